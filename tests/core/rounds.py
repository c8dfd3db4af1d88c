# SPDX-License-Identifier: Apache-2.0
"""Seeded rounds of cameras and small detectors for tests of the runtime."""

import dataclasses

import numpy as np
import torch

from ftkd_core.geometry import yaw_transform
from ftkd_core.runtime.detector import Detector
from ftkd_core.runtime.fast import FastEngine
from ftkd_core.runtime.thresholds import ScoreThreshold
from ftkd_core.types import CameraRound, CameraView
from tests.core.helpers import camera_ring, small_model

CPU = torch.device("cpu")


def make_round(
    index: int = 0, size: tuple[int, int] = (192, 108), missing: int | None = None, cameras: int = 6
) -> CameraRound:
    """Make round `index` of a drive at 2 Hz, with random images of `size` (width, height)."""
    random = np.random.default_rng(index)
    pose = yaw_transform(0.1 * index, (1000 + 3.0 * index, -500, 0))
    views: list[CameraView | None] = []
    for camera in range(cameras):
        view = CameraView(
            image=random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8),
            intrinsics=np.array([[160.0, 0, size[0] / 2], [0, 160.0, size[1] / 2], [0, 0, 1]]),
            ego_from_camera=camera_ring(cameras)[0, camera].double().numpy(),
            global_from_ego=pose,
            stamp_ns=1_500_000_000_000_000_000 + 500_000_000 * index,
        )
        views.append(None if camera == missing else view)
    return CameraRound(
        views=tuple(views),
        reference_stamp_ns=1_500_000_000_000_000_000 + 500_000_000 * index,
        global_from_ego=pose,
    )


def far_away(camera_round: CameraRound, index: int) -> CameraRound:
    """The round of a vehicle that turns and climbs, tens of kilometres from the origin of its map."""
    pose = yaw_transform(
        0.07 * index, (41_000.0 + 4.0 * index, -23_000.0 + 0.8 * index, 300.0 + 0.05 * index)
    )
    moved = tuple(
        None if view is None else dataclasses.replace(view, global_from_ego=pose)
        for view in camera_round.views
    )
    return dataclasses.replace(camera_round, views=moved, global_from_ego=pose)


def turn_camera(camera_round: CameraRound) -> CameraRound:
    """Return the round with its first camera rotated by 0.1 rad about z."""
    view = camera_round.views[0]
    assert view is not None
    knocked = dataclasses.replace(view, ego_from_camera=yaw_transform(0.1) @ view.ego_from_camera)
    return dataclasses.replace(camera_round, views=(knocked, *camera_round.views[1:]))


def make_detector(threshold: ScoreThreshold = 0.0, runtime: str = "fast") -> Detector:
    """Make a detector of the small model."""
    return Detector(
        small_model(),
        weights_name="small",
        device=CPU,
        score_threshold=threshold,
        max_detections=50,
        runtime=runtime,
    )


def fast_detector(**arguments: object) -> Detector:
    """Make a detector of the small model whose fast engine has these arguments."""
    detector = make_detector(runtime="plain")
    detector.engine = FastEngine(detector.model, CPU, 50, **arguments)  # type: ignore[arg-type]
    return detector
