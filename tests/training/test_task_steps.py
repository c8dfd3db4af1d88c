# SPDX-License-Identifier: Apache-2.0
"""One training step with various rigs, empty frames, frame rates, ranges and class orders."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import Clip, StreamBatch, collate, make_sample
from ftkd_core.data.windows import WindowBatch, collate_windows, make_window
from ftkd_core.errors import UserError
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.memory import Memory
from ftkd_core.models.sparse_bev import SparseBEV, build_sparse_bev
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.weights.importing.stream_petr import POINT_RANGE_M
from tests.core.helpers import FOCAL, RIGS, make_clip, rig_settings, small_config, small_model, small_sparse
from tests.training.helpers import Task
from training.study.predicting import detect_clip
from training.tasks import State, StreamingTask, WindowTask, visible_geometry

PLAIN = Augmentation()
ORDER = (*CLASS_NAMES[3:], *CLASS_NAMES[:3])


def frames_of(*clips: Clip, frame: int = 0, dropped: int = -1) -> StreamBatch:
    """Return one frame of each clip as the streams of a batch."""
    return collate([make_sample(clip, frame, PLAIN, frame == 0, dropped) for clip in clips])


def windows_of(*clips: Clip, past: int = 2) -> WindowBatch:
    return collate_windows([make_window(clip, 3, PLAIN, past, 0) for clip in clips])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def backward_step(
    task: nn.Module, batch: StreamBatch | WindowBatch, state: State
) -> tuple[dict[str, Tensor], State]:
    """Run a training step without the optimiser; assert that all terms and gradients are finite."""
    task.train()
    task.zero_grad()
    terms, after = task(batch, state, generator())
    assert all(torch.isfinite(value) for value in terms.values()), terms
    torch.stack(list(terms.values())).sum().backward()
    gradients = [p.grad for p in task.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
    return detached(terms), after


def detached(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in terms.items()}


@RIGS
def test_any_number_of_cameras_trains_every_parameter(cameras: int, width: int, height: int) -> None:
    model = small_model(*rig_settings(cameras, width, height))
    task = StreamingTask(model, 1)
    clip = make_clip(objects=40, width=width, height=height, cameras=cameras)
    _, state = backward_step(task, frames_of(clip), task.start_state())
    second = frames_of(clip, frame=1, dropped=0 if cameras > 1 else -1)
    assert int(second.rig.mask.sum()) == max(1, cameras - 1)
    assert second.targets.mask.any()
    terms, state = backward_step(task, second, state)
    assert float(terms["layer1/box"]) > 0 and float(terms["denoising1/box"]) > 0
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("streaming", [True, False])
def test_batch_with_another_number_of_cameras_is_refused(streaming: bool) -> None:
    message = (
        r"a batch of 6 cameras for a model of 2 \(CAM_FRONT, CAM_FRONT_RIGHT\); expected those of model.cha"
    )
    settings = rig_settings(2, 96, 32)
    task: Task
    if streaming:
        task = StreamingTask(build_stream_petr(small_config(*settings)), 1)
    else:
        task = WindowTask(small_sparse(*settings))
    batch = frames_of(make_clip()) if streaming else windows_of(make_clip())
    with pytest.raises(UserError, match=message):
        task(batch, task.start_state(), generator())


@pytest.mark.parametrize(("settings", "image_queries"), [((), 8), (FOCAL, 0)])
def test_stream_trains_on_frames_without_objects(settings: tuple[str, ...], image_queries: int) -> None:
    torch.manual_seed(0)
    model = build_stream_petr(small_config(*settings, image_queries=image_queries))
    task = StreamingTask(model, 2)
    empty = make_clip(objects=0)
    _, state = backward_step(task, frames_of(empty, empty), task.start_state())
    terms, _ = backward_step(task, frames_of(empty, empty, frame=1), state)
    assert (
        float(terms["denoising1/class"]) == float(terms["denoising1/box"]) == float(terms["layer1/box"]) == 0
    )
    assert float(terms["layer1/class"]) > 0
    assert model.classifier[0].weight.grad.any()
    auxiliary = model.auxiliary.cls if settings else model.auxiliary.heat  # type: ignore[union-attr]
    assert auxiliary.weight.grad.any()


@pytest.mark.parametrize("image_queries", [0, 24])
def test_window_model_trains_on_windows_without_objects(image_queries: int) -> None:
    task = WindowTask(small_sparse(image_queries=image_queries))
    terms, _ = backward_step(task, windows_of(make_clip(objects=0)), ())
    assert (
        float(terms["denoising1/class"]) == float(terms["denoising1/box"]) == float(terms["layer1/box"]) == 0
    )
    assert float(terms["layer1/class"]) > 0
    assert ("auxiliary/heat" in terms) == bool(image_queries)


def test_streams_of_different_rates_share_a_batch() -> None:
    """A batch of a 2 Hz and a 12 Hz stream equals the two streams alone. Memory skips some 12 Hz frames."""
    clips = [make_clip(seed=0), replace(make_clip(seed=1), times=np.arange(6) * 0.083)]
    model = small_model()
    joint = StreamingTask(model, 2)
    state = joint.start_state()
    single = [StreamingTask(model, 1) for _ in clips]
    states = [task.start_state() for task in single]
    for frame in range(6):
        with torch.no_grad():
            _, state = joint.eval()(frames_of(*clips, frame=frame), state, generator())
            for index, clip in enumerate(clips):
                _, states[index] = single[index].eval()(
                    frames_of(clip, frame=frame), states[index], generator()
                )
    newest = Memory(*state).time[:, ::6]
    assert newest[0].tolist() == [2.5, 2.0, 1.5]
    assert newest[1].tolist() == pytest.approx([0.415, 0.0, 0.0])
    for name, both, *each in zip(Memory._fields, state, *states, strict=True):
        assert torch.allclose(both, torch.cat(each), atol=1e-4), name
    terms, _ = backward_step(joint, frames_of(*clips, frame=4), state)
    assert float(terms["layer1/box"]) > 0


def with_far_objects(clip: Clip, keep: Callable[[np.ndarray], np.ndarray]) -> Clip:
    """Return the clip with every second object moved to 53 to 60 m ahead, and only the objects that `keep`
    selects from the mask of far objects."""
    annotated = []
    for objects in clip.objects:
        boxes, far = objects.boxes.copy(), np.arange(len(objects.boxes)) % 2 == 1
        boxes[far, 0], boxes[far, 1] = np.linspace(53, 60, far.sum()), np.linspace(-8, 8, far.sum())
        kept = keep(far)
        annotated.append(
            replace(
                objects, boxes=boxes[kept], labels=objects.labels[kept], visible=objects.visible[kept],
                num_points=objects.num_points[kept],
            )
        )  # fmt: skip
    return replace(clip, objects=tuple(annotated))


def task_with_range(kind: str, reach: float) -> Task:
    torch.manual_seed(0)
    settings = ["loss.denoising_groups=0"]
    settings += [f"decoder.point_range_m={[-reach, -reach, -5.0, reach, reach, 3.0]}"]
    if kind == "window":
        return WindowTask(small_sparse(*settings, image_queries=24))
    return StreamingTask(small_model(*settings, *FOCAL, image_queries=0), 1)


@pytest.mark.parametrize("kind", ["stream", "window"])
def test_objects_outside_the_range_of_a_model_change_no_loss(kind: str) -> None:
    clip = make_clip(objects=8)
    batch_of = windows_of if kind == "window" else frames_of
    everything, near = (
        batch_of(with_far_objects(clip, keep)) for keep in (lambda far: far | True, lambda far: ~far)
    )
    assert int(everything.targets.mask.sum()) == 8 and int(near.targets.mask.sum()) == 4
    assert everything.targets.mask_2d[..., 1::2].any()
    short, long = task_with_range(kind, POINT_RANGE_M[3]), task_with_range(kind, 61.2)
    for task, expected_same in ((short, True), (long, False)):
        state = task.start_state()
        found, expected = (detached(task(batch, state, generator())[0]) for batch in (everything, near))
        assert found.keys() == expected.keys()
        for name in (
            "layer1/box",
            "layer1/class",
            *(name for name in found if name.startswith("auxiliary/")),
        ):
            assert (abs(float(found[name] - expected[name])) < 1e-6) == expected_same, name


def reorder_classes(model: StreamPETR | SparseBEV) -> StreamPETR | SparseBEV:
    """Return the model with its classes in another order: tensors with one row or column per class are
    rolled."""
    config = replace(model.config, class_names=ORDER)
    reordered = build_sparse_bev(config) if isinstance(model, SparseBEV) else build_stream_petr(config)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in state.items():
        last = name.rpartition(".")[0]
        if last in ("classifier.6", "decoder_layer.classifier.6", "auxiliary.heat", "auxiliary.cls"):
            state[name] = value.roll(-3, dims=0)
        elif name == "label_embedding.weight":
            state[name] = torch.cat([value[:-1].roll(-3, dims=0), value[-1:]])
        elif name in ("anchor_content.0.weight", "anchor_content.weight"):
            state[name] = torch.cat([value[:, :7], value[:, 7:].roll(-3, dims=1)], dim=1)
    reordered.load_state_dict(state)
    return reordered.eval()


@pytest.mark.parametrize("kind", ["dense", "focal", "window"])
def test_losses_and_detections_do_not_depend_on_the_class_order(kind: str) -> None:
    clip = make_clip(objects=60)
    assert all(set(clip.objects[frame].labels.tolist()) == set(range(10)) for frame in (0, 3))
    settings = ["loss.denoising_groups=0"] if kind == "window" else []  # denoising draws classes at random
    model: StreamPETR | SparseBEV
    if kind == "window":
        model = small_sparse(*settings, image_queries=24)
    else:
        extra, queries = (FOCAL, 0) if kind == "focal" else ((), 8)
        model = small_model(*extra, image_queries=queries)
    batch_of = windows_of if kind == "window" else frames_of
    losses = []
    for one in (model, reorder_classes(model)):
        task = WindowTask(one) if isinstance(one, SparseBEV) else StreamingTask(one, 1)
        for module in one.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        losses.append(task.train()(batch_of(clip), task.start_state(), generator())[0])
    for name, value in losses[0].items():
        assert torch.allclose(value, losses[1][name], rtol=1e-4, atol=1e-5), name
    plain, reordered = (
        detect_clip(one, clip, torch.device("cpu"))[0] for one in (model, reorder_classes(model))
    )
    assert torch.allclose(plain.scores, reordered.scores, atol=1e-5)
    key = [
        np.lexsort((found.labels[0].numpy(), found.scores[0].numpy().round(5)))
        for found in (plain, reordered)
    ]
    assert plain.labels[0, key[0]].tolist() == reordered.labels[0, key[1]].tolist()


def test_features_of_hidden_tokens_reach_neither_queries_nor_losses() -> None:
    """The image behind hidden tokens may change: the detections of a student without image queries stay."""
    task = StreamingTask(small_model(), 1).eval()
    clip = make_clip(objects=5)
    cameras, height, width = clip.images.shape[1:4]
    seen = np.ones((cameras, height // 16, width // 16), dtype=bool)
    seen[1] = False
    hidden = replace(clip, seen_tokens=seen)
    batch = frames_of(hidden)
    geometry = visible_geometry(task.detector, batch)
    expected = torch.from_numpy(seen.reshape(1, -1))
    assert torch.equal(geometry.mask, expected)
    images = batch.images.clone()
    images[:, 1] = 255 - images[:, 1]
    changed = batch._replace(images=images)
    with torch.no_grad():
        terms, others, visible = (
            task(item, task.start_state(), generator())[0]
            for item in (batch, changed, frames_of(clip)._replace(images=images))
        )
    boxes = [name for name in terms if name.endswith("box")]
    assert boxes and all(torch.equal(terms[name], others[name]) for name in boxes)
    assert any(not torch.equal(others[name], visible[name]) for name in boxes)
