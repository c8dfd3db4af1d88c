# SPDX-License-Identifier: Apache-2.0
"""One key frame of a scene: six images, poses, and ground truth with visibility."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftkd_core.data.synthetic.actors import ActorStates
from ftkd_core.data.synthetic.lidar import lidar_hits
from ftkd_core.data.synthetic.render import render_camera
from ftkd_core.data.synthetic.rig import LIDAR_OFFSET_S, SurroundRig
from ftkd_core.data.synthetic.world import Scene


class SceneFrame(NamedTuple):
    """Key frame: images (N, H, W, 3) uint8; global_from_ego_at_exposure (N, 4, 4) and exposure_s (N,) of each
    camera; global_from_ego (4, 4) and actors at the key frame's time; visible_fraction (M,) over all cameras;
    lidar_points (M,)."""

    images: NDArray[np.uint8]
    global_from_ego_at_exposure: NDArray[np.float64]
    exposure_s: NDArray[np.float64]
    global_from_ego: NDArray[np.float64]
    actors: ActorStates
    visible_fraction: NDArray[np.float64]
    lidar_points: NDArray[np.int64]


def render_frame(scene: Scene, key_time_s: float, rig: SurroundRig) -> SceneFrame:
    """Render the key frame stamped key_time_s, the end of its lidar sweep; the exposure offset of each camera
    counts from the start of the sweep."""
    exposure = rig.exposures_s(key_time_s - LIDAR_OFFSET_S)
    renderings = [render_camera(scene, float(time), rig, camera) for camera, time in enumerate(exposure)]
    visible = np.sum([rendering.visible_pixels for rendering in renderings], axis=0)
    total = np.sum([rendering.total_pixels for rendering in renderings], axis=0)
    return SceneFrame(
        images=np.stack([rendering.image for rendering in renderings]),
        global_from_ego_at_exposure=np.stack([scene.ego_pose(float(time)) for time in exposure]),
        exposure_s=exposure,
        global_from_ego=scene.ego_pose(key_time_s),
        actors=scene.actors_at(key_time_s),
        visible_fraction=np.where(total > 0, visible / np.maximum(total, 1e-9), 0.0),
        lidar_points=lidar_hits(scene, key_time_s),
    )
