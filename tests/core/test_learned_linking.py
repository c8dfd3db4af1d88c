# SPDX-License-Identifier: Apache-2.0
"""Learned linking: symmetric, unaffected by repeated frames, and able to learn velocities without a prior."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.evaluation.detector_benchmark import compare_detectors
from ftkd_core.losses.linking import linking_losses
from ftkd_core.models.anchored_stream_petr import AnchoredStreamPETR
from ftkd_core.models.anchors import Anchors
from ftkd_core.models.learned_linking import LearnedLinking
from ftkd_core.models.linking import FrameProposals, motion_prior
from ftkd_core.models.predictions import IMPOSSIBLE, LinkedProposals
from ftkd_core.runtime.detector import Detector
from ftkd_core.runtime.export import export_onnx
from ftkd_core.runtime.exported_engine import ExportedEngine
from ftkd_core.runtime.sessions import OnnxSession, OpenVinoSession
from ftkd_core.types import Targets
from tests.core.helpers import small_model
from tests.core.rounds import make_round

TIMES = (-0.5, -1.0, 0.5)
CHANNELS = 6
MOBILE = motion_prior(CLASS_NAMES)[0]
CAR, BARRIER = CLASS_NAMES.index("car"), CLASS_NAMES.index("barrier")


def linking(seed: int = 0) -> LearnedLinking:
    """A network with random weights, also where training starts at zero."""
    torch.manual_seed(seed)
    model = LearnedLinking(len(TIMES), len(CLASS_NAMES), CHANNELS, CHANNELS, 8)
    torch.nn.init.normal_(model.content.weight)
    return model.eval()


class World:
    """Objects (B, I) that move on straight lines, seen in the current frame and at TIMES, with noise."""

    def __init__(self, seed: int, batch: int = 1, objects: int = 8, noise_m: float = 0.2) -> None:
        random = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random)

        self.centers = 25 * draw(batch, objects, 2)
        self.velocity = 5 * draw(batch, objects, 2)
        self.velocity[:, ::2] = 0.0
        self.label = torch.full((batch, objects), CAR)
        heading = draw(batch, objects, 2)
        self.heading = heading / heading.norm(dim=-1, keepdim=True)
        self.time = torch.tensor(TIMES).expand(batch, -1)
        path = self.centers[:, None] + self.velocity[:, None] * self.time[:, :, None, None]
        self.seen = path + noise_m * draw(*path.shape)
        self.features = draw(batch, objects, CHANNELS)
        self.other_features = draw(batch, len(TIMES), objects, CHANNELS)

    def codes(self, centers: Tensor) -> Tensor:
        heading = self.heading.view(len(centers), *[1] * (centers.ndim - 3), -1, 2).expand_as(centers)
        middle = torch.zeros(*centers.shape[:-1], 4)
        return torch.cat([centers, middle, heading.flip(-1), torch.zeros_like(centers)], dim=-1)

    def logits(self, centers: Tensor) -> Tensor:
        one_hot = torch.nn.functional.one_hot(self.label, len(CLASS_NAMES)).float() * 6 - 4
        return one_hot.view(len(centers), *[1] * (centers.ndim - 3), *one_hot.shape[1:]).expand(
            *centers.shape[:-1], -1
        )

    def run(self, model: LearnedLinking, order: Tensor | None = None) -> LinkedProposals:
        """Link; with the proposals of the other frames in another order."""
        codes, logits, features = self.codes(self.seen), self.logits(self.seen), self.other_features
        if order is not None:
            codes, logits, features = (value[:, :, order] for value in (codes, logits, features))
        origin = torch.zeros(len(codes), len(TIMES), 2)
        others = FrameProposals(codes, logits, origin, self.time)
        centers = self.centers[:, None]
        zero = torch.zeros(len(codes), 1)
        current = FrameProposals(
            self.codes(centers), self.logits(centers), zero[..., None].expand(-1, -1, 2), zero
        )
        return model(current, others, self.features, features, MOBILE)  # type: ignore[no-any-return]

    def turned(self, angle: float) -> "World":
        """The same world around a vehicle that is turned."""
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        other = World.__new__(World)
        vars(other).update(vars(self))
        for name in ("centers", "velocity", "heading", "seen"):
            setattr(other, name, getattr(self, name) @ turn.T)
        return other

    def targets(self) -> Targets:
        batch, objects = self.label.shape
        boxes = torch.zeros(batch, objects, 9)
        boxes[..., :2], boxes[..., 3:6], boxes[..., 7:] = self.centers, 1.0, self.velocity
        per_camera = torch.zeros(batch, 1, objects)
        return Targets(
            boxes, self.label, torch.ones(batch, objects, dtype=torch.bool),
            per_camera[..., None].expand(-1, -1, -1, 4), per_camera[..., None].expand(-1, -1, -1, 2),
            per_camera, per_camera.bool(),
        )  # fmt: skip


@given(seed=st.integers(0, 10**6), angle=st.floats(-math.pi, math.pi))
@settings(max_examples=20, deadline=None)
def test_velocities_turn_with_the_vehicle(seed: int, angle: float) -> None:
    world = World(seed)
    model = linking()
    straight, turned = world.run(model), world.turned(angle).run(model)
    back = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    # Where two candidates are equally good, rounding may choose either.
    best = straight.scores.sort(-1, descending=True).values
    clear = best[..., 0] - best[..., 1] > 1e-3
    error = (turned.velocity @ back.T - straight.velocity).norm(dim=-1)
    assert float((error * clear).max().detach()) < 0.02
    assert float((turned.content - straight.content).norm(dim=-1).mul(clear).max().detach()) < 0.02


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_order_of_other_proposals_does_not_matter(seed: int) -> None:
    world, model = World(seed), linking()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    a, b = world.run(model), world.run(model, order)
    assert torch.allclose(a.velocity, b.velocity, atol=1e-4)


def test_a_frame_that_repeats_the_current_one_does_not_matter() -> None:
    world, model = World(3), linking()
    world.time = world.time.clone()
    world.time[:, 1] = 0.0
    before = world.run(model)
    world.seen = world.seen.clone()
    world.seen[:, 1] += 7.0
    world.other_features = world.other_features.clone()
    world.other_features[:, 1] = 5.0
    after = world.run(model)
    assert torch.allclose(before.velocity, after.velocity, atol=1e-5)
    assert torch.allclose(before.scores, after.scores, atol=1e-4)


def test_without_other_frames_only_standing_still_is_possible() -> None:
    world = World(5)
    world.time = torch.zeros_like(world.time)
    linked = world.run(linking())
    assert bool((linked.scores[..., 1:] <= IMPOSSIBLE).all()) and bool(torch.isfinite(linked.velocity).all())


def test_objects_that_cannot_move_stand_still() -> None:
    world = World(7)
    world.label = torch.full_like(world.label, BARRIER)
    assert float(world.run(linking()).velocity.abs().max()) == 0.0


def test_the_loss_falls_and_velocities_become_right() -> None:
    """Most candidates lead to other objects; the right ones are learned, without a prior."""
    model = linking().train()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    first = last = 0.0
    for step in range(150):
        world = World(100 + step, batch=4)
        terms = linking_losses(world.run(model), world.targets())
        assert set(terms) == {"linking/choice", "linking/velocity"}
        loss = torch.stack(list(terms.values())).sum()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        first, last = (float(loss.detach()) if step == 0 else first), float(loss.detach())
    assert last < first / 3
    world = World(999, batch=8)
    error = (world.run(model).velocity - world.velocity).norm(dim=-1)[:, 1::2].mean()
    assert float(error.detach()) < 0.5 * float(world.velocity[:, 1::2].norm(dim=-1).mean())


def test_objects_of_unknown_velocity_do_not_count() -> None:
    world, model = World(11), linking()
    targets = world.targets()
    linked = world.run(model)
    everything = linking_losses(linked, targets)
    targets.boxes[..., 7:] = torch.nan
    nothing = linking_losses(linked, targets)
    assert float(everything["linking/velocity"].detach()) > 0
    assert all(float(value.detach()) == 0 for value in nothing.values())


@pytest.mark.parametrize("settings_", [("decoder.learned_linking=true", "decoder.num_image_queries=0")])
def test_learned_linking_needs_image_queries(settings_: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="learned_linking: expected num_image_queries"):
        small_model(*settings_)


def test_anchors_carry_the_linked_velocity_without_gradient() -> None:
    linked = World(13).run(linking())
    assert isinstance(linked.anchors, Anchors)
    assert torch.equal(linked.anchors.codes[..., 8:], linked.velocity.detach())
    assert not linked.anchors.codes.requires_grad and linked.velocity.requires_grad


def learned_detector(runtime: str) -> Detector:
    """A small detector whose learned linking matters."""
    model = small_model("decoder.learned_linking=true")
    assert isinstance(model, AnchoredStreamPETR) and model.linking is not None
    torch.manual_seed(1)
    torch.nn.init.normal_(model.linking.content.weight, std=0.3)
    return Detector(
        model, weights_name="small", device=torch.device("cpu"), score_threshold=0.0, max_detections=50,
        runtime=runtime,
    )  # fmt: skip


def test_the_fast_engine_links_as_the_plain_one() -> None:
    rounds = [make_round(index, missing=4 if index == 3 else None) for index in range(6)]
    agreement = compare_detectors(learned_detector("plain"), learned_detector("fast"), rounds, top=20)
    assert agreement.unmatched == 0 and agreement.compared == 120
    assert agreement.center_m < 1e-3 and agreement.score < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("library", ["onnx", "openvino"])
def test_an_exported_detector_links_as_the_plain_one(library: str, tmp_path: Path) -> None:
    plain, other = learned_detector("plain"), learned_detector("plain")
    model = other.engine.model  # type: ignore[attr-defined]
    export_onnx(model, tmp_path / "small.onnx", weights_hash="", max_detections=50)
    session = {
        "onnx": partial(OnnxSession, device=torch.device("cpu"), threads=1),
        "openvino": partial(OpenVinoSession, threads=1),
    }[library]
    other.engine = ExportedEngine(tmp_path / "small.onnx", model.config, session)
    agreement = compare_detectors(plain, other, [make_round(index) for index in range(8)], top=20)
    assert agreement.unmatched == 0 and agreement.compared == 160
    assert agreement.center_m < 1e-3 and agreement.score < 1e-3
