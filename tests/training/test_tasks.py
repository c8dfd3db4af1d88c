# SPDX-License-Identifier: Apache-2.0
"""What a step teaches: both pairs of teacher and student learn, nothing of the teacher stays in the student,
and a killed run goes on exactly."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ftkd_core.config import to_dict
from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.data.clips import StreamDataset
from ftkd_core.data.windows import PairedDataset, WindowBatch, WindowDataset
from ftkd_core.distillation.config import FTKDConfig
from ftkd_core.distillation.methods import METHODS, method_config
from ftkd_core.distillation.reconstruction import future_aware_target
from ftkd_core.errors import UserError
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.sparse_bev import SparseBEV, build_sparse_bev
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.presets import preset, sparse_bev_preset
from ftkd_core.runtime.preprocess import normalise
from ftkd_core.weights import (
    load_into,
    read_weights,
    read_window_weights,
    save_weights,
    start_from,
    weights_hash,
)
from tests.core.helpers import NO_AUGMENTATION, make_clip, small_config
from tests.core.test_sparse_bev import small_sparse
from training import train
from training.distill import load_teacher, main
from training.feature_cache import network_input
from training.tasks import StreamLesson, WindowLesson, difference, make_distiller
from training.trainer import OptimConfig, Trainer

OPTIM = OptimConfig(lr=2e-3, warmup_steps=2, ema=0.9)
Lesson = StreamLesson | WindowLesson


def make_trainer(out: Path, lesson: Lesson, steps: int, autocast: torch.dtype | None = None) -> Trainer:
    fabric = Fabric(accelerator="cpu", devices=1)
    out.mkdir(exist_ok=True)
    return Trainer(fabric, lesson, OPTIM, out, steps=steps, seed=3, autocast=autocast)


def teacher() -> SparseBEV:
    return small_sparse(past=1, future=1)


def stream_lesson(method: str = "ftkd", **settings: object) -> StreamLesson:
    """With a teacher; without one where the method is empty."""
    torch.manual_seed(1)
    student = build_stream_petr(small_config())
    if not method:
        return StreamLesson(student, 2)
    config = replace(method_config(method), **settings)  # type: ignore[arg-type]
    return StreamLesson(student, 2, make_distiller(teacher(), student, config))


def window_lesson(method: str = "ftkd", **settings: object) -> WindowLesson:
    """The same of a student of windows."""
    student = small_sparse(past=1)
    if not method:
        return WindowLesson(student)
    config = replace(method_config(method), **settings)  # type: ignore[arg-type]
    return WindowLesson(student, make_distiller(teacher(), student, config))


def pairs(augment: AugmentConfig = NO_AUGMENTATION) -> PairedDataset:
    clips = [make_clip(seed=seed) for seed in range(2)]
    streams = StreamDataset(clips.__getitem__, 2, num_streams=2, segment=3, augment=augment, seed=3)
    return PairedDataset(streams, 1, 1)


def windows(future: int = 1) -> WindowDataset:
    clips = [make_clip(seed=seed) for seed in range(2)]
    return WindowDataset(
        clips.__getitem__, 2, batch=2, num_past=1, num_future=future, augment=NO_AUGMENTATION, seed=3
    )


def totals(trainer: Trainer, data: PairedDataset | WindowDataset, steps: int) -> dict[str, list[float]]:
    trainer.model.train()
    history: dict[str, list[float]] = {}
    for step in range(steps):
        terms, _ = trainer.train_step(data[step])
        trainer.step += 1
        for name, value in terms.items():
            history.setdefault(name, []).append(float(value))
    return history


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("ftkd", "logits")])
def test_every_method_teaches_both_students(tmp_path: Path, method: str, streaming: bool) -> None:
    lesson: Lesson = stream_lesson(method) if streaming else window_lesson(method)
    history = totals(make_trainer(tmp_path, lesson, 3), pairs() if streaming else windows(), 3)
    taught = {
        name for name in history if "/" in name and name.split("/")[0] in ("ftkd", "mgd", "cwd", "stxd")
    }
    expected = {
        "ftkd_no_pv": {"ftkd/bev", "ftkd/logits_background_box"},
        "ftkd_no_bev": {"ftkd/pv16", "ftkd/logits_background_box"},
        "ftkd_no_fld": {"ftkd/pv16", "ftkd/bev"},
    }.get(method, {f"{method}/16"} if streaming else {f"{method}/16", f"{method}/32"})
    assert expected <= taught
    part = {"ftkd_no_pv": "pv", "ftkd_no_bev": "bev", "ftkd_no_fld": "logits"}.get(method, "ftkd")
    assert not any(part in name for name in taught)
    assert all(value == value for values in history.values() for value in values)


def test_a_student_of_windows_rebuilds_the_strides_and_frames_that_are_asked_for() -> None:
    """All its frames are rebuilt from the same future; one that only repeats another is not."""
    data = windows()
    batch = next(batch for batch in map(data.__getitem__, range(8)) if not batch.real[:, 1].all())

    def rebuilt(**settings: object) -> dict[str, float]:
        lesson = window_lesson("ftkd_no_bev", pv_mask_ratio=0.0, logits_weight=0.0, **settings)
        terms, _ = lesson(batch, (), torch.Generator().manual_seed(0))
        return {name: float(value.detach()) for name, value in terms.items() if name.startswith("ftkd/")}

    assert set(rebuilt()) == {"ftkd/pv16", "ftkd/pv32"}
    assert set(rebuilt(pv_strides=(8, 16))) == {"ftkd/pv8", "ftkd/pv16"}
    assert rebuilt(pv_frames="all") != rebuilt()
    lesson = window_lesson("ftkd_no_bev", pv_mask_ratio=0.0, pv_frames="all", logits_weight=0.0)
    assert lesson.distiller is not None
    answer = lesson.distiller.answer(batch)
    assert answer.target_weights[16].tolist() == batch.real[:, :2].float().flatten().tolist()
    with torch.no_grad():
        pyramid = lesson.detector.extract(network_input(batch.images, lesson.detector.config.image))
        branch = lesson.distiller.method.map_branches["32"]
        errors = []
        for window, frame in batch.real[:, :2].nonzero().tolist():
            target, _ = future_aware_target(
                *(lesson.distiller.teacher.extract(x)[-1] for x in frames_of(batch, window, frame)),
                batch.real[window : window + 1, 2:],
            )
            guess = branch.rebuild(pyramid[-1][window : window + 1, frame], torch.Generator())
            errors.append(float((guess - target).square().mean()))
    expected = FTKDConfig().pv_weight * sum(errors) / len(errors)
    assert rebuilt(pv_frames="all")["ftkd/pv32"] == pytest.approx(expected, rel=1e-4)


def frames_of(batch: WindowBatch, window: int, frame: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A frame of a window and its future frames, as the networks see them."""
    images = normalise(batch.images[window : window + 1], small_config().image)
    return images[:, frame], images[:, 2:]


