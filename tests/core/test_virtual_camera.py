# SPDX-License-Identifier: Apache-2.0
"""Virtual cameras: geometry, resampling, assignment to channels, masks and refused rigs."""

import dataclasses
import logging

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.rig_cases import other_size, ring, turned, zoomed
from ftkd_core.canonical_cameras import cameras_from_json, cameras_to_json, orientation, rotation_of
from ftkd_core.config import ImageConfig
from ftkd_core.data.synthetic.render import render_camera
from ftkd_core.data.synthetic.rig import SurroundRig, canonical_cameras, nuscenes_rig
from ftkd_core.data.synthetic.world import make_scene
from ftkd_core.errors import UserError
from ftkd_core.lens import Lens
from ftkd_core.runtime import virtual_camera
from ftkd_core.runtime.camera_assignment import Sight, assign, same_yaw
from ftkd_core.runtime.detector import Detector
from ftkd_core.runtime.device_remap import remap_on_device, remap_tensors
from ftkd_core.runtime.fast import FastEngine
from ftkd_core.runtime.preprocess import network_intrinsics, resize_and_crop, visible_tokens
from ftkd_core.runtime.remap import ImageRemap
from ftkd_core.runtime.virtual_camera import VirtualCameras
from ftkd_core.types import CameraRound, CameraView
from tests.core.helpers import drive, small_model
from tests.core.rounds import make_round

TRAINED = nuscenes_rig(400, 225)
IMAGE = ImageConfig(width=192, height=64)
ANGLE = st.floats(-3.1, 3.1)


def round_of(
    rig: SurroundRig, images: list[NDArray[np.uint8]] | None = None, lens: Lens | None = None
) -> CameraRound:
    views = tuple(
        CameraView(
            image=np.full((rig.height, rig.width, 3), 90, dtype=np.uint8)
            if images is None
            else images[index],
            intrinsics=rig.intrinsics[index],
            ego_from_camera=rig.ego_from_camera[index],
            global_from_ego=np.eye(4),
            stamp_ns=0,
            lens=lens,
            name=channel.lower(),
        )
        for index, channel in enumerate(rig.channels)
    )
    return CameraRound(views=views, reference_stamp_ns=0, global_from_ego=np.eye(4))


def cameras(model: str = "auto") -> VirtualCameras:
    return VirtualCameras(canonical_cameras(nuscenes_rig()), IMAGE, nuscenes_rig().channels, model)


def rendered(rig: SurroundRig, count: int = 1) -> list[NDArray[np.uint8]]:
    scene = make_scene(900_000)
    return [render_camera(scene, 3.0, rig, camera, noise_seed=0).image for camera in range(count)]


@settings(max_examples=50, deadline=None)
@given(ANGLE, st.floats(-1.4, 1.4), st.floats(-3.0, 3.0))
def test_orientation_inverts_rotation_of(yaw: float, pitch: float, roll: float) -> None:
    pose = np.eye(4)
    pose[:3, :3] = rotation_of(yaw, pitch, roll)
    np.testing.assert_allclose(orientation(pose), (yaw, pitch, roll), atol=1e-9)


@pytest.mark.parametrize("model", ["as_is", "auto", "virtual"])
def test_trained_rig_passes_unchanged(model: str) -> None:
    given_round = round_of(TRAINED)
    found = cameras(model).see(given_round)
    assert all(a is b for a, b in zip(found.views, given_round.views, strict=True))
    assert visible_tokens(found, IMAGE) is None


@pytest.mark.parametrize("model", ["as_is", "auto", "virtual"])
def test_cameras_at_another_height_are_a_warning(model: str, caplog: pytest.LogCaptureFixture) -> None:
    seen = cameras(model)
    seen.see(round_of(TRAINED))
    assert seen.warnings == []
    given_round = round_of(TRAINED)
    views = [view for view in given_round.views if view is not None]
    poses = [view.ego_from_camera.copy() for view in views]
    for pose in poses[1:]:
        pose[2, 3] += 0.1
    poses[0][2, 3] += 1.2
    raised = [
        dataclasses.replace(view, ego_from_camera=pose) for view, pose in zip(views, poses, strict=True)
    ]
    for _ in range(2):
        seen.see(dataclasses.replace(given_round, views=tuple(raised)))
    (warning,) = seen.warnings
    assert "another height than in the training (cam_front +1.20 m)" in warning
    assert [record.getMessage() for record in caplog.records].count(warning) == 1


