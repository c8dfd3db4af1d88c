# SPDX-License-Identifier: Apache-2.0
"""Matched round of messages -> CameraRound for the detector; unusable cameras are masked with a reason."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ftkd_core.errors import UserError
from ftkd_core.types import CameraRound, CameraView, PreparedImage
from ftkd_ros.convert.calibration import CameraGeometry
from ftkd_ros.convert.images import RgbImage, image_to_rgb
from ftkd_ros.sync.arrivals import ArrivingImages
from ftkd_ros.sync.matcher import MatchedRound

T = TypeVar("T")

_MISSES: Final = 3
REFERENCE_TIMES: Final = ("latest", "anchor", "mean")


class Rig(Protocol):
    """Geometry of the cameras: `tf_rig.RigReader` reads it from topics, `replay_rounds.BagRig` from a bag."""

    cameras: tuple[str, ...]

    def global_from_ego(self, stamp_ns: int, wait_until: float) -> NDArray[np.float64]: ...

    def geometry(
        self, camera: str, frame_id: str, stamp_ns: int, image_size: tuple[int, int], wait_until: float
    ) -> CameraGeometry: ...


@dataclass(frozen=True, kw_only=True)
class BuiltRound:
    """A round; faults: by camera, why its image is masked; stage_ms: milliseconds by stage."""

    camera_round: CameraRound
    faults: dict[str, str]
    stage_ms: dict[str, float]


def newest_stamp_ns(matched: MatchedRound[Any]) -> int:
    """Return the latest exposure of a round."""
    return max(stamp for stamp in matched.stamps_ns if stamp is not None)


def reference_stamp_ns(matched: MatchedRound[Any], rule: str, anchor: int = 0) -> int:
    """Return the time of the detections by rule: `latest` exposure, exposure of camera `anchor`, or `mean`.

    If the anchor camera is missing, the latest exposure is used. A round of policy `anchor` has the stamp of
    its anchor image instead of the latest one, because one image can be in several rounds.
    """
    if matched.anchor_ns is not None and rule != "mean":
        return matched.anchor_ns
    stamps = [stamp for stamp in matched.stamps_ns if stamp is not None]
    if rule == "anchor" and (stamp := matched.stamps_ns[anchor]) is not None:
        return stamp
    return sum(stamps) // len(stamps) if rule == "mean" else max(stamps)


class _Image(NamedTuple):
    """A decoded image (H, W, 3) and its network images."""

    pixels: RgbImage
    prepared: tuple[PreparedImage, ...]


_Decoded: TypeAlias = _Image | UserError


@dataclass
class RoundBuilder:
    """Decodes the images of a round and looks up the geometry of the cameras.

    Images are decoded in parallel, because OpenCV releases the GIL; those given to `arrive` before their
    round is built. `prepare` (index, image) returns network images for `CameraView.prepared`. `topics` are
    the image topics, for error messages. Views have the order of the cameras, filled up with None to
    `num_views`. `tf_timeout_s` limits the wait for camera_info and tf per round. A camera whose calibration
    or frame was missing in three rounds in a row is waited for no longer, until they are there again.
    `pose_is_awaited`: the caller has waited for the vehicle pose, up to `tf_timeout_s`.
    """

    rig: Rig
    topics: Sequence[str]
    num_views: int
    reference_time: str = "latest"
    anchor: int = 0
    tf_timeout_s: float = 0.5
    prepare: Callable[[int, RgbImage], tuple[PreparedImage, ...]] | None = None
    pose_is_awaited: bool = False
    _pool: ThreadPoolExecutor = field(init=False, repr=False)
    _arriving: ArrivingImages[_Decoded] = field(init=False, repr=False)
    _misses: Counter[str] = field(init=False, repr=False, default_factory=Counter)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=min(4, len(self.topics)), thread_name_prefix="decode")
        self._arriving = ArrivingImages(self._pool, self._decode, len(self.topics))

    def close(self) -> None:
        """Shut down the decoder pool."""
        self._arriving.clear()
        self._pool.shutdown(wait=True)

    def arrive(self, camera: int, message: Any) -> None:
        """Start to decode and prepare an image before its round is complete."""
        self._arriving.add(camera, message)

    def build(self, matched: MatchedRound[Any]) -> BuiltRound:
        """Decode a round and add its geometry.

        Raises UserError if the pose is unknown or no camera is usable.
        """
        faults: dict[str, str] = {}
        started = time.perf_counter()
        futures = [
            None if message is None else self._arriving.take(index, message)
            for index, message in enumerate(matched.messages)
        ]
        images = [None if future is None else future.result() for future in futures]
        for camera, image in zip(self.rig.cameras, images, strict=True):
            if isinstance(image, UserError):
                faults[camera] = str(image)
        decoded = time.perf_counter()
        camera_round = self._add_geometry(matched, images, faults)
        stages = {"decode": (decoded - started) * 1e3, "geometry": (time.perf_counter() - decoded) * 1e3}
        return BuiltRound(camera_round=camera_round, faults=faults, stage_ms=stages)

    def _decode(self, camera: int, message: Any) -> _Decoded:
        try:
            image = image_to_rgb(message, self.topics[camera])
        except UserError as error:
            return error
        return _Image(image, () if self.prepare is None else self.prepare(camera, image))

    def _add_geometry(
        self,
        matched: MatchedRound[Any],
        images: Sequence[_Decoded | None],
        faults: dict[str, str],
    ) -> CameraRound:
        wait_until = time.monotonic() + self.tf_timeout_s
        stamp_ns = reference_stamp_ns(matched, self.reference_time, self.anchor)
        global_from_ego = self._pose(stamp_ns, wait_until)
        views: list[CameraView | None] = [None] * self.num_views
        for index, image in enumerate(images):
            if not isinstance(image, _Image):
                continue
            camera = self.rig.cameras[index]
            try:
                views[index] = self._view(matched, index, image, wait_until)
            except UserError as error:
                faults[camera] = str(error)
        if not any(view is not None for view in views):
            raise UserError(f"no camera of the round is usable: {next(iter(faults.values()))}")
        return CameraRound(views=tuple(views), reference_stamp_ns=stamp_ns, global_from_ego=global_from_ego)

    def _pose(self, stamp_ns: int, wait_until: float) -> NDArray[np.float64]:
        until = time.monotonic() if self.pose_is_awaited else wait_until
        try:
            return self.rig.global_from_ego(stamp_ns, until)
        except UserError as error:
            raise self._after_waiting(error) from error

    def _after_waiting(self, error: UserError) -> UserError:
        return UserError(f"{error} (waited for tf_timeout_s, {self.tf_timeout_s:g} s)")

    def _waiting(self, what: str, wait_until: float, look_up: Callable[[float], T]) -> T:
        """Look up with the deadline, or without waiting if `what` is known to be missing."""
        known_missing = self._misses[what] >= _MISSES
        try:
            found = look_up(time.monotonic() if known_missing else wait_until)
        except UserError as error:
            self._misses[what] += 1
            if known_missing or time.monotonic() < wait_until:
                raise
            raise self._after_waiting(error) from error
        self._misses[what] = 0
        return found

    def _view(self, matched: MatchedRound[Any], index: int, image: _Image, wait_until: float) -> CameraView:
        stamp_ns = matched.stamps_ns[index]
        message = matched.messages[index]
        assert stamp_ns is not None and message is not None
        height, width = image.pixels.shape[:2]
        camera = self.rig.cameras[index]
        geometry = self._waiting(
            camera,
            wait_until,
            lambda until: self.rig.geometry(
                camera, message.header.frame_id, stamp_ns, (width, height), until
            ),
        )
        return CameraView(
            image=image.pixels,
            intrinsics=geometry.intrinsics,
            ego_from_camera=geometry.ego_from_camera,
            global_from_ego=geometry.global_from_ego,
            stamp_ns=stamp_ns,
            lens=geometry.lens,
            name=self.rig.cameras[index],
            prepared=image.prepared,
        )
