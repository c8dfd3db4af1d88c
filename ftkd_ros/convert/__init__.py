# SPDX-License-Identifier: Apache-2.0
"""Conversion between ROS messages and arrays, for messages of rclpy and of `rosbags`."""
