# SPDX-License-Identifier: Apache-2.0
"""The work of an experiment: commands of training runs, their processes, caches of teacher outputs."""

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ftkd_core.config import override
from ftkd_core.distillation.cache import TeacherCache
from ftkd_core.distillation.methods import method_config
from ftkd_core.errors import UserError
from ftkd_core.models.build import build_stream_petr
from ftkd_core.weights import save_weights
from tests.core.helpers import small_config
from tests.training.helpers import NoiseClips, small_teacher
from tests.training.study.helpers import PLAN
from training import distill, train
from training.distiller import make_distiller
from training.study import teacher_caches
from training.study.deadline import OutOfTime
from training.study.matrix import ROWS, row_settings
from training.study.teacher_caches import cache_kind, fill_teacher_cache, widest_method
from training.study.work import Machine, Work, training_command

MACHINE = Machine(accelerator="cpu", threads=1, clips=Path("clips"))


def test_commands_are_accepted_by_the_training_programs(tmp_path: Path) -> None:
    plan = replace(PLAN, backbone_ratio=0.0, init="start.safetensors", init_parts="backbone")
    plan = replace(plan, cache_features=True)
    module, *command = training_command(
        plan, MACHINE, "ftkd", tmp_path, steps=50, seed=3, teacher=Path("t"), cache=Path("c"),
        balance={"pv_weight": 2.0},
    )  # fmt: skip
    assert module == "training.distill"
    options = distill.DistillOptions(**vars(distill.make_parser().parse_args(command)))
    assert (options.method, options.teacher, options.cache) == ("ftkd", Path("t"), Path("c"))
    assert (options.init, options.init_parts) == (Path("start.safetensors"), "backbone")
    assert override(method_config("ftkd"), options.method_overrides).pv_weight == 2.0  # type: ignore[union-attr]
    config = train.resolve_config(options)
    assert (config.steps, config.seed, config.streams) == (50, 3, 2)
    assert config.data.cache_features and config.optim.backbone_ratio == 0
    assert (config.augment.flip, config.augment.rotation, config.augment.colour) == (0, 0, 0)
    assert config.optim.warmup_steps == 6

    module, *command = training_command(PLAN, MACHINE, "teacher", tmp_path, steps=50, seed=0)
    assert module == "training.train"
    config = train.resolve_config(train.TrainOptions(**vars(train.make_parser().parse_args(command))))
    assert config.model.preset == "sparse_bev_tiny_offline"
    assert config.augment.flip > 0, "teachers are trained with augmentation"
    assert config.data.hide_future == 0.5


def test_blind_row_hides_the_future_and_all_runs_share_the_world(tmp_path: Path) -> None:
    plan = replace(PLAN, world="traffic")
    for row, hidden in (("ftkd", False), ("ftkd_blind", True)):
        _, *command = training_command(
            plan, MACHINE, row, tmp_path, steps=1, seed=0, teacher=Path("t"), cache=Path("c")
        )
        options = distill.DistillOptions(**vars(distill.make_parser().parse_args(command)))
        assert options.hide_future is hidden
        data = train.resolve_config(options).data
        assert (data.world, data.hide_future) == ("traffic", 0.0)
    assert Work(plan, MACHINE).clips().world == "traffic"


def test_settings_of_ftkd_apply_to_its_rows_only(tmp_path: Path) -> None:
    plan = replace(PLAN, set_method=("pv_target=current",))
    changed = {
        row
        for row in ("mgd", "logits", "ftkd_no_pv", "ftkd_blind")
        if "--set-method=pv_target=current"
        in training_command(plan, MACHINE, row, tmp_path, steps=1, seed=0, teacher=Path("t"))
    }
    assert changed == {"ftkd_no_pv", "ftkd_blind"}


def test_settings_of_the_student_apply_to_all_students_only(tmp_path: Path) -> None:
    plan = replace(PLAN, set_student=("decoder.learned_linking=true",))
    for row in ("none", "ftkd"):
        teacher = Path("t") if row == "ftkd" else None
        command = training_command(plan, MACHINE, row, tmp_path, steps=1, seed=0, teacher=teacher)
        assert "--set=model.decoder.learned_linking=true" in command
    command = training_command(plan, MACHINE, "teacher", tmp_path, steps=1, seed=0)
    assert not any("learned_linking" in part for part in command)


def test_training_process_is_stopped_at_its_timeout(tmp_path: Path) -> None:
    work, log = Work(PLAN, MACHINE), tmp_path / "run" / "log.txt"
    began = time.monotonic()
    with pytest.raises(OutOfTime, match="run ftkd-0 was stopped after 2 s"):
        work.train("ftkd-0", ["timeit", "-n", "1", "import time; time.sleep(60)"], log, 2.0)
    assert time.monotonic() - began < 30


def test_failed_training_process_is_reported_with_its_last_line(tmp_path: Path) -> None:
    work, log = Work(PLAN, MACHINE), tmp_path / "run" / "log.txt"
    with pytest.raises(UserError, match=r"run none-0 ended with \d+: .*No such file.*missing.json"):
        work.train("none-0", ["json.tool", str(tmp_path / "missing.json")], log, None)
    work.train("none-0", ["timeit", "-n", "1", "pass"], log, None)
    assert "loop" in log.read_text(), "the log keeps the output of all attempts"


def test_each_row_reads_everything_from_the_cache_of_its_kind(tmp_path: Path) -> None:
    settings = ["pv_target=current"]
    assert [cache_kind(ROWS[row].method, settings) for row in ("ftkd", "logits", "stxd")] == [
        "future_current", "future_current", "relations",
    ]  # fmt: skip
    assert cache_kind("ftkd") == "future"
    for row in ("ftkd", "logits", "stxd"):
        kind = cache_kind(ROWS[row].method, settings)
        method = override(method_config(ROWS[row].method), row_settings(row, settings))
        student = build_stream_petr(small_config())
        stored, read = (
            make_distiller(small_teacher(), student, config).describe("hash", "clips")
            for config in (widest_method(kind), method)
        )
        (tmp_path / row).mkdir()
        (tmp_path / row / "manifest.json").write_text(json.dumps(stored | {"shards": {}}))
        TeacherCache(tmp_path / row, read, 0)  # raises UserError for a cache of another kind


def test_filling_a_cache_stops_between_two_scenes_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_caches, "preset", lambda name: small_config())
    model = small_teacher()
    save_weights(tmp_path / "teacher.safetensors", model.state_dict(), model.config)
    started = 0

    def only_one() -> None:
        nonlocal started
        if started == 1:
            raise OutOfTime
        started += 1

    def fill(before_scene: object) -> int:
        with contextlib.suppress(OutOfTime):
            fill_teacher_cache(
                tmp_path / "cache", "future", tmp_path / "teacher.safetensors", "tiny",
                NoiseClips(tmp_path), 2, torch.device("cpu"), before_scene=before_scene,  # type: ignore[arg-type]
            )  # fmt: skip
        return len(json.loads((tmp_path / "cache" / "manifest.json").read_text())["shards"])

    assert fill(only_one) == 1
    assert fill(lambda: None) == 2
