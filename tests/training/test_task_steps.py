# SPDX-License-Identifier: Apache-2.0
"""A step of a lesson, whatever it is shown: rigs, frames without objects, rates, ranges and class orders."""

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
from tests.core.helpers import RIGS, make_clip, rig_settings, small_config, small_model
from tests.core.test_focal_head import FOCAL
from tests.core.test_sparse_bev import small_sparse
from training.study.predicting import detect_clip
from training.tasks import State, StreamLesson, WindowLesson

PLAIN = Augmentation()
ORDER = (*CLASS_NAMES[3:], *CLASS_NAMES[:3])


def frames_of(*clips: Clip, frame: int = 0, dropped: int = -1) -> StreamBatch:
    """A frame of each clip, as streams of one batch."""
    return collate([make_sample(clip, frame, PLAIN, frame == 0, dropped) for clip in clips])


def windows_of(*clips: Clip, past: int = 2) -> WindowBatch:
    return collate_windows([make_window(clip, 3, PLAIN, past, 0) for clip in clips])


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def learn(
    lesson: nn.Module, batch: StreamBatch | WindowBatch, state: State
) -> tuple[dict[str, Tensor], State]:
    """A training step without the optimiser: all terms and gradients are finite."""
    lesson.train()
    lesson.zero_grad()
    terms, after = lesson(batch, state, draws())
    assert all(torch.isfinite(value) for value in terms.values()), terms
    torch.stack(list(terms.values())).sum().backward()
    gradients = [p.grad for p in lesson.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
    return detached(terms), after


def detached(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in terms.items()}


# -- what is shown ---------------------------------------------------------------------------------------


@RIGS
def test_any_number_of_cameras_teaches(cameras: int, width: int, height: int) -> None:
    model = small_model(*rig_settings(cameras, width, height))
    lesson = StreamLesson(model, 1)
    clip = make_clip(objects=40, width=width, height=height, cameras=cameras)
    _, state = learn(lesson, frames_of(clip), lesson.start_state())
    second = frames_of(clip, frame=1, dropped=0 if cameras > 1 else -1)
    assert int(second.rig.mask.sum()) == max(1, cameras - 1)
    assert second.targets.mask.any()
    terms, state = learn(lesson, second, state)
    assert float(terms["layer1/box"]) > 0 and float(terms["denoising1/box"]) > 0
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("streaming", [True, False])
def test_a_batch_of_other_cameras_is_refused(streaming: bool) -> None:
    said = (
        r"a batch of 6 cameras for a model of 2 \(CAM_FRONT, CAM_FRONT_RIGHT\); expected those of model.cha"
    )
    settings = rig_settings(2, 96, 32)
    lesson: StreamLesson | WindowLesson
    if streaming:
        lesson = StreamLesson(build_stream_petr(small_config(*settings)), 1)
    else:
        lesson = WindowLesson(small_sparse(*settings))
    batch = frames_of(make_clip()) if streaming else windows_of(make_clip())
    with pytest.raises(UserError, match=said):
        lesson(batch, lesson.start_state(), draws())


@pytest.mark.parametrize(("settings", "image_queries"), [((), 8), (FOCAL, 0)])
def test_a_frame_without_objects_teaches_a_stream(settings: tuple[str, ...], image_queries: int) -> None:
    torch.manual_seed(0)
    model = build_stream_petr(small_config(*settings, image_queries=image_queries))
    lesson = StreamLesson(model, 2)
    empty = make_clip(objects=0)
    _, state = learn(lesson, frames_of(empty, empty), lesson.start_state())
    terms, _ = learn(lesson, frames_of(empty, empty, frame=1), state)
    assert (
        float(terms["denoising1/class"]) == float(terms["denoising1/box"]) == float(terms["layer1/box"]) == 0
    )
    assert float(terms["layer1/class"]) > 0
    assert model.classifier[0].weight.grad.any()
    auxiliary = model.auxiliary.cls if settings else model.auxiliary.heat  # type: ignore[union-attr]
    assert auxiliary.weight.grad.any()


@pytest.mark.parametrize("image_queries", [0, 24])
def test_a_window_without_objects_teaches(image_queries: int) -> None:
    lesson = WindowLesson(small_sparse(image_queries=image_queries))
    terms, _ = learn(lesson, windows_of(make_clip(objects=0)), ())
    assert (
        float(terms["denoising1/class"]) == float(terms["denoising1/box"]) == float(terms["layer1/box"]) == 0
    )
    assert float(terms["layer1/class"]) > 0
    assert ("auxiliary/heat" in terms) == bool(image_queries)


def test_streams_of_different_rates_share_a_batch() -> None:
    """Key frames of 2 Hz beside frames of 12 Hz, of which not all are remembered; each as if alone."""
    clips = [make_clip(seed=0), replace(make_clip(seed=1), times=np.arange(6) * 0.083)]
    model = small_model()
    together, state = StreamLesson(model, 2), small_state(model, 2)
    alone = [StreamLesson(model, 1) for _ in clips]
    states = [small_state(model, 1) for _ in clips]
    for frame in range(6):
        with torch.no_grad():
            _, state = together.eval()(frames_of(*clips, frame=frame), state, draws())
            for place, clip in enumerate(clips):
                _, states[place] = alone[place].eval()(frames_of(clip, frame=frame), states[place], draws())
    newest = Memory(*state).time[:, ::6]
    assert newest[0].tolist() == [2.5, 2.0, 1.5]
    assert newest[1].tolist() == pytest.approx([0.415, 0.0, 0.0])
    for name, both, *each in zip(Memory._fields, state, *states, strict=True):
        assert torch.allclose(both, torch.cat(each), atol=1e-4), name
    terms, _ = learn(together, frames_of(*clips, frame=4), state)
    assert float(terms["layer1/box"]) > 0


def small_state(model: StreamPETR, streams: int) -> State:
    return StreamLesson(model, streams).start_state()


# -- what is asked for -----------------------------------------------------------------------------------


def with_far_objects(clip: Clip, keep: Callable[[np.ndarray], np.ndarray]) -> Clip:
    """The clip, every second object of which stands 53 to 60 m ahead; of all objects those that are kept."""
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


def lesson_of(kind: str, reach: float) -> StreamLesson | WindowLesson:
    torch.manual_seed(0)
    settings = ["loss.denoising_groups=0"]
    settings += [f"decoder.point_range_m={[-reach, -reach, -5.0, reach, reach, 3.0]}"]
    if kind == "window":
        return WindowLesson(small_sparse(*settings, image_queries=24))
    return StreamLesson(small_model(*settings, *FOCAL, image_queries=0), 1)


@pytest.mark.parametrize("kind", ["stream", "window"])
def test_objects_out_of_a_models_range_change_no_loss(kind: str) -> None:
    clip = make_clip(objects=8)
    show = windows_of if kind == "window" else frames_of
    everything, near = (
        show(with_far_objects(clip, keep)) for keep in (lambda far: far | True, lambda far: ~far)
    )
    assert int(everything.targets.mask.sum()) == 8 and int(near.targets.mask.sum()) == 4
    assert everything.targets.mask_2d[..., 1::2].any()
    short, long = lesson_of(kind, POINT_RANGE_M[3]), lesson_of(kind, 61.2)
    for lesson, same in ((short, True), (long, False)):
        state = lesson.start_state()
        found, expected = (detached(lesson(batch, state, draws())[0]) for batch in (everything, near))
        assert found.keys() == expected.keys()
        for name in (
            "layer1/box",
            "layer1/class",
            *(name for name in found if name.startswith("auxiliary/")),
        ):
            assert (abs(float(found[name] - expected[name])) < 1e-6) == same, name


def in_order(model: StreamPETR | SparseBEV) -> StreamPETR | SparseBEV:
    """The model with its classes in another order: whatever has a row or column a class is turned too."""
    config = replace(model.config, class_names=ORDER)
    turned = build_sparse_bev(config) if isinstance(model, SparseBEV) else build_stream_petr(config)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in state.items():
        last = name.rpartition(".")[0]
        if last in ("classifier.6", "decoder_layer.classifier.6", "auxiliary.heat", "auxiliary.cls"):
            state[name] = value.roll(-3, dims=0)
        elif name == "label_embedding.weight":
            state[name] = torch.cat([value[:-1].roll(-3, dims=0), value[-1:]])
        elif name in ("anchor_content.0.weight", "anchor_content.weight"):
            state[name] = torch.cat([value[:, :7], value[:, 7:].roll(-3, dims=1)], dim=1)
    turned.load_state_dict(state)
    return turned.eval()


@pytest.mark.parametrize("kind", ["dense", "focal", "window"])
def test_a_model_learns_and_answers_by_the_names_of_its_classes(kind: str) -> None:
    clip = make_clip(objects=60)
    assert all(set(clip.objects[frame].labels.tolist()) == set(range(10)) for frame in (0, 3))
    settings = ["loss.denoising_groups=0"] if kind == "window" else []  # they draw classes at random
    model: StreamPETR | SparseBEV
    if kind == "window":
        model = small_sparse(*settings, image_queries=24)
    else:
        extra, queries = (FOCAL, 0) if kind == "focal" else ((), 8)
        model = small_model(*extra, image_queries=queries)
    show = windows_of if kind == "window" else frames_of
    answers = []
    for one in (model, in_order(model)):
        lesson = WindowLesson(one) if isinstance(one, SparseBEV) else StreamLesson(one, 1)
        for module in one.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        answers.append(lesson.train()(show(clip), lesson.start_state(), draws())[0])
    for name, value in answers[0].items():
        assert torch.allclose(value, answers[1][name], rtol=1e-4, atol=1e-5), name
    plain, turned = (detect_clip(one, clip, torch.device("cpu"))[0] for one in (model, in_order(model)))
    assert torch.allclose(plain.scores, turned.scores, atol=1e-5)
    key = [
        np.lexsort((found.labels[0].numpy(), found.scores[0].numpy().round(5))) for found in (plain, turned)
    ]
    assert plain.labels[0, key[0]].tolist() == turned.labels[0, key[1]].tolist()
