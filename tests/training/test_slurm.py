# SPDX-License-Identifier: Apache-2.0
"""The Slurm script, run with stand-ins for Slurm's commands that record how they were called."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from scripts.docs_sources import ROOT

SCRIPT = ROOT / "scripts" / "slurm_train.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def start(folder: Path, srun: str, *arguments: str) -> subprocess.Popen[str]:
    """Start the script; `srun` is the body of the stand-in for srun."""
    bodies = {
        "srun": f'echo "$@" > "{folder}/srun.txt"\n{srun}',
        "scontrol": f'if [ "$1" = show ]; then echo node7; else echo "$@" > "{folder}/requeue.txt"; fi',
    }
    for name, body in bodies.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        path.chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "42", "SLURM_GPUS_ON_NODE": "8",
    }  # fmt: skip
    # A test process may ignore SIGTERM; bash could not trap it then.
    return subprocess.Popen(
        ["env", "--default-signal=TERM", "bash", str(SCRIPT), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_one_torchrun_per_node_meets_at_the_first_node(tmp_path: Path) -> None:
    run = start(tmp_path, "exit 0", "train", "--recipe", "sparse_bev_r50", "--out", "runs/a b")
    assert run.wait(20) == 0
    called = (tmp_path / "srun.txt").read_text().strip()
    assert called == (
        "--kill-on-bad-exit=1 torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id 42 "
        "--rdzv-endpoint node7:29500 -m training.train --recipe sparse_bev_r50 --out runs/a b"
    )
    assert not (tmp_path / "requeue.txt").exists()


def test_sigterm_is_passed_on_and_the_job_is_queued_again(tmp_path: Path) -> None:
    """The stand-in needs a moment to save, as a training does."""
    body = (
        f"trap 'sleep 0.1; touch {tmp_path}/saved; exit 143' TERM\n"
        f"touch {tmp_path}/started\nwhile :; do sleep 0.02; done"
    )
    run = start(tmp_path, body, "distill", "--recipe", "ftkd_stream_petr_r50")
    for _ in range(1000):
        if (tmp_path / "started").exists():
            break
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    assert run.wait(20) == 143
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeue.txt").read_text().strip() == "requeue 42"


def test_a_failed_run_is_not_queued_again(tmp_path: Path) -> None:
    assert start(tmp_path, "exit 2", "train").wait(20) == 2
    assert not (tmp_path / "requeue.txt").exists()
    run = start(tmp_path, "exit 0", "evaluate")
    assert run.wait(20) == 2
    assert run.stderr is not None and "expected train or distill first" in run.stderr.read()
