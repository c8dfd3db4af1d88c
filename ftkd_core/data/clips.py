# SPDX-License-Identifier: Apache-2.0
"""Sequences of frames for training: what a clip is, how it is drawn, augmented and batched.

A clip is one scene's key frames at network resolution. `StreamDataset` cuts clips into segments and serves,
step by step, one frame of each of B parallel streams; what it serves is a function of (seed, step) alone,
so a run that was killed resumes exactly and a worker process needs no state. Symbols: T frames, N cameras,
H/W network size, M objects, G object slots, B streams.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ftkd_core.boxes import box_corners
from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.config import ImageConfig
from ftkd_core.data.augmentation import Augmentation, AugmentConfig, draw_augmentation
from ftkd_core.data.order import EpochOrder
from ftkd_core.errors import UserError
from ftkd_core.geometry import invert_rigid, transform_points, yaw_transform
from ftkd_core.runtime.preprocess import zoom_and_crop, zoomed_intrinsics
from ftkd_core.types import CameraRig, Frame, Targets, pad_targets

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class ClipObjects:
    """Ground truth of one frame: boxes (M, 9) in ego at the key time, labels (M,), visible (M,) fraction of
    the object that any camera sees, num_points (M,) lidar returns (the devkit scores objects with at least
    one)."""

    boxes: Array
    labels: Array
    visible: Array
    num_points: Array


class ImageSource(Protocol):
    """Images of a clip that are read frame by frame."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, N, H, W, 3)."""

    def __getitem__(self, frame: int, /) -> NDArray[np.uint8]:
        """Images (N, H, W, 3) of a frame."""

    def zoomed(self, frame: int, zoom: float, left: float) -> NDArray[np.uint8]:
        """The same drawn larger or smaller, as `preprocess.zoom_and_crop`."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """images (T, N, H, W, 3) uint8, an array or files that are read when a frame is asked for; intrinsics (N,
    3, 3) in network pixels; ego_from_camera (T, N, 4, 4), ego at the key time, camera at its exposure;
    global_from_ego (T, 4, 4); times (T,) seconds; objects, one entry a frame; features (T, N, C, h, w), what
    a frozen backbone says of the images, in their place where they are kept, and blank (C, h, w), what it
    says of no image."""

    name: str
    images: NDArray[np.uint8] | ImageSource
    intrinsics: Array
    ego_from_camera: Array
    global_from_ego: Array
    times: Array
    objects: tuple[ClipObjects, ...]
    features: Array | None = None
    blank: Array | None = None


class ClipSource(Protocol):
    """Clips by number; what training draws from."""

    @property
    def name(self) -> str:
        """Says which clips these are, for what is derived from them."""

    def __call__(self, index: int, /) -> Clip:
        """Clip `index`."""


@dataclass(frozen=True)
class SomeImages:
    """Images (T, N, H, W, 3) of the N cameras at some places of a clip's images, read frame by frame."""

    images: NDArray[np.uint8] | ImageSource
    places: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array of all images."""
        return (self.images.shape[0], len(self.places), *self.images.shape[2:])

    def __getitem__(self, frame: int) -> NDArray[np.uint8]:
        chosen: NDArray[np.uint8] = self.images[frame][list(self.places)]
        return chosen

    def zoomed(self, frame: int, zoom: float, left: float) -> NDArray[np.uint8]:
        """As `ImageSource.zoomed`."""
        if isinstance(self.images, np.ndarray):
            return _zoomed(self[frame], zoom, left)
        return self.images.zoomed(frame, zoom, left)[list(self.places)]


@dataclass(frozen=True)
class SomeCameras:
    """Clips that show `channels`, in that order, of a source whose clips have all CAMERA_CHANNELS. Errors:
    UserError for another camera."""

    clips: ClipSource
    channels: tuple[str, ...]

    def __post_init__(self) -> None:
        strange = [name for name in self.channels if name not in CAMERA_CHANNELS]
        if strange:
            raise UserError(
                f"model.channels has {strange[0]!r}; {self.clips.name} has {', '.join(CAMERA_CHANNELS)}"
            )

    @property
    def name(self) -> str:
        """The source's, and which cameras."""
        return f"{self.clips.name} by {', '.join(self.channels)}"

    def __call__(self, index: int) -> Clip:
        clip = self.clips(index)
        places = [CAMERA_CHANNELS.index(name) for name in self.channels]
        return replace(
            clip,
            images=SomeImages(clip.images, tuple(places)),
            intrinsics=clip.intrinsics[places],
            ego_from_camera=clip.ego_from_camera[:, places],
        )


def choose_cameras(clips: ClipSource, channels: tuple[str, ...]) -> ClipSource:
    """The clips as a model of these cameras takes them: the source itself where that is all of them."""
    return clips if channels == CAMERA_CHANNELS else SomeCameras(clips, channels)


class StreamBatch(NamedTuple):
    """images (B, N, H, W, 3) uint8, with Frame and Targets otherwise as the network takes them."""

    images: Tensor
    rig: CameraRig
    global_from_ego: Tensor
    time: Tensor
    is_first: Tensor
    targets: Targets

    def frame(self, images: Tensor) -> Frame:
        """The frame of this batch once its images are normalised, (B, N, 3, H, W)."""
        return Frame(images, self.rig, self.global_from_ego, self.time, self.is_first)


