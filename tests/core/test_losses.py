# SPDX-License-Identifier: Apache-2.0
"""Matching and detection losses."""

import numpy as np
import pytest
import torch

from ftkd_core.boxes import encode_boxes
from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import StreamBatch, collate, make_sample
from ftkd_core.losses.dense_head import dense_head_losses
from ftkd_core.losses.detection import DetectionCriterion
from ftkd_core.losses.focal import sigmoid_focal_loss
from ftkd_core.losses.matching import match
from ftkd_core.models.dense_head import propose
from ftkd_core.models.predictions import REFERENCE_FOCAL_PX, DenseMaps, Predictions
from tests.core.helpers import make_clip, small_config


def perfect(batch: StreamBatch, extra: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (B, Q, K) and codes (B, Q, 10) of the ground truth in reversed order, then `extra`
    background queries."""
    boxes, labels = batch.targets.boxes.flip(1), batch.targets.labels.flip(1)
    one_hot = torch.nn.functional.one_hot(labels, 10).float() * batch.targets.mask.flip(1)[..., None]
    logits = torch.cat([one_hot * 40 - 20, torch.full((len(labels), extra, 10), -20.0)], dim=1)
    codes = torch.cat([encode_boxes(boxes), torch.zeros(len(labels), extra, 10)], dim=1)
    return logits, codes


@pytest.fixture
def batch() -> StreamBatch:
    samples = [make_sample(make_clip(objects=n, seed=n), 0, Augmentation(), True) for n in (5, 3)]
    return collate(samples)


def test_perfect_predictions_are_matched_to_their_objects(batch: StreamBatch) -> None:
    logits, codes = perfect(batch)
    assigned = match(logits, codes, batch.targets)
    assert assigned[0].tolist() == [4, 3, 2, 1, 0, -1, -1, -1]
    assert assigned[1].tolist() == [-1, -1, 2, 1, 0, -1, -1, -1]


def test_perfect_predictions_have_no_loss_and_one_metre_costs_its_weight(batch: StreamBatch) -> None:
    config = small_config()
    logits, codes = perfect(batch)
    criterion = DetectionCriterion(config)

    def terms(codes: torch.Tensor) -> dict[str, torch.Tensor]:
        return criterion(Predictions(logits[None], codes[None], logits, logits), batch.targets, batch.rig)

    zero = terms(codes)
    assert float(zero["layer0/box"]) == pytest.approx(0, abs=1e-4)
    assert float(zero["layer0/class"]) == pytest.approx(0, abs=1e-4)
    moved = codes.clone()
    moved[..., 0] += 1.0
    assert float(terms(moved)["layer0/box"]) == pytest.approx(0.25 * 2.0, rel=1e-3)


def test_unknown_velocity_has_no_loss(batch: StreamBatch) -> None:
    boxes = batch.targets.boxes.clone()
    boxes[..., 7:] = torch.nan
    targets = batch.targets._replace(boxes=boxes)
    logits, codes = perfect(batch)
    codes = (codes.nan_to_num() + torch.tensor([0.0] * 8 + [9.0, 9.0])).requires_grad_()
    terms = DetectionCriterion(small_config())(
        Predictions(logits[None], codes[None], logits, logits), targets, batch.rig
    )
    assert float(terms["layer0/box"]) == pytest.approx(0, abs=1e-4)
    (gradient,) = torch.autograd.grad(terms["layer0/box"], codes)
    assert torch.isfinite(gradient).all()


def test_a_frame_without_objects_has_finite_losses_that_lower_all_scores() -> None:
    sample = make_sample(make_clip(objects=0), 0, Augmentation(), True)
    logits = torch.zeros(1, 1, 4, 10, requires_grad=True)
    codes = torch.zeros(1, 1, 4, 10, requires_grad=True)
    heat = torch.zeros(1, 6, 10, 4, 12, requires_grad=True)
    maps = DenseMaps(heat, *(torch.zeros(1, 6, channels, 4, 12) for channels in (4, 2, 1, 3, 2, 2)))
    predictions = Predictions(logits, codes, logits[0], logits[0], maps)
    terms = DetectionCriterion(small_config())(predictions, sample.targets, sample.rig)
    total = torch.stack(list(terms.values())).sum()
    assert torch.isfinite(total)
    total.backward()
    assert torch.all(logits.grad > 0)
    assert torch.all(heat.grad > 0)


def test_a_non_finite_cost_raises_an_error(batch: StreamBatch) -> None:
    logits, codes = perfect(batch)
    codes[0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="layer1/box: the cost is not finite"):
        match(logits, codes, batch.targets, part="layer1")
    logits[0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="layer1/class: the cost is not finite"):
        match(logits, codes, batch.targets, part="layer1")


def test_focal_loss_is_weighted_cross_entropy() -> None:
    logits, targets = torch.tensor([0.3, -1.0]), torch.tensor([1.0, 0.0])
    p = logits.sigmoid()
    expected = torch.stack([-0.25 * (1 - p[0]) ** 2 * p[0].log(), -0.75 * p[1] ** 2 * (1 - p[1]).log()])
    assert torch.allclose(sigmoid_focal_loss(logits, targets), expected, atol=1e-6)


def test_proposals_of_perfect_maps_are_the_objects() -> None:
    """Perfect maps also have almost no heat loss, and depth errors at centres increase the depth loss."""
    sample = make_sample(make_clip(objects=6, seed=3), 0, Augmentation(), True)
    stride, height, width = 8, 4, 12
    targets = sample.targets
    maps = DenseMaps(
        torch.full((1, 6, 10, height, width), -20.0),
        *(torch.zeros(1, 6, channels, height, width) for channels in (4, 2, 1, 3, 2, 2)),
    )
    visible: list[int] = []
    for _, camera, slot in targets.mask_2d.nonzero().tolist():
        center = targets.centers_2d[0, camera, slot] / stride - 0.5
        column, row = (round(float(value)) for value in center)
        if not (0 <= column < width and 0 <= row < height) or slot in visible:
            continue
        visible.append(slot)
        cell = torch.tensor([column, row])
        box = targets.boxes_2d[0, camera, slot] / stride - 0.5
        maps.heat[0, camera, targets.labels[0, slot], row, column] = 20.0
        maps.offset[0, camera, :, row, column] = center - cell
        maps.edges[0, camera, :, row, column] = torch.cat([cell - box[:2], box[2:] - cell])
        focal = sample.rig.intrinsics[0, camera, 0, 0]
        depth = targets.depths[0, camera, slot] * REFERENCE_FOCAL_PX / focal
        maps.log_depth[0, camera, 0, row, column] = depth.log()
        size = targets.boxes[0, slot, [4, 3, 5]]
        maps.log_size[0, camera, :, row, column] = size.log()
        direction = targets.boxes[0, slot, :2] - sample.rig.ego_from_camera[0, camera, :2, 3]
        relative = targets.boxes[0, slot, 6] - torch.atan2(direction[1], direction[0])
        maps.heading[0, camera, :, row, column] = torch.stack([relative.cos(), relative.sin()])
        maps.axis[0, camera, :, row, column] = torch.stack([(2 * relative).cos(), (2 * relative).sin()])
    assert len(visible) >= 3
    features = torch.randn(1, 6, 16, height, width)
    proposals = propose(maps, features, sample.rig, stride, len(visible))
    distance = torch.cdist(proposals.anchors.codes[0, :, :3], targets.boxes[0, visible, :3])
    assert distance.amin(1).max() < 1e-3
    assert distance.amin(0).max() < 1e-3
    truth = encode_boxes(targets.boxes[0, visible])[distance.argmin(1)]
    assert torch.allclose(proposals.anchors.codes[0, :, 3:8], truth[:, 3:8], atol=1e-3)
    labels = targets.labels[0, visible][distance.argmin(1)]
    assert torch.equal(proposals.anchors.logits[0].argmax(-1), labels)
    only = targets._replace(mask_2d=targets.mask_2d & torch.isin(torch.arange(6), torch.tensor(visible)))
    terms = dense_head_losses(maps, only, sample.rig, stride)
    names = ("heat", "edges", "offset", "depth", "size", "heading", "axis")
    assert set(terms) == {f"auxiliary/{name}" for name in names}
    assert float(terms["auxiliary/heat"]) < 1e-3
    assert all(np.isfinite(float(value)) for value in terms.values())
    before = float(terms["auxiliary/depth"])  # not 0, because cells around the centres are wrong
    maps.log_depth.copy_(maps.log_depth + 0.1 * (maps.heat.amax(2, keepdim=True) > 0))
    assert float(dense_head_losses(maps, only, sample.rig, stride)["auxiliary/depth"]) > before + 0.05
