# SPDX-License-Identifier: Apache-2.0
"""Build windows on the training device from scenes in its memory, so that no loader runs.

A loader of nine frames of six cameras per window needs several processes. A few gigabytes of device memory
hold a hundred scenes at 352x128 instead. A prepared scene is a folder of `images.npy` and `geometry.npz`.
Symbols: F frames, N cameras, G object slots, B windows, T frames of a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ftkd_core.config import ImageConfig
from ftkd_core.data.augmentation import Augmentation, AugmentConfig, draw_augmentation
from ftkd_core.data.clips import Clip, augment_boxes
from ftkd_core.data.synthetic_clips import render_clip
from ftkd_core.data.targets import make_targets
from ftkd_core.data.windows import WindowBatch, window_order
from ftkd_core.errors import UserError
from ftkd_core.geometry import invert_rigid, yaw_transform
from ftkd_core.types import CameraRig, Targets

Array = NDArray[np.float64]
_RANGE_M: Final = 61.2  # as `make_targets`
_ROTATED_RANGE_M: Final = 90.0  # distance of the corners of the range
_GEOMETRY: Final = ("intrinsics", "ego_from_camera", "global_from_ego", "times")


def prepare_scene(seed: int, image: ImageConfig, folder: Path, duration_s: float, world: str) -> Path:
    """Render the scene of a seed and write it with the targets of all frames; return its folder."""
    path = folder / f"seed-{seed:07d}"
    partial = path.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)
    clip = render_clip(seed, image, duration_s, world=world)
    np.save(partial / "images.npy", np.asarray(clip.images))
    np.savez(partial / "geometry.npz", **_geometry(clip))
    partial.rename(path)
    return path


def _geometry(clip: Clip) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of a clip: poses, and targets (F, G, ...) without range limit, padded to G slots."""
    size, present = clip.images.shape[2:4], np.ones(len(clip.intrinsics), dtype=bool)
    frames = [
        make_targets(
            objects.boxes, objects, clip.intrinsics, clip.ego_from_camera[index], present,
            (size[0], size[1]), range_m=_ROTATED_RANGE_M,
        )
        for index, objects in enumerate(clip.objects)
    ]  # fmt: skip
    slots = max(1, *(frame.labels.shape[1] for frame in frames))
    arrays: dict[str, NDArray[np.generic]] = {name: getattr(clip, name) for name in _GEOMETRY}
    for name in Targets._fields:
        arrays[name] = np.stack([_padded(getattr(frame, name)[0].numpy(), name, slots) for frame in frames])
    return arrays


def _padded(values: NDArray[np.generic], name: str, slots: int) -> NDArray[np.generic]:
    """Pad values of objects to `slots` objects; padding boxes have size 1 (`types.pad_targets`)."""
    axis = _slot_axis(name)
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, slots - values.shape[axis])
    return np.pad(values, widths, constant_values=1 if name == "boxes" else 0)


def _slot_axis(name: str) -> int:
    return 0 if name in ("boxes", "labels", "mask") else 1


@dataclass(frozen=True)
class _Scene:
    """A prepared scene: images (F, N, H, W, 3) on the device, arrays on the CPU."""

    images: Tensor
    arrays: dict[str, NDArray[np.generic]]


def read_scenes(folders: Sequence[Path], device: torch.device) -> list[_Scene]:
    """Return prepared scenes with their images on a device and equal numbers of object slots."""
    scenes = []
    for folder in folders:
        with np.load(folder / "geometry.npz") as file:
            arrays = {name: file[name] for name in file.files}
        scenes.append(_Scene(torch.from_numpy(np.load(folder / "images.npy")).to(device), arrays))
    slots = max(scene.arrays["labels"].shape[1] for scene in scenes)
    for scene in scenes:
        for name in Targets._fields:
            frames = [_padded(frame, name, slots) for frame in scene.arrays[name]]
            scene.arrays[name] = np.stack(frames)
    return scenes


