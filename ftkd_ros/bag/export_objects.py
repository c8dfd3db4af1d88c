# SPDX-License-Identifier: Apache-2.0
"""Objects of key frames -> nuScenes annotations and instances, with facts that a converted bag has."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.errors import UserError
from ftkd_core.evaluation.stability import PosedFrame, match_frames
from ftkd_core.geometry import invert_rigid, transform_points
from ftkd_core.types import ObjectList
from ftkd_ros.bag.io import BagReader
from ftkd_ros.bag.nuscenes_rows import CATEGORIES, NuscenesRows, Row, link, token_of


class SceneObjects(NamedTuple):
    """Objects in ego, global_from_ego (4, 4) at their stamp, and facts about each object if known."""

    objects: ObjectList
    global_from_ego: NDArray[np.float64]
    facts: Sequence[Mapping[str, Any]] | None


@dataclass(frozen=True)
class BagFacts:
    """What a converted bag has beyond geometry: the scene, and facts about objects by stamp."""

    scene: dict[str, str] = field(default_factory=dict)
    annotations: dict[int, list[dict[str, Any]]] = field(default_factory=dict)


def read_facts(bag: BagReader) -> BagFacts:
    """Read /scene and /ground_truth/annotations; both may be absent. UserError if they are no JSON."""
    scene: dict[str, str] = {}
    annotations: dict[int, list[dict[str, Any]]] = {}
    for topic, _, message in bag.messages(["/scene", "/ground_truth/annotations"], optional=True):
        try:
            content = json.loads(message.data)
            if topic == "/scene":
                scene = {str(key): str(value) for key, value in content.items()}
            else:
                annotations[int(content["stamp_ns"])] = list(content["objects"])
        except (AttributeError, ValueError, KeyError, TypeError):
            if topic != "/scene":  # somebody else's topic may be called /scene
                raise UserError(f"bag {str(bag.path)!r}: {topic} has no annotations") from None
    return BagFacts(scene, annotations)


def add_annotations(
    rows: NuscenesRows, scene: str, samples: Sequence[Row], frames: Sequence[SceneObjects | None]
) -> int:
    """Add annotations and instances of the key frames and return the number of annotations.

    Objects with equal ids are one instance. Detections have no ids: objects that match from key frame to key
    frame by class, velocity and distance (2 m) are one instance.
    """
    names = _instance_names(frames)
    by_instance: dict[str, list[Row]] = {}
    categories: dict[str, str] = {}
    count = 0
    for sample, frame, own in zip(samples, frames, names, strict=True):
        if frame is None:
            continue
        for index, box in enumerate(_global_boxes(frame)):
            fact = dict(frame.facts[index]) if frame.facts and len(frame.facts) == len(own) else {}
            instance = str(fact.get("id") or own[index])
            class_name = CLASS_NAMES[int(frame.objects.labels[index])]
            category = str(fact.get("category") or CATEGORIES[class_name])
            categories.setdefault(instance, rows.category(category))
            by_instance.setdefault(instance, []).append(
                _annotation(
                    rows, scene, sample, instance, box, fact, frame.objects.attributes[index : index + 1]
                )
            )
            count += 1
    for instance, own_rows in by_instance.items():
        link(own_rows)
        rows.tables["sample_annotation"] += own_rows
        rows.add(
            "instance",
            {
                "token": instance,
                "category_token": categories[instance],
                "nbr_annotations": len(own_rows),
                "first_annotation_token": own_rows[0]["token"],
                "last_annotation_token": own_rows[-1]["token"],
            },
        )
    return count


def _annotation(
    rows: NuscenesRows,
    scene: str,
    sample: Row,
    instance: str,
    box: NDArray[np.float64],
    fact: Mapping[str, Any],
    attributes: Sequence[str],
) -> Row:
    attribute = fact.get("attribute") or (attributes[0] if attributes else "")
    known = {row["name"]: row["token"] for row in rows.tables["attribute"]}
    yaw = float(box[6])
    return {
        "token": token_of("sample_annotation", scene, sample["token"], instance),
        "sample_token": sample["token"],
        "instance_token": instance,
        "visibility_token": str(fact.get("visibility") or 4),
        "attribute_tokens": [known[attribute]] if attribute in known else [],
        "translation": box[:3].tolist(),
        "size": box[[4, 3, 5]].tolist(),
        "rotation": [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))],
        # A pre-label counts as seen; the devkit leaves out objects without any point.
        "num_lidar_pts": int(fact.get("num_lidar_pts", 1)),
        "num_radar_pts": int(fact.get("num_radar_pts", 0)),
    }


def _global_boxes(frame: SceneObjects) -> NDArray[np.float64]:
    """Return boxes (M, 9) in the global frame: the inverse of the conversion of annotations to ego."""
    boxes = np.array(frame.objects.boxes)
    ego_from_global = invert_rigid(frame.global_from_ego)
    boxes[:, :3] = transform_points(frame.global_from_ego, boxes[:, :3])
    boxes[:, 6] -= np.arctan2(ego_from_global[1, 0], ego_from_global[0, 0])
    return boxes


def _instance_names(frames: Sequence[SceneObjects | None]) -> list[list[str]]:
    """Return the instance of each object: its id, or that of the object it matches in the frame before."""
    names: list[list[str]] = []
    before: tuple[SceneObjects, list[str]] | None = None
    for number, frame in enumerate(frames):
        if frame is None:
            names.append([])
            continue
        ids = frame.objects.ids or ("",) * len(frame.objects.boxes)
        own = [identity or token_of("instance", number, index) for index, identity in enumerate(ids)]
        if before is not None and not any(ids):
            earlier, known = before
            pairs = match_frames(
                PosedFrame(earlier.objects, earlier.global_from_ego),
                PosedFrame(frame.objects, frame.global_from_ego),
            )
            for old, new in pairs.tolist():
                own[new] = known[old]
        names.append(own)
        before = (frame, own)
    return names
