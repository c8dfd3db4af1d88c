# SPDX-License-Identifier: Apache-2.0
"""StreamPETR's 2-D head: maps, matching, losses, and removal at inference."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import StreamBatch, make_sample
from ftkd_core.errors import UserError
from ftkd_core.losses.detection import DetectionCriterion
from ftkd_core.losses.focal_head import (
    box_overlaps,
    center_form,
    focal_head_losses,
    heat_targets,
    match_cells,
)
from ftkd_core.losses.matching import focal_cost
from ftkd_core.models.focal_head import FocalHead
from ftkd_core.models.predictions import FocalMaps
from ftkd_core.presets import preset
from ftkd_core.runtime.inference_model import inference_model
from ftkd_core.runtime.preprocess import normalise
from tests.core.helpers import FOCAL, make_clip, small_config, small_model

STRIDE, SIZE = 8, (4, 12)  # for the images of make_clip
TERMS = {f"auxiliary/{name}" for name in ("class", "centerness", "box", "iou", "center")}


def sample_of(seed: int = 3, objects: int = 6) -> StreamBatch:
    return make_sample(make_clip(objects=objects, seed=seed), 0, Augmentation(), True)


def maps_of(seed: int = 0) -> FocalMaps:
    torch.manual_seed(seed)
    head = FocalHead(32, 10)
    maps: FocalMaps = head(torch.randn(1, 6, 32, *SIZE))
    return maps


def test_zero_outputs_decode_to_the_centre_of_the_cell() -> None:
    head = FocalHead(32, 10)
    for layer in (head.ltrb, head.center2d, head.cls):
        torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(head.center2d.bias)  # type: ignore[arg-type]
    torch.nn.init.constant_(head.ltrb.bias, -20.0)  # type: ignore[arg-type]
    maps = head(torch.randn(2, 3, 32, 4, 8))
    assert maps.logits.shape == (2, 3, 4, 8, 10) and maps.centerness.shape == (2, 3, 4, 8)
    assert torch.allclose(maps.logits.sigmoid(), torch.tensor(0.01), atol=1e-6)
    middle = torch.tensor([2.5 / 8, 1.5 / 4])  # x, then y
    assert torch.allclose(maps.centers[0, 0, 1, 2], middle, atol=1e-6)
    assert torch.allclose(maps.boxes[1, 2, 1, 2], middle.repeat(2), atol=1e-6)


def test_boxes_are_inside_the_image() -> None:
    maps = maps_of()
    assert float(maps.boxes.detach().min()) >= 0 and float(maps.boxes.detach().max()) <= 1
    assert (maps.boxes[..., :2] <= maps.boxes[..., 2:]).all()


corner = st.integers(0, 11)


@given(st.lists(st.tuples(corner, corner, corner, corner), min_size=2, max_size=2))
def test_overlaps_equal_ratios_of_pixel_counts(raw: list[tuple[int, int, int, int]]) -> None:
    boxes = [(min(a, c), min(b, d), max(a, c) + 1, max(b, d) + 1) for a, b, c, d in raw]
    grids = []
    for x1, y1, x2, y2 in boxes:
        grid = np.zeros((12, 12), dtype=bool)
        grid[y1:y2, x1:x2] = True
        grids.append(grid)
    intersection, union = (grids[0] & grids[1]).sum(), (grids[0] | grids[1]).sum()
    (left, top), (right, bottom) = np.min(boxes, axis=0)[:2], np.max(boxes, axis=0)[2:]
    hull = (right - left) * (bottom - top)
    first, second = (torch.tensor(box).float() / 12 for box in boxes)
    overlap, generalised = box_overlaps(first, second)
    assert float(overlap) == pytest.approx(intersection / union, abs=1e-4)
    assert float(generalised) == pytest.approx(intersection / union - (hull - union) / hull, abs=1e-4)
    assert float(box_overlaps(first, first)[1]) == pytest.approx(1.0, abs=1e-4)


def test_cells_are_matched_with_the_lowest_total_cost() -> None:
    random = torch.Generator().manual_seed(1)
    logits, raw = torch.randn(1, 5, 10, generator=random), torch.rand(1, 5, 4, generator=random)
    boxes = torch.cat(
        [torch.minimum(raw[..., :2], raw[..., 2:]), torch.maximum(raw[..., :2], raw[..., 2:])], -1
    )
    centers = torch.rand(1, 5, 2, generator=random)
    target = torch.tensor([[[0.1, 0.1, 0.5, 0.4], [0.0, 0.0, 1.0, 1.0], [0.4, 0.2, 0.9, 0.8]]])
    target_centers, labels = torch.tensor([[[0.3, 0.2], [0.5, 0.5], [0.6, 0.5]]]), torch.tensor([[4, 1, 7]])
    visible = torch.tensor([[True, False, True]])
    found = match_cells(logits, boxes, centers, labels, target, target_centers, visible)
    assert sorted(found[0].tolist()) == [-1, -1, -1, 0, 2]

    def cost(cell: int, slot: int) -> float:
        total = 2.0 * focal_cost(logits[0, cell : cell + 1], labels[0, slot : slot + 1])[0, 0]
        total = total + 5.0 * (center_form(boxes[0, cell]) - center_form(target[0, slot])).abs().sum()
        total = total - 2.0 * box_overlaps(boxes[0, cell], target[0, slot])[1]
        return float(total + 10.0 * (centers[0, cell] - target_centers[0, slot]).abs().sum())

    best = min(itertools.permutations(range(5), 2), key=lambda pair: cost(pair[0], 0) + cost(pair[1], 2))
    assert (int((found[0] == 0).nonzero()), int((found[0] == 2).nonzero())) == best


def test_heat_extends_from_the_centre_to_the_nearest_edge() -> None:
    boxes = torch.tensor([[[0.1, 0.1, 0.9, 0.9], [0.0, 0.0, 0.2, 0.4], [0.5, 0.5, 1.0, 1.0]]])
    centers = torch.tensor([[[0.5, 0.5], [0.05, 0.3], [0.7, 0.7]]])
    visible = torch.tensor([[True, True, False]])
    heat = heat_targets(boxes, centers, visible, (8, 16))
    plain = np.zeros((8, 16))
    for slot, radius in ((0, 4), (1, 1)):  # ceil of 3.2 rows; of 0.8 columns
        column, row = int(centers[0, slot, 0] * 16), int(centers[0, slot, 1] * 8)
        for y, x in itertools.product(range(8), range(16)):
            if abs(y - row) <= radius and abs(x - column) <= radius:
                sigma = (2 * radius + 1) / 6
                bump = np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * sigma**2))
                plain[y, x] = max(plain[y, x], bump)
    assert np.allclose(heat[0].numpy(), plain, atol=1e-6)
    assert not heat_targets(boxes[:, :0], centers[:, :0], visible[:, :0], (8, 16)).any()


def test_perfect_maps_have_no_loss_and_errors_do() -> None:
    """Perfect maps have no loss, except for centres outside the image."""
    sample = sample_of()
    targets = sample.targets
    image = torch.tensor([SIZE[1], SIZE[0]]) * STRIDE
    maps = FocalMaps(
        torch.full((1, 6, *SIZE, 10), -20.0), torch.full((1, 6, *SIZE), -20.0),
        torch.zeros(1, 6, *SIZE, 4), torch.zeros(1, 6, *SIZE, 2),
    )  # fmt: skip
    cells = [iter(list(itertools.product(range(SIZE[0]), range(SIZE[1])))) for _ in range(6)]
    places = []
    for _, camera, slot in targets.mask_2d.nonzero().tolist():
        row, column = next(cells[camera])
        center = (targets.centers_2d[0, camera, slot] / image).clamp(0, 1)
        maps.logits[0, camera, row, column, targets.labels[0, slot]] = 20.0
        maps.boxes[0, camera, row, column] = targets.boxes_2d[0, camera, slot] / image.repeat(2)
        maps.centers[0, camera, row, column] = center
        row, column = (min(int(v * s), s - 1) for v, s in zip(center.flip(0), SIZE, strict=True))
        maps.centerness[0, camera, row, column] = 20.0
        places.append((camera, slot))
    assert len(places) >= 3
    terms = focal_head_losses(maps, targets, STRIDE)
    assert terms.keys() == TERMS
    for name in TERMS - {"auxiliary/centerness"}:
        assert float(terms[name]) == pytest.approx(0.0, abs=1e-3), name
    assert float(terms["auxiliary/centerness"]) < 2.0  # centres outside the image have no cell
    moved = focal_head_losses(maps._replace(boxes=(maps.boxes + 0.1).clamp(0, 1)), targets, STRIDE)
    assert float(moved["auxiliary/box"]) > 0.1 and float(moved["auxiliary/iou"]) > 0.1
    assert float(moved["auxiliary/class"]) > 0.01  # a score of 1 for a box with a lower IoU


def test_a_frame_without_objects_has_class_losses_only() -> None:
    targets = sample_of().targets
    targets = targets._replace(mask_2d=torch.zeros_like(targets.mask_2d))
    head = FocalHead(32, 10)
    terms = focal_head_losses(head(torch.randn(1, 6, 32, *SIZE)), targets, STRIDE)
    torch.stack(list(terms.values())).sum().backward()
    assert float(terms["auxiliary/box"].detach()) == float(terms["auxiliary/iou"].detach()) == 0.0
    assert head.cls.weight.grad is not None and head.cls.weight.grad.abs().sum() > 0
    assert head.ltrb.weight.grad is None or head.ltrb.weight.grad.abs().sum() == 0


def test_the_head_learns_and_is_removed_for_inference() -> None:
    torch.manual_seed(0)
    model = small_model(*FOCAL, image_queries=0)
    criterion = DetectionCriterion(model.config)
    sample = sample_of()
    frame = sample.frame(normalise(sample.images))
    inference, _ = model(frame, model.start_memory())
    assert inference.auxiliary is None
    model.train()
    optimizer = torch.optim.Adam(model.auxiliary.parameters(), 3e-3)  # type: ignore[union-attr]
    losses = []
    for _ in range(25):
        predictions, _ = model(frame, model.start_memory())
        assert isinstance(predictions.auxiliary, FocalMaps)
        terms = criterion(predictions, sample.targets, sample.rig)
        assert terms.keys() > TERMS
        loss = torch.stack([terms[name] for name in sorted(TERMS)]).sum()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    fast = inference_model(model, torch.device("cpu"))
    assert fast.auxiliary is None and model.auxiliary is not None
    again, _ = fast(frame, fast.start_memory())
    model.eval()
    assert torch.allclose(again.logits, model(frame, model.start_memory())[0].logits, atol=1e-4)


def test_incompatible_settings_are_refused() -> None:
    with pytest.raises(UserError, match="auxiliary_kind is 'sharp'; expected 'none', 'dense' or 'focal'"):
        small_config("auxiliary_kind=sharp", image_queries=0)
    with pytest.raises(UserError, match="auxiliary_kind focal: expected dense, because 8 image queries"):
        small_config(*FOCAL)
    with pytest.raises(UserError, match="neck_channels 16: expected a multiple of 32"):
        small_config("auxiliary_kind=focal", image_queries=0)
    assert preset("r50_704x256_428q").auxiliary_kind == preset("r50_704x256_900q").auxiliary_kind == "focal"
