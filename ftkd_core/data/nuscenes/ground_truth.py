# SPDX-License-Identifier: Apache-2.0
"""Annotated objects of a nuScenes key frame."""

from typing import Any

import numpy as np
import torch
from nuscenes.eval.detection.utils import category_to_detection_name

from ftkd_core.boxes import BOX_DIM, transform_boxes
from ftkd_core.classes import CLASS_NAMES
from ftkd_core.data.nuscenes.tables import NuScenes, sample_pose, sample_record
from ftkd_core.geometry import invert_rigid, make_transform
from ftkd_core.types import ObjectList


def ground_truth(dataset: NuScenes, sample_token: str, *, min_points: int = 0) -> ObjectList:
    """Return the annotated objects of the ten classes in ego at the key frame's stamp; ids are instance
    tokens.

    Objects with fewer than `min_points` lidar and radar points are left out; the official metrics use 1.
    Velocity is the devkit's finite difference between neighbouring key frames, nan if undefined.
    """
    sample = sample_record(dataset, sample_token)
    boxes, labels, ids = [], [], []
    for token in sample["anns"]:
        annotation = dataset.get("sample_annotation", token)
        name = category_to_detection_name(annotation["category_name"])
        if name is None or annotation["num_lidar_pts"] + annotation["num_radar_pts"] < min_points:
            continue
        boxes.append(_global_box(dataset, annotation))
        labels.append(CLASS_NAMES.index(name))
        ids.append(str(annotation["instance_token"]))
    boxes_global = np.array(boxes, dtype=np.float64).reshape(-1, BOX_DIM)
    ego_from_global = invert_rigid(sample_pose(dataset, sample_token))
    boxes_ego = transform_boxes(torch.from_numpy(ego_from_global), torch.from_numpy(boxes_global))
    return ObjectList(
        boxes=boxes_ego.numpy(),
        scores=np.ones(len(labels)),
        labels=np.array(labels, dtype=np.int64),
        stamp_ns=int(sample["timestamp"]) * 1000,
        ids=tuple(ids),
    )


def annotation_facts(dataset: NuScenes, sample_token: str) -> list[dict[str, Any]]:
    """Return id, category, attribute, visibility and sensor points of the objects of `ground_truth`, in its
    order; attribute is "" without exactly one, visibility is None if unknown."""
    facts = []
    for token in sample_record(dataset, sample_token)["anns"]:
        annotation = dataset.get("sample_annotation", token)
        if category_to_detection_name(annotation["category_name"]) is None:
            continue
        names = [str(dataset.get("attribute", key)["name"]) for key in annotation["attribute_tokens"]]
        visibility = str(annotation["visibility_token"] or "")
        facts.append(
            {
                "id": str(annotation["instance_token"]),
                "category": str(annotation["category_name"]),
                "attribute": names[0] if len(names) == 1 else "",
                "visibility": int(visibility) if visibility.isdigit() else None,
                "num_lidar_pts": int(annotation["num_lidar_pts"]),
                "num_radar_pts": int(annotation["num_radar_pts"]),
            }
        )
    return facts


def _global_box(dataset: NuScenes, annotation: dict[str, Any]) -> list[float]:
    """Convert an annotation (width, length, height, quaternion) to the box format of `ftkd_core.boxes`, in
    global."""
    width, length, height = annotation["size"]
    rotation = make_transform(annotation["rotation"])
    yaw = float(np.arctan2(rotation[1, 0], rotation[0, 0]))
    velocity = dataset.box_velocity(annotation["token"])[:2]
    return [*annotation["translation"], length, width, height, yaw, *velocity]
