# SPDX-License-Identifier: Apache-2.0
"""Training tasks: both teacher-student pairs train, the student keeps nothing of the teacher, and a killed
run resumes exactly."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ftkd_core.config import to_dict
from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.data.clips import StreamDataset
from ftkd_core.data.windows import PairedDataset, WindowBatch
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
from tests.training.helpers import (
    Task,
    loss_history,
    make_trainer,
    paired_data,
    small_arguments,
    small_sparse,
    small_teacher,
    streaming_task,
    window_data,
    window_task,
)
from training import train
from training.distill import load_teacher, main
from training.distiller import make_distiller
from training.feature_cache import network_input
from training.tasks import StreamingTask, WindowTask


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("ftkd", "logits")])
def test_every_method_adds_its_terms_for_both_students(tmp_path: Path, method: str, streaming: bool) -> None:
    task: Task = streaming_task(method) if streaming else window_task(method)
    history = loss_history(make_trainer(tmp_path, task, 3), paired_data() if streaming else window_data(), 3)
    distilled = {
        name for name in history if "/" in name and name.split("/")[0] in ("ftkd", "mgd", "cwd", "stxd")
    }
    expected = {
        "ftkd_no_pv": {"ftkd/bev", "ftkd/logits_background_box"},
        "ftkd_no_bev": {"ftkd/pv16", "ftkd/logits_background_box"},
        "ftkd_no_fld": {"ftkd/pv16", "ftkd/bev"},
    }.get(method, {f"{method}/16"} if streaming else {f"{method}/16", f"{method}/32"})
    assert expected <= distilled
    part = {"ftkd_no_pv": "pv", "ftkd_no_bev": "bev", "ftkd_no_fld": "logits"}.get(method, "ftkd")
    assert not any(part in name for name in distilled)
    assert all(value == value for values in history.values() for value in values)


def test_window_student_rebuilds_the_maps_of_the_current_frame() -> None:
    data = window_data()
    batch = next(batch for batch in map(data.__getitem__, range(8)) if not batch.real[:, 1].all())
    task = window_task("ftkd_no_bev", logits_weight=0.0)
    assert task.distiller is not None
    branches = task.distiller.method.map_branches
    assert set(branches) == {"16", "32"}
    branches["32"].mask_ratio = 0.0
    output = task.distiller.run_teacher(batch)
    assert output.target_weights[16].tolist() == batch.real[:, 0].float().tolist()
    terms, _ = task(batch, (), torch.Generator().manual_seed(0))
    with torch.no_grad():
        pyramid = task.detector.extract(network_input(batch.images))
        errors = []
        for window in range(len(batch.real)):
            target, _ = future_aware_target(
                *(task.distiller.teacher.extract(x)[-1] for x in frames_of(batch, window, 0)),
                batch.real[window : window + 1, 2:],
            )
            guess = branches["32"].rebuild(pyramid[-1][window : window + 1, 0], torch.Generator())
            errors.append(float((guess - target).square().mean()))
    expected = FTKDConfig().pv_weight * sum(errors) / len(errors)
    assert float(terms["ftkd/pv32"].detach()) == pytest.approx(expected, rel=1e-4)


def frames_of(batch: WindowBatch, window: int, frame: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a normalised frame of a window and its future frames."""
    images = normalise(batch.images[window : window + 1])
    return images[:, frame], images[:, 2:]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", ["tiny", "r18_352x128"])