class DeviceWindows(Dataset[WindowBatch]):
    """Item `step` is a batch of random windows on the device, a function of (seed, step). The future of a
    window is hidden with probability `hide_future`. Raise UserError for zoom, scale or camera_dropout, which
    it does not implement."""

    def __init__(
        self, scenes: Sequence[_Scene], *, batch: int, num_past: int, num_future: int, augment: AugmentConfig,
        seed: int, hide_future: float = 0.0,
    ) -> None:  # fmt: skip
        if augment.zoom != (1.0, 1.0) or augment.scale or augment.camera_dropout or augment.as_published:
            raise UserError(
                "device windows: expected augment.zoom 1, augment.scale and camera_dropout 0, and no "
                "augment.as_published"
            )
        self.scenes, self.batch = scenes, batch
        self.num_past, self.num_future = num_past, num_future
        self.augment, self.seed, self.hide_future = augment, seed, hide_future

    def __getitem__(self, step: int) -> WindowBatch:
        random = np.random.default_rng([self.seed, step])
        windows = []
        for _ in range(self.batch):
            scene = self.scenes[int(random.integers(len(self.scenes)))]
            index = int(random.integers(len(scene.images)))
            change = draw_augmentation(self.augment, random)
            windows.append((scene, index, change, bool(random.random() < self.hide_future)))
        return self.build(windows)

    def build(self, windows: Sequence[tuple[_Scene, int, Augmentation, bool]]) -> WindowBatch:
        """Return the batch of windows: scene, current frame, augmentation, whether the future is hidden."""
        device = windows[0][0].images.device
        orders = [self._order(len(scene.images), index, hidden) for scene, index, _, hidden in windows]
        views, geometry = [], []
        for (scene, _index, change, _), (order, _real) in zip(windows, orders, strict=True):
            views += [scene.images[frame] for frame in order]
            geometry.append(_window_geometry(scene, order, change))
        shape = (len(windows), len(orders[0][0]))
        images = torch.unflatten(torch.stack(views), 0, shape)
        columns = [np.stack(values) for values in zip(*geometry, strict=True)]
        intrinsics, extrinsics, time, *rest = (_upload(values, device) for values in columns)
        rig = CameraRig(intrinsics, extrinsics, torch.ones_like(intrinsics[..., 0, 0], dtype=torch.bool))
        real = _upload(np.array([real for _, real in orders]), device)
        return WindowBatch(
            _augmented(images, [change for _, _, change, _ in windows]), rig, time, real, Targets(*rest)
        )

    def _order(self, length: int, index: int, hidden: bool) -> tuple[list[int], list[bool]]:
        order, real = window_order(index, length, self.num_past, self.num_future)
        if hidden:
            first = 1 + self.num_past
            order[first:], real[first:] = [index] * self.num_future, [False] * self.num_future
        return order, real


def _window_geometry(
    scene: _Scene, order: Sequence[int], change: Augmentation
) -> tuple[NDArray[np.generic], ...]:
    """Return intrinsics (T, N, 3, 3), extrinsics (T, N, 4, 4), times (T,) and the targets of the current
    frame in the order of `Targets`."""
    arrays = scene.arrays
    poses = np.asarray(arrays["global_from_ego"], dtype=np.float64)
    mirror = -1.0 if change.mirror else 1.0
    new_from_ego = yaw_transform(change.angle) @ np.diag([1.0, mirror, 1.0, 1.0])
    moved = new_from_ego @ invert_rigid(poses[order[0]]) @ poses[list(order)]  # (T, 4, 4)
    cameras = np.asarray(arrays["ego_from_camera"], dtype=np.float64)[list(order)]
    extrinsics = moved[:, None] @ cameras @ np.diag([mirror, 1.0, 1.0, 1.0])
    width = scene.images.shape[3]
    intrinsics = np.array(arrays["intrinsics"], dtype=np.float64)
    if change.mirror:
        intrinsics[:, 0, 2] = width - intrinsics[:, 0, 2]
    times = np.asarray(arrays["times"], dtype=np.float64)[list(order)]
    rows = (np.broadcast_to(intrinsics, (len(order), *intrinsics.shape)), extrinsics, times - times[0])
    return (
        *(row.astype(np.float32) for row in rows),
        *_targets(arrays, order[0], change, new_from_ego, width),
    )


def _targets(
    arrays: dict[str, NDArray[np.generic]], frame: int, change: Augmentation, new_from_ego: Array, width: int
) -> tuple[NDArray[np.generic], ...]:
    """Return the targets (G, ...) of a frame, mirrored and rotated."""
    old = Targets(*(arrays[name][frame] for name in Targets._fields))
    boxes = augment_boxes(np.asarray(old.boxes), new_from_ego, change)
    near = np.abs(boxes[:, :2]).max(axis=1) < _RANGE_M
    boxes_2d, centers = np.array(old.boxes_2d), np.array(old.centers_2d)
    if change.mirror:
        boxes_2d[..., [0, 2]] = width - boxes_2d[..., [2, 0]]
        centers[..., 0] = width - centers[..., 0]
    mask, mask_2d = np.asarray(old.mask) & near, np.asarray(old.mask_2d) & near
    return (
        boxes.astype(np.float32), np.asarray(old.labels), mask, boxes_2d, centers, np.asarray(old.depths),
        mask_2d,
    )  # fmt: skip


def _augmented(images: Tensor, changes: Sequence[Augmentation]) -> Tensor:
    """Return images (B, T, N, H, W, 3) uint8, mirrored and with changed colours per window."""
    device, shape = images.device, (len(changes), 1, 1, 1, 1, -1)
    mirrored = [change.mirror for change in changes]
    if any(mirrored):
        chosen = _upload(np.array(mirrored), device).view(shape)
        images = torch.where(chosen, images.flip(-2), images)
    if all(change.gain == (1.0, 1.0, 1.0) and change.offset == 0.0 for change in changes):
        return images
    gain = _upload(np.array([change.gain for change in changes], dtype=np.float32), device).view(shape)
    offset = _upload(np.array([change.offset for change in changes], dtype=np.float32), device).view(shape)
    return (images * gain).add_(offset).clamp_(0, 255).to(torch.uint8)


def _upload(values: NDArray[np.generic], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