@settings(max_examples=20, deadline=None)
@given(st.floats(-6, 6), st.floats(-3, 3), st.floats(0.8, 1.4), st.floats(-10, 10))
def test_a_point_falls_on_the_same_row_as_in_training(
    pitch: float, roll: float, zoom: float, yaw: float
) -> None:
    """The virtual camera maps an ego direction, turned by the yaw, to the pixel of the canonical camera."""
    other = zoomed(turned(TRAINED, pitch=pitch, roll=roll, yaw=yaw), zoom)
    plain, seen = cameras("as_is"), cameras("virtual")
    trained = plain.see(round_of(TRAINED))
    found = seen.see(round_of(other))
    for index, view in enumerate(found.views):
        reference = trained.views[index]
        assert view is not None and reference is not None
        about_z = orientation(view.ego_from_camera)[0] - orientation(reference.ego_from_camera)[0]
        cos, sin = np.cos(about_z), np.sin(about_z)
        turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
        np.testing.assert_allclose(
            view.ego_from_camera[:3, :3], turn @ reference.ego_from_camera[:3, :3], atol=1e-4
        )
        np.testing.assert_allclose(view.ego_from_camera[:3, 3], reference.ego_from_camera[:3, 3])
        height, width = view.image.shape[:2]  # a camera that differs by less than 0.005 degrees is unchanged
        found_intrinsics = network_intrinsics(view.intrinsics, IMAGE, width, height)
        np.testing.assert_allclose(found_intrinsics, plain_network_intrinsics(index), atol=0.02)


def plain_network_intrinsics(camera: int) -> NDArray[np.float64]:
    return network_intrinsics(nuscenes_rig().intrinsics[camera], IMAGE, 1600, 900)


@pytest.mark.parametrize(
    ("change", "most"),
    [({"pitch": 4.0}, 3.0), ({"roll": 3.0}, 3.0), ({"pitch": -3.0, "roll": 2.0}, 3.0)],
)
def test_virtual_image_is_that_of_the_trained_camera(change: dict[str, float], most: float) -> None:
    """Mean difference in grey levels to the rendered image of the canonical camera, where both see."""
    big = nuscenes_rig(800, 450)
    expected = resize_and_crop(rendered(big)[0], IMAGE).astype(float)
    rig = turned(big, **change)
    view = cameras().see(one_camera(rig, rendered(rig)[0])).views[0]
    assert view is not None
    seen = inside(view)
    unaligned = resize_and_crop(rendered(rig)[0], IMAGE).astype(float)
    error = np.abs(view.image.astype(float) - expected)[seen].mean()
    assert error < most
    assert error < 0.5 * np.abs(unaligned - expected)[seen].mean()


def inside(view: CameraView) -> NDArray[np.bool_]:
    """Return the pixels (H, W) of the cells that the camera sees entirely."""
    cells = np.ones((4, 12)) if view.visible is None else view.visible
    return np.kron(cells >= 1, np.ones((16, 16))) > 0


def one_camera(rig: SurroundRig, image: NDArray[np.uint8], lens: Lens | None = None) -> CameraRound:
    part = dataclasses.replace(
        rig, channels=rig.channels[:1], intrinsics=rig.intrinsics[:1], ego_from_camera=rig.ego_from_camera[:1]
    )
    found = round_of(part, [image], lens)
    return dataclasses.replace(found, views=(*found.views, *[None] * 5))


@pytest.mark.parametrize(
    ("model", "lens"),
    [
        ("as_is", Lens("plumb_bob", (-0.28, 0.09, 0.0005, -0.0004, -0.012))),
        ("auto", Lens("plumb_bob", (-0.28, 0.09, 0.0005, -0.0004, -0.012))),
        ("virtual", Lens("rational_polynomial", (0.4, -0.05, 0.0, 0.0, 0.01, 0.7, 0.02, 0.01))),
        ("as_is", Lens("equidistant", (0.02, -0.01, 0.0, 0.0))),
    ],
)
def test_distortion_is_removed(model: str, lens: Lens) -> None:
    rig = nuscenes_rig(480, 270)
    raw = rendered(dataclasses.replace(rig, lenses=(lens,) * 6))[0]
    seen = cameras(model)
    view = seen.see(one_camera(rig, raw, lens)).views[0]
    assert view is not None and view.lens is None
    expected = resize_and_crop(rendered(rig)[0], IMAGE).astype(float)
    where = inside(view)
    ignored = resize_and_crop(raw, IMAGE).astype(float)
    error = np.abs(view.image.astype(float) - expected)[where].mean()
    assert where.mean() > 0.7
    assert error < 0.7 * np.abs(ignored - expected)[where].mean()


