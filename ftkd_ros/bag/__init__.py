# SPDX-License-Identifier: Apache-2.0
"""Rosbag tools: convert, play, record, detect, evaluate, report."""
