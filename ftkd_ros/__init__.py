# SPDX-License-Identifier: Apache-2.0
"""ROS 2 nodes and bag tools for the detectors of ftkd_core."""
