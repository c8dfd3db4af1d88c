# SPDX-License-Identifier: Apache-2.0
"""ROS 2 nodes and tools around ftkd_core."""
