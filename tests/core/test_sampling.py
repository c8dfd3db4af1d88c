# SPDX-License-Identifier: Apache-2.0
"""Sampling at points of moving boxes: positions, visibility, and agreement of both implementations."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftkd_core.boxes import box_corners
from ftkd_core.models.sampling import (
    _read_padded,
    box_points,
    move_points,
    project_to_views,
    sample_pyramid,
    sample_pyramid_reference,
)
from ftkd_core.types import CameraRig
from tests.core.helpers import camera_ring

SIZE = (32, 96)  # height, width
CORNERS = torch.tensor(
    [[1, -1, 1], [1, 1, 1], [1, 1, -1], [1, -1, -1], [-1, -1, 1], [-1, 1, 1], [-1, 1, -1], [-1, -1, -1]]
)


def window_rig(frames: int = 2, cameras: int = 6, batch: int = 1) -> CameraRig:
    """Return the ring of cameras of the model tests, the same in every frame."""
    k = torch.tensor([[80.0, 0, SIZE[1] / 2], [0, 80.0, SIZE[0] / 2], [0, 0, 1]])
    shape = (batch, frames, cameras)
    return CameraRig(
        k.expand(*shape, 3, 3).clone(),
        camera_ring(6)[:, None, :cameras].expand(*shape, 4, 4).clone(),
        torch.ones(shape, dtype=torch.bool),
    )


def test_offsets_of_one_half_are_the_corners_of_the_box() -> None:
    boxes = torch.tensor([[[10.0, -5.0, 1.0, 4.6, 1.9, 1.7, 0.7, 3.0, 1.0], [0, 0, 0, 1, 2, 3, -2.0, 0, 0]]])
    points = box_points(boxes, (CORNERS / 2).expand(1, 2, 8, 3))
    assert np.allclose(points[0].numpy(), box_corners(boxes[0].numpy()), atol=1e-5)


@given(st.floats(-20, 20), st.floats(-20, 20), st.floats(-4, 4))
def test_points_move_with_velocity_times_time(vx: float, vy: float, time: float) -> None:
    """With +vx, an object is farther ahead in a future frame and farther behind in a past one."""
    points = torch.tensor([[[[5.0, 2.0, 1.0]]]])
    moved = move_points(points, torch.tensor([[[vx, vy]]]), torch.tensor([[0.0, time]]))
    assert torch.equal(moved[:, 0], points)
    expected = torch.tensor([5.0 + vx * time, 2.0 + vy * time, 1.0])
    assert torch.allclose(moved[0, 1, 0, 0], expected, atol=1e-4)


def test_points_are_projected_into_the_camera_that_sees_them() -> None:
    rig = window_rig(1)
    ahead, behind, above = [10.0, 0.5, 1.4], [-10.0, 0.5, 1.4], [0.0, 0.0, 30.0]
    found = project_to_views(torch.tensor([ahead, behind, above]).view(1, 1, 3, 1, 3), rig, SIZE)
    assert found.seen[0, 0, :, 0].tolist() == [True, True, False]
    assert found.view[0, 0, :2, 0].tolist() == [0, 3]
    # The camera is at (1, 0, 1.5): the point is 9 m ahead of it, 0.5 m to the left, 0.1 m below.
    u, v = SIZE[1] / 2 - 80 * 0.5 / 9, SIZE[0] / 2 + 80 * 0.1 / 9
    assert torch.allclose(found.uv[0, 0, 0, 0], torch.tensor([u / SIZE[1], v / SIZE[0]]), atol=1e-5)


def test_a_masked_camera_sees_nothing() -> None:
    rig = window_rig(1)
    point = torch.tensor([10.0, 0.5, 1.4]).view(1, 1, 1, 1, 3)
    rig.mask[0, 0, 0] = False
    assert not project_to_views(point, rig, SIZE).seen.any()


@pytest.mark.parametrize("cameras", [1, 2, 6])
def test_sampling_equals_the_reference(cameras: int) -> None:
    generator = torch.Generator().manual_seed(0)
    groups, count, frames, batch = 2, 3, 2, 2
    pyramid = [
        torch.randn(batch, frames, cameras, 8, SIZE[0] // s, SIZE[1] // s, generator=generator)
        for s in (4, 8)
    ]
    spread = torch.tensor([12.0, 12.0, 1.0])
    points = torch.randn(batch, frames, 5, groups * count, 3, generator=generator) * spread
    found = project_to_views(points + torch.tensor([0, 0, 1.5]), window_rig(frames, cameras, batch), SIZE)
    assert found.seen.any() and not found.seen.all()
    weights = torch.rand(batch, 5, groups, count, 2, generator=generator)
    fast = sample_pyramid(pyramid, found, weights)
    assert fast.shape == (batch, 5, groups, frames * count, 4)
    assert torch.allclose(fast, sample_pyramid_reference(pyramid, found, weights), atol=1e-5)
    assert torch.allclose(fast, sample_pyramid(pyramid, found, weights, keep_unseen=True), atol=1e-5)
    unseen = ~found.seen.unflatten(3, (groups, count)).permute(0, 2, 3, 1, 4).flatten(3)
    assert torch.count_nonzero(fast[unseen]) == 0


@pytest.mark.parametrize("keep_unseen", [False, True])
def test_half_precision_maps_are_sampled_in_float32(keep_unseen: bool) -> None:
    """Samples of bfloat16 maps equal those of the same values in float32, also under autocast."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, 2, 6, 8, SIZE[0] // 4, SIZE[1] // 4, generator=generator).bfloat16()
    points = torch.randn(1, 2, 9, 4, 3, generator=generator) * torch.tensor([12.0, 12.0, 1.0])
    found = project_to_views(points + torch.tensor([0, 0, 1.5]), window_rig(), SIZE, keep_unseen=keep_unseen)
    weights = torch.rand(1, 9, 2, 2, 1, generator=generator)
    exact = sample_pyramid([maps.float()], found, weights, keep_unseen=keep_unseen)
    with torch.autocast("cpu", torch.bfloat16):
        read = sample_pyramid([maps], found, weights, keep_unseen=keep_unseen)
    assert torch.count_nonzero(exact) > 100
    assert torch.equal(read, exact)


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))
def test_padded_cameras_are_read_as_the_volume_of_the_public_code(
    seed: int, cameras: int, height: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(1, 2, cameras, height, width, generator=generator)
    uv = torch.rand(1, 9, 3, 2, generator=generator) * 4 - 1.5  # far outside the image too
    view = torch.randint(0, cameras, (1, 9, 3, 1), generator=generator).float()
    depth = view * (2.0 / max(cameras - 1, 1)) - (1.0 if cameras > 1 else 0.0)
    grid = torch.cat([uv * 2 - 1, depth], dim=-1)[..., None, :]
    volume = torch.nn.functional.grid_sample(maps, grid, align_corners=True)[..., 0]
    assert torch.allclose(_read_padded(maps, uv, view, cameras), volume, atol=1e-4)
