# SPDX-License-Identifier: Apache-2.0
"""Preprocessing of camera images to network input: scale, crop, normalise; and the matching intrinsics.

Symbols: N cameras, H/W network size.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftkd_core.config import TOKEN_STRIDE, ImageConfig
from ftkd_core.errors import UserError
from ftkd_core.geometry import invert_rigid, is_rigid
from ftkd_core.types import CameraRig, CameraRound, CameraView, Frame

IMAGE_MEAN: Final = (123.675, 116.28, 103.53)
"""ImageNet's mean per RGB channel, 0..255, which images are normalised with [public code]."""
IMAGE_STD: Final = (58.395, 57.12, 57.375)
"""ImageNet's standard deviation per RGB channel, 0..255 [public code]."""


def crop_top(image: ImageConfig, width: int, height: int) -> int:
    """Return the rows to cut from the top after a width x height camera image is scaled to the network's
    width (negative: padding)."""
    return round(height * image.width / width) - image.height


def resize_and_crop(image: NDArray[np.uint8], config: ImageConfig) -> NDArray[np.uint8]:
    """Convert a camera image (h, w, 3) uint8 to a network image (H, W, 3) uint8: area-averaged if it shrinks,
    top rows cut.

    An image that is too flat is padded with black rows on top. The filter is the same as in training. Rows
    that are cut are not scaled, up to the last common row border of the two images; the pixels equal those of
    scaling the whole image.
    """
    height, width = image.shape[:2]
    scaled_height = round(height * config.width / width)
    if (scaled_height, config.width) != (height, width):
        if scaled_height > config.height and config.width < width:
            # Blocks of rows whose borders map to row borders of the scaled image.
            blocks = math.gcd(height, scaled_height)
            skipped = (scaled_height - config.height) * blocks // scaled_height
            image = image[skipped * (height // blocks) :]
            scaled_height -= skipped * (scaled_height // blocks)
        filter_ = cv2.INTER_AREA if config.width < width else cv2.INTER_LINEAR
        image = cv2.resize(image, (config.width, scaled_height), interpolation=filter_)  # type: ignore[assignment]
    cut = scaled_height - config.height
    if cut < 0:
        return np.pad(image, ((-cut, 0), (0, 0), (0, 0)))
    return image[cut:]


def zoom_and_crop(
    image: NDArray[np.uint8], config: ImageConfig, zoom: float, left: float
) -> NDArray[np.uint8]:
    """Return the network image (H, W, 3) of a camera image drawn `zoom` times as large.

    Of the surplus width, the fraction `left` (0..1) is cut at the left and the rest at the right; surplus
    rows are cut at the top. Missing pixels are black, on top and at the right (as in StreamPETR's resize and
    crop). zoom 1 equals `resize_and_crop`.
    """
    height, width = image.shape[:2]
    size = (round(config.width * zoom), round(height * config.width / width * zoom))
    filter_ = cv2.INTER_AREA if size[0] < width else cv2.INTER_LINEAR
    scaled = np.asarray(cv2.resize(image, size, interpolation=filter_), dtype=np.uint8)
    start = _cut_left(size[0], config, left)
    scaled = scaled[max(size[1] - config.height, 0) :, start : start + config.width]
    missing = (config.height - scaled.shape[0], config.width - scaled.shape[1])
    return np.pad(scaled, ((missing[0], 0), (0, missing[1]), (0, 0)))


def zoomed_intrinsics(
    intrinsics: NDArray[Any], config: ImageConfig, zoom: float, left: float
) -> NDArray[np.float64]:
    """Return the intrinsics (..., 3, 3) of network images after `zoom_and_crop`; the bottom row of the image
    stays at the bottom."""
    result = np.array(intrinsics, dtype=np.float64)
    result[..., :2, :] *= zoom
    result[..., 0, 2] -= _cut_left(round(config.width * zoom), config, left)
    result[..., 1, 2] += config.height - zoom * config.height
    return result


def _cut_left(width: int, config: ImageConfig, left: float) -> int:
    return round(left * max(width - config.width, 0))


def network_intrinsics(
    intrinsics: NDArray[Any], config: ImageConfig, width: int, height: int
) -> NDArray[np.float64]:
    """Return the intrinsics (3, 3) of the network image of a width x height camera image; pixel centres lie
    at .5."""
    result = np.array(intrinsics, dtype=np.float64)
    scaled_height = round(height * config.width / width)
    result[0] *= config.width / width
    result[1] *= scaled_height / height
    result[1, 2] -= scaled_height - config.height
    return result


def normalise(images: Tensor) -> Tensor:
    """Convert uint8 images (..., H, W, 3) to float32 (..., 3, H, W), (x - mean) / std per RGB channel, on the
    images' device."""
    mean = torch.tensor(IMAGE_MEAN, device=images.device)
    std = torch.tensor(IMAGE_STD, device=images.device)
    return ((images.float() - mean) / std).movedim(-1, -3)


def check_view(view: CameraView, channel: str) -> None:
    """Raise UserError with camera and value if an image or its calibration cannot be used."""
    if (
        view.image.ndim != 3
        or view.image.shape[2] != 3
        or view.image.dtype != np.uint8
        or 0 in view.image.shape
    ):
        raise UserError(
            f"{channel}: image of shape {view.image.shape} {view.image.dtype}; expected (h, w, 3) uint8"
        )
    k = view.intrinsics
    if k.shape != (3, 3) or not np.all(np.isfinite(k)) or k[0, 0] <= 0 or k[1, 1] <= 0:
        raise UserError(
            f"{channel}: intrinsics {k.tolist()}; expected a finite 3x3 matrix with positive focal lengths"
        )
    for name, matrix in (
        ("ego_from_camera", view.ego_from_camera),
        ("global_from_ego", view.global_from_ego),
    ):
        if not is_rigid(matrix):
            raise UserError(f"{channel}: {name} is not a rigid transform: {matrix.tolist()}")


def stack_images(views: Sequence[CameraView | None], config: ImageConfig) -> NDArray[np.uint8]:
    """Return the network images (N, H, W, 3) uint8 of a round; a missing camera is black."""
    images = np.zeros((len(views), config.height, config.width, 3), dtype=np.uint8)
    for index, view in enumerate(views):
        if view is not None:
            images[index] = _network_image(view, config)
    return images


def _network_image(view: CameraView, config: ImageConfig) -> NDArray[np.uint8]:
    if view.remap is not None:
        return view.remap(view.image)
    for prepared in view.prepared:
        if prepared.remap is None and prepared.image.shape == (config.height, config.width, 3):
            return prepared.image
    return resize_and_crop(view.image, config)


def token_grid(config: ImageConfig) -> tuple[int, int]:
    """Return the rows and columns of the tokens of a network image."""
    return config.height // TOKEN_STRIDE, config.width // TOKEN_STRIDE


def visible_tokens(camera_round: CameraRound, config: ImageConfig) -> NDArray[np.bool_] | None:
    """Return the tokens (L,) of which the cameras see at least half, camera by camera; None if they see
    all."""
    if all(view is None or view.visible is None for view in camera_round.views):
        return None
    everything = np.ones(token_grid(config), dtype=np.float32)
    shares = [
        v.visible if v is not None and v.visible is not None else everything for v in camera_round.views
    ]
    return np.asarray(np.stack(shares).reshape(-1) >= 0.5)


def round_rig(camera_round: CameraRound, config: ImageConfig, channels: Sequence[str]) -> CameraRig:
    """Return the rig (batch of 1) of a round: each camera from its own exposure, through the global frame, to
    ego at the reference stamp.

    A missing camera has mask False and a placeholder calibration that looks forward. UserError for a wrong
    number of cameras or invalid calibration.
    """
    if len(camera_round.views) != len(channels):
        raise UserError(f"round of {len(camera_round.views)} cameras; the detector expects {len(channels)}")
    intrinsics = np.tile(np.eye(3), (len(channels), 1, 1))
    intrinsics[:, :2] *= config.width
    ego_from_camera = np.tile(np.eye(4), (len(channels), 1, 1))
    mask = np.zeros(len(channels), dtype=bool)
    ego_from_global = invert_rigid(camera_round.global_from_ego)
    for index, (view, channel) in enumerate(zip(camera_round.views, channels, strict=True)):
        if view is None:
            continue
        check_view(view, channel)
        width, height = view.size
        intrinsics[index] = network_intrinsics(view.intrinsics, config, width, height)
        ego_from_camera[index] = ego_from_global @ view.global_from_ego @ view.ego_from_camera
        mask[index] = True
    return CameraRig(
        torch.from_numpy(intrinsics).float()[None],
        torch.from_numpy(ego_from_camera).float()[None],
        torch.from_numpy(mask)[None],
    )


def round_to_frame(
    camera_round: CameraRound,
    config: ImageConfig,
    channels: Sequence[str],
    *,
    time_s: float,
    is_first: bool,
    device: torch.device,
) -> Frame:
    """Return the network input (batch of 1) of a round; time_s is relative to the stream."""
    rig = round_rig(camera_round, config, channels)
    images = torch.from_numpy(stack_images(camera_round.views, config)).to(device)
    return Frame(
        normalise(images)[None],
        CameraRig(*(value.to(device) for value in rig)),
        torch.from_numpy(np.asarray(camera_round.global_from_ego, dtype=np.float64))[None].to(device),
        torch.tensor([time_s], dtype=torch.float64, device=device),
        torch.tensor([is_first], device=device),
    )
