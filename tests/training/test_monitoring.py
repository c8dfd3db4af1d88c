# SPDX-License-Identifier: Apache-2.0
"""What a run reports and keeps while it trains: logs, throughput, checkpoints, validation, SIGTERM."""

import csv
import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.data.nuscenes_clips import NuScenesClips
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.errors import UserError
from ftkd_core.weights import read_weights, save_weights
from tests.core.helpers import small_config
from tests.training.helpers import small_sparse, stream_data, stream_trainer, train_small
from training import checkpoint, distill
from training.periodic_validation import ValidationPlan, keep_best
from training.preemption import EXIT_CODE, StoppedError, StopRequest
from training.run_log import RunLog, Throughput, make_logger
from training.split_detection import SceneDetections, detect_scenes, score_scenes
from training.trainer import Trainer
from training.validate import ValidateOptions, validate


def lines_of(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_logs_have_every_term_and_the_throughput(tmp_path: Path) -> None:
    trainer = stream_trainer(tmp_path / "run", 4)
    trainer.run(stream_data(), workers=0, save_every=4, log_every=2, samples_per_step=2)
    rows = lines_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0]["seconds_left"] > 0 and rows[1]["seconds_left"] == 0
    assert rows[1]["samples_per_s"] > 0 and 0 <= rows[1]["load_share"] <= 1
    with (tmp_path / "run" / "log.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(row["step"]) for row in table] == [2, 4]
    for name in ("total", "gradient_norm", "lr", "layer1/class"):
        assert float(table[1][name]) == pytest.approx(rows[1][name])


def test_a_resumed_run_has_each_step_once_in_its_logs(tmp_path: Path) -> None:
    """Steps after the last checkpoint are logged again."""
    first = stream_trainer(tmp_path / "run", 6)
    step = first.train_step

    def killed(batch: Any) -> Any:
        if first.step == 5:
            raise KeyboardInterrupt
        return step(batch)

    first.train_step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.run(stream_data(), workers=0, save_every=3, log_every=1)
    assert [row["step"] for row in lines_of(tmp_path / "run")] == [1, 2, 3, 4, 5]
    second = stream_trainer(tmp_path / "run", 6)
    second.resume(tmp_path / "run" / checkpoint.FILE_NAME)
    second.run(stream_data(), workers=0, save_every=3, log_every=1)
    assert [row["step"] for row in lines_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    with (tmp_path / "run" / "log.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4", "5", "6"]


def test_a_stopped_run_continues_as_if_it_had_not_been(tmp_path: Path) -> None:
    """SIGTERM in the middle of a step: the step is finished and saved, at no multiple of save_every."""
    whole = stream_trainer(tmp_path / "whole", 5)
    whole.run(stream_data(), workers=0, save_every=100)
    stopped = stream_trainer(tmp_path / "stopped", 5)
    step = stopped.train_step

    def interrupted(batch: Any) -> Any:
        if stopped.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batch)

    stopped.train_step = interrupted  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="stopped by SIGTERM at step 3 of 5; the checkpoint is saved"):
        stopped.run(stream_data(), workers=0, save_every=100)
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = stream_trainer(tmp_path / "stopped", 5)
    resumed.resume(tmp_path / "stopped" / checkpoint.FILE_NAME)
    assert resumed.step == 3
    resumed.run(stream_data(), workers=0, save_every=100)
    states = [read_weights(tmp_path / name / "weights.safetensors")[0] for name in ("whole", "stopped")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_sigterm_in_the_last_step_ends_normally(tmp_path: Path) -> None:
    trainer = stream_trainer(tmp_path / "run", 1)
    step = trainer.train_step

    def interrupted(batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(batch)

    trainer.train_step = interrupted  # type: ignore[method-assign]
    trainer.run(stream_data(), workers=0, save_every=100)
    assert trainer.step == 1


def test_command_reports_a_stop_with_its_own_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def interrupted(trainer: Trainer, batch: Any) -> Any:
        if trainer.step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    assert train_small(tmp_path / "run", 3, "save_every=100") == EXIT_CODE == 143
    assert "at step 1 of 3; the checkpoint is saved; the same command resumes it" in capsys.readouterr().err
    assert train_small(tmp_path / "run", 3, "save_every=100") == 0
    assert distill.EXIT_CODE == EXIT_CODE


def test_a_stop_of_another_process_stops_this_one() -> None:
    class Others:
        world_size, device = 2, "cpu"

        def all_reduce(self, flag: Any, reduce_op: str) -> Any:
            assert reduce_op == "sum"
            return flag + 1

    assert StopRequest(Others())  # type: ignore[arg-type]
    assert not StopRequest(Fabric(accelerator="cpu", devices=1))


def test_the_last_checkpoints_are_kept_and_can_be_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stream_trainer(run, 6).run(stream_data(), workers=0, save_every=2, keep=2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["0000004", "0000006"]
    older, newer = (run / "checkpoints" / name for name in ("0000004", "0000006"))
    last = (run / "weights.safetensors").read_bytes()
    assert (newer / "weights.safetensors").read_bytes() == last
    assert (older / "weights.safetensors").read_bytes() != last
    again = stream_trainer(run, 6)
    again.resume(older / checkpoint.FILE_NAME)
    assert again.step == 4


def test_checkpoints_are_copied_if_they_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "state.pt").write_bytes(b"state")
    checkpoint.keep_copies(tmp_path, 3, 2, ["state.pt"])
    assert (tmp_path / "checkpoints" / "0000003" / "state.pt").read_bytes() == b"state"
    checkpoint.keep_copies(tmp_path / "other", 3, 1, ["state.pt"])
    assert not (tmp_path / "other").exists()


def test_throughput_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("training.run_log.time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def slow() -> Any:
        for item in range(4):
            now[0] += 1.0  # waiting for data
            yield item

    speed = Throughput(8)
    for _ in speed.timed(slow()):
        now[0] += 3.0  # training
        with speed.paused():
            now[0] += 100.0
    assert speed.figures(10) == {"samples_per_s": 2.0, "load_share": 0.25, "seconds_left": 40.0}


def test_a_missing_logger_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, package in (("wandb", "wandb"), ("mlflow", "pytorch_lightning")):
        with pytest.raises(UserError, match=f"--logger {name}: {package} is not installed; run `pip install"):
            make_logger(name, tmp_path)
    assert train_small(tmp_path / "run", 1, more=("--logger", "wandb")) == 2
    assert "wandb is not installed" in capsys.readouterr().err


def test_a_logger_gets_all_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of the package, as Fabric's interface defines it."""
    written: list[tuple[dict[str, float], int]] = []

    class WandbLogger:
        def __init__(self, **settings: Any) -> None:
            assert settings["save_dir"] == str(tmp_path)

        def log_metrics(self, values: dict[str, float], step: int) -> None:
            written.append((values, step))

        def finalize(self, status: str) -> None:
            written.append(({status: 0.0}, -1))

    parent = "wandb.integration.lightning"
    for name in ("wandb", "wandb.integration", parent):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    fabric_module = types.ModuleType(f"{parent}.fabric")
    fabric_module.WandbLogger = WandbLogger  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"{parent}.fabric", fabric_module)
    log = RunLog(tmp_path, [make_logger("wandb", tmp_path)])
    log.write(3, {"total": 1.5})
    log.write_validation(4, {"NDS": 0.5, "mAVE": None, "split": "val"})
    log.close()
    assert written == [({"total": 1.5}, 3), ({"validation/NDS": 0.5}, 4), ({"success": 0.0}, -1)]


@pytest.fixture(scope="module")
def dataroot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(
        tmp_path_factory.mktemp("synth") / "data", (900_002, 900_005), version="v1.0-synth", split="few",
        width=192, height=108, duration_s=1.0, sweeps=False, progress=False,
    )  # fmt: skip


def test_a_run_validates_every_epoch_and_keeps_the_best_weights(dataroot: Path, tmp_path: Path) -> None:
    """Two scenes of two key frames are an epoch of four steps of one stream."""
    run = tmp_path / "run"
    settings = [f"data.root={dataroot}", "data.nuscenes=v1.0-synth", "data.split=few", "save_every=100"]
    more = ("--validate-every", "1", "--validate-split", "few")
    assert train_small(run, 6, *settings, more=more) == 0
    found = lines_of(run, "validation")
    assert [row["step"] for row in found] == [4, 6]
    assert all(row["samples"] == 4 and 0 <= row["NDS"] <= 1 for row in found)
    best = json.loads((run / "validation" / "best.json").read_text())
    assert best["NDS"] == max(row["NDS"] for row in found)
    assert (run / "best.safetensors").is_file()
    whole = json.loads((run / "validation" / "step-0000004.json").read_text())
    assert set(whole["classes"]) and whole["NDS"] == found[0]["NDS"]


def test_shares_of_several_processes_give_the_score_of_one(dataroot: Path, tmp_path: Path) -> None:
    model = small_sparse(past=1)
    config = model.config
    clips = NuScenesClips(dataroot, "v1.0-synth", "few", config.image, config.channels, tmp_path)
    clips.prepare()
    model.train()
    whole = detect_scenes(model, clips, range(2), torch.device("cpu"))
    assert model.training and model.backbone.training
    parts = [detect_scenes(model, clips, [index], torch.device("cpu")) for index in (1, 0)]
    for number, part in enumerate(parts):
        part.save(tmp_path / f"{number}.npz")
    read = [SceneDetections.load(tmp_path / f"{number}.npz") for number in range(2)]
    scores = [score_scenes(found, dataroot, "v1.0-synth") for found in ([whole], read)]
    assert scores[0] == scores[1] and scores[0]["samples"] == 4
    save_weights(tmp_path / "weights.safetensors", model.state_dict(), config, half=False)
    options = ValidateOptions(
        dataroot=dataroot, weights=tmp_path / "weights.safetensors", split="few", device="cpu"
    )
    found = validate(options)
    assert (found["NDS"], found["frames"]) == (scores[0]["NDS"], 4)


def test_best_weights_change_only_if_they_are_better(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    (tmp_path / "validation").mkdir()
    for step, score in ((1, 0.2), (2, 0.5), (3, 0.4), (4, None)):
        weights.write_bytes(str(step).encode())
        keep_best(weights, {"NDS": score, "step": step})
    assert (tmp_path / "best.safetensors").read_bytes() == b"2"
    weights.write_bytes(b"again")
    keep_best(weights, {"NDS": 0.1, "step": 2})  # step 2 again, after a resume
    assert (tmp_path / "best.safetensors").read_bytes() == b"again"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--validate-every", "1"), "--validate-every without data.root"),
        (("--validate-every", "-1"), "--validate-every -1, --keep 1: expected at least 0 and 1"),
        (("--keep", "0"), "--keep 0: expected at least 0 and 1"),
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert train_small(tmp_path / "run", 1, more=more) == 2
    assert message in capsys.readouterr().err


def test_a_missing_validation_set_is_reported_before_training(
    dataroot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--validate-every", "1", "--validate-root", str(tmp_path / "none"), "--validate-version", "v1.0")
    assert train_small(tmp_path / "run", 1, more=more) == 2
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_validation_is_due_at_multiples_and_at_the_end(dataroot: Path, tmp_path: Path) -> None:
    clips = NuScenesClips(dataroot, "v1.0-synth", "few", small_config().image, CAMERA_CHANNELS, tmp_path)
    plan = ValidationPlan(clips=clips, every=100)
    assert [step for step in range(1, 251) if plan.is_due(step, 250)] == [100, 200, 250]
