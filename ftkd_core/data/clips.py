# SPDX-License-Identifier: Apache-2.0
"""Clips for training: sampling, augmentation and batching of frame sequences.

A clip holds the key frames of one scene at network resolution. `StreamDataset` cuts clips into segments and
returns, for each step, one frame of each of B parallel streams. The result depends only on (seed, step), so a
killed run resumes exactly and worker processes need no state. Symbols: T frames, N cameras, H/W network size,
M objects, G object slots, B streams.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ftkd_core.config import TOKEN_STRIDE, ImageConfig
from ftkd_core.data.augmentation import Augmentation, AugmentConfig, draw_augmentation, in_view
from ftkd_core.data.order import EpochOrder
from ftkd_core.data.photometric import distort
from ftkd_core.data.targets import ClipObjects, make_targets
from ftkd_core.geometry import transform_points, yaw_transform
from ftkd_core.runtime.preprocess import token_grid, zoom_and_crop, zoomed_intrinsics
from ftkd_core.types import CameraRig, Frame, Targets, pad_targets

Array = NDArray[Any]


class ImageSource(Protocol):
    """Images of a clip, read frame by frame."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (T, N, H, W, 3)."""

    def __getitem__(self, frame: int, /) -> NDArray[np.uint8]:
        """Read the images (N, H, W, 3) of a frame."""

    def zoomed(self, frame: int, zoom: float, left: float) -> NDArray[np.uint8]:
        """Read the images of a frame with zoom and crop as in `preprocess.zoom_and_crop`."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One scene: images (T, N, H, W, 3) uint8, as an array or read per frame; intrinsics (N, 3, 3) in network
    pixels; ego_from_camera (T, N, 4, 4) from the camera at its exposure to ego at the key frame's time;
    global_from_ego (T, 4, 4); times (T,) seconds; objects, one entry per frame.

    present (N,) bool: cameras that the rig has, None if it has all. seen_tokens (N, H/16, W/16) bool: tokens
    that the cameras see, None if they see all. keys: indices of the T frames that are key frames, if not all
    are; the others have no objects. features (T, N, C, h, w): cached outputs of a frozen backbone, used
    instead of images if present. blank (C, h, w): its output for a black image.
    """

    name: str
    images: NDArray[np.uint8] | ImageSource
    intrinsics: Array
    ego_from_camera: Array
    global_from_ego: Array
    times: Array
    objects: tuple[ClipObjects, ...]
    present: NDArray[np.bool_] | None = None
    seen_tokens: NDArray[np.bool_] | None = None
    features: Array | None = None
    blank: Array | None = None
    keys: NDArray[np.int64] | None = None

    @property
    def num_keys(self) -> int:
        """Number of key frames."""
        return len(self.times) if self.keys is None else len(self.keys)


class ClipSource(Protocol):
    """Clips by index."""

    @property
    def name(self) -> str:
        """Name that identifies the clips in caches derived from them."""

    def __call__(self, index: int, /) -> Clip:
        """Load clip `index`."""


class StreamBatch(NamedTuple):
    """Batch of frames: images (B, N, H, W, 3) uint8, the other inputs of `Frame`, targets, and the tokens
    (B, L) bool that the cameras see."""

    images: Tensor
    rig: CameraRig
    global_from_ego: Tensor
    time: Tensor
    is_first: Tensor
    targets: Targets
    visible: Tensor

    def frame(self, images: Tensor) -> Frame:
        """Return the network's input for normalised images (B, N, 3, H, W)."""
        return Frame(images, self.rig, self.global_from_ego, self.time, self.is_first)


