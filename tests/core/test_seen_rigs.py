# SPDX-License-Identifier: Apache-2.0
"""Rendered images of rigs through virtual cameras: each channel shows what a pinhole camera with the trained
intrinsics, pitch and roll would show at the place and yaw of the real camera."""

import dataclasses
import re
from collections.abc import Sequence

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.rig_cases import ring, turned
from ftkd_core.canonical_cameras import orientation
from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.config import ImageConfig
from ftkd_core.data.synthetic.render import render_camera
from ftkd_core.data.synthetic.rig import SurroundRig, canonical_cameras, nuscenes_rig
from ftkd_core.data.synthetic.rig_presets import preset_rig
from ftkd_core.data.synthetic.world import make_scene
from ftkd_core.errors import UserError
from ftkd_core.lens import Lens
from ftkd_core.runtime.virtual_camera import SeenCamera, VirtualCameras
from ftkd_core.types import CameraRound, CameraView

IMAGE = ImageConfig(width=192, height=64)
SCENE = make_scene(900_000)
TIME_S = 3.0
YAWS = {
    1: [10.0], 2: [0.0, 175.0], 3: [0.0, 120.0, -120.0], 4: [0.0, 90.0, 180.0, -90.0],
    5: [0.0, 72.0, 144.0, -144.0, -72.0], 6: [30.0, 90.0, 150.0, -150.0, -90.0, -30.0],
    7: [0.0, 50.0, 100.0, 150.0, -150.0, -100.0, -50.0],
    8: [0.0, 45.0, 90.0, 135.0, 180.0, -135.0, -90.0, -45.0],
}  # fmt: skip


def virtual() -> VirtualCameras:
    return VirtualCameras(canonical_cameras(nuscenes_rig()), IMAGE, CAMERA_CHANNELS, "auto")


def rendered_round(rig: SurroundRig, order: Sequence[int] = ()) -> CameraRound:
    """Render a rig, with its cameras in another order if one is given."""
    views = [
        CameraView(
            image=render_camera(SCENE, TIME_S, rig, camera, noise_seed=0).image,
            intrinsics=rig.intrinsics[camera], ego_from_camera=rig.ego_from_camera[camera],
            global_from_ego=np.eye(4), stamp_ns=0, lens=rig.lens(camera), name=rig.channels[camera],
        )
        for camera in range(len(rig.channels))
    ]  # fmt: skip
    ordered = tuple(views[index] for index in order) if order else tuple(views)
    return CameraRound(views=ordered, reference_stamp_ns=0, global_from_ego=np.eye(4))


def expected_image(view: CameraView, seen: SeenCamera) -> NDArray[np.float64]:
    """Render what the virtual camera should see, at four times its resolution, averaged."""
    k = np.diag([4.0, 4.0, 1.0]) @ seen.intrinsics
    rig = SurroundRig(
        channels=("virtual",), width=4 * IMAGE.width, height=4 * IMAGE.height, intrinsics=k[None],
        ego_from_camera=(view.ego_from_camera @ seen.camera_from_virtual)[None],
        exposure_offsets_s=np.zeros(1),
    )  # fmt: skip
    fine = render_camera(SCENE, TIME_S, rig, 0, noise_seed=0).image
    size = (IMAGE.width, IMAGE.height)
    return np.asarray(cv2.resize(fine, size, interpolation=cv2.INTER_AREA), dtype=np.float64)


def check_images(rig: SurroundRig, given: CameraRound) -> VirtualCameras:
    """Assert that all channels show what their virtual cameras should show; return the cameras."""
    cameras = virtual()
    found = cameras.see(given)
    for seen in cameras.seen:
        view, source = found.views[seen.channel], given.views[seen.camera]
        assert view is not None and source is not None and seen.remap is not None
        inside = np.kron(seen.remap.visible >= 1, np.ones((16, 16))) > 0
        assert inside.mean() > 0.4
        image, expected = view.image.astype(float), expected_image(source, seen)
        error = np.abs(image - expected)[inside].mean()
        # The same picture five columns further differs much more.
        shifted = np.abs(np.roll(image, 5, axis=1) - expected)[inside].mean()
        assert error < 7.0 and error < 0.6 * shifted, (seen.name, error, shifted)
        yaw, pitch, roll = np.rad2deg(orientation(view.ego_from_camera))
        model = np.rad2deg(orientation(canonical_cameras(nuscenes_rig())[seen.channel].ego_from_camera))
        assert abs(pitch) < 1.0 and abs(roll) < 0.5, "those of the training"
        assert abs((yaw - model[0] + 180) % 360 - 180) < 60, "the channel that looks there"
        np.testing.assert_allclose(view.ego_from_camera[:3, 3], source.ego_from_camera[:3, 3], atol=1e-9)
    return cameras


@pytest.mark.parametrize("count", range(1, 9))
def test_rigs_of_one_to_eight_cameras_in_any_order(count: int) -> None:
    rig = turned(ring(YAWS[count], [90.0] * count), pitch=4.0, roll=-2.0)
    order = np.random.default_rng(count).permutation(count).tolist()
    cameras = check_images(rig, rendered_round(rig, order))
    assert len(cameras.seen) == len({seen.channel for seen in cameras.seen}) == min(count, 6)
    left_out = set(rig.channels) - {seen.name for seen in cameras.seen}
    assert set(cameras.faults) == left_out and len(left_out) == max(0, count - 6)
    for name in left_out:
        assert f"{name}: is not used, because the weights have 6 channels" in cameras.faults[name]


