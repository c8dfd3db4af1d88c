# SPDX-License-Identifier: Apache-2.0
"""Two processes with a stream each learn what one process with both would."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
def test_two_processes_have_the_gradients_of_one(tmp_path: Path, method: str) -> None:
    alone, together = (run(count, method, tmp_path / f"{count}.pt") for count in (1, 2))
    assert alone.keys() == together.keys() and len(alone) > 100
    assert any(name.startswith("distiller.method") for name in alone) == (method == "ftkd")
    largest = max(float(value.abs().max()) for value in alone.values())
    for name, value in alone.items():
        assert torch.allclose(together[name], value, rtol=1e-3, atol=1e-5 * largest), name
