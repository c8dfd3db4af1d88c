# SPDX-License-Identifier: Apache-2.0
"""Linking proposals through a window: speeds and places it must find, and what it must not make up."""

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
    _Observations,
    _support,
    link_proposals,
    motion_prior,
)

TIMES = (0.0, -0.5, -1.0, 0.5, 1.0)
SPARE = 4  # proposals a frame that belong to nothing, far away and weak


def window(
    start: list[tuple[float, float]], velocity: list[tuple[float, float]], labels: list[int],
    *, times: tuple[float, ...] = TIMES, noise: float = 0.0, seed: int = 0,
) -> FrameProposals:  # fmt: skip
    """Objects that move evenly, seen in every frame in another order, beside proposals of nothing."""
    generator = torch.Generator().manual_seed(seed)
    count = len(start) + SPARE
    codes = torch.zeros(1, len(times), count, 10)
    logits = torch.full((1, len(times), count, 3), -8.0)
    for frame, time in enumerate(times):
        order = torch.arange(len(start))
        if frame:
            order = torch.randperm(len(start), generator=generator)
        for place, own in enumerate(order.tolist()):
            there = torch.tensor(start[own]) + time * torch.tensor(velocity[own])
            there = there + noise * torch.randn(2, generator=generator)
            codes[0, frame, place, :2] = there
            codes[0, frame, place, 7] = 1.0  # faces ahead
            logits[0, frame, place, labels[own]] = 3.0
        codes[0, frame, len(start) :, :2] = 200.0 + 50.0 * torch.rand(SPARE, 2, generator=generator)
    origin = torch.zeros(1, len(times), 2)
    return FrameProposals(codes, logits, origin, torch.tensor([times]))


def linked(frames: FrameProposals, names: Sequence[str] = ("car", "car", "car")) -> Anchors:
    """The first frame is the current one."""
    return link_proposals(
        FrameProposals(*(value[:, :1] for value in frames)),
        FrameProposals(*(value[:, 1:] for value in frames)),
        MotionPrior(*motion_prior(names)),
    )


def velocities(anchors: Anchors, count: int) -> Tensor:
    return anchors.codes[0, :count, 8:]


@settings(max_examples=30, deadline=None)
@given(st.floats(2.0, 15.0), st.floats(-math.pi, math.pi))
def test_the_velocity_of_an_even_motion_is_found(speed: float, direction: float) -> None:
    moving = (speed * math.cos(direction), speed * math.sin(direction))
    found = linked(window([(20.0, 3.0), (-15.0, -8.0)], [moving, (0.0, 0.0)], [0, 0]))
    error = velocities(found, 2) - torch.tensor([moving, (0.0, 0.0)])
    assert error.norm(dim=-1).max() < 0.1 * speed + 0.1  # held back a little


def test_two_that_cross_keep_their_own_velocities() -> None:
    start, velocity = [(20.0, 0.0), (24.0, 6.0)], [(6.0, 0.0), (0.0, -6.0)]
    found = velocities(linked(window(start, velocity, [0, 0])), 2)
    assert torch.allclose(found, torch.tensor(velocity), atol=0.8)


def test_what_faces_the_other_way_is_turned_to_where_it_goes() -> None:
    found = linked(window([(20.0, 0.0)], [(-8.0, 0.0)], [0])).codes[0, 0]
    assert found[7] == -1.0


def test_proposals_of_another_class_are_not_linked_and_some_classes_never_move() -> None:
    frames = window([(20.0, 0.0)], [(6.0, 0.0)], [0])
    frames.logits[0, 1:, 0] = torch.tensor([-8.0, 3.0, -8.0])
    assert velocities(linked(frames), 1).norm() < 1e-3
    frames = window([(20.0, 0.0)], [(6.0, 0.0)], [2])
    assert velocities(linked(frames), 1).norm() > 5
    assert velocities(linked(frames, ("car", "car", "barrier")), 1).norm() == 0


def test_what_stands_is_placed_better_than_by_one_frame() -> None:
    start = [(x, y) for x in (-30.0, -15.0, 15.0, 30.0) for y in (-12.0, 12.0)]
    errors = []
    for seed in range(8):
        frames = window(start, [(0.0, 0.0)] * 8, [0] * 8, noise=0.6, seed=seed)
        together = linked(frames).codes[0, :8, :2]
        truth = torch.tensor(start)
        errors.append([(c - truth).norm(dim=-1).mean() for c in (frames.codes[0, 0, :8, :2], together)])
    before, after = torch.tensor(errors).mean(0)
    assert after < 0.75 * before