class StreamDataset(Dataset[StreamBatch]):
    """Item `step` is the batch of that step: frame `step mod segment` of B streams, each in a segment of
    its own.

    load(index) gives clip `index` of num_clips and is cached for the streams in flight. Streams are
    staggered, unless told otherwise, so that not all start at the same step; in a distributed run each rank
    takes its own of all_streams (default: those of this data set). A segment is a random one of a random
    clip, or, with `order`, one of segments as long, the next that no other stream has.
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
        if num_clips < 1 or num_streams < 1 or segment < 1:
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
        chosen = self.choose(stream, step)
        return make_sample(chosen.clip, chosen.frame, chosen.change, chosen.first, chosen.dropped_camera)

    def choose(self, stream: int, step: int) -> "Choice":
        """What a stream shows at a step: a function of (seed, stream, step)."""
        shifted = step + (stream * self.segment // self.all_streams if self.staggered else 0)
        index, position = divmod(shifted, self.segment)
        random = np.random.default_rng([self.seed, stream, index])
        if self.order is None:
            number = int(random.integers(self.num_clips))
            clip = self._load(number)
            start = int(random.integers(max(len(clip.times) - self.segment, 0) + 1))
        else:
            number, start = self.order(index * self.all_streams + stream)
            clip = self._load(number)
        first = position == 0 or step == 0
        change = draw_augmentation(self.augment, random)
        frame = min(start + position, len(clip.times) - 1)
        per_frame = np.random.default_rng([self.seed, stream, index, position])
        dropped = -1
        if per_frame.random() < self.augment.camera_dropout:
            dropped = int(per_frame.integers(len(clip.intrinsics)))
        return Choice(clip, frame, change, first, dropped, number)


class Choice(NamedTuple):
    """Frame `frame` of a clip, changed; first where its stream starts; dropped_camera is -1 for none; number
    is the clip's."""

    clip: Clip
    frame: int
    change: Augmentation
    first: bool
    dropped_camera: int
    number: int


def make_sample(
    clip: Clip, index: int, change: Augmentation, first: bool, dropped_camera: int = -1
) -> StreamBatch:
    """Frame `index` of the clip as a batch of one stream, augmented.

    The turned, mirrored and scaled world is a world in its own right: images, extrinsics, poses and boxes
    change together. (The same images are of a world twice as large, seen from cameras twice as far apart.)
    """
    mirror = np.diag([1.0, -1.0 if change.mirror else 1.0, 1.0, 1.0])
    new_from_ego = yaw_transform(change.angle) @ mirror
    flip_camera = np.diag([-1.0 if change.mirror else 1.0, 1.0, 1.0, 1.0])
    ego_from_camera = new_from_ego @ clip.ego_from_camera[index] @ flip_camera
    global_from_ego = mirror @ clip.global_from_ego[index] @ np.linalg.inv(new_from_ego)
    for pose in (ego_from_camera, global_from_ego):  # both are new arrays
        pose[..., :3, 3] *= change.scale
    images, intrinsics = _drawn(clip, index, change)
    if change.mirror:
        images = images[:, :, ::-1]
        intrinsics[:, 0, 2] = images.shape[2] - intrinsics[:, 0, 2]
    images = _recolour(images, change)
    if clip.features is not None:
        images = clip.features[index]
    present = np.ones(len(intrinsics), dtype=bool)
    if dropped_camera >= 0:
        present[dropped_camera] = False
        nothing = images.dtype.type(0) if clip.blank is None else clip.blank
        images = np.where(present[:, None, None, None], images, nothing)
    objects = clip.objects[index]
    boxes = augment_boxes(objects.boxes, new_from_ego, change)
    targets = make_targets(
        boxes, objects, intrinsics, ego_from_camera, present, (clip.images.shape[2], clip.images.shape[3])
    )
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
        torch.tensor([first]),
        targets,
    )


def _drawn(clip: Clip, index: int, change: Augmentation) -> tuple[NDArray[np.uint8], Array]:
    """Images (N, H, W, 3) of a frame and their intrinsics, zoomed."""
    if change.zoom == 1.0:
        return clip.images[index], clip.intrinsics.copy()
    height, width = clip.images.shape[2:4]
    config = ImageConfig(width=width, height=height)
    intrinsics = zoomed_intrinsics(clip.intrinsics, config, change.zoom, change.left)
    if not isinstance(clip.images, np.ndarray):
        return clip.images.zoomed(index, change.zoom, change.left), intrinsics
    return _zoomed(clip.images[index], change.zoom, change.left), intrinsics


def _zoomed(images: NDArray[np.uint8], zoom: float, left: float) -> NDArray[np.uint8]:
    """Images (N, H, W, 3), each as `preprocess.zoom_and_crop`."""
    config = ImageConfig(width=images.shape[2], height=images.shape[1])
    return np.stack([zoom_and_crop(image, config, zoom, left) for image in images])


