# SPDX-License-Identifier: Apache-2.0
"""Matching and losses of published models equal numbers computed from the formulas of the public code.

The formulas are written out again here in NumPy, one number at a time: FocalLossCost and FocalLoss of mmdet
(alpha 0.25, gamma 2), BBox3DL1Cost, `normalize_bbox`, and the averages of the two public heads.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ftkd_core.config import DetectorConfig, SparseBEVConfig, override
from ftkd_core.losses.detection import DetectionCriterion
from ftkd_core.losses.matching import match, matching_weights
from ftkd_core.models.denoising import make_denoising
from ftkd_core.models.predictions import Predictions
from ftkd_core.noise_scale import noise_scale
from ftkd_core.presets import preset, sparse_bev_preset
from ftkd_core.types import CameraRig, Targets
from ftkd_core.weights.importing.sparse_bev import sparse_bev_config
from ftkd_core.weights.importing.stream_petr import stream_petr_config
from tests.core.helpers import small_config

Config = DetectorConfig | SparseBEVConfig
WEIGHTS = (2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
CLASSES = small_config().class_names
STREAM_PETR = stream_petr_config("r50_704x256_428q", CLASSES)
SPARSE_BEV = sparse_bev_config(CLASSES)
RIG = CameraRig(torch.eye(3).expand(1, 6, 3, 3), torch.eye(4).expand(1, 6, 4, 4), torch.ones(1, 6).bool())
Array = NDArray[np.float64]


def objects(seed: int, count: int = 3) -> Targets:
    """Return targets of one frame with finite velocities."""
    random = np.random.default_rng(seed)
    low, high = [-20, -20, -1, 0.5, 0.5, 0.5, -3, -9, -9], [20, 20, 2, 5, 5, 5, 3, 9, 9]
    boxes = random.uniform(low, high, (count, 9))
    real = torch.ones(1, count, dtype=torch.bool)
    empty = torch.zeros(1, 6, count)
    labels = torch.tensor(random.integers(0, 10, (1, count)))
    return Targets(
        torch.tensor(boxes, dtype=torch.float32)[None], labels, real,
        empty[..., None].expand(-1, -1, -1, 4), empty[..., None].expand(-1, -1, -1, 2), empty, empty.bool(),
    )  # fmt: skip


def normalize_bbox(box: Array) -> Array:
    """Return [cx, cy, cz, log w, log l, log h, sin, cos, vx, vy] of a box [x, y, z, l, w, h, yaw, vx, vy].
    The public code has cz in the fifth place; the weights of these places are equal."""
    x, y, z, length, width, height, yaw, vx, vy = box
    sizes = math.log(width), math.log(length), math.log(height)
    return np.array([x, y, z, *sizes, math.sin(yaw), math.cos(yaw), vx, vy])


def focal_cost(logit: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -math.log(p + 1e-12) * 0.25 * (1 - p) ** 2 + math.log(1 - p + 1e-12) * 0.75 * p**2


def focal_loss(logit: float, target: bool) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -0.25 * (1 - p) ** 2 * math.log(p) if target else -0.75 * p**2 * math.log(1 - p)


def public_costs(logits: Array, codes: Array, targets: Targets, elements: int) -> Array:
    """Return the cost (Q, G) of `HungarianAssigner3D.assign` with `code_weights`; StreamPETR compares 8
    elements (`with_velo=False`), SparseBEV 10."""
    boxes, labels = targets.boxes[0].double().numpy(), targets.labels[0].tolist()
    costs = np.zeros((len(logits), len(labels)))
    for query, slot in itertools.product(range(len(logits)), range(len(labels))):
        goal = normalize_bbox(boxes[slot])
        distance = sum(abs(codes[query][i] - goal[i]) * WEIGHTS[i] for i in range(elements))
        costs[query, slot] = 2.0 * focal_cost(logits[query][labels[slot]]) + 0.25 * distance
    return costs


def best_assignment(costs: Array) -> list[int]:
    """Return the object of each query, -1 for none, by trying all assignments."""
    queries, slots = costs.shape
    chosen = min(
        itertools.permutations(range(queries), slots), key=lambda q: sum(costs[q[i], i] for i in range(slots))
    )
    return [chosen.index(query) if query in chosen else -1 for query in range(queries)]


def predictions(seed: int, queries: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng([seed, 1])
    codes = np.concatenate(
        [random.uniform(-20, 20, (queries, 2)), random.normal(0, 1.5, (queries, 8))], axis=1
    )
    logits = torch.tensor(random.normal(-1, 2, (1, queries, 10)), dtype=torch.float32)
    return logits, torch.tensor(codes, dtype=torch.float32)[None]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("config", "elements"), [(STREAM_PETR, 8), (SPARSE_BEV, 10)])
def test_matching_is_that_of_the_public_assigner(config: Config, elements: int, seed: int) -> None:
    targets, (logits, codes) = objects(seed), predictions(seed)
    costs = public_costs(logits[0].double().numpy(), codes[0].double().numpy(), targets, elements)
    weights = matching_weights(config)
    assert len(weights) == elements
    assert match(logits, codes, targets, code_weights=weights)[0].tolist() == best_assignment(costs)


def test_velocity_decides_in_sparse_bev_only() -> None:
    """Two equal predictions except for velocity: StreamPETR is free to take either, SparseBEV takes the right
    one; the position weighs twice."""
    targets, (logits, codes) = objects(1, 1), predictions(1, 2)
    goal = torch.tensor(normalize_bbox(targets.boxes[0, 0].double().numpy())).float()
    logits[:] = 0.0
    codes[0] = goal
    codes[0, 0, 8] += 5.0
    codes[0, 1, 0] += 0.5
    assert match(logits, codes, targets, code_weights=matching_weights(SPARSE_BEV))[0].tolist() == [-1, 0]
    assert match(logits, codes, targets, code_weights=matching_weights(STREAM_PETR))[0].tolist() == [0, -1]


def test_other_models_match_as_configured() -> None:
    assert matching_weights(small_config()) == (1.0,) * 8
    assert matching_weights(sparse_bev_preset("sparse_bev_small")) == WEIGHTS
    assert matching_weights(preset("r50_704x256_428q")) == (1.0,) * 8


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("config", "elements"), [(STREAM_PETR, 8), (SPARSE_BEV, 10)])
def test_losses_are_those_of_the_public_heads(config: Config, elements: int, seed: int) -> None:
    """`loss_single` of both: focal loss and weighted L1 divided by the number of matched queries. Cones and
    barriers learn their annotated heading."""
    targets, (logits, codes) = objects(seed), predictions(seed)
    targets = targets._replace(
        labels=torch.tensor([[CLASSES.index("barrier"), CLASSES.index("traffic_cone"), 0]])
    )
    found = DetectionCriterion(config)(Predictions(logits[None], codes[None], logits, logits), targets, RIG)
    costs = public_costs(logits[0].double().numpy(), codes[0].double().numpy(), targets, elements)
    class_loss = box_loss = 0.0
    for query, slot in enumerate(best_assignment(costs)):
        label = int(targets.labels[0, slot]) if slot >= 0 else -1
        class_loss += sum(focal_loss(float(logits[0, query, k]), k == label) for k in range(10))
        if slot >= 0:
            goal = normalize_bbox(targets.boxes[0, slot].double().numpy())
            box_loss += sum(abs(float(codes[0, query, i]) - goal[i]) * WEIGHTS[i] for i in range(10))
    assert float(found["layer0/class"]) == pytest.approx(2.0 * class_loss / 3, rel=1e-4)
    assert float(found["layer0/box"]) == pytest.approx(0.25 * box_loss / 3, rel=1e-4)


@pytest.mark.parametrize("config", [STREAM_PETR, SPARSE_BEV])
def test_denoising_losses_are_those_of_the_public_heads(config: Config) -> None:
    """`dn_loss_single`: the box term covers positives and negatives and is divided by all; the class term of
    StreamPETR is divided by their number times pi / 6 * 0.75^3."""
    targets = objects(5)
    noise = make_denoising(
        targets, config.loss, torch.full((3,), 60.0), torch.Generator().manual_seed(1), noise_scale(config)
    )
    assert noise is not None
    count = noise.points_ego.shape[1]
    logits, codes = predictions(9, count)
    others, other_codes = predictions(2)
    outputs = Predictions(others[None], other_codes[None], others, others, None, logits[None], codes[None])
    found = DetectionCriterion(config)(outputs, targets, RIG, noise)
    class_loss = box_loss = 0.0
    for query in range(count):
        slot = int(noise.target[0, query])
        label = int(targets.labels[0, slot]) if noise.positive[0, query] else -1
        class_loss += sum(focal_loss(float(logits[0, query, k]), k == label) for k in range(10))
        goal = normalize_bbox(targets.boxes[0, slot].double().numpy())
        box_loss += sum(abs(float(codes[0, query, i]) - goal[i]) * WEIGHTS[i] for i in range(10))
    negatives = isinstance(config, DetectorConfig)
    assert bool((~noise.positive).any()) == negatives
    divisor = count * (3.14159 / 6 * 0.75**3 if negatives else 1.0)
    assert float(found["denoising0/class"]) == pytest.approx(2.0 * class_loss / divisor, rel=1e-4)
    assert float(found["denoising0/box"]) == pytest.approx(0.25 * box_loss / count, rel=1e-4)


@pytest.mark.parametrize(
    ("config", "largest"),
    [(STREAM_PETR, 0.5), (SPARSE_BEV, 0.25), (sparse_bev_preset("sparse_bev_small"), 0.5)],
)
def test_noise_reaches_as_far_as_published(config: Config, largest: float) -> None:
    """In units of the box: half of it in StreamPETR, a quarter in SparseBEV."""
    targets = objects(3)
    loss = replace(config.loss, denoising_groups=200)
    reach = torch.full((3,), 1e3)
    noise = make_denoising(targets, loss, reach, torch.Generator().manual_seed(0), noise_scale(config))
    assert noise is not None
    boxes = targets.boxes[0][noise.target[0]]
    moved = ((noise.points_ego[0] - boxes[:, :3]) / boxes[:, 3:6]).abs().max()
    assert 0.97 * largest < float(moved) <= largest + 1e-6
    share = float(noise.positive.float().mean())
    assert share == pytest.approx(noise_scale(config).positive_share, abs=0.05)


def test_published_losses_belong_to_published_models() -> None:
    """An override switches both; the box loss of negatives is not trained otherwise."""
    config = override(STREAM_PETR, ["decoder.as_published=false"])
    assert noise_scale(config) == noise_scale(STREAM_PETR)
    assert matching_weights(config) == (1.0,) * 8
    assert not DetectionCriterion(config).published
