# SPDX-License-Identifier: Apache-2.0
"""Clips with a part of their cameras or frames. Symbols: T frames, N cameras, H/W network size."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.data.clips import Clip, ClipSource, ImageSource, zoom_images
from ftkd_core.errors import UserError


@dataclass(frozen=True)
class SelectedImages:
    """Images (T, N, H, W, 3) of N selected cameras of a clip, read frame by frame."""

    images: NDArray[np.uint8] | ImageSource
    places: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (T, N, H, W, 3)."""
        return (self.images.shape[0], len(self.places), *self.images.shape[2:])

    def __getitem__(self, frame: int) -> NDArray[np.uint8]:
        chosen: NDArray[np.uint8] = self.images[frame][list(self.places)]
        return chosen

    def zoomed(self, frame: int, zoom: float, left: float) -> NDArray[np.uint8]:
        """See `ImageSource.zoomed`."""
        if isinstance(self.images, np.ndarray):
            return zoom_images(self[frame], zoom, left)
        return self.images.zoomed(frame, zoom, left)[list(self.places)]


@dataclass(frozen=True)
class SelectedFrames:
    """Images (T, N, H, W, 3) of T selected frames of a clip, read frame by frame."""

    images: ImageSource
    places: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (T, N, H, W, 3)."""
        return (len(self.places), *self.images.shape[1:])

    def __getitem__(self, frame: int) -> NDArray[np.uint8]:
        return self.images[self.places[frame]]

    def zoomed(self, frame: int, zoom: float, left: float) -> NDArray[np.uint8]:
        """See `ImageSource.zoomed`."""
        return self.images.zoomed(self.places[frame], zoom, left)


def only_keys(clip: Clip) -> Clip:
    """Return a clip without the frames that are not key frames."""
    if clip.keys is None:
        return clip
    images = clip.images
    kept = images[clip.keys] if isinstance(images, np.ndarray) else SelectedFrames(images, tuple(clip.keys))
    return replace(
        clip, images=kept, ego_from_camera=clip.ego_from_camera[clip.keys],
        global_from_ego=clip.global_from_ego[clip.keys], times=clip.times[clip.keys],
        objects=tuple(clip.objects[key] for key in clip.keys), keys=None,
    )  # fmt: skip


@dataclass(frozen=True)
class SelectedCameras:
    """Clips reduced to the cameras `channels`, in that order; the source has all CAMERA_CHANNELS. UserError
    for an unknown camera."""

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
        """Name of the source with the selected cameras."""
        return f"{self.clips.name} by {', '.join(self.channels)}"

    def __call__(self, index: int) -> Clip:
        clip = self.clips(index)
        places = [CAMERA_CHANNELS.index(name) for name in self.channels]
        return replace(
            clip,
            images=SelectedImages(clip.images, tuple(places)),
            intrinsics=clip.intrinsics[places],
            ego_from_camera=clip.ego_from_camera[:, places],
            present=None if clip.present is None else clip.present[places],
            seen_tokens=None if clip.seen_tokens is None else clip.seen_tokens[places],
        )


def select_cameras(clips: ClipSource, channels: tuple[str, ...]) -> ClipSource:
    """Reduce clips to the cameras of a model; the source itself if these are all CAMERA_CHANNELS."""
    return clips if channels == CAMERA_CHANNELS else SelectedCameras(clips, channels)
