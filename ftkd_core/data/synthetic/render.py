# SPDX-License-Identifier: Apache-2.0
"""Camera images of a scene: ground and sky, solid bodies in exact back-to-front order, and sensor noise."""

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.data.synthetic.backdrop import paint_backdrop
from ftkd_core.data.synthetic.lens_image import render_through_lens
from ftkd_core.data.synthetic.painter import BodyPainter, bodies_at
from ftkd_core.data.synthetic.rig import SurroundRig
from ftkd_core.data.synthetic.world import Scene
from ftkd_core.geometry import yaw_transform

Image = NDArray[np.uint8]
Counts = NDArray[np.float64]


class Rendering(NamedTuple):
    """Image (H, W, 3) uint8 RGB, and for each actor in the order of `Scene.actors_at` the visible pixels (M,)
    of its silhouette and the total pixels (M,) of the silhouette without occlusion."""

    image: NDArray[np.uint8]
    visible_pixels: NDArray[np.float64]
    total_pixels: NDArray[np.float64]


def render_camera(
    scene: Scene, time_s: float, rig: SurroundRig, camera: int, noise_seed: int | None = None
) -> Rendering:
    """Render one camera at a scene time. The result is deterministic: scene, camera and time seed the noise
    unless noise_seed is given."""
    x, y, yaw, _ = scene.ego.at(time_s)
    local_from_ego = yaw_transform(yaw, (x, y, 0.0))
    bodies = bodies_at(scene, time_s)

    def paint(pinholes: SurroundRig, index: int = 0) -> tuple[Image, Counts, Counts]:
        image = paint_backdrop(scene, pinholes, index, local_from_ego)
        local_from_camera = local_from_ego @ pinholes.ego_from_camera[index]
        painter = BodyPainter(image, scene, pinholes.intrinsics[index], local_from_camera, yaw)
        return (image, *painter.paint(bodies))

    if rig.lens(camera) is None:
        image, visible, total = paint(rig, camera)
    else:
        image, visible, total = render_through_lens(rig, camera, paint)
    if noise_seed is None:
        noise_seed = hash((scene.seed, camera, round(time_s * 1e6))) & 0x7FFFFFFF
    _add_noise(image, noise_seed, scene.night)
    return Rendering(image, visible, total)


@lru_cache(maxsize=1)
def _noise_bank() -> NDArray[np.uint8]:
    noise = np.random.default_rng(5).normal(128, 4.0, (1200, 2000, 3))
    return np.clip(noise, 0, 255).astype(np.uint8)


def _add_noise(image: NDArray[np.uint8], seed: int, night: bool) -> None:
    """Add sensor noise in place: a window of a fixed noise image, chosen by the seed; stronger at night."""
    bank = _noise_bank()
    height, width = image.shape[:2]
    random = np.random.default_rng(seed)
    if height > bank.shape[0] or width > bank.shape[1]:
        bank = np.tile(bank, (height // bank.shape[0] + 1, width // bank.shape[1] + 1, 1))
    row = int(random.integers(bank.shape[0] - height + 1))
    column = int(random.integers(bank.shape[1] - width + 1))
    gain = 1.6 if night else 1.0
    cv2.addWeighted(
        image, 1.0, bank[row : row + height, column : column + width], gain, -128.0 * gain, dst=image
    )
