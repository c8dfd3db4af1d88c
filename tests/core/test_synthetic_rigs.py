# SPDX-License-Identifier: Apache-2.0
"""Rigs of the synthetic world: presets, lenses, free-running cameras, and rigs that scenes draw."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkd_core.canonical_cameras import orientation
from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.config import ImageConfig
from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import make_sample
from ftkd_core.data.synthetic.backdrop import paint_backdrop
from ftkd_core.data.synthetic.lens_image import lens_faces
from ftkd_core.data.synthetic.painter import BodyPainter, bodies_at
from ftkd_core.data.synthetic.render import _add_noise, render_camera
from ftkd_core.data.synthetic.rig import (
    HEIGHT_RANGE_M,
    MountedCamera,
    RigConfig,
    SurroundRig,
    canonical_cameras,
    nuscenes_config,
    nuscenes_rig,
)
from ftkd_core.data.synthetic.rig_presets import RIGS, preset_rig
from ftkd_core.data.synthetic.varied_rigs import (
    CALIBRATION_ERROR_DEG,
    CHASSIS_PITCH_DEG,
    CHASSIS_ROLL_DEG,
    draw_rig,
    rig_of_scene,
)
from ftkd_core.data.synthetic.world import make_scene
from ftkd_core.data.synthetic_clips import SyntheticClips, load_clip, render_clip, save_clip
from ftkd_core.errors import UserError
from ftkd_core.geometry import is_rigid, yaw_transform
from ftkd_core.lens import Lens
from ftkd_core.runtime.virtual_camera import VirtualCameras
from ftkd_core.types import CameraRound, CameraView

SCENE = make_scene(1)
IMAGE = ImageConfig(width=96, height=32)
BARREL = Lens("plumb_bob", (-0.28, 0.09, 0.0005, -0.0004, -0.012))


@pytest.mark.parametrize("camera", [0, 3])
def test_trained_rig_is_rendered_bit_identically_to_its_plain_twin(camera: int) -> None:
    rig = nuscenes_rig(160, 90)
    x, y, yaw, _ = SCENE.ego.at(2.0)
    local_from_ego = yaw_transform(yaw, (x, y, 0.0))
    expected = paint_backdrop(SCENE, rig, camera, local_from_ego)
    pose = local_from_ego @ rig.ego_from_camera[camera]
    BodyPainter(expected, SCENE, rig.intrinsics[camera], pose, yaw).paint(bodies_at(SCENE, 2.0))
    _add_noise(expected, hash((SCENE.seed, camera, 2_000_000)) & 0x7FFFFFFF, SCENE.night)
    np.testing.assert_array_equal(render_camera(SCENE, 2.0, rig, camera).image, expected)


def test_calibration_of_the_trained_rig_is_that_of_the_shipped_weights() -> None:
    rig = preset_rig("nuscenes")
    assert rig.intrinsics[0].tolist() == [[1266.0, 0.0, 816.0], [0.0, 1266.0, 491.0], [0.0, 0.0, 1.0]]
    assert rig.exposures_s(1.0).tolist() == (1.0 + rig.exposure_offsets_s).tolist()
    yaw, pitch, roll = np.rad2deg(orientation(rig.ego_from_camera[CAMERA_CHANNELS.index("CAM_BACK_RIGHT")]))
    assert (yaw, pitch, roll) == pytest.approx((-110.6, 0.9, 0.0), abs=1e-9)


@pytest.mark.parametrize("name", list(RIGS))
def test_presets_are_rigs_of_vehicles_at_any_size(name: str) -> None:
    full, small = preset_rig(name), preset_rig(name, 160)
    assert is_rigid(full.ego_from_camera[0])
    assert small.height == round(full.height * 160 / full.width)
    np.testing.assert_allclose(small.intrinsics[:, 0], full.intrinsics[:, 0] * 160 / full.width)
    assert small.lenses == full.lenses and small.free_running_hz == full.free_running_hz


def test_unknown_rig_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="rig 'tractor': expected one of nuscenes, .*five_cameras, varied"):
        rig_of_scene("tractor", 0)
    with pytest.raises(UserError, match="rig 'tractor': expected one of nuscenes"):
        preset_rig("tractor")


FRONT = nuscenes_config().cameras["CAM_FRONT"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": (1.0, 0.0, 0.4)}, r"CAM: height 0.4; expected 1 to 3.2"),
        ({"position": (1.0, 0.0, np.nan)}, r"CAM: height nan; expected 1 to 3.2"),
        ({"pitch_deg": 60.0}, r"CAM: pitch_deg 60; expected -45 to 45"),
        ({"roll_deg": -40.0}, r"CAM: roll_deg -40; expected -30 to 30"),
        ({"yaw_deg": 270.0}, r"CAM: yaw_deg 270; expected -180 to 180"),
        ({"focal": 10.0}, r"CAM: focal 10; expected 160 to"),
        ({"center": (800.0, 1200.0)}, r"CAM: principal point y 1200; expected 0 to 900"),
        ({"exposure_s": 0.2}, r"CAM: exposure_s 0.2; expected 0 to 0.05"),
        ({"lens": Lens("plumb_bob", (-3.0, 0.0, 0.0, 0.0))}, r"CAM: distortion .* folds back"),
    ],
)
def test_camera_that_no_vehicle_has_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RigConfig(width=1600, height=900, cameras={"CAM": replace(FRONT, **change)})


def test_number_of_cameras_and_rate_are_checked() -> None:
    with pytest.raises(UserError, match="rig of 0 cameras; expected 1 to 8"):
        RigConfig(width=1600, height=900, cameras={})
    with pytest.raises(UserError, match="rig of 9 cameras; expected 1 to 8"):
        RigConfig(width=1600, height=900, cameras={f"CAM_{index}": FRONT for index in range(9)})
    with pytest.raises(UserError, match="free_running_hz 5: expected 0 or 25 to 60"):
        RigConfig(width=1600, height=900, cameras={"CAM": FRONT}, free_running_hz=5.0)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.0, 20.0), st.sampled_from([25.0, 30.0, 45.0, 60.0]))
def test_free_running_cameras_have_their_own_clocks(start_s: float, rate_hz: float) -> None:
    rig = replace(nuscenes_rig(), free_running_hz=rate_hz)
    times, wanted = rig.exposures_s(start_s), start_s + rig.exposure_offsets_s
    assert ((times >= wanted - 1e-9) & (times < wanted + 1.001 / rate_hz)).all()
    period = (rig.exposures_s(start_s + 1.0) - times) * rate_hz  # whole numbers of a camera's own periods
    own = period / np.round(period)
    np.testing.assert_allclose(own, 1 + 4e-5 * np.arange(6), rtol=1e-9)
    later = rig.exposures_s(start_s + 0.05)
    assert (later > times).all()  # no image belongs to two sweeps


def _view(rig: SurroundRig, camera: int, lens: Lens | None, image: np.ndarray) -> CameraView:  # type: ignore[type-arg]
    return CameraView(
        image=image, intrinsics=rig.intrinsics[camera], ego_from_camera=rig.ego_from_camera[camera],
        global_from_ego=np.eye(4), stamp_ns=0, lens=lens, name=rig.channels[camera],
    )  # fmt: skip


def difference(a: np.ndarray, b: np.ndarray) -> float:  # type: ignore[type-arg]
    """Mean difference in grey levels."""
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def test_lens_without_distortion_gives_the_pinhole_image() -> None:
    rig = nuscenes_rig(320, 180)
    lens = Lens("plumb_bob", (0.0, 0.0, 0.0, 0.0, 0.0))
    plain = render_camera(SCENE, 2.0, rig, 0, noise_seed=0)
    found = render_camera(SCENE, 2.0, replace(rig, lenses=(lens,) * 6), 0, noise_seed=0)
    assert difference(plain.image, found.image) < 2.0
    assert difference(plain.image[:-2], found.image[2:]) > 4.0  # a shift of two rows is seen
    assert found.total_pixels.sum() == pytest.approx(plain.total_pixels.sum(), rel=0.05)
    assert found.visible_pixels.sum() == pytest.approx(plain.visible_pixels.sum(), rel=0.05)
    large = plain.total_pixels > 500
    share, expected = (r.visible_pixels[large] / r.total_pixels[large] for r in (found, plain))
    np.testing.assert_allclose(share, expected, atol=0.15)


@pytest.mark.parametrize("lens", [BARREL, Lens("equidistant", (0.02, -0.006, 0.001, -0.0002))])
def test_virtual_camera_recovers_the_pinhole_image_from_a_rendered_lens(lens: Lens) -> None:
    """The lens as rendered and the lens as removed are the same one."""
    image = ImageConfig(width=192, height=96)
    trained = nuscenes_rig(384, 216)
    wide = trained.intrinsics.copy()
    wide[:, (0, 1), (0, 1)] *= 0.95  # the lens sees more than the pinhole camera
    rig = replace(trained, intrinsics=wide, lenses=(lens,) * 6)
    cameras = VirtualCameras(canonical_cameras(nuscenes_rig()), image, CAMERA_CHANNELS, "virtual")
    raw = render_camera(SCENE, 2.0, rig, 0, noise_seed=0).image
    views = (_view(rig, 0, lens, raw), *[None] * 5)
    seen = cameras.see(CameraRound(views=views, reference_stamp_ns=0, global_from_ego=np.eye(4))).views[0]
    assert seen is not None and (seen.visible is None or seen.visible.min() == 1)
    pinhole = nuscenes_rig(768, 432)
    expected = render_camera(SCENE, 2.0, pinhole, 0, noise_seed=0).image
    half = expected[432 - 4 * image.height :].reshape(image.height, 4, image.width, 4, 3).mean(axis=(1, 3))
    assert difference(seen.image, half) < 3.0
    assert difference(seen.image[:, 3:], half[:, :-3]) > 5.0


def test_fisheye_sees_several_faces_and_a_moderate_lens_one() -> None:
    assert len(lens_faces(preset_rig("shuttle_fisheye", 80), 0)) == 5
    assert len(lens_faces(replace(nuscenes_rig(80, 45), lenses=(BARREL,) * 6), 0)) == 1


def test_drawn_rig_depends_on_the_seed_only() -> None:
    again, first, other = draw_rig(5), draw_rig(5), draw_rig(6)
    np.testing.assert_array_equal(again.true.ego_from_camera, first.true.ego_from_camera)
    assert other.true.channels != first.true.channels or not np.allclose(
        other.true.ego_from_camera, first.true.ego_from_camera
    )


def test_drawn_rigs_vary_within_the_stated_ranges() -> None:
    rigs = [draw_rig(seed) for seed in range(200)]
    heights = np.concatenate([rig.calibrated.ego_from_camera[:, 2, 3] for rig in rigs])
    assert HEIGHT_RANGE_M[0] <= heights.min() < 1.2 and 3.0 < heights.max() <= HEIGHT_RANGE_M[1]
    counts = {len(rig.true.channels) for rig in rigs}
    assert {3, 4, 5, 6} <= counts
    unchanged = [rig for rig in rigs if np.array_equal(rig.true.intrinsics, nuscenes_rig().intrinsics)]
    assert 0.2 < len(unchanged) / len(rigs) < 0.4
    chassis = []
    for rig in rigs:
        true, calibrated = rig.true.ego_from_camera, rig.calibrated.ego_from_camera
        moved = true[:, :3, :3] @ calibrated[:, :3, :3].transpose(0, 2, 1)
        angles = np.rad2deg(np.arccos(np.clip((np.trace(moved, axis1=1, axis2=2) - 1) / 2, -1, 1)))
        assert angles.max() <= CALIBRATION_ERROR_DEG + np.hypot(CHASSIS_PITCH_DEG, CHASSIS_ROLL_DEG)
        chassis.append(angles.mean())
    assert np.mean(np.array(chassis) > 0.3) > 0.4  # most calibrations are wrong by a visible angle
    assert all(is_rigid(pose) for rig in rigs for pose in rig.true.ego_from_camera)


@pytest.fixture(scope="module")
def varied_seed() -> int:
    """A scene whose rig lacks a camera and sees its images in part."""
    return next(s for s in range(100) if len(draw_rig(s).true.channels) == 5)


def test_varied_clip_is_seen_through_virtual_cameras(tmp_path: Path, varied_seed: int) -> None:
    clip = render_clip(varied_seed, IMAGE, 1.0, rig_name="varied")
    trained = render_clip(varied_seed, IMAGE, 1.0)
    assert clip.images.shape == trained.images.shape
    assert trained.present is None and trained.seen_tokens is None
    assert clip.present is not None
    own = {tuple(k.ravel().round(4)) for k in clip.intrinsics[clip.present]}
    assert own <= {tuple(k.ravel().round(4)) for k in trained.intrinsics.astype(np.float32).astype(float)}
    save_clip(clip, tmp_path / "clip")
    again = load_clip(tmp_path / "clip")
    for name in ("present", "seen_tokens", "images", "ego_from_camera"):
        np.testing.assert_array_equal(getattr(again, name), getattr(clip, name))


def test_tokens_that_no_camera_sees_are_masked_and_move_with_the_augmentation() -> None:
    clip = render_clip(1, IMAGE, 1.0)
    seen = np.ones((6, 2, 6), dtype=bool)
    seen[0, :, :2] = False
    present = np.array([True] * 5 + [False])
    clip = replace(clip, present=present, seen_tokens=seen)
    plain = make_sample(clip, 0, Augmentation(), True)
    assert plain.visible.shape == (1, 72)
    np.testing.assert_array_equal(plain.visible.numpy().reshape(seen.shape), seen)
    assert plain.rig.mask.numpy().tolist() == [present.tolist()]
    mirrored = make_sample(clip, 0, Augmentation(mirror=True), True)
    np.testing.assert_array_equal(mirrored.visible.numpy().reshape(seen.shape), seen[:, :, ::-1])
    zoomed = make_sample(clip, 0, Augmentation(zoom=2.0, left=0.0), True)
    assert zoomed.visible.numpy().reshape(seen.shape)[0].sum(axis=1).tolist() == [2, 2]  # 4 of 6 columns
    assert make_sample(replace(clip, seen_tokens=None), 0, Augmentation(), True).visible.all()


def test_objects_that_only_hidden_tokens_show_are_no_targets() -> None:
    clip = render_clip(1, IMAGE, 1.0)
    everything = make_sample(clip, 0, Augmentation(), True).targets
    dark = replace(clip, seen_tokens=np.zeros((6, 2, 6), dtype=bool))
    assert int(make_sample(dark, 0, Augmentation(), True).targets.mask.sum()) == 0
    half = np.ones((6, 2, 6), dtype=bool)
    half[:, :, :3] = False
    seen = make_sample(replace(clip, seen_tokens=half), 0, Augmentation(), True).targets
    assert 0 < int(seen.mask.sum()) < int(everything.mask.sum())
    centers = seen.centers_2d[seen.mask_2d]
    assert len(centers) and (centers[:, 0] >= 48).all()


def test_clips_of_another_rig_are_cached_separately(tmp_path: Path) -> None:
    plain = SyntheticClips(0, IMAGE, tmp_path, 1.0)
    other = SyntheticClips(0, IMAGE, tmp_path, 1.0, rig_name="truck", intervals_s=(0.5, 0.1))
    assert plain.cache != other.cache and other.name.endswith("every 0.5, 0.1 s")
    assert np.ptp(other(0).ego_from_camera[0, :, 2, 3]) < 0.6
    assert other(0).ego_from_camera[0, 0, 2, 3] == pytest.approx(2.7, abs=0.01)  # height is not corrected
    assert np.diff(other(1).times)[0] == pytest.approx(0.1)
    with pytest.raises(UserError, match="rig 'tank'"):
        SyntheticClips(0, IMAGE, tmp_path, rig_name="tank")


def test_mounted_camera_has_the_orientation_of_its_settings() -> None:
    mount = MountedCamera(
        position=(1.0, 0.2, 2.0), yaw_deg=40.0, pitch_deg=10.0, roll_deg=-5.0, focal=800.0,
        center=(800.0, 450.0),
    )  # fmt: skip
    rig = RigConfig(width=1600, height=900, cameras={"CAM": mount}).build()
    assert np.rad2deg(orientation(rig.ego_from_camera[0])) == pytest.approx((40.0, 10.0, -5.0))
