# SPDX-License-Identifier: Apache-2.0
"""Synthetic driving world: scenes, camera images, lidar sweeps, and export in the nuScenes format."""
