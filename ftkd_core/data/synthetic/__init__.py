# SPDX-License-Identifier: Apache-2.0
"""A driving world with ground truth, rendered by the camera and written as a nuScenes dataset."""
