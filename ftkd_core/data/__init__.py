# SPDX-License-Identifier: Apache-2.0
"""Training data: nuScenes and the synthetic world as clips, streams and windows."""
