# SPDX-License-Identifier: Apache-2.0
"""Conversion of boxes and transformation between frames."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftkd_core.boxes import box_corners, decode_boxes, encode_boxes, transform_boxes, wrap_angle
from ftkd_core.geometry import invert_rigid, yaw_transform

seeds = st.integers(0, 2**32 - 1)


def random_boxes(seed: int, count: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(count, 3, generator=generator, dtype=torch.float64) * 100 - 50
    sizes = torch.rand(count, 3, generator=generator, dtype=torch.float64) * 10 + 0.2
    yaw = torch.rand(count, 1, generator=generator, dtype=torch.float64) * 6 - 3
    velocity = torch.randn(count, 2, generator=generator, dtype=torch.float64) * 5
    return torch.cat([centers, sizes, yaw, velocity], dim=1)


@given(seeds)
def test_codes_round_trip(seed: int) -> None:
    boxes = random_boxes(seed)
    assert torch.allclose(decode_boxes(encode_boxes(boxes)), boxes, atol=1e-9)


def test_codes_have_the_order_of_stream_petr() -> None:
    code = encode_boxes(torch.tensor([1.0, 2.0, 3.0, 4.0, 2.0, 1.5, 0.5, 6.0, 7.0]))
    expected = [1, 2, 3, np.log(2.0), np.log(4.0), np.log(1.5), np.sin(0.5), np.cos(0.5), 6, 7]
    assert np.allclose(code.numpy(), expected, atol=1e-6)


@given(seeds, st.floats(-3.1, 3.1), st.floats(-500, 500), st.floats(-500, 500))
def test_transforming_there_and_back_keeps_boxes(seed: int, yaw: float, x: float, y: float) -> None:
    boxes = random_boxes(seed)
    dst_from_src = torch.from_numpy(yaw_transform(yaw, (x, y, 1.0)))
    back = transform_boxes(invert_rigid(dst_from_src), transform_boxes(dst_from_src, boxes))
    back[:, 6] = boxes[:, 6] + wrap_angle(back[:, 6] - boxes[:, 6])
    assert torch.allclose(back, boxes, atol=1e-8)


@given(seeds, st.floats(-3.1, 3.1))
def test_corners_of_transformed_boxes_are_transformed_corners(seed: int, yaw: float) -> None:
    boxes = random_boxes(seed)
    dst_from_src = yaw_transform(yaw, (3.0, -4.0, 0.5))
    moved = box_corners(transform_boxes(torch.from_numpy(dst_from_src), boxes).numpy())
    corners = box_corners(boxes.numpy()) @ dst_from_src[:3, :3].T + dst_from_src[:3, 3]
    assert np.allclose(moved, corners, atol=1e-8)


def test_the_length_is_along_the_heading() -> None:
    corners = box_corners(np.array([[0, 0, 1, 4, 2, 1.5, np.pi / 2, 0, 0]]))[0]
    assert np.allclose(np.ptp(corners, axis=0), [2, 4, 1.5])
    assert np.all(corners[:4, 1] > 0)  # the front face comes first


@given(st.floats(-100, 100))
def test_wrapped_angles_differ_by_full_turns(angle: float) -> None:
    wrapped = wrap_angle(torch.tensor(angle, dtype=torch.float64))
    assert -np.pi <= float(wrapped) < np.pi
    assert np.isclose(np.cos(float(wrapped)), np.cos(angle), atol=1e-9)
    assert np.isclose(np.sin(float(wrapped)), np.sin(angle), atol=1e-9)
