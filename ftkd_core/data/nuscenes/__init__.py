# SPDX-License-Identifier: Apache-2.0
"""nuScenes data as rounds of cameras, ground truth in ego, and times in nanoseconds.

All data is read through the tables of the official devkit; its box format, quaternions and microseconds are
converted here. The same functions read real nuScenes and the synthetic world, which is exported in the same
format. A *key frame* (nuScenes "sample", 2 Hz) has annotations; a *sweep round* is one round of cameras with
or without annotations (12 Hz).
"""

from ftkd_core.data.nuscenes.cameras import (
    CameraRecord,
    SweepRound,
    camera_records,
    camera_round,
    ego_poses,
    load_sweep_round,
    load_view,
    read_image,
    sensor_poses,
    sweep_rounds,
)
from ftkd_core.data.nuscenes.ground_truth import ground_truth
from ftkd_core.data.nuscenes.tables import (
    LIDAR_CHANNEL,
    TABLE_NAMES,
    NuScenes,
    find_tables,
    open_dataset,
    sample_pose,
    sample_stamp_ns,
    scene_names,
    scene_samples,
    split_scenes,
)

__all__ = [
    "LIDAR_CHANNEL",
    "TABLE_NAMES",
    "CameraRecord",
    "NuScenes",
    "SweepRound",
    "camera_records",
    "camera_round",
    "ego_poses",
    "find_tables",
    "ground_truth",
    "load_sweep_round",
    "load_view",
    "open_dataset",
    "read_image",
    "sample_pose",
    "sample_stamp_ns",
    "scene_names",
    "scene_samples",
    "sensor_poses",
    "split_scenes",
    "sweep_rounds",
]