class StreamDataset(Dataset[StreamBatch]):
    """Batches of parallel streams; item `step` is frame `step mod segment` of each of B streams, each in its
    own segment.

    load(index) loads one of num_clips clips and is cached. Streams are staggered by default, so that they do
    not all start at the same step. In a distributed run each rank serves its own part of all_streams
    (default: the streams of this data set). A segment is a random one of a random clip or, with `order`, the
    next one in that order that no other stream uses. Segment 0 takes halves of scenes, of any length, in that
    order; all streams then start at step 0. Raises ValueError for counts below 1.
    """

    def __init__(
        self,
        load: Callable[[int], Clip],
        num_clips: int,
        *,
        num_streams: int,
        segment: int,
        augment: AugmentConfig,
        seed: int,
        first_stream: int = 0,
        all_streams: int | None = None,
        staggered: bool = True,
        order: EpochOrder | None = None,
    ) -> None:
        if num_clips < 1 or num_streams < 1 or segment < (order is None):
            raise ValueError(
                f"{num_clips} clips, {num_streams} streams, segment {segment}: expected at least 1 of each"
            )
        if order is not None:
            order.require(num_clips, segment)
        self._load = lru_cache(maxsize=2 * num_streams)(load)
        self.num_clips = num_clips
        self.streams = range(first_stream, first_stream + num_streams)
        self.all_streams = all_streams or num_streams
        self.segment = segment
        self.staggered = staggered
        self.augment = augment
        self.seed = seed
        self.order = order

    def __getitem__(self, step: int) -> StreamBatch:
        return collate([self._sample(stream, step) for stream in self.streams])

    def _sample(self, stream: int, step: int) -> StreamBatch:
        chosen = self.select_frame(stream, step)
        return make_sample(
            chosen.clip, chosen.frame, chosen.augmentation, chosen.is_first, chosen.dropped_camera
        )

    def _place(self, stream: int, step: int) -> tuple[int, int]:
        """Return which segment of a stream a step is in, and its position in the segment."""
        if not self.segment:
            assert self.order is not None
            return self.order.place(stream, self.all_streams, step)
        shifted = step + (stream * self.segment // self.all_streams if self.staggered else 0)
        return divmod(shifted, self.segment)

    def select_frame(self, stream: int, step: int) -> "FrameChoice":
        """Select the frame and augmentation of a stream at a step; depends only on (seed, stream, step)."""
        index, position = self._place(stream, step)
        random = np.random.default_rng([self.seed, stream, index])
        if self.order is None:
            number = int(random.integers(self.num_clips))
            clip = self._load(number)
            start = int(random.integers(max(len(clip.times) - self.segment, 0) + 1))
        else:
            number, start = self.order(index * self.all_streams + stream)
            clip = self._load(number)
        is_first = position == 0 or step == 0
        augmentation = draw_augmentation(self.augment, random)
        frame = min(start + position, len(clip.times) - 1)
        per_frame = np.random.default_rng([self.seed, stream, index, position])
        view = 0
        if self.augment.views:
            view = int(random.integers(self.augment.views))
            augmentation = in_view(augmentation, self.augment, number, view)
        elif self.augment.as_published:
            scale = augmentation.scale
            augmentation = draw_augmentation(self.augment, per_frame)._replace(scale=scale)
        dropped = -1
        if per_frame.random() < self.augment.camera_dropout:
            dropped = int(per_frame.integers(len(clip.intrinsics)))
        return FrameChoice(clip, frame, augmentation, is_first, dropped, number, view)


class FrameChoice(NamedTuple):
    """Frame `frame` of a clip with its augmentation. is_first: the stream starts here. dropped_camera: index
    or -1. clip_index: index of the clip in its source. view: number of the augmentation among
    `AugmentConfig.views`."""

    clip: Clip
    frame: int
    augmentation: Augmentation
    is_first: bool
    dropped_camera: int
    clip_index: int
    view: int = 0


def make_sample(
    clip: Clip, index: int, augmentation: Augmentation, is_first: bool, dropped_camera: int = -1
) -> StreamBatch:
    """Make frame `index` of the clip, augmented, as a batch of one stream.

    Images, extrinsics, poses and boxes change together, so the rotated, mirrored and scaled world is
    consistent. If images are mirrored and the world is not, the horizontal focal length is negative. Scaling
    keeps the images: cameras twice as far apart see the same images of a world twice as large.
    """
    mirrored = augmentation.world_mirrored
    mirror = np.diag([1.0, -1.0 if mirrored else 1.0, 1.0, 1.0])
    new_from_ego = yaw_transform(augmentation.angle) @ mirror
    flip_camera = np.diag([-1.0 if mirrored else 1.0, 1.0, 1.0, 1.0])
    ego_from_camera = new_from_ego @ clip.ego_from_camera[index] @ flip_camera
    global_from_ego = mirror @ clip.global_from_ego[index] @ np.linalg.inv(new_from_ego)
    for pose in (ego_from_camera, global_from_ego):  # both are new arrays
        pose[..., :3, 3] *= augmentation.scale
    present = np.ones(len(clip.intrinsics), dtype=bool) if clip.present is None else clip.present.copy()
    if dropped_camera >= 0:
        present[dropped_camera] = False
    images, intrinsics = _augmented_images(clip, index, augmentation, present)
    visible = _augmented_tokens(clip, augmentation)
    objects = clip.objects[index]
    boxes = augment_boxes(objects.boxes, new_from_ego, augmentation)
    image_size = (clip.images.shape[2], clip.images.shape[3])
    rig = CameraRig(
        torch.from_numpy(intrinsics).float()[None],
        torch.from_numpy(ego_from_camera).float()[None],
        torch.from_numpy(present)[None],
    )
    return StreamBatch(
        torch.from_numpy(np.array(images))[None],
        rig,
        torch.from_numpy(global_from_ego)[None],
        torch.tensor([clip.times[index]], dtype=torch.float64),
        torch.tensor([is_first]),
        make_targets(boxes, objects, intrinsics, ego_from_camera, present, image_size, visible=visible),
        torch.from_numpy(_all_tokens(clip) if visible is None else visible).reshape(1, -1),
    )


def _all_tokens(clip: Clip) -> NDArray[np.bool_]:
    """Return all tokens (N, H/16, W/16) of a frame as visible."""
    count, height, width = clip.images.shape[1:4]
    return np.ones((count, *token_grid(ImageConfig(width=width, height=height))), dtype=bool)


def _augmented_tokens(clip: Clip, augmentation: Augmentation) -> NDArray[np.bool_] | None:
    """Return the visible tokens (N, H/16, W/16) of a frame after zoom and mirroring, None if all are
    visible."""
    if clip.seen_tokens is None:
        return None
    visible = clip.seen_tokens
    if augmentation.zoom != 1.0:
        height, width = clip.images.shape[2:4]
        config = ImageConfig(width=width, height=height)
        now = zoomed_intrinsics(np.eye(3), config, augmentation.zoom, augmentation.left)
        rows, columns = (np.arange(count) + 0.5 for count in visible.shape[1:])
        rows = (rows * TOKEN_STRIDE - now[1, 2]) / now[1, 1] / TOKEN_STRIDE
        columns = (columns * TOKEN_STRIDE - now[0, 2]) / now[0, 0] / TOKEN_STRIDE
        rows, columns = (
            np.clip(np.floor(places).astype(int), 0, count - 1)
            for places, count in zip((rows, columns), visible.shape[1:], strict=True)
        )
        visible = visible[:, rows][:, :, columns]
    return np.ascontiguousarray(visible[:, :, ::-1]) if augmentation.mirror else visible


def _augmented_images(
    clip: Clip, index: int, augmentation: Augmentation, present: NDArray[np.bool_]
) -> tuple[Array, Array]:
    """Return images (N, H, W, 3), or cached features in their place, and their intrinsics (N, 3, 3); cameras
    that are not present are blank."""
    images, intrinsics = _zoomed_frame(clip, index, augmentation)
    if augmentation.mirror:
        images = images[:, :, ::-1]
        intrinsics[:, 0, 2] = images.shape[2] - intrinsics[:, 0, 2]
        if not augmentation.mirror_world:
            intrinsics[:, 0, 0] *= -1.0
    images = _recolor(images, augmentation, index)
    if clip.features is not None:
        images = clip.features[index]
    if not present.all():
        blank = images.dtype.type(0) if clip.blank is None else clip.blank
        images = np.where(present[:, None, None, None], images, blank)
    return images, intrinsics


def _zoomed_frame(clip: Clip, index: int, augmentation: Augmentation) -> tuple[NDArray[np.uint8], Array]:
    """Return images (N, H, W, 3) of a frame and their intrinsics, with zoom."""
    if augmentation.zoom == 1.0:
        return clip.images[index], clip.intrinsics.copy()
    height, width = clip.images.shape[2:4]
    config = ImageConfig(width=width, height=height)
    intrinsics = zoomed_intrinsics(clip.intrinsics, config, augmentation.zoom, augmentation.left)
    if not isinstance(clip.images, np.ndarray):
        return clip.images.zoomed(index, augmentation.zoom, augmentation.left), intrinsics
    return zoom_images(clip.images[index], augmentation.zoom, augmentation.left), intrinsics


def zoom_images(images: NDArray[np.uint8], zoom: float, left: float) -> NDArray[np.uint8]:
    """Zoom each of the images (N, H, W, 3) as in `preprocess.zoom_and_crop`."""
    config = ImageConfig(width=images.shape[2], height=images.shape[1])
    return np.stack([zoom_and_crop(image, config, zoom, left) for image in images])


def augment_boxes(boxes: Array, new_from_ego: Array, augmentation: Augmentation) -> Array:
    """Transform boxes (M, 9) to the rotated, mirrored and scaled ego frame."""
    result = boxes.astype(np.float64).copy()
    result[:, :3] = transform_points(new_from_ego, boxes[:, :3].astype(np.float64))
    result[:, 6] = (-boxes[:, 6] if augmentation.world_mirrored else boxes[:, 6]) + augmentation.angle
    result[:, 7:9] = boxes[:, 7:9] @ new_from_ego[:2, :2].T
    result[:, [0, 1, 2, 3, 4, 5, 7, 8]] *= augmentation.scale
    return result


def _recolor(images: NDArray[np.uint8], augmentation: Augmentation, frame: int) -> NDArray[np.uint8]:
    if augmentation.distortion:
        return np.stack(
            [
                distort(image, augmentation.distortion, np.random.default_rng([augmentation.seed, frame, i]))
                for i, image in enumerate(images)
            ]
        )
    if augmentation.gain == (1.0, 1.0, 1.0) and augmentation.offset == 0.0:
        return images
    levels = np.arange(256, dtype=np.float32)
    table = np.stack(
        [np.clip(levels * gain + augmentation.offset, 0, 255) for gain in augmentation.gain], axis=-1
    ).astype(np.uint8)
    return np.stack([table[:, channel][images[..., channel]] for channel in range(3)], axis=-1)


def collate(samples: list[StreamBatch]) -> StreamBatch:
    """Concatenate streams to one batch; object slots are padded to the largest number G."""
    slots = max(1, *(sample.targets.labels.shape[1] for sample in samples))
    padded = [pad_targets(sample.targets, slots) for sample in samples]
    targets = Targets(*(torch.cat([getattr(t, name) for t in padded]) for name in Targets._fields))
    rig = CameraRig(*(torch.cat([getattr(s.rig, name) for s in samples]) for name in CameraRig._fields))
    images, poses, times, firsts, visible = (
        torch.cat([getattr(s, name) for s in samples])
        for name in ("images", "global_from_ego", "time", "is_first", "visible")
    )
    return StreamBatch(images, rig, poses, times, firsts, targets, visible)
