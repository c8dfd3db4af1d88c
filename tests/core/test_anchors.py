# SPDX-License-Identifier: Apache-2.0
"""Anchored queries: the view frame, refinement, ambiguous headings, and boxes from memory."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.geometry import line_of_sight, rotate_2d, rotate_2d_back, yaw_transform
from ftkd_core.losses.dense_head import _supervised_cells
from ftkd_core.losses.headings import target_heading
from ftkd_core.models.anchors import (
    Anchors,
    anchor_features,
    face_forward,
    points_as_anchors,
    refine_anchors,
)
from ftkd_core.models.dense_head import ray_features, resolve_heading
from ftkd_core.models.memory import align_memory
from ftkd_core.models.predictions import REFERENCE_FOCAL_PX
from tests.core.helpers import drive, small_config, small_model

ANGLE = st.floats(-3.14, 3.14)


def rotated(codes: torch.Tensor, angle: float) -> torch.Tensor:
    """Return codes (..., 10) of the same boxes in a rotated ego frame."""
    axis = torch.tensor([math.cos(angle), math.sin(angle)])
    heading = rotate_2d(codes[..., [7, 6]], axis).flip(-1)
    middle = codes[..., 2:6]
    return torch.cat(
        [rotate_2d(codes[..., :2], axis), middle, heading, rotate_2d(codes[..., 8:], axis)], dim=-1
    )


@given(ANGLE, ANGLE)
def test_rotating_back_inverts_rotating(angle: float, other: float) -> None:
    axis = torch.tensor([math.cos(angle), math.sin(angle)])
    vector = torch.tensor([math.cos(other), math.sin(other)]) * 3
    assert torch.allclose(rotate_2d_back(rotate_2d(vector, axis), axis), vector, atol=1e-5)
    x_axis = torch.tensor([3.0, 0.0])
    assert torch.allclose(rotate_2d(x_axis, axis), 3 * axis, atol=1e-5)


@given(ANGLE)
def test_refinement_and_features_are_rotation_equivariant(angle: float) -> None:
    """An anchor rotated about the vehicle and refined by the same change gives the rotated box."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randn(1, 7, 10, generator=generator) * torch.tensor([20.0, 20.0] + [1.0] * 8)
    change = torch.randn(1, 7, 10, generator=generator)
    logits = torch.randn(1, 7, 10, generator=generator)
    gain_and_age = (
        torch.rand(1, 7, 2, generator=generator),
        torch.tensor([[0.0, 0.0, 0.5, 0.5, 0.1, 1.0, 2.0]]),
    )
    straight = refine_anchors(codes, change, *gain_and_age)
    after = refine_anchors(rotated(codes, angle), change, *gain_and_age)
    assert torch.allclose(after, rotated(straight, angle), atol=1e-2)
    features = anchor_features(Anchors(codes, logits))
    assert torch.allclose(anchor_features(Anchors(rotated(codes, angle), logits)), features, atol=1e-4)


def test_zero_change_keeps_the_anchor_and_the_first_axis_points_away() -> None:
    anchors = points_as_anchors(torch.tensor([[[10.0, 10.0, 0.5], [0.0, 0.0, 0.0]]]), 10)
    gain_and_age = (torch.full((1, 2, 2), 0.5), torch.zeros(1, 2))
    assert torch.equal(refine_anchors(anchors.codes, torch.zeros(1, 2, 10), *gain_and_age), anchors.codes)
    farther = refine_anchors(anchors.codes, torch.eye(10)[:1].expand(1, 2, 10), *gain_and_age)[0]
    assert torch.count_nonzero(farther[:, 8:]) == 0  # an offset of a new query gives no velocity
    step = (1 + 0.05 * math.sqrt(200)) / math.sqrt(2)
    assert torch.allclose(farther[0, :2], torch.tensor([10 + step, 10 + step]))
    assert torch.allclose(farther[1, :2], torch.tensor([1.0, 0.0]))  # at the vehicle itself: x
    assert torch.equal(line_of_sight(torch.zeros(3)), torch.tensor([1.0, 0.0]))


def test_an_offset_of_a_box_from_memory_corrects_its_velocity() -> None:
    codes = torch.zeros(1, 1, 10)
    codes[..., 1] = 20.0  # directly to the left of the vehicle: the line of sight is y
    codes[..., 8] = 4.0
    change = torch.zeros(1, 1, 10)
    change[..., 1] = -0.5  # across the line of sight, which is +x; the unit is 2 m
    gain = torch.tensor([[[0.1, 0.5]]])
    moved = refine_anchors(codes, change, gain, torch.full((1, 1), 0.5))
    assert torch.allclose(moved[0, 0, :2], torch.tensor([1.0, 20.0]), atol=1e-5)
    assert torch.allclose(moved[0, 0, 8:], torch.tensor([4.0 + 0.5 * 1.0 / 0.5, 0.0]), atol=1e-5)


def test_headings_follow_the_direction_of_motion() -> None:
    heading = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    velocity = torch.tensor([[5.0, 1.0], [-5.0, 1.0], [-0.5, 0.0], [0.0, -9.0]])
    assert face_forward(heading, velocity)[:, 0].tolist() == [1.0, -1.0, 1.0, 1.0]


