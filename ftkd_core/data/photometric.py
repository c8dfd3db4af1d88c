# SPDX-License-Identifier: Apache-2.0
"""Photometric distortion of single images, as SparseBEV's code applies it to every image of a window."""

import cv2
import numpy as np
from numpy.typing import NDArray


def distort(image: NDArray[np.uint8], strength: float, random: np.random.Generator) -> NDArray[np.uint8]:
    """Return an RGB image (H, W, 3) with changed colours. Each change has probability one half.

    With strength 0.5 [code]: brightness by up to 32 of 255, contrast and saturation by a factor of 0.5 to
    1.5, hue by up to 18 of 360 degrees, and a random order of the channels. Contrast changes before or after
    saturation and hue.
    """
    values = image.astype(np.float32) / 255
    if random.random() < 0.5:
        values += np.float32(random.uniform(-64, 64) * strength / 255)
    contrast = np.float32(1 + random.uniform(-1, 1) * strength)
    early, late = random.random() < 0.5, random.random() < 0.5
    if late and early:
        values *= contrast
    values = _change_hue(values, strength, random)
    if late and not early:
        values *= contrast
    if random.random() < 0.5:
        values = values[..., random.permutation(3)]
    changed: NDArray[np.uint8] = np.clip(values * 255, 0, 255).astype(np.uint8)
    return changed


def _change_hue(
    values: NDArray[np.float32], strength: float, random: np.random.Generator
) -> NDArray[np.float32]:
    """Change saturation and hue of an image (H, W, 3) with values around 0 to 1, each with probability one
    half."""
    saturation = 1 + random.uniform(-1, 1) * strength if random.random() < 0.5 else 1.0
    hue = random.uniform(-36, 36) * strength if random.random() < 0.5 else 0.0
    if saturation == 1.0 and hue == 0.0:
        return values
    hsv = cv2.cvtColor(np.ascontiguousarray(values), cv2.COLOR_RGB2HSV)  # hue 0..360, saturation 0..1
    hsv[..., 1] = np.clip(hsv[..., 1] * np.float32(saturation), 0, 1)
    hsv[..., 0] = (hsv[..., 0] + np.float32(hue)) % 360
    changed: NDArray[np.float32] = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), dtype=np.float32)
    return changed
