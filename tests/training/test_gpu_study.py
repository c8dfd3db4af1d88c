# SPDX-License-Identifier: Apache-2.0
"""The study on one GPU, rehearsed on a CPU: it renders, trains in several processes and ends by itself."""

import json
import time
from pathlib import Path

import pytest

from benchmarks import gpu_study
from ftkd_core.config import SparseBEVConfig
from ftkd_core.weights import read_window_weights

NAMES = ("teacher", "student")


@pytest.mark.timeout(180)
def test_a_rehearsal_writes_weights_and_a_summary_in_time(tmp_path: Path) -> None:
    began = time.monotonic()
    # Long enough for the imports of three processes on a busy machine.
    arguments = ["--rehearse", "--minutes", "1.0", "--jobs", ",".join(NAMES), "--cores", "1", "--scenes", "1"]
    assert gpu_study.main([*arguments, "--out", str(tmp_path)]) == 0
    assert time.monotonic() - began < 75
    summary = json.loads((tmp_path / "study.json").read_text())
    assert summary["scenes"] == 1 and set(summary["jobs"]) == set(NAMES)
    for name in NAMES:
        _, config, notes = read_window_weights(tmp_path / name / "weights.safetensors")
        assert isinstance(config, SparseBEVConfig)
        assert config.num_future == (4 if name == "teacher" else 0)
        log = summary["jobs"][name]
        assert len(log["losses"]) >= 1
        assert log["steps"] == notes["steps"] >= 1 and log["windows"] >= log["steps"]
        assert (tmp_path / name / "weights.safetensors").stat().st_size < 16 * 2**20
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 1 + len(NAMES)


def test_without_scenes_a_job_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_study, "_ENDING_S", 1.0)
    monkeypatch.setattr(gpu_study.Study, "_render", lambda self, scenes: None)
    arguments = ["--rehearse", "--minutes", "0.01", "--jobs", "student", "--out", str(tmp_path)]
    assert gpu_study.main(arguments) == 1
    assert json.loads((tmp_path / "study.json").read_text())["jobs"]["student"]["exit_code"] != 0


def test_unknown_jobs_and_a_missing_gpu_are_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_study.main(["--jobs", "nobody", "--out", str(tmp_path)]) == 2
    assert "--jobs nobody: expected some of teacher" in capsys.readouterr().err
    assert gpu_study.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
