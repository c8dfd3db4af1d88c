# SPDX-License-Identifier: Apache-2.0
"""Official metrics, subset metrics, latency and the detector benchmark."""
