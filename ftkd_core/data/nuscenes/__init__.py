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
    camera_channels,
    camera_records,
    camera_round,
    ego_poses,
    load_sweep_round,
    load_view,
    sensor_poses,
    sweep_rounds,
)
from ftkd_core.data.nuscenes.categories import CATEGORY_MAP_NAME, parse_category_map
from ftkd_core.data.nuscenes.ground_truth import annotation_facts, ground_truth
from ftkd_core.data.nuscenes.image_files import faults_text, find_faults, read_image
from ftkd_core.data.nuscenes.sensors import (
    SensorFile,
    can_messages,
    channels_of,
    map_mask,
    scene_facts,
    sensor_files,
)
from ftkd_core.data.nuscenes.tables import (
    LIDAR_CHANNEL,
    TABLE_NAMES,
    Dataset,
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
    "CATEGORY_MAP_NAME",
    "LIDAR_CHANNEL",
    "TABLE_NAMES",
    "CameraRecord",
    "Dataset",
    "NuScenes",
    "SensorFile",
    "SweepRound",
    "annotation_facts",
    "camera_channels",
    "camera_records",
    "camera_round",
    "can_messages",
    "channels_of",
    "ego_poses",
    "faults_text",
    "find_faults",
    "find_tables",
    "ground_truth",
    "load_sweep_round",
    "load_view",
    "map_mask",
    "open_dataset",
    "parse_category_map",
    "read_image",
    "sample_pose",
    "sample_stamp_ns",
    "scene_facts",
    "scene_names",
    "scene_samples",
    "sensor_files",
    "sensor_poses",
    "split_scenes",
    "sweep_rounds",
]