@pytest.mark.parametrize("name", ["car", "trailer", "pedestrian", "bicycle"])
def test_what_stands_gets_no_speed_from_the_noise_of_its_places(name: str) -> None:
    """Places half as far off as linking takes them to be, which is 1.4 m and more at 12 m."""
    start = [(x, y) for x in (-12.0, 0.0, 12.0) for y in (-12.0, 12.0)]
    speeds = []
    for seed in range(10):
        frames = window(start, [(0.0, 0.0)] * 6, [0] * 6, noise=0.7, seed=seed)
        speeds.append(velocities(linked(frames, (name, "car", "car")), 6).norm(dim=-1))
    said = torch.cat(speeds)
    assert (said < 0.5).float().mean() > 0.9
    assert said.mean() < 0.3


@pytest.mark.parametrize(
    ("name", "speed"), [("car", 3.0), ("car", 20.0), ("trailer", 4.0), ("pedestrian", 1.2), ("bicycle", 3.0)]
)
def test_what_moves_as_its_class_does_is_found_to(name: str, speed: float) -> None:
    frames = window([(15.0, 3.0)], [(0.0, speed)], [0], times=(0.0, -0.5, -1.0, -1.5, -2.0), noise=0.1)
    found = velocities(linked(frames, (name, "car", "car")), 1)[0]
    assert found[1] == pytest.approx(speed, rel=0.25)


def test_a_class_asks_more_of_a_speed_that_is_unusual_for_it() -> None:
    names = ("car", "pedestrian", "trailer", "barrier")
    prior = MotionPrior(*motion_prior(names))
    speeds = torch.tensor([0.0, 1.0, 3.0, 10.0]).expand(1, 4, 4)
    cost = prior.cost(torch.arange(4)[None], speeds)[0]  # (class, speed)
    assert (cost[:, 0] == 0).all() and (cost.diff(dim=1) > 0).all()
    assert cost[1, 3] > 4 > cost[0, 3]  # nobody walks at 10 m/s, whatever four frames say
    assert cost[2, 1] > cost[0, 1]  # most trailers stand
    assert prior.mobile.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("times", [(0.0,), (0.0, 0.0, 0.0)])
def test_a_window_without_other_moments_says_nothing(times: tuple[float, ...]) -> None:
    frames = window([(20.0, 3.0), (-9.0, 1.0)], [(5.0, 0.0), (0.0, 0.0)], [0, 1], times=times)
    found = linked(frames)
    assert torch.allclose(found.codes[:, :2], frames.codes[:, 0, :2], atol=1e-4)
    assert found.logits.equal(frames.logits[:, 0])


def test_a_repeated_frame_of_the_scene_end_adds_no_motion() -> None:
    plain = velocities(linked(window([(20.0, 3.0)], [(5.0, 1.0)], [0], times=(0.0, -0.5, -1.0))), 1)
    ended = velocities(linked(window([(20.0, 3.0)], [(5.0, 1.0)], [0], times=(0.0, -0.5, -1.0, 0.0, 0.0))), 1)
    assert torch.allclose(plain, ended, atol=0.6)


def test_the_world_may_be_turned_and_windows_batched() -> None:
    frames = window([(20.0, 3.0), (-15.0, 9.0)], [(5.0, 2.0), (0.0, 0.0)], [0, 1], noise=0.2)
    cos, sin = math.cos(0.7), math.sin(0.7)
    turn = torch.tensor([[cos, sin], [-sin, cos]])
    codes = frames.codes.clone()
    for pair in ([0, 1], [7, 6], [8, 9]):
        codes[..., pair] = codes[..., pair] @ turn
    turned = frames._replace(codes=codes)
    plain, other = linked(frames).codes, linked(turned).codes
    for pair in ([0, 1], [7, 6], [8, 9]):
        assert torch.allclose(plain[0, :2, pair] @ turn, other[0, :2, pair], atol=1e-3)
    both = FrameProposals(*(torch.cat(pair) for pair in zip(turned, frames, strict=True)))
    assert torch.allclose(linked(both).codes[1:], plain, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_support_is_that_of_all_pairs(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    points = 25 * torch.randn(2, 12, 2, generator=random)
    seen = _Observations(
        points, 0.4 + 0.08 * points.norm(dim=-1), torch.rand(2, 12, generator=random),
        torch.randint(3, (2, 12), generator=random),
    )  # fmt: skip
    label = torch.randint(4, (2, 5), generator=random)  # one class nobody saw
    gone = points[:, :5, None] + torch.randn(2, 5, 7, 2, generator=random)
    distance = (gone[:, :, :, None] - seen.points[:, None, None]).norm(dim=-1)  # (B, I, V, J)
    near = torch.exp(-0.5 * (distance / seen.spread[:, None, None]).square()) * seen.score[:, None, None]
    plain = (near * (label[:, :, None, None] == seen.label[:, None, None])).amax(-1)
    assert torch.allclose(_support(label, gone, seen), plain, atol=5e-3)
