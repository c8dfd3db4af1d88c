# SPDX-License-Identifier: Apache-2.0
"""Alignment diagnostics: known values in known cases, and runs read from checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import make_sample
from ftkd_core.distillation.cache import TeacherCache, fill_cache
from ftkd_core.distillation.ftkd import FTKD
from ftkd_core.distillation.teacher_output import TeacherOutput
from ftkd_core.errors import UserError
from ftkd_core.models.predictions import Predictions
from ftkd_core.types import Targets
from ftkd_core.weights import save_weights
from tests.core.helpers import make_clip
from tests.training.helpers import (
    distiller_of,
    loss_history,
    make_trainer,
    paired_data,
    small_teacher,
    streaming_task,
)
from training.feature_cache import network_input
from training.study.alignment_diagnostics import (
    AlignmentStatistics,
    future_share,
    main,
    measure_alignment,
    read_run,
)
from training.study.variance import ExplainedVariance, linear_probe
from training.tasks import StreamingTask


def test_explained_variance_is_1_for_the_truth_and_0_for_its_mean() -> None:
    true = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 3
    for estimate, expected in (
        (true, 1.0),
        (true.mean(0).expand_as(true), 0.0),
        (2 * true.mean(0) - true, -3.0),
    ):
        variance = ExplainedVariance()
        for part in (slice(0, 20), slice(20, 50)):  # adding in parts changes nothing
            variance.add(true[part], estimate[part])
        assert variance.value() == pytest.approx(expected, abs=1e-5)
    assert ExplainedVariance().value() is None
    constant = ExplainedVariance()
    constant.add(torch.ones(5, 2), torch.zeros(5, 2))
    assert constant.value() is None


def test_linear_probe_is_evaluated_on_other_pairs() -> None:
    draws = torch.Generator().manual_seed(0)
    inputs, noise = (torch.randn(400, 5, generator=draws) for _ in range(2))
    linear = inputs @ torch.randn(5, 5, generator=draws) + 2

    def probe(targets: Tensor) -> float | None:
        return linear_probe([(inputs[:200], targets[:200])], [(inputs[200:], targets[200:])])

    assert probe(linear) == pytest.approx(1.0, abs=1e-6)
    assert probe(noise) == pytest.approx(0.0, abs=0.1)
    assert linear_probe([(inputs[:11], linear[:11])], [(inputs, linear)]) is None, "too few pairs to fit"
    assert linear_probe([(inputs, linear)], []) is None


def predict_frame(task: StreamingTask) -> tuple[Targets, Predictions, FTKD]:
    """Return the targets and the student's predictions of a frame, and the method."""
    method = distiller_of(task).method
    assert isinstance(method, FTKD)
    task.eval()
    batch = make_sample(make_clip(), 2, Augmentation(), True)
    images = network_input(batch.images)
    predictions, _ = task.detector(batch.frame(images), task.detector.start_memory(1))
    return batch.targets, predictions, method


@torch.no_grad()
def test_student_equal_to_its_teacher_is_matched_to_itself() -> None:
    task = streaming_task("ftkd")
    targets, predictions, method = predict_frame(task)
    width = small_teacher().config.decoder.channels
    features = torch.randn(*predictions.features.shape[:2], width)
    maps: dict[int, Tensor] = {16: torch.randn(1, 6, width, *predictions.image_features.shape[-2:])}
    output = TeacherOutput(predictions.logits, predictions.codes, features, maps, {16: torch.ones(1)})
    method.teacher = None
    found = AlignmentStatistics(method)
    for seed in range(2):
        found.add(predictions, output, targets, seed)
    summary = found.summary()
    assert summary["frames"] == 2
    assert (
        summary["foreground"]["pairs_per_frame"]
        == summary["objects_per_frame"]
        == int(targets.mask.sum())
        > 0
    )
    queries = predictions.logits.shape[2]
    assert summary["foreground"]["pairs_per_frame"] + summary["background"]["pairs_per_frame"] == queries
    for kind in ("foreground", "background"):
        assert summary[kind]["median_distance_m"] == 0 and summary[kind]["within_2_m"] == 1
    total = sum(summary[kind]["teacher_score"] * summary[kind]["pairs_per_frame"] for kind in found.pairs)
    assert total == pytest.approx(float(predictions.logits[-1].sigmoid().amax(-1).sum()), rel=1e-5)
    assert summary["background"]["features_rebuilt"] < 0.5, "noise cannot be rebuilt"
    assert summary["maps_rebuilt"]["16"] < 0.5


@torch.no_grad()
def test_future_share_is_0_if_the_current_frame_is_the_target() -> None:
    clip = make_clip()
    share = future_share(small_teacher().eval(), clip, (16,), "current")
    assert share["16"] == pytest.approx(0, abs=1e-6)
    assert 0 < future_share(small_teacher().eval(), clip, (16,), "mean_residual")["16"] < 1
    odd = make_clip(frames=5)  # windows come in fours: the last is alone and has no future
    assert 0 < future_share(small_teacher().eval(), odd, (16,), "mean_residual")["16"] < 1


def test_run_is_read_from_its_checkpoint(tmp_path: Path) -> None:
    task = streaming_task("ftkd")
    trainer = make_trainer(tmp_path, task, 2)
    loss_history(trainer, paired_data(), 2)
    trainer.save()
    run = read_run(tmp_path, small_teacher())
    assert run.steps == 2
    for original, loaded in ((task.detector, run.student), (distiller_of(task), run.distiller)):
        assert not loaded.training
        saved, read = original.state_dict(), loaded.state_dict()
        assert saved.keys() == read.keys() and all(saved[name].equal(read[name]) for name in saved)
    description = run.distiller.describe("hash", "clips")
    clips = [make_clip(seed=seed) for seed in range(2)].__getitem__
    fill_cache(tmp_path / "cache", description, run.distiller.run_teacher_on_clip, clips, 2)
    summary = measure_alignment(run, clips, TeacherCache(tmp_path / "cache", description, 2), 2)
    assert summary["frames"] == 12 and summary["maps_rebuilt"].keys() == {"16"}
    assert summary["foreground"]["pairs_per_frame"] == summary["objects_per_frame"] == 4
    with pytest.raises(UserError, match="expected a folder of"):
        read_run(tmp_path / "none", small_teacher())


def test_runs_of_other_methods_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path, streaming_task("mgd"), 1)
    trainer.save()
    with pytest.raises(UserError, match="is not an FTKD run with a streaming student"):
        read_run(tmp_path, small_teacher())
    guide = tmp_path / "teacher.safetensors"
    save_weights(guide, small_teacher().state_dict(), small_teacher().config, half=False)
    command = ["--run", str(tmp_path), "--teacher", str(guide), "--cache", str(tmp_path)]
    assert main(command) == 2
    assert "is not an FTKD run" in capsys.readouterr().err
    assert main([*command, "--scenes", "0"]) == 2
    assert "--scenes 0: expected at least 1" in capsys.readouterr().err


def test_checkpoint_with_another_setting_is_refused_by_name(tmp_path: Path) -> None:
    make_trainer(tmp_path, streaming_task(), 1).save()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    settings = json.loads(state["settings"])
    del settings["method"]["matching"]
    torch.save(state | {"settings": json.dumps(settings)}, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"\(method.matching unset, here 'object'\)"):
        read_run(tmp_path, small_teacher())