def augment_boxes(boxes: Array, new_from_ego: Array, change: Augmentation) -> Array:
    """Boxes (M, 9) in the turned, mirrored and scaled ego frame."""
    result = boxes.astype(np.float64).copy()
    result[:, :3] = transform_points(new_from_ego, boxes[:, :3].astype(np.float64))
    result[:, 6] = (-boxes[:, 6] if change.mirror else boxes[:, 6]) + change.angle
    result[:, 7:9] = boxes[:, 7:9] @ new_from_ego[:2, :2].T
    result[:, [0, 1, 2, 3, 4, 5, 7, 8]] *= change.scale
    return result


def _recolour(images: NDArray[np.uint8], change: Augmentation) -> NDArray[np.uint8]:
    if change.gain == (1.0, 1.0, 1.0) and change.offset == 0.0:
        return images
    levels = np.arange(256, dtype=np.float32)
    table = np.stack(
        [np.clip(levels * gain + change.offset, 0, 255) for gain in change.gain], axis=-1
    ).astype(np.uint8)
    return np.stack([table[:, channel][images[..., channel]] for channel in range(3)], axis=-1)


def make_targets(
    boxes: Array,
    objects: ClipObjects,
    intrinsics: Array,
    ego_from_camera: Array,
    present: Array,
    image_size: tuple[int, int],
    range_m: float = 61.2,
    min_visible: float = 0.15,
) -> Targets:
    """Targets of one frame: objects with a lidar return, in range, and seen by a camera that is there.

    The last is asked where not all CAMERA_CHANNELS are there. boxes (M, 9) in ego; image_size (height,
    width). In 2-D an object counts where its centre projects in front of the camera, its clipped box has an
    area, and at least min_visible of it can be seen at all.
    """
    keep = (objects.num_points > 0) & (np.abs(boxes[:, :2]).max(axis=1, initial=0.0) < range_m)
    boxes_2d, centers, depths = project_boxes(boxes, intrinsics, ego_from_camera, image_size)
    area = (boxes_2d[..., 2] - boxes_2d[..., 0]) * (boxes_2d[..., 3] - boxes_2d[..., 1])
    in_view = (depths > 0.5) & (area > 1.0)
    if not present.all() or len(present) < len(CAMERA_CHANNELS):
        keep &= (in_view & present[:, None]).any(axis=0)
    mask_2d = in_view & present[:, None] & (objects.visible > min_visible)
    return Targets(
        boxes=torch.from_numpy(boxes[keep]).float()[None],
        labels=torch.from_numpy(objects.labels[keep].astype(np.int64))[None],
        mask=torch.ones(1, int(keep.sum()), dtype=torch.bool),
        boxes_2d=torch.from_numpy(boxes_2d[:, keep]).float()[None],
        centers_2d=torch.from_numpy(centers[:, keep]).float()[None],
        depths=torch.from_numpy(depths[:, keep]).float()[None],
        mask_2d=torch.from_numpy(mask_2d[:, keep])[None],
    )


def project_boxes(
    boxes: Array, intrinsics: Array, ego_from_camera: Array, image_size: tuple[int, int]
) -> tuple[Array, Array, Array]:
    """Boxes (M, 9) in N cameras: clipped 2-D boxes (N, M, 4) x1 y1 x2 y2, centres (N, M, 2) in pixels,
    depths (N, M).

    Corners behind a camera are brought to 10 cm in front of it, which keeps boxes beside the camera
    one-sided.
    """
    points = np.concatenate([box_corners(boxes), boxes[:, None, :3].astype(np.float64)], axis=1)  # (M, 9, 3)
    camera_from_ego = invert_rigid(ego_from_camera)
    local = transform_points(
        camera_from_ego, np.broadcast_to(points.reshape(1, -1, 3), (len(intrinsics), points.size // 3, 3))
    )
    depth = local[..., 2:]
    pixels = local[..., :2] / np.maximum(depth, 0.1) * intrinsics[:, None, (0, 1), (0, 1)]
    pixels = (pixels + intrinsics[:, None, :2, 2]).reshape(len(intrinsics), -1, 9, 2)
    height, width = image_size
    limit = np.array([width, height], dtype=np.float64)
    corners = np.clip(pixels[:, :, :8], 0.0, limit)
    boxes_2d = np.concatenate([corners.min(axis=2), corners.max(axis=2)], axis=-1)
    return boxes_2d, pixels[:, :, 8], depth.reshape(len(intrinsics), -1, 9)[:, :, 8]


def collate(samples: list[StreamBatch]) -> StreamBatch:
    """One batch of several streams; object slots are padded to the largest G."""
    slots = max(1, *(sample.targets.labels.shape[1] for sample in samples))
    padded = [pad_targets(sample.targets, slots) for sample in samples]
    targets = Targets(*(torch.cat([getattr(t, name) for t in padded]) for name in Targets._fields))
    rig = CameraRig(*(torch.cat([getattr(s.rig, name) for s in samples]) for name in CameraRig._fields))
    images, poses, times, firsts = (
        torch.cat([getattr(s, name) for s in samples])
        for name in ("images", "global_from_ego", "time", "is_first")
    )
    return StreamBatch(images, rig, poses, times, firsts, targets)
