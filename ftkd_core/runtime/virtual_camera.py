# SPDX-License-Identifier: Apache-2.0
"""Virtual cameras: weights trained on one rig see the cameras of another rig as they saw their own.

A network memorises the image rows of the cameras it was trained with: one degree of pitch costs half of its
mAP, even if it gets the true calibration. Each real camera is therefore seen through a virtual one with the
intrinsics, pitch and roll of the training (the canonical camera of its channel) and the real camera's yaw and
position. Both have the same centre, so the map between their images is exact. It is composed with the removal
of lens distortion and with the network's scaling and crop (`remap.ImageRemap`), and cached by calibration.

A virtual camera cannot move a camera: another height is not corrected. Symbols: N cameras, H/W network image.
"""

import logging
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftkd_core.canonical_cameras import CAMERA_MODELS, CanonicalCamera, orientation, rotation_of
from ftkd_core.config import ImageConfig
from ftkd_core.errors import UserError
from ftkd_core.geometry import make_transform
from ftkd_core.lens import Lens, check_fold, horizontal_field, project_pixels
from ftkd_core.runtime.camera_assignment import Placement, Sight, assign, same_yaw
from ftkd_core.runtime.preprocess import check_view, network_intrinsics, resize_and_crop
from ftkd_core.runtime.remap import ImageRemap
from ftkd_core.types import CameraRound, CameraView, PreparedImage

Array = NDArray[np.float64]

AUTO_TOLERANCE_DEG: Final = 0.2
"""`auto` takes a camera as it is if no point of its network image is displaced by more than this angle."""
_EXACT_DEG: Final = 0.005  # with `virtual`, a camera that differs less is taken as it is
_HEIGHT_TOLERANCE_M: Final = 0.15  # 0.2 m cost the shipped weights 38 % of mAP (benchmarks.rigs)
_LEAST_SHARE: Final = 0.05  # a camera that sees less of its virtual image is masked
_CACHED: Final = 64

_logger = logging.getLogger(__name__)


class Calibration(NamedTuple):
    """Calibration of a real camera; size is (width, height)."""

    name: str
    size: tuple[int, int]
    intrinsics: Array
    ego_from_camera: Array
    lens: Lens | None


@dataclass(frozen=True, kw_only=True)
class SeenCamera:
    """How a channel sees a real camera (index `camera` of the round).

    remap is None for a camera that is taken as it is; then the other values do not apply. intrinsics (3, 3)
    of the network image; camera_from_virtual (4, 4). difference_deg: largest displacement of a network pixel
    if the camera were taken as it is. share: visible part of the network image.
    """

    camera: int
    channel: int
    name: str
    remap: ImageRemap | None
    intrinsics: Array
    camera_from_virtual: Array
    difference_deg: float
    share: float

    def view(self, view: CameraView, leave_to_engine: bool = False) -> CameraView:
        """Return the image of the virtual camera with its geometry, or with leave_to_engine the image of the
        camera and the map."""
        if self.remap is None:
            return view
        visible = None if self.remap.visible.min() >= 1 else self.remap.visible
        prepared = self._prepared(view, self.remap)
        if prepared is None and not leave_to_engine:
            prepared = self.remap(view.image)
        return replace(
            view,
            image=view.image if prepared is None else prepared,
            remap=self.remap if prepared is None else None,
            intrinsics=self.intrinsics,
            ego_from_camera=view.ego_from_camera @ self.camera_from_virtual,
            lens=None,
            visible=visible,
            prepared=(),
        )

    def _prepared(self, view: CameraView, remap: ImageRemap) -> NDArray[np.uint8] | None:
        for prepared in view.prepared:
            if prepared.remap is remap:
                return prepared.image
        return None