def test_resampling_is_close_to_a_supersampled_reference() -> None:
    image = rendered(nuscenes_rig())[0]

    def pixel_map(pixels: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        return pixels * (1600 / 192) + (3.3, 201.7), np.ones(len(pixels), dtype=bool)

    remap = ImageRemap(pixel_map, (1600, 900), (160, 64))
    offsets = (np.arange(160 * 8) + 0.5) / 8, (np.arange(64 * 8) + 0.5) / 8
    grid = np.stack(np.meshgrid(*offsets), axis=-1).reshape(-1, 2)
    maps = (pixel_map(grid)[0] - 0.5).reshape(64 * 8, 160 * 8, 2).astype(np.float32)
    fine = cv2.remap(image, maps, None, cv2.INTER_LINEAR)  # type: ignore[call-overload]
    reference = cv2.resize(fine, (160, 64), interpolation=cv2.INTER_AREA).astype(float)
    single = cv2.remap(image, maps[4::8, 4::8], None, cv2.INTER_LINEAR).astype(float)  # type: ignore[call-overload]

    def rms(values: NDArray[np.float64]) -> float:
        return float(np.sqrt(np.square(values - reference).mean()))

    assert rms(remap(image).astype(float)) < 0.4 * rms(single)


def test_cells_that_the_camera_does_not_see_are_masked() -> None:
    found = cameras("virtual").see(round_of(zoomed(TRAINED, 1.6)))
    tokens = visible_tokens(found, IMAGE)
    assert tokens is not None
    share = tokens.reshape(6, 4, 12).mean(axis=(1, 2))
    assert ((share > 0.2) & (share < 0.9)).all()
    view = found.views[0]
    assert view is not None and view.visible is not None
    assert (view.visible == 0).any() and (view.visible == 1).any()
    assert (view.image == 90).all()  # the border is repeated


@pytest.mark.parametrize("image_queries", [0, 8])
@pytest.mark.parametrize("runtime", ["plain", "fast"])
def test_masked_tokens_have_no_influence(runtime: str, image_queries: int) -> None:
    """Both engines give the same boxes of a rig that the network sees in part, and whatever the masked cells
    contain, the attention ignores them."""

    def boxes(name: str) -> NDArray[np.float64]:
        detector = Detector(
            small_model(image_queries=image_queries), weights_name="small", device=torch.device("cpu"),
            score_threshold=0.0, max_detections=20, runtime=name, camera_model="virtual",
            canonical_cameras=canonical_cameras(nuscenes_rig()),
        )  # fmt: skip
        return np.concatenate([detector.step(round_of(zoomed(TRAINED, 1.6))).boxes for _ in range(2)])

    np.testing.assert_allclose(boxes(runtime), boxes("plain"), atol=1e-3)


def test_token_attention_ignores_masked_cells() -> None:
    model = small_model(image_queries=0)
    frame, memory = drive(model.config, 1)[0], model.start_memory()
    geometry = model.geometry(frame.rig)
    mask = geometry.mask.clone()
    mask[0, ::3] = False
    masked = geometry._replace(mask=mask)
    content = torch.zeros_like(model.project_tokens(model.extract(frame.images)[0]))
    content[0, ::3] = 5.0
    plain = model.project_tokens

    def outcome(change: float) -> torch.Tensor:
        model.project_tokens = lambda features: plain(features) + change * content  # type: ignore[method-assign]
        return model(frame, memory, geometry=masked)[0].codes

    torch.testing.assert_close(outcome(0.0), outcome(1.0))


def test_channels_are_assigned_by_yaw_not_by_order() -> None:
    order = [3, 0, 5, 1, 4, 2]
    shuffled = dataclasses.replace(
        TRAINED,
        channels=tuple(f"cam{index}" for index in range(6)),
        intrinsics=TRAINED.intrinsics[order],
        ego_from_camera=TRAINED.ego_from_camera[order],
    )
    images = [np.full((225, 400, 3), 10 * index, dtype=np.uint8) for index in order]
    found = cameras("auto").see(round_of(shuffled, images))
    assert [int(view.image[0, 0, 0]) for view in found.views if view is not None] == [0, 10, 20, 30, 40, 50]


@settings(max_examples=50, deadline=None)
@given(st.lists(ANGLE, min_size=1, max_size=6), st.lists(st.floats(0.5, 3.3), min_size=6, max_size=6))
def test_assignment_uses_each_channel_once_and_every_camera(yaws: list[float], fields: list[float]) -> None:
    sights = [Sight(yaw, yaw - f / 2, yaw + f / 2) for yaw, f in zip(yaws, fields, strict=False)]
    placed = assign(sights, [0.0, -1.0, 1.0, 3.1, 2.0, -2.0], [1.1] * 6)
    assert len({p.channel for p in placed}) == len(placed) <= 6
    assert {p.camera for p in placed} == set(range(len(sights)))
    wide = sum(sight.field > np.deg2rad(100) for sight in sights)
    assert len(placed) == min(len(sights) + wide, 6)


def test_more_cameras_than_channels_are_refused_by_name_if_names_matter() -> None:
    with pytest.raises(UserError, match=r"7 cameras; the weights have 6 channels, so leave out cam_6"):
        cameras("as_is").see(round_of(ring([0, 50, 100, 150, -160, -110, -60], [70] * 7)))


def test_wide_camera_is_split_in_two_that_look_left_and_right() -> None:
    lens = Lens("equidistant", (0.0, 0.0, 0.0, 0.0))
    rig = ring([0.0], [90.0])
    rig.intrinsics[:, (0, 1), (0, 1)] = 400 / np.deg2rad(80)
    seen = cameras()
    found = seen.see(round_of(rig, lens=lens))
    yaws = sorted(np.rad2deg(orientation(v.ego_from_camera)[0]) for v in found.views if v is not None)
    np.testing.assert_allclose(yaws, [-40, 40], atol=1)
    assert all(camera.share > 0.9 for camera in seen.seen)


def test_camera_with_the_yaw_of_another_is_masked_with_its_name(caplog: pytest.LogCaptureFixture) -> None:
    rig = ring([0, 0.5, 120, -120], [90, 40, 90, 90])
    seen = cameras()
    with caplog.at_level(logging.WARNING):
        found = seen.see(round_of(rig))
    assert list(seen.faults) == ["cam_1"] and "has the yaw of cam_0" in seen.faults["cam_1"]
    assert "cam_1: has the yaw of cam_0" in caplog.text
    assert sum(view is not None for view in found.views) == 3


def test_camera_that_looks_at_the_sky_is_masked_and_a_rig_of_them_refused() -> None:
    sky = turned(TRAINED, pitch=-70)
    one = dataclasses.replace(
        TRAINED, ego_from_camera=np.concatenate([sky.ego_from_camera[:1], TRAINED.ego_from_camera[1:]])
    )
    seen = cameras()
    found = seen.see(round_of(one))
    assert found.views[0] is None and sum(view is not None for view in found.views) == 5
    assert "cam_front: sees 0%" in seen.faults["cam_front"]
    with pytest.raises(UserError, match="no camera of the round is usable: cam_"):
        cameras().see(round_of(sky))


@pytest.mark.parametrize("scale", [(1, 1, 0), (-1, 1, 1)])
def test_singular_and_mirrored_extrinsics_are_refused_by_name(scale: tuple[int, int, int]) -> None:
    poses = TRAINED.ego_from_camera.copy()
    poses[2, :3, :3] = poses[2, :3, :3] @ np.diag(scale)
    with pytest.raises(UserError, match="cam_front_left: ego_from_camera is not a rigid transform"):
        cameras().see(round_of(dataclasses.replace(TRAINED, ego_from_camera=poses)))


def test_folding_lens_is_masked_with_its_name() -> None:
    seen = cameras()
    given_round = round_of(TRAINED)
    view = given_round.views[1]
    assert view is not None
    folded = dataclasses.replace(view, lens=Lens("plumb_bob", (-4.0, 0.0, 0.0, 0.0)))
    views = (given_round.views[0], folded, *given_round.views[2:])
    found = seen.see(dataclasses.replace(given_round, views=views))
    assert found.views[1] is None and "cam_front_right: distortion plumb_bob" in next(
        iter(seen.faults.values())
    )


def test_maps_are_cached_by_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(*arguments: object) -> ImageRemap:
        made.append(1)
        return ImageRemap(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(virtual_camera, "ImageRemap", counted)
    seen = cameras("virtual")
    first, second = turned(TRAINED, pitch=2), turned(TRAINED, pitch=3)
    for rig in (first, first, second, first):
        seen.see(round_of(rig))
    assert len(made) == 12


def test_other_image_sizes_keep_the_network_size() -> None:
    found = cameras().see(round_of(other_size(TRAINED, 480, 302)))
    assert {view.image.shape for view in found.views if view is not None} == {(64, 192, 3)}


def test_cameras_survive_json_and_damaged_ones_are_refused() -> None:
    rows = cameras_to_json(canonical_cameras(nuscenes_rig()))
    again = cameras_from_json(rows, "file")
    np.testing.assert_array_equal(again[3].ego_from_camera, nuscenes_rig().ego_from_camera[3])
    with pytest.raises(UserError, match="cameras of file"):
        cameras_from_json([{"channel": "CAM_FRONT"}], "file")


def test_equal_yaws_wrap_around() -> None:
    sights = [Sight(np.pi - 0.01, 0, 1), Sight(-np.pi + 0.01, 0, 1.5)]
    assert same_yaw(sights) == {0: 1}


def remaps() -> list[tuple[str, ImageRemap]]:
    """Maps that shrink, enlarge, read a part and see in part."""
    cases = {
        "shrinks": nuscenes_rig(1600, 900), "as large": nuscenes_rig(192, 108),
        "enlarges": nuscenes_rig(120, 68), "long": zoomed(nuscenes_rig(800, 450), 1.6),
    }  # fmt: skip
    found = []
    for name, rig in cases.items():
        seen = cameras("virtual")
        seen.see(round_of(turned(rig, pitch=2.0, roll=3.0)))
        remap = seen.seen[0].remap
        assert remap is not None
        found.append((name, remap))
    return found


@pytest.mark.parametrize(("name", "remap"), remaps())
def test_resampling_on_the_device_equals_that_of_opencv(name: str, remap: ImageRemap) -> None:
    random = np.random.default_rng(3)
    width, height = remap.source
    coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    image = np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST), dtype=np.uint8)
    left, top, right, bottom = remap.window
    maps = remap_tensors(remap, torch.device("cpu"))
    found = remap_on_device(torch.from_numpy(image[top:bottom, left:right].copy()), maps).numpy()
    expected = remap(image)
    assert found.shape == expected.shape == (64, 192, 3), name
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 1, name
    assert difference.mean() < 0.2


