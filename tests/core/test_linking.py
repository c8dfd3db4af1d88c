# SPDX-License-Identifier: Apache-2.0
"""Linking of proposals across frames: velocities and positions, and no motion without evidence."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ftkd_core.models.anchors import Anchors
from ftkd_core.models.linking import (
    FrameProposals,
    MotionPrior,
    Observations,
    link_proposals,
    motion_prior,
    support,
)

TIMES = (0.0, -0.5, -1.0, 0.5, 1.0)
SPARE = 4  # proposals per frame without an object, far away and weak


def window(
    start: list[tuple[float, float]], velocity: list[tuple[float, float]], labels: list[int],
    *, times: tuple[float, ...] = TIMES, noise: float = 0.0, seed: int = 0,
) -> FrameProposals:  # fmt: skip
    """Return objects with constant velocity, in a different order in every frame, and proposals without an
    object."""
    generator = torch.Generator().manual_seed(seed)
    count = len(start) + SPARE
    codes = torch.zeros(1, len(times), count, 10)
    logits = torch.full((1, len(times), count, 3), -8.0)
    for frame, time in enumerate(times):
        order = torch.arange(len(start))
        if frame:
            order = torch.randperm(len(start), generator=generator)
        for place, own in enumerate(order.tolist()):
            position = torch.tensor(start[own]) + time * torch.tensor(velocity[own])
            position = position + noise * torch.randn(2, generator=generator)
            codes[0, frame, place, :2] = position
            codes[0, frame, place, 7] = 1.0  # heading along x
            logits[0, frame, place, labels[own]] = 3.0
        codes[0, frame, len(start) :, :2] = 200.0 + 50.0 * torch.rand(SPARE, 2, generator=generator)
    origin = torch.zeros(1, len(times), 2)
    return FrameProposals(codes, logits, origin, torch.tensor([times]))


def linked(frames: FrameProposals, names: Sequence[str] = ("car", "car", "car")) -> Anchors:
    """Link the first frame, the current one, to the others."""
    return link_proposals(
        FrameProposals(*(value[:, :1] for value in frames)),
        FrameProposals(*(value[:, 1:] for value in frames)),
        MotionPrior(*motion_prior(names)),
    )


def velocities(anchors: Anchors, count: int) -> Tensor:
    return anchors.codes[0, :count, 8:]


@settings(max_examples=30, deadline=None)
@given(st.floats(2.0, 15.0), st.floats(-math.pi, math.pi))
def test_constant_velocity_is_recovered(speed: float, direction: float) -> None:
    moving = (speed * math.cos(direction), speed * math.sin(direction))
    found = linked(window([(20.0, 3.0), (-15.0, -8.0)], [moving, (0.0, 0.0)], [0, 0]))
    error = velocities(found, 2) - torch.tensor([moving, (0.0, 0.0)])
    assert error.norm(dim=-1).max() < 0.1 * speed + 0.1  # the prior reduces it slightly


def test_crossing_objects_keep_their_own_velocities() -> None:
    start, velocity = [(20.0, 0.0), (24.0, 6.0)], [(6.0, 0.0), (0.0, -6.0)]
    found = velocities(linked(window(start, velocity, [0, 0])), 2)
    assert torch.allclose(found, torch.tensor(velocity), atol=0.8)


def test_a_heading_against_the_motion_is_reversed() -> None:
    found = linked(window([(20.0, 0.0)], [(-8.0, 0.0)], [0])).codes[0, 0]
    assert found[7] == -1.0


def test_other_classes_are_not_linked_and_immobile_classes_do_not_move() -> None:
    frames = window([(20.0, 0.0)], [(6.0, 0.0)], [0])
    frames.logits[0, 1:, 0] = torch.tensor([-8.0, 3.0, -8.0])
    assert velocities(linked(frames), 1).norm() < 1e-3
    frames = window([(20.0, 0.0)], [(6.0, 0.0)], [2])
    assert velocities(linked(frames), 1).norm() > 5
    assert velocities(linked(frames, ("car", "car", "barrier")), 1).norm() == 0


def test_positions_of_standing_objects_improve_over_a_single_frame() -> None:
    start = [(x, y) for x in (-30.0, -15.0, 15.0, 30.0) for y in (-12.0, 12.0)]
    errors = []
    for seed in range(8):
        frames = window(start, [(0.0, 0.0)] * 8, [0] * 8, noise=0.6, seed=seed)
        linked_positions = linked(frames).codes[0, :8, :2]
        truth = torch.tensor(start)
        errors.append(
            [(c - truth).norm(dim=-1).mean() for c in (frames.codes[0, 0, :8, :2], linked_positions)]
        )
    before, after = torch.tensor(errors).mean(0)
    assert after < 0.75 * before


@pytest.mark.parametrize("name", ["car", "trailer", "pedestrian", "bicycle"])
def test_noise_of_positions_gives_standing_objects_no_speed(name: str) -> None:
    """The noise is half of the standard deviation that linking assumes, which is at least 1.4 m at 12 m."""
    start = [(x, y) for x in (-12.0, 0.0, 12.0) for y in (-12.0, 12.0)]
    speeds = []
    for seed in range(10):
        frames = window(start, [(0.0, 0.0)] * 6, [0] * 6, noise=0.7, seed=seed)
        speeds.append(velocities(linked(frames, (name, "car", "car")), 6).norm(dim=-1))
    predicted = torch.cat(speeds)
    assert (predicted < 0.5).float().mean() > 0.9
    assert predicted.mean() < 0.3


@pytest.mark.parametrize(
    ("name", "speed"), [("car", 3.0), ("car", 20.0), ("trailer", 4.0), ("pedestrian", 1.2), ("bicycle", 3.0)]
)
def test_typical_speeds_of_a_class_are_recovered(name: str, speed: float) -> None:
    frames = window([(15.0, 3.0)], [(0.0, speed)], [0], times=(0.0, -0.5, -1.0, -1.5, -2.0), noise=0.1)
    found = velocities(linked(frames, (name, "car", "car")), 1)[0]
    assert found[1] == pytest.approx(speed, rel=0.25)


def test_unusual_speeds_of_a_class_cost_more() -> None:
    names = ("car", "pedestrian", "trailer", "barrier")
    prior = MotionPrior(*motion_prior(names))
    speeds = torch.tensor([0.0, 1.0, 3.0, 10.0]).expand(1, 4, 4)
    cost = prior.cost(torch.arange(4)[None], speeds)[0]  # (class, speed)
    assert (cost[:, 0] == 0).all() and (cost.diff(dim=1) > 0).all()
    assert cost[1, 3] > 4 > cost[0, 3]  # more than the support of four frames for a pedestrian at 10 m/s
    assert cost[2, 1] > cost[0, 1]  # most trailers stand
    assert prior.mobile.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("times", [(0.0,), (0.0, 0.0, 0.0)])
def test_without_frames_at_other_times_proposals_stay_unchanged(times: tuple[float, ...]) -> None:
    frames = window([(20.0, 3.0), (-9.0, 1.0)], [(5.0, 0.0), (0.0, 0.0)], [0, 1], times=times)
    found = linked(frames)
    assert torch.allclose(found.codes[:, :2], frames.codes[:, 0, :2], atol=1e-4)
    assert found.logits.equal(frames.logits[:, 0])


def test_repeated_frames_at_a_scene_end_add_no_motion() -> None:
    plain = velocities(linked(window([(20.0, 3.0)], [(5.0, 1.0)], [0], times=(0.0, -0.5, -1.0))), 1)
    with_repeats = velocities(
        linked(window([(20.0, 3.0)], [(5.0, 1.0)], [0], times=(0.0, -0.5, -1.0, 0.0, 0.0))), 1
    )
    assert torch.allclose(plain, with_repeats, atol=0.6)


def test_linking_is_rotation_equivariant_and_independent_of_batching() -> None:
    frames = window([(20.0, 3.0), (-15.0, 9.0)], [(5.0, 2.0), (0.0, 0.0)], [0, 1], noise=0.2)
    cos, sin = math.cos(0.7), math.sin(0.7)
    rotation = torch.tensor([[cos, sin], [-sin, cos]])
    codes = frames.codes.clone()
    for pair in ([0, 1], [7, 6], [8, 9]):
        codes[..., pair] = codes[..., pair] @ rotation
    rotated = frames._replace(codes=codes)
    plain, other = linked(frames).codes, linked(rotated).codes
    for pair in ([0, 1], [7, 6], [8, 9]):
        assert torch.allclose(plain[0, :2, pair] @ rotation, other[0, :2, pair], atol=1e-3)
    both = FrameProposals(*(torch.cat(pair) for pair in zip(rotated, frames, strict=True)))
    assert torch.allclose(linked(both).codes[1:], plain, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_support_equals_the_explicit_computation_over_all_pairs(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    points = 25 * torch.randn(2, 12, 2, generator=random)
    observed = Observations(
        points, 0.4 + 0.08 * points.norm(dim=-1), torch.rand(2, 12, generator=random),
        torch.randint(3, (2, 12), generator=random),
    )  # fmt: skip
    label = torch.randint(4, (2, 5), generator=random)  # one class without observations
    expected = points[:, :5, None] + torch.randn(2, 5, 7, 2, generator=random)
    distance = (expected[:, :, :, None] - observed.points[:, None, None]).norm(dim=-1)  # (B, I, V, J)
    near = (
        torch.exp(-0.5 * (distance / observed.spread[:, None, None]).square()) * observed.score[:, None, None]
    )
    plain = (near * (label[:, :, None, None] == observed.label[:, None, None])).amax(-1)
    assert torch.allclose(support(label, expected, observed), plain, atol=5e-3)