@given(ANGLE, st.floats(-1.4, 1.4))
def test_the_axis_gives_the_angle_and_the_heading_the_side(yaw: float, error: float) -> None:
    axis = torch.tensor([math.cos(2 * yaw), math.sin(2 * yaw)])
    rough = torch.tensor([math.cos(yaw + error), math.sin(yaw + error)])
    expected = torch.tensor([math.cos(yaw), math.sin(yaw)])
    assert torch.allclose(resolve_heading(axis, rough), expected, atol=1e-3)
    assert torch.allclose(resolve_heading(axis, -rough), -expected, atol=1e-3)


def test_ray_features_give_the_depth_of_the_ground() -> None:
    """The point at that depth on the ray of a cell has height 0."""
    frame = drive(small_config(), 1)[0]
    stride = 8
    features = ray_features(frame.rig, (4, 12), stride)[0]
    k, pose = frame.rig.intrinsics[0, 2], frame.rig.ego_from_camera[0, 2]
    for row, column in ((3, 0), (2, 5), (3, 11)):
        pixel = torch.tensor([(column + 0.5) * stride, (row + 0.5) * stride, 1.0])
        ray = torch.linalg.inv(k) @ pixel
        depth = features[2, 2, row, column].exp() * k[0, 0] / REFERENCE_FOCAL_PX
        point = pose[:3, :3] @ (ray * depth) + pose[:3, 3]
        assert abs(float(point[2])) < 1e-3
        assert torch.allclose(features[2, :2, row, column], ray[:2])
    sky = features[2, 2, 0].exp() * k[0, 0] / REFERENCE_FOCAL_PX
    assert torch.allclose(sky, torch.full((12,), 200.0), rtol=1e-4)


def test_target_headings_follow_the_scoring_of_the_devkit() -> None:
    labels = torch.tensor([CLASS_NAMES.index(name) for name in ("car", "barrier", "barrier", "traffic_cone")])
    true = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    predicted = torch.tensor([[-0.9, 0.1], [-0.9, 0.1], [0.3, 0.4], [0.5, 0.5]])
    target = target_heading(true, predicted, labels)
    assert torch.equal(target[:3], torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]))
    assert torch.isnan(target[3]).all()


def test_supervised_cells_lie_in_the_box_of_the_object_and_in_the_image() -> None:
    boxes = torch.tensor([[[[-0.5, 0.0, 1.4, 0.8], [4.9, 1.8, 5.1, 2.2]]]])  # (B, N, G, 4) in cells
    row, column = torch.tensor([[[0, 2]]]), torch.tensor([[[0, 5]]])
    visible = (torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long), torch.tensor([0, 1]))
    _, _, slot, rows, columns, share = _supervised_cells(visible, boxes, row, column, (4, 12))
    shares = {
        (s, r, c): w for s, r, c, w in zip(*(v.tolist() for v in (slot, rows, columns, share)), strict=True)
    }
    assert shares == {(0, 0, 0): 1.0, (0, 0, 1): 0.5, (1, 2, 5): 1.0}


def test_boxes_from_memory_are_moved_and_rotated_into_the_current_frame() -> None:
    """Boxes are expected where their velocity moves them, in the vehicle's new frame."""
    model = small_model()
    first, second = drive(model.config, 2)
    second = second._replace(global_from_ego=torch.from_numpy(yaw_transform(0.5, (2.0, 1.0, 0.0)))[None])
    with torch.no_grad():
        predictions, memory = model(first, model.start_memory(1))
    past = align_memory(memory, second, model.points_in_metres(model.pseudo_points))
    anchors = model.past_anchors(past)
    best = predictions.logits[-1][0].amax(-1).topk(6).indices
    before = predictions.codes[-1][0, best].double()
    world = before[:, :2] + before[:, 8:10] * 0.5  # the first pose is the identity
    inverse = torch.linalg.inv(second.global_from_ego[0])
    expected = world @ inverse[:2, :2].mT + inverse[:2, 3]
    assert torch.allclose(anchors.codes[0, :6, :2].double(), expected, atol=1e-3)
    yaw_then = torch.atan2(before[:, 6], before[:, 7])
    yaw_now = torch.atan2(anchors.codes[0, :6, 6], anchors.codes[0, :6, 7]).double()
    assert torch.allclose(torch.cos(yaw_then - 0.5 - yaw_now), torch.ones(6).double(), atol=1e-4)
    assert torch.allclose(anchors.codes[0, :6, 3:6].double(), before[:, 3:6], atol=1e-5)
    assert anchors.logits[0, :6] == pytest.approx(predictions.logits[-1][0, best] + 4.6, abs=1e-4)


def test_a_stream_starts_without_evidence() -> None:
    model = small_model()
    frame = drive(model.config, 1)[0]
    with torch.no_grad():
        _, memory = model(frame, model.start_memory(1))
        _, memory = model(frame, memory)
    assert torch.count_nonzero(memory.logits[0, 6:]) == 0
    assert torch.count_nonzero(memory.shape_global[0, 6:]) == 0