def test_engine_that_maps_images_sees_what_the_host_sees() -> None:
    """The same boxes with images resampled on the host and by the engine; also after a camera is lost, has
    another calibration, and for cameras that are taken as they are."""
    trained = nuscenes_rig(400, 225)
    images = rendered(trained, 6)
    mixed = dataclasses.replace(trained, ego_from_camera=trained.ego_from_camera.copy())
    mixed.ego_from_camera[:3] = turned(trained, pitch=3.0).ego_from_camera[:3]
    first = round_of(mixed, images)
    lost = dataclasses.replace(first, views=(None, *first.views[1:]))
    rounds = [first, lost, round_of(turned(trained, roll=2.0), images), round_of(trained, images), first]

    def boxes(device_images: bool) -> list[NDArray[np.float64]]:
        detector = Detector(
            small_model(), weights_name="small", device=torch.device("cpu"), score_threshold=0.0,
            max_detections=20, runtime="plain", canonical_cameras=canonical_cameras(nuscenes_rig()),
        )  # fmt: skip
        detector.engine = FastEngine(detector.model, torch.device("cpu"), 20, device_images=device_images)
        assert detector.engine.maps_images == device_images
        return [detector.step(camera_round).boxes for camera_round in rounds]

    for host, device in zip(boxes(False), boxes(True), strict=True):
        np.testing.assert_allclose(device, host, atol=2e-2)


