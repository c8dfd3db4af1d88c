# SPDX-License-Identifier: Apache-2.0
"""The experiment: its plan is kept, methods are balanced, detections are scored on the right frames, and the
table is what the runs say."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ftkd_core.config import ImageConfig, override
from ftkd_core.data.nuscenes import open_dataset
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.data.synthetic_clips import render_clip
from ftkd_core.distillation.cache import TeacherCache
from ftkd_core.distillation.methods import method_config
from ftkd_core.errors import UserError
from ftkd_core.models.build import build_stream_petr
from tests.core.helpers import make_clip, small_config
from tests.core.test_sparse_bev import small_sparse
from tests.training.test_tasks import pairs, stream_lesson, teacher
from training.study import planning, predicting, provenance, scoring, speeds, stages
from training.study.balance import balance, balanced, measure_terms
from training.study.experiments import Experiment, main, make_parser
from training.study.matrix import (
    OFFLINE,
    PAST,
    ROWS,
    SCORES,
    choose_rows,
    chosen_settings,
    read_matrix,
    subset_table,
    table,
)
from training.study.planning import Plan
from training.study.timing import Costs
from training.tasks import make_distiller


def entry(method: str, seed: int, score: float, **more: object) -> dict[str, object]:
    return {"method": method, "seed": seed, **dict.fromkeys(SCORES, score), "steps": 100, **more}


def test_the_table_says_mean_and_spread_in_the_order_of_the_rows() -> None:
    entries = [entry("ftkd", 0, 0.2), entry("none", 0, 0.1), entry("ftkd", 1, 0.4), entry("teacher", 0, 0.5)]
    lines = table(entries).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| teacher", "| none", "| ftkd"]
    assert "| 2 | 100 | 0.300 ± 0.141 |" in lines[4]
    assert "±" not in lines[2]
    assert subset_table(entries, "AP") == ""
    parts = {"near": {"AP": 0.5, "AVE": None}, "far": {"AP": 0.25, "AVE": 1.0}}
    assert (
        subset_table([entry("none", 0, 0.1, subsets=parts)], "AVE").splitlines()[2] == "| none | - | 1.000 |"
    )


def test_files_that_are_no_matrix_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "matrix.json"
    assert main(["--table", str(path)]) == 2
    path.write_text('[{"method": "none"}]')
    with pytest.raises(UserError, match="expected a list of runs with"):
        read_matrix(path)
    path.write_text(json.dumps([entry("none", 0, 0.25)]))
    capsys.readouterr()
    assert main(["--table", str(path)]) == 0
    assert "| none | 1 | 100 | 0.250 |" in capsys.readouterr().out
    assert main([]) == 2
    assert "name one with --out" in capsys.readouterr().err


def test_rows_are_chosen_by_name() -> None:
    assert choose_rows("") == list(ROWS)
    assert choose_rows("none,ftkd") == ["none", "ftkd"]
    with pytest.raises(UserError, match="unknown row 'fgd'"):
        choose_rows("none,fgd")


def arguments(out: Path, *more: str) -> list[str]:
    return ["--out", str(out), "--preset", "tiny", "--teacher-preset", "sparse_bev_tiny_offline",
            "--past-preset", "sparse_bev_tiny", "--accelerator", "cpu", *more]  # fmt: skip


def pretend_costs(
    monkeypatch: pytest.MonkeyPatch, answers: float = 0.0, detection: float = 0.0, **steps: float
) -> None:
    """Parts of an experiment take these seconds; steps that are not named, one; processes start at once."""
    monkeypatch.setattr(Costs, "step", lambda self, method: steps.get(method, 1.0))
    monkeypatch.setattr(Costs, "answers", lambda self, teacher, kind: answers)
    monkeypatch.setattr(Costs, "detection", lambda self, method: detection)
    monkeypatch.setattr(Costs, "start", lambda self: 0.0)


def test_a_plan_is_kept_and_not_bent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Experiment, "render", lambda self, plan: None)
    pretend_costs(monkeypatch, teacher=4.0, past_teacher=2.0)

    def plan(*more: str) -> Plan:
        return Experiment(make_parser().parse_args(arguments(tmp_path, *more))).make_plan()

    first = plan("--minutes", "100", "--rows", "none,none_long,ftkd", "--seeds", "2")
    free = 0.95 * 6000 - 20  # a method is balanced in 20 steps
    assert first.teacher_steps == pytest.approx(free / 3 / 4, abs=1)  # a third of the time, one teacher
    assert first.steps == pytest.approx(free * 2 / 3 / (2 * 4 * 1.0), abs=1)
    assert plan("--minutes", "5", "--seeds", "2") == first  # time fixes a plan once
    assert plan("--seeds", "3") == replace(first, seeds=3)  # more runs of the same
    with pytest.raises(UserError, match="has scenes 200, the command 30; give another --out"):
        plan("--seeds", "2", "--scenes", "30")
    assert plan("--seeds", "3", "--phase", "score") == first  # scoring needs to know no setting
    with pytest.raises(UserError, match="has steps"):
        plan("--seeds", "2", "--steps", "7")
    older = json.loads((tmp_path / "plan.json").read_text())
    for name in ("keep_features", "set_method"):
        del older[name]
    (tmp_path / "plan.json").write_text(json.dumps(older))
    assert plan("--seeds", "2") == first


def test_settings_of_ftkd_are_of_the_plan_and_of_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Experiment, "render", lambda self, plan: None)
    asked = ["--steps", "3", "--teacher", "a", "--past-teacher", "b", "--set-method", "bev_mask_ratio=0.25"]
    parse = make_parser().parse_args
    experiment = Experiment(parse(arguments(tmp_path, *asked)))
    plan = experiment.make_plan()
    assert plan.set_method == ("bev_mask_ratio=0.25",)
    assert experiment.make_plan() == plan  # read back
    with pytest.raises(UserError, match="has set_method"):
        Experiment(parse(arguments(tmp_path, *asked[:-2]))).make_plan()
    with pytest.raises(UserError, match="bev_mask_ratio is 'half'; expected a valid number"):
        Experiment(parse(arguments(tmp_path, *asked[:-1], "bev_mask_ratio=half")))

    commands: dict[str, list[str]] = {}
    monkeypatch.setattr(Experiment, "balance", lambda self, plan, row, teacher: {"weight": 2.0})
    monkeypatch.setattr(
        Experiment, "run", lambda self, plan, name, command, steps, seed: commands.update({name: command})
    )
    for row in ("none", "mgd", "ftkd_no_pv", "ftkd_past_teacher"):
        experiment.train_student(plan, row, 0, {OFFLINE: Path("a"), PAST: Path("b")})
    told = {name for name, command in commands.items() if "--set-method=bev_mask_ratio=0.25" in command}
    assert told == {"ftkd_no_pv-0", "ftkd_past_teacher-0"}


def test_another_target_of_the_image_features_has_a_cache_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Experiment, "render", lambda self, plan: None)
    asked = ["--steps", "3", "--teacher", "a", "--past-teacher", "b", "--set-method", "pv_target=current"]
    experiment = Experiment(make_parser().parse_args(arguments(tmp_path, *asked)))
    plan = experiment.make_plan()
    rows = ("ftkd", "ftkd_past_teacher", "logits", "stxd")
    folders = [experiment.cache(plan, row)[1].name for row in rows]
    assert folders == [
        "answers_teacher_future_current", "answers_past_teacher_future_current",
        "answers_teacher_future_current", "answers_teacher_relations",
    ]  # fmt: skip
    for row in rows:  # what a cache holds is what its row reads
        kind = experiment.cache(plan, row)[0]
        chosen = override(method_config(ROWS[row].method), chosen_settings(row, plan.set_method))
        student = build_stream_petr(small_config())
        held, read = (
            make_distiller(teacher(), student, method).describe("hash", "clips")
            for method in (stages.widest_of(kind), chosen)
        )
        (tmp_path / row).mkdir()
        (tmp_path / row / "manifest.json").write_text(json.dumps(held | {"shards": {}}))
        TeacherCache(tmp_path / row, read, 0)  # would refuse answers of another kind


def test_both_teachers_share_the_time_of_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Experiment, "render", lambda self, plan: None)
    pretend_costs(monkeypatch)
    parsed = make_parser().parse_args(arguments(tmp_path, "--minutes", "100"))
    free = 0.95 * 6000 - 20 * 9
    assert Experiment(parsed).make_plan().teacher_steps == pytest.approx(free / 3 / 2, abs=1)
    given = ["--minutes", "100", "--teacher", "a", "--past-teacher", "b"]
    parsed = make_parser().parse_args(arguments(tmp_path / "given", *given))
    assert Experiment(parsed).make_plan().teacher_steps == 0


@pytest.mark.parametrize("method", ["ftkd", "ftkd_no_bev", "logits", "mgd", "stxd"])
def test_every_part_is_brought_to_its_share(method: str) -> None:
    student = stream_lesson("").detector
    config, before = balance(
        teacher(), student, method_config(method), pairs(), streams=2, share=0.1, batches=2
    )
    lesson = stream_lesson(method)
    assert lesson.distiller is not None
    lesson.distiller.method.config = config
    terms = {name: value for name, value in before.items() if "/" in name}
    detection = sum(v for n, v in terms.items() if n.split("/")[0] not in ("ftkd", "mgd", "stxd"))
    again = measure_terms(lesson, pairs(), 2, torch.device("cpu"))
    for part in ("ftkd/pv", "ftkd/bev", "ftkd/logits", "mgd", "stxd"):
        mine = sum(value for name, value in again.items() if name.startswith(part))
        if mine:
            # the generators' random weights differ, so the scale is right but not the last digit
            assert 0.02 < mine / detection < 0.5, part
    rescaled = balanced(config, {"layer0/box": 10.0, f"{method}/16": 2.0, "ftkd/bev": 4.0}, 0.1)
    if method == "mgd":
        assert rescaled.weight == pytest.approx(config.weight * 0.5)  # type: ignore[union-attr]
    if method == "ftkd":
        assert rescaled.bev_weight == pytest.approx(config.bev_weight * 0.25)  # type: ignore[union-attr]


def test_detections_are_kept_and_read_as_they_were(tmp_path: Path) -> None:
    from ftkd_core.models.build import build_stream_petr

    clips = [make_clip(seed=seed) for seed in range(2)]
    torch.manual_seed(0)
    for model in (build_stream_petr(small_config()), small_sparse(past=1, future=1)):
        path = predicting.predict(model, clips.__getitem__, 2, tmp_path / "found.npz", torch.device("cpu"))
        with np.load(path) as file:
            assert len(file["counts"]) == sum(len(clip.times) for clip in clips)
            assert file["counts"].sum() == len(file["boxes"]) == len(file["scores"])
            first = predicting.detect_clip(model, clips[0], torch.device("cpu"))[0]
            kept = first.scores[0] >= 0.01
            assert np.allclose(file["boxes"][: file["counts"][0]], first.boxes[0][kept].numpy(), atol=1e-5)


def test_what_is_true_in_the_clips_is_true_in_the_data_set(tmp_path: Path) -> None:
    """The truth of the clips, taken for detections, scores as perfect on the data set of the same seeds."""
    seeds, image = [900_001, 900_004], ImageConfig(width=352, height=128)
    root = write_dataset(
        tmp_path / "data", seeds, version="v1.0-synth", split="held_out", width=704, height=396,
        duration_s=1.0, sweeps=False, progress=False,
    )  # fmt: skip
    clips = [render_clip(seed, image, 1.0) for seed in seeds]
    seen = [(o.boxes[o.num_points > 0], o.labels[o.num_points > 0]) for clip in clips for o in clip.objects]
    values = {
        "boxes": np.concatenate([boxes for boxes, _ in seen]),
        "labels": np.concatenate([labels for _, labels in seen]),
        "counts": np.array([len(labels) for _, labels in seen]),
        "global_from_ego": np.concatenate([clip.global_from_ego for clip in clips]),
    }
    values["scores"] = np.linspace(0.9, 0.5, len(values["labels"]))
    np.savez(tmp_path / "truth.npz", **values)
    dataset = open_dataset(root, "v1.0-synth")
    found = scoring.score(tmp_path / "truth.npz", dataset, "held_out")
    parts = scoring.score_subsets(tmp_path / "truth.npz", dataset, "held_out")
    assert found["mAP_present"] > 0.97
    assert parts["distance_0_20"]["AP"] > 0.97
    by_class = speeds.speeds(tmp_path / "truth.npz", dataset, "held_out")
    moving = [own for own in by_class.values() if (own["still"] or 0) > 0.5]
    assert moving and all(own["AVE"] < 0.2 * own["still"] for own in moving)
    assert f"| mean |  | {by_class['mean']['AVE']:.2f} |" in speeds.table(by_class)
    values["global_from_ego"] = values["global_from_ego"][::-1]
    np.savez(tmp_path / "other.npz", **values)
    with pytest.raises(UserError, match="differ in where frame 0 was taken"):
        scoring.score(tmp_path / "other.npz", dataset, "held_out")
    np.savez(tmp_path / "few.npz", **{**values, "counts": values["counts"][:-1]})
    with pytest.raises(UserError, match="holds 3 frames, the data set 4"):
        scoring.score(tmp_path / "few.npz", dataset, "held_out")


def test_a_folder_that_holds_no_experiment_is_not_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path, "--phase", "score")) == 2
    assert "holds no experiment" in capsys.readouterr().err


def test_whole_runs_are_scored_before_parts_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, list[str]]] = []

    def scores(files: Sequence[Path], folder: Path, *, subsets: bool) -> Iterator[dict[str, object]]:
        asked.append((subsets, [file.stem for file in files]))
        whole = {**dict.fromkeys(SCORES, 0.5), "samples": 1}
        return iter([{"distance_0_20": {"AP": 0.5}} if subsets else dict(whole) for _ in files])

    monkeypatch.setattr(stages, "render", lambda clips, count: None)
    monkeypatch.setattr(stages, "write_held_out", lambda folder, count: None)
    monkeypatch.setattr(stages, "score", scores)
    command = arguments(tmp_path, "--steps", "1", "--teacher-steps", "1")
    Experiment(make_parser().parse_args(command)).make_plan()

    def run(*names: str, more: Sequence[str] = ()) -> list[dict[str, object]]:
        asked.clear()
        for name in names:
            (tmp_path / "predictions").mkdir(exist_ok=True)
            (tmp_path / "predictions" / f"{name}.npz").touch()
            (tmp_path / "predictions" / f"{name}.json").write_text('{"steps": 1}')
        assert main([*command, "--phase", "score", *more]) == 0
        return read_matrix(tmp_path / "matrix.json")

    first = run("none-0", more=["--no-subsets"])
    assert asked == [(False, ["none-0"])]
    assert "subsets" not in first[0]
    second = run("ftkd-0")
    assert asked == [(False, ["ftkd-0"]), (True, ["ftkd-0", "none-0"])]
    assert [e["method"] for e in second if "subsets" in e] == ["none", "ftkd"]
    run()
    assert asked == [(False, []), (True, [])]  # nothing is scored twice
    (tmp_path / "predictions" / "none-0.npz").write_bytes(b"of a run that was trained again")
    third = run()
    assert asked == [(False, ["none-0"]), (True, ["none-0"])]
    assert all("subsets" in e for e in third)
    for older in third:
        del older["predictions"]
    (tmp_path / "matrix.json").write_text(json.dumps(third))
    run()
    assert asked == [(False, []), (True, [])]  # entries that do not say of what they are, are taken so


def test_a_frozen_backbone_is_balanced_as_it_will_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def statistics_after(**more: bool) -> dict[str, torch.Tensor]:
        student = stream_lesson("").detector
        balance(teacher(), student, method_config("mgd"), pairs(), streams=2, share=0.1, batches=1, **more)
        return {name: value for name, value in student.state_dict().items() if "running_mean" in name}

    start = stream_lesson("").detector.state_dict()
    learnt, frozen = statistics_after(), statistics_after(frozen_backbone=True)
    backbone = [name for name in frozen if name.startswith("backbone.")]
    assert backbone and all(torch.equal(frozen[name], start[name]) for name in backbone)
    assert not any(torch.equal(learnt[name], start[name]) for name in backbone)

    seen: dict[str, object] = {}
    monkeypatch.setattr(stages, "balance_method", lambda *_, **more: seen.update(more) or {"settings": {}})
    for ratio in ("0", "0.25"):
        command = arguments(tmp_path / ratio, "--backbone-ratio", ratio)
        plan = planning.asked_plan(make_parser().parse_args(command))
        Experiment(make_parser().parse_args(command)).balance(plan, "mgd", Path("teacher"))
        assert seen["frozen_backbone"] == (ratio == "0")


def test_training_needs_no_devkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
import sys
sys.modules["nuscenes"] = None  # what is not installed cannot be imported
from training import distill, train
from training.study import experiments
from training.study import stages
for module in (distill, experiments, train):
    try:
        module.main(["--help"])
    except SystemExit as end:
        assert not end.code
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: python -m training.") == 3
    monkeypatch.setitem(sys.modules, "nuscenes", None)
    assert main(arguments(tmp_path)) == 2  # said before hours of training, not after
    assert "scoring needs the nuScenes devkit" in capsys.readouterr().err
    Experiment(make_parser().parse_args(arguments(tmp_path, "--phase", "train")))


def test_a_commit_says_whether_files_differ_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "1234abc-dirty\n"

    def run(command: list[str], **_: object) -> object:
        assert command[0] == "git" and "--dirty" in command
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(provenance.subprocess, "run", run)
    assert provenance.commit() == "1234abc-dirty"
    answer = ""
    assert provenance.commit() == "unknown"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_experiment_runs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = arguments(
        tmp_path / "out", "--rows", "none,ftkd,stxd,ftkd_past_teacher", "--seeds", "1", "--scenes", "1",
        "--held-out", "1", "--streams", "1", "--steps", "2", "--teacher-steps", "1", "--threads", "1",
        "--clips", str(tmp_path / "clips"),
    )  # fmt: skip
    assert main([*command, "--phase", "train"]) == 0
    assert not (tmp_path / "out" / "matrix.json").exists()
    assert main(command) == 0  # nothing is trained again
    assert "| ftkd_past_teacher | 1 | 2 |" in capsys.readouterr().out
    entries = read_matrix(tmp_path / "out" / "matrix.json")
    assert {e["method"] for e in entries} == {
        "teacher", "past_teacher", "none", "ftkd", "stxd", "ftkd_past_teacher",
    }  # fmt: skip
    assert all({"preset", "device", "commit", "subsets"} <= e.keys() for e in entries)
