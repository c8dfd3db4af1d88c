# SPDX-License-Identifier: Apache-2.0
"""The detector: preprocessing, streaming through the public interface, weights on disk, and invalid input."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.config import ImageConfig
from ftkd_core.errors import UserError
from ftkd_core.geometry import yaw_transform
from ftkd_core.models.predictions import decode
from ftkd_core.runtime.detector import Detector, describe_training, resolve_device
from ftkd_core.runtime.preprocess import network_intrinsics, resize_and_crop, round_to_frame
from ftkd_core.runtime.thresholds import DEFAULT_THRESHOLD, ScoreThreshold, class_thresholds
from ftkd_core.weights import read_weights, save_weights
from tests.core.helpers import RIGS, rig_settings, small_model
from tests.core.rounds import CPU, make_detector, make_round


@RIGS
def test_both_engines_run_on_any_number_of_cameras(cameras: int, width: int, height: int) -> None:
    settings = rig_settings(cameras, width, height)
    fast, plain = (
        Detector(small_model(*settings), weights_name="", device=CPU, score_threshold=0.0, runtime=runtime)
        for runtime in ("fast", "plain")
    )
    for index in range(2):
        seen = make_round(index, cameras=cameras)
        found, expected = fast.step(seen), plain.step(seen)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
        assert len(found.scores) == 10 * (12 + 8 + 6)


def test_network_image_is_scaled_and_cropped_at_the_top() -> None:
    config = ImageConfig(width=96, height=32)
    image = np.zeros((108, 192, 3), dtype=np.uint8)
    image[60:62, 100:102] = 255
    small = resize_and_crop(image, config)
    assert small.shape == (32, 96, 3)
    row, column = np.argwhere(small[..., 0] == 255)[0]
    k = network_intrinsics(np.eye(3), config, 192, 108)
    # The centre of the white square, pixel (101, 61), maps to the centre of the white cell.
    assert (k @ [101.0, 61.0, 1.0])[:2] == pytest.approx([column + 0.5, row + 0.5])


@pytest.mark.parametrize("size", [(1600, 900), (800, 450), (1920, 1080), (1936, 1216), (1440, 928)])
def test_skipping_cut_rows_does_not_change_the_image(size: tuple[int, int]) -> None:
    """The plain twin scales the whole image and cuts it afterwards."""
    config = ImageConfig(width=704, height=256)
    image = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    scaled = (config.width, round(size[1] * config.width / size[0]))
    whole = cv2.resize(image, scaled, interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(resize_and_crop(image, config), whole[-config.height :])


def test_flat_image_is_padded_on_top() -> None:
    config = ImageConfig(width=96, height=64)
    image = np.full((30, 96, 3), 200, dtype=np.uint8)
    small = resize_and_crop(image, config)
    assert small.shape == (64, 96, 3)
    assert small[:34].max() == 0
    assert network_intrinsics(np.eye(3), config, 96, 30)[1, 2] == 34


def test_ego_motion_between_exposures_changes_extrinsics() -> None:
    camera_round = make_round()
    view = camera_round.views[1]
    assert view is not None
    later = dataclasses.replace(view, global_from_ego=view.global_from_ego @ yaw_transform(0.0, (0.5, 0, 0)))
    moved = dataclasses.replace(camera_round, views=(camera_round.views[0], later, *camera_round.views[2:]))
    channels = [f"cam{i}" for i in range(6)]
    config = ImageConfig(width=96, height=32)
    frames = [
        round_to_frame(r, config, channels, time_s=0, is_first=True, device=CPU)
        for r in (camera_round, moved)
    ]
    difference = frames[1].rig.ego_from_camera - frames[0].rig.ego_from_camera
    assert torch.allclose(difference[0, 1, :3, 3], torch.tensor([0.5, 0, 0]), atol=1e-4)
    assert torch.all(difference[0, [0, 2, 3, 4, 5]] == 0)


def test_detector_steps_equal_the_model_frame_by_frame() -> None:
    detector = make_detector(runtime="plain")
    model, memory = detector.model, detector.model.start_memory()
    for index in range(3):
        objects = detector.step(make_round(index))
        frame = round_to_frame(
            make_round(index),
            model.config.image,
            detector.channels,
            time_s=0.5 * index,
            is_first=index == 0,
            device=CPU,
        )
        with torch.no_grad():
            predictions, memory = model(frame._replace(images=frame.images.contiguous()), memory)
        expected = decode(predictions, 50)
        assert np.allclose(objects.scores, expected.scores[0].numpy(), atol=1e-6)
        assert np.allclose(objects.boxes, expected.boxes[0].numpy(), atol=1e-4)
        assert objects.stamp_ns == make_round(index).reference_stamp_ns


def test_reset_and_warm_up_start_a_new_stream() -> None:
    detector, fresh = make_detector(), make_detector()
    detector.step(make_round(5))
    detector.reset()
    assert np.array_equal(detector.step(make_round(0)).scores, fresh.step(make_round(0)).scores)
    warm = make_detector()
    warm.warm_up()
    assert np.array_equal(warm.step(make_round(0)).scores, make_detector().step(make_round(0)).scores)


def test_missing_camera_is_masked() -> None:
    objects = make_detector().step(make_round(0, missing=2))
    assert len(objects.scores) == 50
    assert np.all(np.isfinite(objects.boxes))
    assert not np.allclose(objects.scores, make_detector().step(make_round(0)).scores)


def test_detections_below_the_threshold_are_dropped() -> None:
    scores = make_detector().step(make_round(0)).scores
    cut = float(scores[10])
    assert len(make_detector(cut).step(make_round(0)).scores) == int((scores >= cut).sum())


def test_thresholds_can_differ_between_classes() -> None:
    everything = make_detector().step(make_round(0))
    name = CLASS_NAMES[int(everything.labels[0])]
    own = make_detector({name: float(everything.scores[0])} | dict.fromkeys(set(CLASS_NAMES) - {name}, 0.0))
    cut = own.step(make_round(0))
    others = everything.labels != everything.labels[0]
    assert len(cut.scores) == 1 + int(others.sum())
    assert np.array_equal(cut.scores[cut.labels != everything.labels[0]], everything.scores[others])


def test_invalid_threshold_raises_one_sentence() -> None:
    cases: list[tuple[ScoreThreshold, str]] = [
        ({"lorry": 0.3}, "class 'lorry': expected one of car, truck"),
        ({"car": 1.5}, "class 'car': 1.5: expected 0 .. 1"),
        ({"car": float("nan")}, "class 'car': nan: expected 0 .. 1"),
        (float("nan"), "score_threshold nan: expected 0 .. 1"),
    ]
    for threshold, text in cases:
        with pytest.raises(UserError, match=text):
            make_detector(threshold)
    with pytest.raises(UserError, match="runtime 'fastest': expected one of auto, fast, plain"):
        make_detector(runtime="fastest")


def test_classes_without_threshold_use_the_default() -> None:
    thresholds = class_thresholds({"car": 0.3}, CLASS_NAMES)
    assert thresholds[CLASS_NAMES.index("car")] == 0.3
    assert np.count_nonzero(thresholds == DEFAULT_THRESHOLD) == len(CLASS_NAMES) - 1


def test_invalid_view_raises_and_keeps_the_stream() -> None:
    detector, other = make_detector(), make_detector()
    for d in (detector, other):
        d.step(make_round(0))
    good = make_round(1)
    view = good.views[0]
    assert view is not None
    bad_k = dataclasses.replace(view, intrinsics=np.full((3, 3), np.nan))
    bad_pose = dataclasses.replace(view, global_from_ego=np.zeros((4, 4)))
    bad_image = dataclasses.replace(view, image=np.zeros((0, 10, 3), dtype=np.uint8))
    for bad, text in (
        (bad_k, "CAM_FRONT: intrinsics"),
        (bad_pose, "not a rigid"),
        (bad_image, "image of shape"),
    ):
        with pytest.raises(UserError, match=text):
            detector.step(dataclasses.replace(good, views=(bad, *good.views[1:])))
    with pytest.raises(UserError, match="7 cameras; the weights have 6 channels, so leave out camera 6"):
        detector.step(dataclasses.replace(good, views=(*good.views, good.views[0])))
    assert np.array_equal(detector.step(good).scores, other.step(good).scores)


def test_weights_round_trip_in_half_precision(tmp_path: Path) -> None:
    model = small_model()
    save_weights(tmp_path / "w.safetensors", model.state_dict(), model.config, notes={"steps": 7})
    state, config, notes = read_weights(tmp_path / "w.safetensors")
    assert (config, notes) == (model.config, {"steps": 7})
    for name, value in model.state_dict().items():
        assert torch.allclose(
            state[name], value.float() if value.is_floating_point() else value, rtol=1e-3, atol=1e-6
        )
    loaded = Detector.from_weights(
        tmp_path / "w.safetensors", device="cpu", runtime="fast", score_threshold=0.0
    )
    assert len(loaded.step(make_round(0)).scores) > 0
    assert loaded.weights_name == "w.safetensors"


def test_detector_describes_its_training() -> None:
    assert Detector.from_weights(device="cpu", runtime="plain").training == "500 steps, distilled by ftkd"
    assert describe_training({}) == ""
    assert describe_training({"format": "stream_petr_r50_428q"}) == "imported from stream_petr_r50_428q"


def test_invalid_weights_raise_one_sentence(tmp_path: Path) -> None:
    model = small_model()
    good = tmp_path / "good.safetensors"
    save_weights(good, model.state_dict(), model.config)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:1000])
    foreign = tmp_path / "pickle.safetensors"
    torch.save(model.state_dict(), foreign)
    part = tmp_path / "part.safetensors"
    state = {name: value for name, value in model.state_dict().items() if "classifier" not in name}
    save_weights(part, state, model.config)
    cases = [
        (tmp_path / "none.safetensors", {}, "not found"),
        (cut, {}, "cannot be read"),
        (foreign, {}, "cannot be read"),
        (part, {}, "missing"),
        (good, {"preset": "r50_704x256"}, "belong to preset 'tiny'; expected 'r50_704x256'"),
        (good, {"device": "warp"}, "device 'warp'"),
        (good, {"score_threshold": 1.5}, "score_threshold 1.5"),
    ]
    for path, arguments, text in cases:
        with pytest.raises(UserError, match=text):
            Detector.from_weights(path, **{"device": "cpu", **arguments})


def test_weights_with_nan_raise_and_are_not_written(tmp_path: Path) -> None:
    model = small_model()
    state = {**model.state_dict(), "reference_points": torch.full((12, 3), torch.nan)}
    with pytest.raises(ValueError, match="reference_points holds nan"):
        save_weights(tmp_path / "w.safetensors", state, model.config)
    assert list(tmp_path.iterdir()) == []


def test_auto_device_exists() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
