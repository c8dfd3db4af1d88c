# SPDX-License-Identifier: Apache-2.0
"""Conventions of imported models: boxes, angles, frame, ranges, and the configuration that contains them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ftkd_core.boxes import decode_boxes, encode_boxes, transform_boxes, transform_codes
from ftkd_core.classes import CLASS_NAMES
from ftkd_core.config import DetectorConfig, SparseBEVConfig, from_dict, to_dict
from ftkd_core.errors import UserError
from ftkd_core.geometry import make_transform, optional_matrix, quaternion_to_rotation, yaw_transform
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.memory import align_memory, update_memory
from ftkd_core.models.model_frame import codes_in_ego
from ftkd_core.models.position import inverse_sigmoid, token_geometry
from ftkd_core.models.sampling import box_points, project_to_views, scramble_groups
from ftkd_core.runtime.detector import Detector
from ftkd_core.types import CameraRig, CameraRound, CameraView
from ftkd_core.weights.importing.conventions import (
    NEW_BOXES,
    OLD_BOXES,
    model_from_ego,
    our_codes,
    our_offsets,
    our_regressor,
)
from ftkd_core.weights.importing.stream_petr import stream_petr_config
from tests.core.helpers import camera_ring, make_frame, small_config, small_model


def public_code(box: Tensor, boxes: str) -> Tensor:
    """Return the code in a public convention of boxes (..., 9) of ours in the same frame."""
    x, y, z, length, width, height, yaw, vx, vy = box.unbind(-1)
    if boxes == NEW_BOXES:
        sizes, angle = (length, width), yaw
    else:
        sizes, angle = (width, length), -yaw - math.pi / 2
    parts = [x, y, z, sizes[0].log(), sizes[1].log(), height.log(), angle.sin(), angle.cos(), vx, vy]
    return torch.stack(parts, dim=-1)


def some_boxes(count: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    boxes = torch.randn(count, 9, generator=generator) * 10
    boxes[:, 3:6] = 0.5 + 5 * torch.rand(count, 3, generator=generator)
    boxes[:, 6] = (torch.rand(count, generator=generator) * 2 - 1) * math.pi
    return boxes


@pytest.mark.parametrize("boxes", [NEW_BOXES, OLD_BOXES])
def test_converted_public_codes_are_our_codes(boxes: str) -> None:
    ours = some_boxes()
    codes = our_codes(public_code(ours, boxes), boxes)
    torch.testing.assert_close(codes, encode_boxes(ours))
    torch.testing.assert_close(decode_boxes(codes), ours)


@pytest.mark.parametrize("boxes", [NEW_BOXES, OLD_BOXES])
def test_a_converted_regressor_predicts_our_codes(boxes: str) -> None:
    torch.manual_seed(0)
    public, ours = nn.Linear(16, 10), nn.Linear(16, 10)
    with torch.no_grad():
        ours.weight.copy_(our_regressor(public.weight, boxes))
        ours.bias.copy_(our_regressor(public.bias, boxes))
    features = torch.randn(5, 16)
    torch.testing.assert_close(ours(features), our_codes(public(features), boxes))


def test_converted_offsets_of_the_old_convention_give_the_same_points() -> None:
    torch.manual_seed(0)
    box, offsets = some_boxes(1)[None], torch.rand(1, 1, 6, 3) - 0.5
    code = public_code(box, OLD_BOXES)[0, 0]
    sizes, angle = code[3:6].exp(), torch.atan2(code[6], code[7])
    aligned = offsets[0, 0] * sizes
    rotated = torch.stack(
        [
            aligned[:, 0] * angle.cos() + aligned[:, 1] * angle.sin(),
            -aligned[:, 0] * angle.sin() + aligned[:, 1] * angle.cos(),
            aligned[:, 2],
        ],
        dim=-1,
    )
    converted = our_offsets(offsets.reshape(18), OLD_BOXES).view(1, 1, 6, 3)
    torch.testing.assert_close(box_points(box, converted)[0, 0], code[:3] + rotated)


def test_axes_of_the_public_frame_point_right_and_forward() -> None:
    matrix = np.array(model_from_ego())
    ahead, left = matrix @ [10.0, 0.0, 0.0, 1.0], matrix @ [0.94, 10.0, 1.84, 1.0]
    assert ahead[1] == pytest.approx(10 - 0.94, abs=0.1)
    assert left[0] == pytest.approx(-10, abs=0.1)
    assert abs(ahead[2] + 1.84) < 0.4
    assert matrix[2, 2] > 0.999


def test_codes_in_the_frame_of_a_model_are_transformed_to_ego() -> None:
    boxes = some_boxes().double()
    rotation = torch.from_numpy(yaw_transform(0.7, (1.0, -2.0, 0.5)))
    there = transform_codes(rotation, encode_boxes(boxes))
    expected = transform_boxes(rotation, boxes)
    torch.testing.assert_close(decode_boxes(there), expected)
    rows = tuple(tuple(row) for row in rotation.tolist())
    back = codes_in_ego(there, optional_matrix(rows))
    torch.testing.assert_close(back, encode_boxes(boxes).float(), atol=1e-5, rtol=1e-5)


def test_a_model_with_a_frame_of_its_own_predicts_in_ego() -> None:
    """A model with a rotated frame, and the same model in ego on a vehicle that is rotated in the same way,
    give the same boxes and memories."""
    rotation = yaw_transform(-math.pi / 2, (0.9, 0.2, 0.0))
    rows = tuple(tuple(float(v) for v in row) for row in rotation)
    config = small_config(image_queries=0)
    torch.manual_seed(0)
    plain = build_stream_petr(config).eval()
    moved = build_stream_petr(replace(config, model_from_ego=rows)).eval()
    moved.load_state_dict(plain.state_dict())
    memory, memory_moved = plain.start_memory(), moved.start_memory()
    for step in range(3):
        pose = yaw_transform(0.2 * step, (100.0 + 3 * step, 40.0, 0.0))
        frame = make_frame(config, step, time=0.5 * step, first=step == 0, pose=pose)
        matrix = torch.from_numpy(rotation)
        rotated = frame._replace(
            rig=frame.rig._replace(ego_from_camera=(matrix @ frame.rig.ego_from_camera.double()).float()),
            global_from_ego=frame.global_from_ego @ torch.linalg.inv(matrix),
        )
        with torch.no_grad():
            expected, memory = plain(rotated, memory)
            found, memory_moved = moved(frame, memory_moved)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
        back = transform_codes(torch.linalg.inv(matrix), expected.codes)
        torch.testing.assert_close(found.codes, back, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(memory_moved.centers_global, memory.centers_global, atol=1e-3, rtol=1e-6)


def test_configurations_of_imported_models_survive_json() -> None:
    config = stream_petr_config("r50_704x256_900q", CLASS_NAMES)
    assert from_dict(DetectorConfig, to_dict(config)) == config
    with pytest.raises(UserError, match="model_from_ego"):
        SparseBEVConfig(preset="x", model_from_ego=((1.0, 0.0),))
    with pytest.raises(UserError, match="point_range_m"):
        replace(config.decoder, point_range_m=(1.0, 2.0, 3.0, 0.0, 0.0, 0.0))


def test_points_are_normalised_to_the_configured_range() -> None:
    decoder = ["decoder.point_range_m=[-51.2, -51.2, -5.0, 51.2, 51.2, 3.0]"]
    model = build_stream_petr(small_config(*decoder, image_queries=0))
    corners = model.points_in_metres(torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    torch.testing.assert_close(corners, torch.tensor([[-51.2, -51.2, -5.0], [51.2, 51.2, 3.0]]))
    torch.testing.assert_close(model.points_normalised(corners), torch.tensor([[0.0] * 3, [1.0] * 3]))


def test_a_detector_returns_labels_in_the_order_of_class_names() -> None:
    order = (*CLASS_NAMES[3:], *CLASS_NAMES[:3])
    plain = small_model(image_queries=0)
    model = build_stream_petr(replace(plain.config, class_names=order))
    state = plain.state_dict()
    for name in ("classifier.6.weight", "classifier.6.bias"):
        state[name] = state[name].roll(-3, dims=0)
    model.load_state_dict(state)
    view = CameraView(
        image=np.full((32, 96, 3), 90, dtype=np.uint8),
        intrinsics=np.array([[80.0, 0, 48], [0, 80.0, 16], [0, 0, 1]]),
        ego_from_camera=camera_ring()[0, 0].double().numpy(),
        global_from_ego=np.eye(4),
        stamp_ns=0,
    )
    camera_round = CameraRound(views=(view,) * 6, reference_stamp_ns=0, global_from_ego=np.eye(4))
    settings = {"weights_name": "", "device": torch.device("cpu"), "score_threshold": 0.0, "runtime": "plain"}
    found, expected = (Detector(m, **settings).step(camera_round) for m in (model, plain))
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
    key = [np.lexsort((objects.labels, objects.scores.round(6))) for objects in (found, expected)]
    np.testing.assert_array_equal(found.labels[key[0]], expected.labels[key[1]])
    unknown_class = build_stream_petr(replace(plain.config, class_names=("tree", *CLASS_NAMES[1:])))
    with pytest.raises(UserError, match="has class 'tree'"):
        Detector(unknown_class, **settings)


def test_scrambled_groups_follow_the_flat_index_of_the_public_code() -> None:
    weights = torch.arange(4.0).view(1, 1, 4, 1, 1)
    found = scramble_groups(weights, 8)[0, 0, :, :, 0, 0]
    assert found.flatten().tolist() == [g for g in range(4) for _ in range(8)]
    assert scramble_groups(weights, 4)[0, 0, 0, :, 0, 0].tolist() == [0.0] * 4
    assert scramble_groups(weights, 1)[0, 0, 0, :, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_published_cones_contain_plain_points_and_cycle_through_the_cameras() -> None:
    frame = make_frame(small_config(), 0)
    intrinsics = frame.rig.intrinsics.clone()
    intrinsics[0, :, 0, 0] = torch.arange(6) * 100.0 + 100
    rig = frame.rig._replace(intrinsics=intrinsics)
    reach = torch.tensor([61.2, 61.2, 10.0])
    ours, public = (
        token_geometry(rig, (2, 6), 16, 64, reach, published_cone=published) for published in (False, True)
    )
    torch.testing.assert_close(inverse_sigmoid(public.cone[..., 2:5]), ours.cone[..., 2:5])
    torch.testing.assert_close(inverse_sigmoid(public.cone[..., 5:]), ours.frustum[..., 3 * 34 : 3 * 35])
    assert ours.cone[0, :12, 0].tolist() == pytest.approx([0.1] * 12)
    assert public.cone[0, :12, 0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6] * 2)
    assert ours.frustum.equal(public.frustum)


def test_unrotated_velocities_keep_the_axes_of_the_frame_that_predicted_them() -> None:
    model = small_model(image_queries=0)
    decoder = model.config.decoder
    memory, pseudo = model.start_memory(), model.points_in_metres(model.pseudo_points)
    predicted = torch.zeros(1, 20, 10)
    predicted[..., 8:] = torch.randn(1, 20, 2, generator=torch.Generator().manual_seed(0)) * 5
    tilted = make_transform(quaternion_to_rotation((0.9, 0.03, -0.05, 0.4)), (500.0, 300.0, 2.0))
    for step, pose in enumerate((tilted, yaw_transform(1.2, (503.0, 301.0, 2.0)))):
        frame = make_frame(model.config, step, first=step == 0, pose=pose)
        aligned = align_memory(memory, frame, pseudo, rotate_velocity=False)
        if step == 0:
            assert not aligned.velocity_ego.any()
            features, logits = torch.zeros(1, 20, decoder.channels), torch.arange(20.0).view(1, 20, 1)
            kept = decoder.num_propagated
            memory = update_memory(
                memory, aligned, frame, features, predicted, logits.expand(-1, -1, 10), kept
            )
    kept = decoder.num_propagated
    expected = predicted[0, -kept:, 8:].flip(0)
    torch.testing.assert_close(aligned.velocity_ego[0, :kept], expected, atol=1e-5, rtol=1e-5)
    assert not aligned.velocity_ego[0, kept:].any()


def test_unseen_points_keep_their_projection_into_the_first_camera_if_requested() -> None:
    frame = make_frame(small_config(), 0)
    rig = CameraRig(*(value[:, None, :2] for value in frame.rig))
    point = torch.tensor([10.0, 0.0, 4.0]).view(1, 1, 1, 1, 3)
    seen, kept = (project_to_views(point, rig, (32, 96), keep_unseen=keep) for keep in (False, True))
    assert not seen.seen.any()
    assert seen.uv.flatten().tolist() == [-2.0, -2.0]
    assert -1.0 < float(kept.uv[..., 1]) < 0.0
    masked = rig._replace(mask=torch.zeros_like(rig.mask))
    assert project_to_views(point, masked, (32, 96), keep_unseen=True).uv.flatten().tolist() == [-2.0, -2.0]