def test_cameras_of_the_trained_rig_keep_their_channels_in_any_order() -> None:
    rig = turned(nuscenes_rig(640, 360), pitch=2.0)
    order = [4, 2, 0, 5, 3, 1]
    cameras = check_images(rig, rendered_round(rig, order))
    assert {seen.channel: order[seen.camera] for seen in cameras.seen} == {i: i for i in range(6)}


@pytest.mark.parametrize(
    ("field_deg", "parts"), [(95.0, 1), (105.0, 2), (125.0, 2)], ids=["narrow", "wide", "very wide"]
)
def test_wide_camera_is_split(field_deg: float, parts: int) -> None:
    rig = turned(ring([0.0, 180.0], [field_deg, 90.0]), pitch=3.0)
    cameras = check_images(rig, rendered_round(rig))
    yaws = [
        np.rad2deg(orientation(rig.ego_from_camera[0] @ seen.camera_from_virtual)[0])
        for seen in cameras.seen
        if seen.name == "CAM_0"
    ]
    assert len(yaws) == parts
    if parts == 2:
        np.testing.assert_allclose(sorted(yaws), [-field_deg / 4, field_deg / 4], atol=1.5)


@pytest.mark.parametrize("name", ["shuttle_fisheye", "truck", "autoware_sensor_kit", "five_cameras"])
def test_presets_are_seen_without_their_lenses_and_pitch(name: str) -> None:
    full, kept = preset_rig(name, 320), [0, 3]
    rig = dataclasses.replace(
        full, channels=tuple(full.channels[i] for i in kept), intrinsics=full.intrinsics[kept],
        ego_from_camera=full.ego_from_camera[kept], lenses=tuple(full.lens(i) for i in kept),
        exposure_offsets_s=full.exposure_offsets_s[kept],
    )  # fmt: skip
    cameras = check_images(rig, rendered_round(rig))
    assert not cameras.faults and {seen.name for seen in cameras.seen} == set(rig.channels)
    wide = {"shuttle_fisheye": 2, "autoware_sensor_kit": 1}.get(name, 0)  # split in two
    assert len(cameras.seen) == 2 + wide


def bad_rigs() -> dict[str, tuple[SurroundRig, str]]:
    """Rigs of four cameras of which the second one is bad, and the reason."""
    rig = ring([0.0, 90.0, 180.0, -90.0], [90.0] * 4)
    sky, same, folded = (
        dataclasses.replace(rig, ego_from_camera=rig.ego_from_camera.copy()) for _ in range(3)
    )
    sky.ego_from_camera[1] = turned(rig, pitch=-75.0).ego_from_camera[1]
    same.ego_from_camera[1, :3, :3] = turned(rig, yaw=-89.0).ego_from_camera[1, :3, :3]
    lens = Lens("plumb_bob", (-2.5, 0.0, 0.0, 0.0))
    folded = dataclasses.replace(folded, lenses=(None, lens, None, None))
    return {
        "sees nothing of the canonical field": (sky, "CAM_1: sees 0% of the image that the weights expect"),
        "same yaw": (same, "CAM_1: has the yaw of CAM_0"),
        "folding lens": (folded, r"CAM_1: distortion plumb_bob .* folds back"),
    }


@pytest.mark.parametrize("name", list(bad_rigs()))
def test_bad_camera_is_masked_by_name_and_the_others_are_used(name: str) -> None:
    rig, reason = bad_rigs()[name]
    given = dataclasses.replace(rig, lenses=())
    views = [
        dataclasses.replace(view, lens=rig.lens(index))
        for index, view in enumerate(rendered_round(given).views)
        if view is not None
    ]
    camera_round = CameraRound(views=tuple(views), reference_stamp_ns=0, global_from_ego=np.eye(4))
    cameras = virtual()
    found = cameras.see(camera_round)
    assert {seen.name for seen in cameras.seen} == {"CAM_0", "CAM_2", "CAM_3"}
    assert sum(view is not None for view in found.views) == 3
    assert list(cameras.faults) == ["CAM_1"]
    assert re.search(reason, cameras.faults["CAM_1"]), cameras.faults["CAM_1"]


@pytest.mark.parametrize(
    ("scale", "problem"), [((1, 1, 0), "singular"), ((-1, 1, 1), "mirrored"), ((2, 2, 2), "scaled")]
)
def test_bad_extrinsics_are_refused_by_name_and_the_next_round_works(
    scale: tuple[int, int, int], problem: str
) -> None:
    rig = ring([0.0, 90.0], [90.0, 90.0])
    good = rendered_round(rig)
    view = good.views[1]
    assert view is not None
    pose = view.ego_from_camera.copy()
    pose[:3, :3] = pose[:3, :3] @ np.diag(scale)
    bad = dataclasses.replace(good, views=(good.views[0], dataclasses.replace(view, ego_from_camera=pose)))
    cameras = virtual()
    with pytest.raises(UserError, match="CAM_1: ego_from_camera is not a rigid transform"):
        cameras.see(bad)
    assert sum(seen is not None for seen in cameras.see(good).views) == 2, problem