@pytest.mark.timeout(600)  # seconds of processor time, which a busy machine stretches
@pytest.mark.parametrize("size", ["tiny", "r18_352x128"])
def test_presets_of_a_size_teach_each_other(tmp_path: Path, size: str) -> None:
    """Steps of the experiment's student and teacher, which begin with the same backbone and 2-D head."""
    student, guide = preset(size), sparse_bev_preset(f"sparse_bev_{size}_offline")
    model, frozen = build_stream_petr(student), build_sparse_bev(guide)
    save_weights(tmp_path / "guide.safetensors", frozen.state_dict(), guide, half=False)
    start_from(tmp_path / "guide.safetensors", model, student, ["backbone", "auxiliary"])
    clip = make_clip(frames=3, width=352, height=128)
    streams = StreamDataset([clip].__getitem__, 1, num_streams=1, segment=3, augment=NO_AUGMENTATION, seed=3)
    lesson = StreamLesson(model, 1, make_distiller(frozen, model, method_config("ftkd")))
    data = PairedDataset(streams, guide.num_past, guide.num_future)
    history = totals(make_trainer(tmp_path, lesson, 2), data, 2)
    assert {"ftkd/pv16", "ftkd/bev", "ftkd/logits_background_box", "auxiliary/heat"} <= set(history)
    assert all(math.isfinite(value) for values in history.values() for value in values)
    assert [name for name, p in lesson.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_of_a_method_gets_a_gradient(tmp_path: Path, method: str, streaming: bool) -> None:
    """DDP waits for the gradients of all that was given to it."""
    lesson: Lesson = stream_lesson(method) if streaming else window_lesson(method)
    totals(make_trainer(tmp_path, lesson, 1), pairs() if streaming else windows(), 1)
    assert [name for name, p in lesson.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("method", ["ftkd", "cwd"])
def test_tensorboard_holds_every_term_and_its_ratio_to_the_detection_loss(
    tmp_path: Path, method: str
) -> None:
    trainer = make_trainer(tmp_path, stream_lesson(method), 2)
    trainer.run(pairs(), workers=0, save_every=2, log_every=1)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    told = {name: [event.value for event in events.Scalars(name)] for name in names}
    terms = names - {"total", "gradient_norm", "lr"} - {name for name in names if name.startswith("ratio/")}
    taught = {name for name in terms if name.split("/")[0] == method}
    assert taught and {"layer1/class", "denoising0/box", "auxiliary/heat"} <= terms - taught
    assert {name for name in names if name.startswith("ratio/")} == {f"ratio/{name}" for name in taught}
    for step in range(2):
        detection = sum(told[name][step] for name in terms - taught)
        assert told["total"][step] == pytest.approx(sum(told[name][step] for name in terms), rel=1e-5)
        for name in taught:
            assert told[f"ratio/{name}"][step] == pytest.approx(told[name][step] / detection, rel=1e-5), name


def test_a_teacher_that_says_nan_is_named(tmp_path: Path) -> None:
    lesson = stream_lesson()
    assert lesson.distiller is not None
    with torch.no_grad():
        for parameter in lesson.distiller.teacher.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="step 0: distillation alignment/teacher/class: .* kept$"):
        make_trainer(tmp_path, lesson, 1).train_step(pairs()[0])


def small_arguments(out: Path, steps: int, *settings: str) -> list[str]:
    """Of `training.train` or `training.distill`: a small `tiny` on one short scene."""
    every = [
        f"steps={steps}", "streams=1", "data.scenes=1", "data.duration_s=3.0", "data.workers=0",
        f"data.cache={out.parent / 'clips'}", "model.image.width=96", "model.image.height=32",
        "model.backbone.base_channels=8", "model.decoder.num_image_queries=24", *settings,
    ]  # fmt: skip
    assigned = [part for setting in every for part in ("--set", setting)]
    return ["--out", str(out), "--accelerator", "cpu", *assigned]


def test_the_weights_file_names_method_and_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = tmp_path / "teacher.safetensors", teacher()
    save_weights(path, model.state_dict(), model.config)
    guided = ["--teacher", str(path), "--method", "logits"]
    assert train.main(small_arguments(tmp_path / "plain", 1)) == 0
    assert main([*guided, *small_arguments(tmp_path / "known", 1)]) == 0
    other = [*guided, "--set-method", "logits_weight=0.5"]
    assert main([*other, *small_arguments(tmp_path / "changed", 1)]) == 0
    plain, known, changed = (
        read_weights(tmp_path / run / "weights.safetensors")[2] for run in ("plain", "known", "changed")
    )
    assert plain.keys() == {"steps", "hours", "seed"} == known.keys() - {"method", "teacher"}
    assert known["method"] == "logits" and known["teacher"] == changed["teacher"] == weights_hash(path)
    assert changed["method"]["logits_weight"] == 0.5
    expected = replace(method_config("logits"), logits_weight=0.5)  # type: ignore[call-arg]
    assert changed["method"] == json.loads(json.dumps(to_dict(expected)))

    kept = (tmp_path / "known" / "state.pt").read_bytes()
    assert main([*guided, *small_arguments(tmp_path / "known", 5, "optim.lr=1e30")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("distillation: step 2: ")
    assert (tmp_path / "known" / "state.pt").read_bytes() == kept


@pytest.mark.parametrize("pair", ["sparse_bev to stream_petr", "sparse_bev to sparse_bev"])
def test_both_pairs_learn_from_truth_and_teacher(tmp_path: Path, pair: str) -> None:
    streaming = pair.endswith("stream_petr")
    lesson: Lesson = stream_lesson() if streaming else window_lesson()
    trainer = make_trainer(tmp_path, lesson, 50)
    history = totals(trainer, pairs() if streaming else windows(), 50)
    taught = [name for name in history if name.startswith("ftkd/")]
    assert {"ftkd/bev", "ftkd/pv16", "ftkd/logits_foreground_class"} <= set(taught)
    assert ("ftkd/pv32" in taught) == (not streaming)  # StreamPETR has the stride-16 level only

    def total(names: list[str], steps: slice) -> float:
        return sum(sum(history[name][steps]) for name in names)

    learnt = [name for name in history if name not in taught]
    for names in (learnt, ["ftkd/bev"], ["ftkd/pv16"]):
        assert total(names, slice(-6, None)) < 0.9 * total(names, slice(6)), names


def test_a_teacher_learns_from_windows(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, WindowLesson(teacher()), 40)
    history = totals(trainer, windows(), 40)
    sums = [sum(values[step] for values in history.values()) for step in range(40)]
    assert sum(sums[-6:]) < 0.8 * sum(sums[:6])
    trainer.save()
    again = load_teacher(tmp_path / "weights.safetensors")
    assert again.config.num_future == 1
    with pytest.raises(UserError, match="are of kind SparseBEVConfig; expected DetectorConfig"):
        read_weights(tmp_path / "weights.safetensors")


def test_the_student_is_the_same_network_with_and_without_a_teacher(tmp_path: Path) -> None:
    """No cost at inference: equal tensors in the file, and with equal weights equal answers."""
    files = {}
    for distilled in (True, False):
        lesson = stream_lesson("ftkd" if distilled else "")
        trainer = make_trainer(tmp_path / str(distilled), lesson, 1)
        trainer.save()
        files[distilled], config, _ = read_weights(tmp_path / str(distilled) / "weights.safetensors")
    assert {n: v.shape for n, v in files[True].items()} == {n: v.shape for n, v in files[False].items()}
    assert config == small_config()
    models = []
    for lesson in (stream_lesson("ftkd"), stream_lesson("")):
        assert isinstance(lesson.detector, StreamPETR)
        load_into(lesson.detector, files[True], "test")
        models.append(lesson.detector.eval())
    frame = pairs()[0][0]
    shown = frame.frame(frame.images.float().movedim(-1, -3) / 255)
    with torch.no_grad():
        a, b = (model(shown, model.start_memory(2))[0] for model in models)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.codes, b.codes)


@pytest.mark.parametrize("method", ["ftkd", "stxd"])
def test_a_killed_distillation_goes_on_bit_for_bit(tmp_path: Path, method: str) -> None:
    data = pairs(AugmentConfig())
    whole = make_trainer(tmp_path / "whole", stream_lesson(method), 4)
    whole.run(data, workers=0, save_every=2)
    killed = make_trainer(tmp_path / "killed", stream_lesson(method), 4)
    for step in range(3):  # dies after step 3; its last checkpoint is of step 2
        killed.train_step(data[step])
        killed.step += 1
        if killed.step == 2:
            killed.save()
    again = make_trainer(tmp_path / "killed", stream_lesson(method), 4)
    again.resume(tmp_path / "killed" / "state.pt")
    again.run(data, workers=0, save_every=2)
    for name, value in whole.lesson.state_dict().items():
        assert torch.equal(value, again.lesson.state_dict()[name]), name
    if method == "stxd":  # the maps of the frame before are part of the state
        assert whole.state[-1].shape == (2, 6, 16, 2, 6) and whole.state[-1].any()
    else:
        assert any(name.startswith("distiller.method") for name in whole.lesson.state_dict())
    assert not any("frozen" in name or "teacher" in name for name in whole.lesson.state_dict())
    with pytest.raises(UserError, match="another configuration .*method"):
        make_trainer(tmp_path / "killed", stream_lesson(bev_mask_ratio=0.25), 4).resume(
            tmp_path / "killed" / "state.pt"
        )


def test_the_teacher_stays_as_it_was(tmp_path: Path) -> None:
    lesson = stream_lesson()
    assert lesson.distiller is not None
    before = {name: value.clone() for name, value in lesson.distiller.teacher.state_dict().items()}
    totals(make_trainer(tmp_path, lesson, 3), pairs(), 3)
    assert not lesson.distiller.teacher.training
    for name, value in lesson.distiller.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("streaming", [True, False])
def test_mixed_precision_trains(tmp_path: Path, streaming: bool) -> None:
    lesson: Lesson = stream_lesson() if streaming else window_lesson()
    trainer = make_trainer(tmp_path, lesson, 3, torch.bfloat16)
    history = totals(trainer, pairs() if streaming else windows(), 3)
    assert all(value == value for values in history.values() for value in values)
    assert not streaming or trainer.state[1].dtype == torch.float64  # places in the world stay exact


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="student has image"):
        make_distiller(teacher(), build_stream_petr(small_config("image.width=112")), FTKDConfig())
    with pytest.raises(UserError, match="student and teacher have maps of stride 16; expected some"):
        stream_lesson(pv_strides=(8, 32))
    stream_lesson(pv_strides=(8, 32), pv_weight=0.0)
    fine = small_sparse("decoder.levels=4", past=1)  # its teacher has no maps of stride 4
    with pytest.raises(UserError, match="student and teacher have maps of stride 32, 16, 8; expected some"):
        make_distiller(teacher(), fine, FTKDConfig(pv_strides=(4,)))
    with pytest.raises(UserError, match="pv_frames all: a streaming student has one frame a step"):
        stream_lesson(pv_frames="all")
    student = small_sparse(past=2)
    with pytest.raises(UserError, match="expected as many past frames"):
        WindowLesson(student, make_distiller(teacher(), student, FTKDConfig()))
    assert isinstance(build_sparse_bev(student.config), SparseBEV)
    with pytest.raises(UserError, match="not found"):
        read_window_weights(tmp_path / "none.safetensors")


def test_bad_input_is_one_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ["--out", str(tmp_path), "--teacher", str(tmp_path / "none.safetensors")]
    assert main(missing) == 2
    assert "none.safetensors' not found" in capsys.readouterr().err
    assert main([*missing, "--set-method", "bev_mask_share=0.5"]) == 2
    assert "unknown configuration key bev_mask_share; did you mean bev_mask_ratio?" in capsys.readouterr().err


def test_how_saved_settings_differ_is_said() -> None:
    saved = {"model": {"layers": 2, "image": [704, 256]}, "method": {"mask": 0.5}}
    assert difference(saved, {"method": {"mask": 0.5}, "model": {"layers": 2, "image": (704, 256)}}) == ""
    ours = {"model": {"layers": 3, "image": (704, 256)}, "method": {"mask": 0.5, "reach": 0}}
    assert difference(saved, ours) == "method.reach unset, here 0; model.layers 2, here 3"
    assert difference({}, {str(value): value for value in range(9)}).endswith("; 3 more")
