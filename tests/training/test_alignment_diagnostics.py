# SPDX-License-Identifier: Apache-2.0
"""Whether a student follows its teacher: the figures are what they say, and a run is read as it was saved."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ftkd_core.distillation.cache import TeacherCache, fill_cache
from ftkd_core.distillation.ftkd import FTKD
from ftkd_core.distillation.teacher_output import TeacherOutput
from ftkd_core.errors import UserError
from ftkd_core.models.predictions import Predictions
from ftkd_core.types import Targets
from ftkd_core.weights import save_weights
from tests.core.helpers import make_clip
from tests.training.test_tasks import make_trainer, pairs, stream_lesson, teacher, totals
from training.study import alignment_diagnostics as following
from training.study.alignment_diagnostics import (
    Following,
    Variance,
    follow,
    future_share,
    linearly_held,
    read_run,
)
from training.tasks import StreamLesson


def test_explained_is_one_of_the_truth_and_none_of_its_mean() -> None:
    true = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 3
    for estimate, expected in (
        (true, 1.0),
        (true.mean(0).expand_as(true), 0.0),
        (2 * true.mean(0) - true, -3.0),
    ):
        variance = Variance()
        for part in (slice(0, 20), slice(20, 50)):  # as if all at once
            variance.add(true[part], estimate[part])
        assert variance.explained() == pytest.approx(expected, abs=1e-5)
    assert Variance().explained() is None
    constant = Variance()
    constant.add(torch.ones(5, 2), torch.zeros(5, 2))
    assert constant.explained() is None


def test_what_is_held_is_what_a_linear_map_tells_of_other_pairs() -> None:
    draws = torch.Generator().manual_seed(0)
    mine, noise = (torch.randn(400, 5, generator=draws) for _ in range(2))
    theirs = mine @ torch.randn(5, 5, generator=draws) + 2

    def held(truth: Tensor) -> float | None:
        return linearly_held([(mine[:200], truth[:200])], [(mine[200:], truth[200:])])

    assert held(theirs) == pytest.approx(1.0, abs=1e-6)
    assert held(noise) == pytest.approx(0.0, abs=0.1)
    assert linearly_held([(mine[:11], theirs[:11])], [(mine, theirs)]) is None, "too few to say"
    assert linearly_held([(mine, theirs)], []) is None


def frame(lesson: StreamLesson) -> tuple[Targets, Predictions, FTKD]:
    """A frame, and what the student says of it."""
    assert lesson.distiller is not None and isinstance(lesson.distiller.method, FTKD)
    lesson.eval()
    batch = following.make_sample(make_clip(), 2, following.Augmentation(), True)
    images = following.network_input(batch.images, lesson.detector.config.image)
    predictions, _ = lesson.detector(batch.frame(images), lesson.detector.start_memory(1))
    return batch.targets, predictions, lesson.distiller.method


@torch.no_grad()
def test_a_student_that_is_its_teacher_is_paired_with_itself() -> None:
    lesson = stream_lesson("ftkd")
    targets, predictions, method = frame(lesson)
    width = teacher().config.decoder.channels
    features = torch.randn(*predictions.features.shape[:2], width)
    maps: dict[int, Tensor] = {16: torch.randn(1, 6, width, *predictions.image_features.shape[-2:])}
    answer = TeacherOutput(predictions.logits, predictions.codes, features, maps, {16: torch.ones(1)})
    method.teacher = None
    found = Following(method)
    for seed in range(2):
        found.add(predictions, answer, targets, seed)
    said = found.summary()
    assert said["frames"] == 2
    assert said["foreground"]["pairs_per_frame"] == said["objects_per_frame"] == int(targets.mask.sum()) > 0
    queries = predictions.logits.shape[2]
    assert said["foreground"]["pairs_per_frame"] + said["background"]["pairs_per_frame"] == queries
    for kind in ("foreground", "background"):
        assert said[kind]["median_apart_m"] == 0 and said[kind]["within_2_m"] == 1
    total = sum(said[kind]["teacher_score"] * said[kind]["pairs_per_frame"] for kind in found.pairs)
    assert total == pytest.approx(float(predictions.logits[-1].sigmoid().amax(-1).sum()), rel=1e-5)
    assert said["background"]["features_rebuilt"] < 0.5, "noise cannot be rebuilt"
    assert said["maps_rebuilt"]["16"] < 0.5


@torch.no_grad()
def test_the_share_of_the_future_is_none_where_the_present_is_the_target() -> None:
    clip = make_clip()
    share = future_share(teacher().eval(), clip, (16,), "current")
    assert share["16"] == pytest.approx(0, abs=1e-6)
    assert 0 < future_share(teacher().eval(), clip, (16,), "mean_residual")["16"] < 1
    odd = make_clip(frames=5)  # windows come four at a time: the last, alone, has no future
    assert 0 < future_share(teacher().eval(), odd, (16,), "sum")["16"] < 1


def test_a_run_is_read_as_it_was_saved(tmp_path: Path) -> None:
    lesson = stream_lesson("ftkd")
    trainer = make_trainer(tmp_path, lesson, 2)
    totals(trainer, pairs(), 2)
    trainer.save()
    run = read_run(tmp_path, teacher())
    assert run.steps == 2
    for mine, theirs in ((lesson.detector, run.student), (lesson.distiller, run.distiller)):
        assert mine is not None and not theirs.training
        saved, read = mine.state_dict(), theirs.state_dict()
        assert saved.keys() == read.keys() and all(saved[name].equal(read[name]) for name in saved)
    description = run.distiller.describe("hash", "clips")
    clips = [make_clip(seed=seed) for seed in range(2)].__getitem__
    fill_cache(tmp_path / "cache", description, run.distiller.answer_clip, clips, 2)
    said = follow(run, clips, TeacherCache(tmp_path / "cache", description, 2), 2)
    assert said["frames"] == 12 and said["maps_rebuilt"].keys() == {"16"}
    assert said["foreground"]["pairs_per_frame"] == said["objects_per_frame"] == 4
    with pytest.raises(UserError, match="expected a folder of"):
        read_run(tmp_path / "none", teacher())


def test_other_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path, stream_lesson("mgd"), 1)
    trainer.save()
    with pytest.raises(UserError, match="is no run of FTKD to a streaming student"):
        read_run(tmp_path, teacher())
    guide = tmp_path / "teacher.safetensors"
    save_weights(guide, teacher().state_dict(), teacher().config, half=False)
    command = ["--run", str(tmp_path), "--teacher", str(guide), "--cache", str(tmp_path)]
    assert following.main(command) == 2
    assert "is no run of FTKD" in capsys.readouterr().err
    assert following.main([*command, "--scenes", "0"]) == 2
    assert "--scenes 0: expected at least 1" in capsys.readouterr().err


def test_a_run_from_before_a_setting_is_told_which(tmp_path: Path) -> None:
    make_trainer(tmp_path, stream_lesson(), 1).save()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    settings = json.loads(state["settings"])
    del settings["method"]["bev_mask_ratio"]
    torch.save(state | {"settings": json.dumps(settings)}, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"\(method.bev_mask_ratio unset, here 0.5\)"):
        read_run(tmp_path, teacher())
