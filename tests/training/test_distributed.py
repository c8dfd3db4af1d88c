# SPDX-License-Identifier: Apache-2.0
"""Distributed training: two processes with one stream each train like one process with both."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from safetensors import safe_open

from ftkd_core.distillation.methods import METHODS
from ftkd_core.errors import UserError
from tests.training.distributed_gradients import make_trainer

ROOT = Path(__file__).parents[2]


def run(processes: int, method: str, output: Path) -> dict[str, torch.Tensor]:
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [*start, "tests.training.distributed_gradients", method, str(output)]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, torch.Tensor] = torch.load(output, weights_only=True)
    return found


@pytest.mark.parametrize("method", ["ftkd", pytest.param("stxd", marks=pytest.mark.slow)])
def test_two_processes_compute_the_gradients_of_one(tmp_path: Path, method: str) -> None:
    single, distributed = (run(count, method, tmp_path / f"{count}.pt") for count in (1, 2))
    assert single.keys() == distributed.keys() and len(single) > 100
    assert any(name.startswith("distiller.method") for name in single) == (method == "ftkd")
    largest = max(float(value.abs().max()) for value in single.values())
    for name, value in single.items():
        assert torch.allclose(distributed[name], value, rtol=1e-3, atol=1e-5 * largest), name


@pytest.mark.slow
def test_every_method_trains_in_two_processes(tmp_path: Path) -> None:
    totals = run(2, "every_method", tmp_path / "totals.pt")
    assert totals.keys() == METHODS.keys()
    assert all(torch.isfinite(value) for value in totals.values())


@pytest.mark.slow
def test_killed_run_of_two_processes_resumes_bit_for_bit(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    found = run(2, "killed", tmp_path / "found.pt")
    names = [name.removeprefix("whole/") for name in found if name.startswith("whole/")]
    assert len(names) > 100
    for name in names:
        assert torch.equal(found[f"whole/{name}"], found[f"resumed/{name}"]), name
    checkpoint = tmp_path / "killed" / "state.pt"
    first, second = torch.load(checkpoint, weights_only=True)["states"]
    assert len(first) == len(second)
    assert not torch.equal(first[0], second[0]), "each process has its own memory"
    single = make_trainer(Fabric(accelerator="cpu", devices=1), "stxd", tmp_path, 5)
    with pytest.raises(UserError, match="was written by 2 processes, this run has 1"):
        single.resume(checkpoint)


@pytest.mark.slow
def test_two_nodes_train_one_run(tmp_path: Path) -> None:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    settings = [
        "data.scenes=1", "data.duration_s=3.0", f"data.cache={tmp_path / 'clips'}", "data.workers=0",
        "model.image.width=96", "model.image.height=32", "model.backbone.base_channels=8",
        "model.decoder.num_image_queries=24",
    ]  # fmt: skip

    def node(rank: int) -> subprocess.Popen[str]:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}",
            "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}", "-m", "training.train",
            "--out", str(tmp_path / "run"), "--steps", "3", "--streams", "1", "--accelerator", "cpu",
            "--threads", "1", *(part for setting in settings for part in ("--set", setting)),
        ]  # fmt: skip
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    nodes = [node(rank) for rank in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], outputs
    assert ["train:" in output for output in outputs] == [True, False]  # only the first process logs
    with safe_open(tmp_path / "run" / "weights.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["notes"])["steps"] == 3