class VirtualCameras:
    """`camera_round = cameras.see(camera_round)`: a round whose views are in the order of the channels.

    camera_model: `as_is` removes lens distortion only; `virtual` sees every camera through a virtual one;
    `auto` does so for cameras that differ from the canonical ones by more than `AUTO_TOLERANCE_DEG`. In both,
    cameras are assigned to channels by yaw. faults: by name, why a camera is masked. seen: the current
    cameras.
    """

    def __init__(
        self,
        canonical: Sequence[CanonicalCamera],
        image: ImageConfig,
        channels: Sequence[str],
        camera_model: str = "auto",
        *,
        log_decisions: bool = True,
    ) -> None:
        if camera_model not in CAMERA_MODELS:
            raise UserError(f"camera_model {camera_model!r}: expected one of {', '.join(CAMERA_MODELS)}")
        if canonical and tuple(camera.channel for camera in canonical) != tuple(channels):
            raise UserError(
                f"canonical cameras of the weights do not match their channels {', '.join(channels)}"
            )
        if camera_model == "virtual" and not canonical:
            raise UserError(
                "camera_model 'virtual': the weights file does not store the cameras it was trained with; "
                "use as_is"
            )
        self.camera_model = camera_model if canonical else "as_is"
        self.canonical = tuple(canonical)
        self.faults: dict[str, str] = {}
        self.seen: list[SeenCamera] = []
        self._image = image
        self._channels = tuple(channels)
        self._models = [_CanonicalView.of(camera, image) for camera in canonical]
        self._calibrations: dict[int, Calibration] = {}
        self._keys: dict[int, bytes] = {}
        self._remaps: OrderedDict[bytes, ImageRemap] = OrderedDict()
        self._logged: dict[str, object] = {}
        self._log_decisions = log_decisions
        self._is_planned = False

    def see(self, camera_round: CameraRound, *, leave_to_engine: bool = False) -> CameraRound:
        """Return the round as the network sees it; with leave_to_engine the engine maps the images.

        Raises UserError for unusable calibration, a round in which every camera is masked and, with `as_is`,
        too many cameras; otherwise those are left out whose yaws fit the channels least.
        """
        self._check_count(camera_round)
        for index, view in enumerate(camera_round.views):
            if view is not None and self._note(index, view):
                self._is_planned = False
        if not self._is_planned:
            self._plan()
            self._is_planned = True
        views: list[CameraView | None] = [None] * max(len(self._channels), 1)
        for seen in self.seen:
            view = camera_round.views[seen.camera] if seen.camera < len(camera_round.views) else None
            if view is not None:
                views[seen.channel] = seen.view(view, leave_to_engine)
        present = any(view is not None for view in camera_round.views)
        if present and self.faults and not any(view is not None for view in views):
            raise UserError(f"no camera of the round is usable: {next(iter(self.faults.values()))}")
        return replace(camera_round, views=tuple(views))

    def forget(self) -> None:
        """Forget the cameras seen so far: the next round may be of another vehicle."""
        self._calibrations.clear()
        self._keys.clear()
        self.faults, self.seen, self._is_planned = {}, [], False

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the rig as a whole: cameras at another height, which nothing corrects."""
        if not self.canonical:
            return []
        off = {
            seen.name: float(
                self._calibrations[seen.camera].ego_from_camera[2, 3]
                - self.canonical[seen.channel].ego_from_camera[2, 3]
            )
            for seen in self.seen
        }
        wrong = {name: metres for name, metres in off.items() if abs(metres) > _HEIGHT_TOLERANCE_M}
        if not wrong:
            return []
        listed = ", ".join(f"{name} {metres:+.2f} m" for name, metres in wrong.items())
        text = (
            f"cameras are at another height than in the training ({listed}), which costs accuracy and is not "
            "corrected; check that the base frame lies on the ground, or use weights that were trained with "
            "such heights"
        )
        return [text]

    def prepare(self, index: int, image: NDArray[np.uint8], *, scale: bool) -> tuple[PreparedImage, ...]:
        """Return the network images of a camera (index in the round) as the last round saw it; () if it was
        not seen with this size. With scale, also that of a camera that is taken as it is.

        Another thread may call this while `see` runs.
        """
        size = (image.shape[1], image.shape[0])
        calibration = self._calibrations.get(index)
        if calibration is None or calibration.size != size:
            return ()
        remaps = [seen.remap for seen in tuple(self.seen) if seen.camera == index]
        return tuple(
            PreparedImage(remap, resize_and_crop(image, self._image) if remap is None else remap(image))
            for remap in remaps
            if scale or remap is not None
        )

    def _check_count(self, camera_round: CameraRound) -> None:
        """Raise UserError that names the cameras for which the weights have no channel, if each camera has
        its own."""
        if self.camera_model != "as_is":
            return
        names = {i: v.name or f"camera {i}" for i, v in enumerate(camera_round.views) if v is not None}
        names |= {index: camera.name for index, camera in self._calibrations.items()}
        if len(names) > len(self._channels):
            extra = ", ".join(name for _, name in sorted(names.items())[len(self._channels) :])
            raise UserError(
                f"{len(names)} cameras; the weights have {len(self._channels)} channels, so leave out {extra}"
            )

    def _note(self, index: int, view: CameraView) -> bool:
        """Store the calibration of a camera; return whether it is new."""
        height, width = view.image.shape[:2]
        lens = None if view.lens is None or view.lens.is_identity else view.lens
        rounded = (np.round(view.intrinsics, 6) + 0.0, np.round(view.ego_from_camera, 6) + 0.0)
        key = b"".join(part.tobytes() for part in rounded) + repr((width, height, lens)).encode()
        if self._keys.get(index) == key:
            return False
        name = view.name or (self._channels[index] if index < len(self._channels) else f"camera {index}")
        check_view(view, name)
        self._calibrations[index] = Calibration(
            name, (width, height), view.intrinsics, view.ego_from_camera, lens
        )
        self._keys[index] = key
        return True

    def _plan(self) -> None:
        """Decide how each known camera is seen."""
        cameras = self._calibrations
        self.faults, self.seen = {}, []
        usable = []
        for index, camera in sorted(cameras.items()):
            try:
                check_fold(camera.intrinsics, camera.lens, camera.size, camera.name)
                usable.append(index)
            except UserError as error:
                self.faults[camera.name] = str(error)
        for placement in self._placements(usable):
            seen = self._see(placement, cameras[placement.camera])
            if seen.share < _LEAST_SHARE:
                self.faults[seen.name] = (
                    f"{seen.name}: sees {seen.share:.0%} of the image that the weights expect at its yaw; "
                    "check its extrinsics (pitch, roll) and intrinsics"
                )
            else:
                self.seen.append(seen)
        if self._log_decisions:
            self._log()

    def _placements(self, usable: Sequence[int]) -> list[Placement]:
        """Return the virtual cameras of these cameras; with `as_is` each keeps its own index."""
        if self.camera_model == "as_is":
            return [Placement(index, index, 0.0, index) for index in usable]
        sights = [self._sight(self._calibrations[index]) for index in usable]
        repeated = same_yaw(sights)
        for index, other in repeated.items():
            name, twin = (self._calibrations[usable[i]].name for i in (index, other))
            self.faults[name] = (
                f"{name}: has the yaw of {twin} ({np.rad2deg(sights[index].yaw):.0f} degrees); check the "
                "extrinsics, or leave it out"
            )
        kept = [i for i in range(len(sights)) if i not in repeated]
        fields = [model.field for model in self._models]
        placed = assign([sights[i] for i in kept], [model.yaw for model in self._models], fields)
        self._note_left_out([usable[i] for i in kept], {usable[kept[p.camera]] for p in placed})
        return [p._replace(camera=usable[kept[p.camera]]) for p in placed]

    def _note_left_out(self, wanted: Sequence[int], used: Collection[int]) -> None:
        """Note the cameras for which no channel is left."""
        for index in wanted:
            if index not in used:
                name = self._calibrations[index].name
                self.faults[name] = (
                    f"{name}: is not used, because the weights have {len(self._channels)} channels and other "
                    "cameras are nearer to their yaws; leave it out"
                )

    def _sight(self, camera: Calibration) -> Sight:
        yaw, _, _ = orientation(camera.ego_from_camera)
        left, right = horizontal_field(camera.intrinsics, camera.lens, camera.size)
        return Sight(yaw, yaw - right, yaw - left)

    def _see(self, placement: Placement, camera: Calibration) -> SeenCamera:
        """Return how the channel of a placement sees a camera."""
        own = network_intrinsics(camera.intrinsics, self._image, *camera.size)
        rotation, intrinsics, tolerance = np.eye(3), own, np.inf
        if self.camera_model != "as_is":
            model = self._models[placement.model]
            virtual = rotation_of(placement.yaw, model.pitch, model.roll)
            rotation, intrinsics = camera.ego_from_camera[:3, :3].T @ virtual, model.intrinsics
            tolerance = AUTO_TOLERANCE_DEG if self.camera_model == "auto" else _EXACT_DEG
        difference = _difference_deg(own, intrinsics, rotation, (self._image.width, self._image.height))
        remap = None
        if camera.lens is not None or difference > tolerance:
            remap = self._remap(camera, intrinsics, rotation)
        return SeenCamera(
            camera=placement.camera, channel=placement.channel, name=camera.name, remap=remap,
            intrinsics=intrinsics, camera_from_virtual=make_transform(rotation), difference_deg=difference,
            share=1.0 if remap is None else remap.share,
        )  # fmt: skip

    def _remap(self, camera: Calibration, intrinsics: Array, rotation: Array) -> ImageRemap:
        """Return the cached map from a camera to a virtual one."""
        arrays = (camera.intrinsics, intrinsics, rotation)
        key = b"".join((np.round(a, 8) + 0.0).tobytes() for a in arrays)
        key += repr((camera.size, camera.lens)).encode()
        if key not in self._remaps:
            camera_from_pixel = rotation @ np.linalg.inv(intrinsics)

            def pixel_map(pixels: Array) -> tuple[Array, NDArray[np.bool_]]:
                points = np.concatenate([pixels, np.ones((len(pixels), 1))], axis=1)
                rays: Array = points @ camera_from_pixel.T
                return project_pixels(rays, camera.intrinsics, camera.lens)

            output = (self._image.width, self._image.height)
            self._remaps[key] = ImageRemap(pixel_map, camera.size, output)
            while len(self._remaps) > _CACHED:
                self._remaps.popitem(last=False)
        self._remaps.move_to_end(key)
        return self._remaps[key]

    def _log(self) -> None:
        """Log each camera once per decision; its calibration may change often, as with a moving mount."""
        for seen in self.seen:
            decision = (seen.channel, seen.remap is None)
            if self._logged.get(seen.name) == decision:
                continue
            self._logged[seen.name] = decision
            if seen.remap is None:
                continue
            what = "its lens distortion removed"
            if self.camera_model != "as_is":
                what = (
                    f"differs by up to {seen.difference_deg:.1f} degrees from {self._channels[seen.channel]} "
                    f"of the training, so a virtual camera replaces it; {seen.share:.0%} of that is visible"
                )
            _logger.warning("%s: %s", seen.name, what)
        for name, fault in self.faults.items():
            if self._logged.get(name) != fault:
                self._logged[name] = fault
                _logger.warning("%s", fault)
        warnings = self.warnings
        if self._logged.get("") != warnings:
            self._logged[""] = warnings
            for warning in warnings:
                _logger.warning("%s", warning)


class _CanonicalView(NamedTuple):
    """A canonical camera as a network image: intrinsics (3, 3), yaw, pitch, roll and horizontal field in
    radians."""

    intrinsics: Array
    yaw: float
    pitch: float
    roll: float
    field: float

    @classmethod
    def of(cls, camera: CanonicalCamera, image: ImageConfig) -> "_CanonicalView":
        k = network_intrinsics(camera.intrinsics, image, camera.width, camera.height)
        left, right = horizontal_field(k, None, (image.width, image.height))
        return cls(k, *orientation(camera.ego_from_camera), right - left)


def _difference_deg(own: Array, intrinsics: Array, rotation: Array, size: tuple[int, int]) -> float:
    """Return the largest angle by which a pixel of the network image is displaced if the camera is taken as
    it is, over its corners and the middles of its edges and centre."""
    columns, rows = np.meshgrid(np.array([0, 0.5, 1]) * size[0], np.array([0, 0.5, 1]) * size[1])
    pixels = np.column_stack([columns.ravel(), rows.ravel()])
    rays = np.column_stack([pixels, np.ones(9)]) @ np.linalg.inv(intrinsics).T @ rotation.T
    found, valid = project_pixels(rays, own, None)
    if not valid.all():
        return 180.0
    return float(np.rad2deg(np.hypot(*(found - pixels).T).max() / own[0, 0]))