@pytest.mark.parametrize("camera_model", ["as_is", "auto", "virtual"])
def test_prepared_images_give_the_same_detections(camera_model: str) -> None:
    """Images are prepared as the last round saw them; with another size or remap they are not used."""
    found = []
    for prepare in (False, True):
        detector = Detector(
            small_model(), weights_name="", device=torch.device("cpu"), runtime="plain", score_threshold=0.0,
            max_detections=20, camera_model=camera_model, canonical_cameras=canonical_cameras(nuscenes_rig()),
        )  # fmt: skip
        counts, objects = [], []
        for index, size in enumerate([(192, 108), (192, 108), (384, 216), (192, 108)]):
            camera_round = make_round(index, size)
            views = []
            for camera, view in enumerate(camera_round.views):
                assert view is not None
                prepared = detector.prepare(camera, view.image) if prepare else ()
                counts.append(len(prepared))
                views.append(dataclasses.replace(view, prepared=prepared))
            objects.append(detector.step(dataclasses.replace(camera_round, views=tuple(views))))
        found.append(objects)
        assert not prepare or (counts[:6] == [0] * 6 and sum(counts[6:12]) >= 6 and not any(counts[12:18]))
    for a, b in zip(*found, strict=True):
        assert np.array_equal(a.boxes, b.boxes) and np.array_equal(a.scores, b.scores)