def test_presets_of_the_same_size_are_teacher_and_student(tmp_path: Path, size: str) -> None:
    """Steps of the experiment's student and teacher, which start with the same backbone and 2-D head."""
    student, guide = preset(size), sparse_bev_preset(f"sparse_bev_{size}_offline")
    model, frozen = build_stream_petr(student), build_sparse_bev(guide)
    save_weights(tmp_path / "guide.safetensors", frozen.state_dict(), guide, half=False)
    start_from(tmp_path / "guide.safetensors", model, student, ["backbone", "auxiliary"])
    clip = make_clip(frames=3, width=352, height=128)
    streams = StreamDataset([clip].__getitem__, 1, num_streams=1, segment=3, augment=NO_AUGMENTATION, seed=3)
    task = StreamingTask(model, 1, make_distiller(frozen, model, method_config("ftkd")))
    data = PairedDataset(streams, guide.num_past, guide.num_future)
    history = loss_history(make_trainer(tmp_path, task, 2), data, 2)
    assert {"ftkd/pv16", "ftkd/bev", "ftkd/logits_background_box", "auxiliary/heat"} <= set(history)
    assert all(math.isfinite(value) for values in history.values() for value in values)
    assert [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_of_a_method_gets_a_gradient(tmp_path: Path, method: str, streaming: bool) -> None:
    """DDP waits for the gradient of every parameter that it wraps."""
    task: Task = streaming_task(method) if streaming else window_task(method)
    loss_history(make_trainer(tmp_path, task, 1), paired_data() if streaming else window_data(), 1)
    assert [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("method", ["ftkd", "cwd"])
def test_tensorboard_logs_every_term_and_its_ratio_to_the_detection_loss(tmp_path: Path, method: str) -> None:
    trainer = make_trainer(tmp_path, streaming_task(method), 2)
    trainer.run(paired_data(), workers=0, save_every=2, log_every=1)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    logged = {name: [event.value for event in events.Scalars(name)] for name in names}
    others = {"total", "gradient_norm", "lr", "samples_per_s", "load_share", "seconds_left"}
    terms = names - others - {name for name in names if name.startswith("ratio/")}
    distilled = {name for name in terms if name.split("/")[0] == method}
    assert distilled and {"layer1/class", "denoising0/box", "auxiliary/heat"} <= terms - distilled
    assert {name for name in names if name.startswith("ratio/")} == {f"ratio/{name}" for name in distilled}
    for step in range(2):
        detection = sum(logged[name][step] for name in terms - distilled)
        assert logged["total"][step] == pytest.approx(sum(logged[name][step] for name in terms), rel=1e-5)
        for name in distilled:
            assert logged[f"ratio/{name}"][step] == pytest.approx(logged[name][step] / detection, rel=1e-5), (
                name
            )


def test_non_finite_teacher_output_is_named(tmp_path: Path) -> None:
    task = streaming_task()
    assert task.distiller is not None
    with torch.no_grad():
        for parameter in task.distiller.teacher.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="step 0: distillation alignment/teacher/class: .* kept$"):
        make_trainer(tmp_path, task, 1).train_step(paired_data()[0])


def test_weights_file_names_method_and_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, model = tmp_path / "teacher.safetensors", small_teacher()
    save_weights(path, model.state_dict(), model.config)
    distilled = ["--teacher", str(path), "--method", "logits"]
    assert train.main(small_arguments(tmp_path / "plain", 1)) == 0
    assert main([*distilled, *small_arguments(tmp_path / "known", 1)]) == 0
    other = [*distilled, "--set-method", "logits_weight=0.5"]
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
    assert main([*distilled, *small_arguments(tmp_path / "known", 5, "optim.lr=1e30")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("distillation: step 2: ")
    assert (tmp_path / "known" / "state.pt").read_bytes() == kept


@pytest.mark.parametrize("pair", ["sparse_bev to stream_petr", "sparse_bev to sparse_bev"])
def test_detection_and_distillation_losses_fall_for_both_pairs(tmp_path: Path, pair: str) -> None:
    streaming = pair.endswith("stream_petr")
    task: Task = streaming_task() if streaming else window_task()
    trainer = make_trainer(tmp_path, task, 50)
    history = loss_history(trainer, paired_data() if streaming else window_data(), 50)
    distilled = [name for name in history if name.startswith("ftkd/")]
    assert {"ftkd/bev", "ftkd/pv16", "ftkd/logits_foreground_class"} <= set(distilled)
    assert ("ftkd/pv32" in distilled) == (not streaming)  # StreamPETR has the stride-16 level only

    def total(names: list[str], steps: slice) -> float:
        return sum(sum(history[name][steps]) for name in names)

    detection = [name for name in history if name not in distilled]
    for names in (detection, ["ftkd/bev"], ["ftkd/pv16"]):
        assert total(names, slice(-6, None)) < 0.9 * total(names, slice(6)), names


def test_teacher_trains_on_windows(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, WindowTask(small_teacher()), 40)
    history = loss_history(trainer, window_data(), 40)
    sums = [sum(values[step] for values in history.values()) for step in range(40)]
    assert sum(sums[-6:]) < 0.9 * sum(sums[:6])
    trainer.save()
    loaded = load_teacher(tmp_path / "weights.safetensors")
    assert loaded.config.num_future == 1
    with pytest.raises(UserError, match="are of kind SparseBEVConfig; expected DetectorConfig"):
        read_weights(tmp_path / "weights.safetensors")


def test_student_is_the_same_network_with_and_without_a_teacher(tmp_path: Path) -> None:
    """No cost at inference: the files hold the same tensors, and equal weights give equal outputs."""
    files = {}
    for distilled in (True, False):
        task = streaming_task("ftkd" if distilled else "")
        trainer = make_trainer(tmp_path / str(distilled), task, 1)
        trainer.save()
        files[distilled], config, _ = read_weights(tmp_path / str(distilled) / "weights.safetensors")
    assert {n: v.shape for n, v in files[True].items()} == {n: v.shape for n, v in files[False].items()}
    assert config == small_config()
    models = []
    for task in (streaming_task("ftkd"), streaming_task("")):
        assert isinstance(task.detector, StreamPETR)
        load_into(task.detector, files[True], "test")
        models.append(task.detector.eval())
    frame = paired_data()[0][0]
    inputs = frame.frame(frame.images.float().movedim(-1, -3) / 255)
    with torch.no_grad():
        a, b = (model(inputs, model.start_memory(2))[0] for model in models)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.codes, b.codes)


@pytest.mark.parametrize("method", ["ftkd", "stxd"])
def test_killed_distillation_resumes_bit_for_bit(tmp_path: Path, method: str) -> None:
    data = paired_data(AugmentConfig())
    whole = make_trainer(tmp_path / "whole", streaming_task(method), 4)
    whole.run(data, workers=0, save_every=2)
    killed = make_trainer(tmp_path / "killed", streaming_task(method), 4)
    for step in range(3):  # interrupted after step 3; the last checkpoint was written at step 2
        killed.train_step(data[step])
        killed.step += 1
        if killed.step == 2:
            killed.save()
    resumed = make_trainer(tmp_path / "killed", streaming_task(method), 4)
    resumed.resume(tmp_path / "killed" / "state.pt")
    resumed.run(data, workers=0, save_every=2)
    for name, value in whole.task.state_dict().items():
        assert torch.equal(value, resumed.task.state_dict()[name]), name
    if method == "stxd":  # the previous frame's maps are part of the state
        assert whole.state[-1].shape == (2, 6, 16, 2, 6) and whole.state[-1].any()
    else:
        assert any(name.startswith("distiller.method") for name in whole.task.state_dict())
    assert not any("frozen" in name or "teacher" in name for name in whole.task.state_dict())
    with pytest.raises(UserError, match="another configuration .*method"):
        make_trainer(tmp_path / "killed", streaming_task(matching="prediction"), 4).resume(
            tmp_path / "killed" / "state.pt"
        )


def test_teacher_is_not_trained(tmp_path: Path) -> None:
    task = streaming_task()
    assert task.distiller is not None
    before = {name: value.clone() for name, value in task.distiller.teacher.state_dict().items()}
    loss_history(make_trainer(tmp_path, task, 3), paired_data(), 3)
    assert not task.distiller.teacher.training
    for name, value in task.distiller.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("streaming", [True, False])
def test_mixed_precision_trains(tmp_path: Path, streaming: bool) -> None:
    task: Task = streaming_task() if streaming else window_task()
    trainer = make_trainer(tmp_path, task, 3, torch.bfloat16)
    history = loss_history(trainer, paired_data() if streaming else window_data(), 3)
    assert all(value == value for values in history.values() for value in values)
    assert not streaming or trainer.state[1].dtype == torch.float64  # global positions stay exact


def test_incompatible_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="student has image"):
        make_distiller(small_teacher(), build_stream_petr(small_config("image.width=112")), FTKDConfig())
    student = small_sparse(past=2)
    with pytest.raises(UserError, match="expected as many past frames"):
        WindowTask(student, make_distiller(small_teacher(), student, FTKDConfig()))
    assert isinstance(build_sparse_bev(student.config), SparseBEV)
    with pytest.raises(UserError, match="not found"):
        read_window_weights(tmp_path / "none.safetensors")


def test_bad_input_is_reported_in_one_sentence_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ["--out", str(tmp_path), "--teacher", str(tmp_path / "none.safetensors")]
    assert main(missing) == 2
    assert "none.safetensors' not found" in capsys.readouterr().err
    assert main([*missing, "--set-method", "pv_wait=1"]) == 2
    assert "unknown configuration key pv_wait; did you mean pv_weight?" in capsys.readouterr().err
