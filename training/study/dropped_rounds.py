# SPDX-License-Identifier: Apache-2.0
"""Scores of an experiment's students when camera rounds are lost.

    python -m training.study.dropped_rounds --out runs/matrix --rows none,ftkd,ftkd_blind

Each student streams the held-out scenes again, without a share of the rounds, which are the same for all
students. Only the rounds that it saw are scored, so the figures show how much the loss of its neighbours
harms a round. Writes `dropped_rounds.json` in the folder: a list of method, seed, share, mAP and NDS. What is
in the file already is not repeated.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from ftkd_core.data.nuscenes import open_dataset
from ftkd_core.errors import UserError
from training.study import predicting
from training.study.json_files import read_json, write_json
from training.study.matrix import choose_rows, method_of, seed_of
from training.study.model_files import load_model
from training.study.plan import HELD_OUT_SEED, Plan, load_plan
from training.study.scoring import VERSION, score, write_held_out
from training.study.work import Machine, Work

FILE: Final = "dropped_rounds.json"
Key = tuple[str, int, float]


def _known(path: Path) -> dict[Key, dict[str, Any]]:
    entries = read_json(path, "delete it to score again") if path.exists() else []
    return {(entry["method"], entry["seed"], entry["share"]): entry for entry in entries}


def _weights(out: Path, rows: Sequence[str]) -> dict[tuple[str, int], Path]:
    """Return the weights of the runs of rows by method and seed. UserError if there are none."""
    files = sorted((out / "runs").glob("*-*/weights.safetensors"))
    found = {(method_of(f.parent.name), seed_of(f.parent.name)): f for f in files}
    chosen = {run: file for run, file in found.items() if run[0] in rows}
    if not chosen:
        raise UserError(f"{str(out / 'runs')!r} has no run of {', '.join(rows)}; train first")
    return chosen


def read_shares(text: str) -> list[float]:
    """Return comma-separated shares. UserError for a value that is no share."""
    try:
        shares = [float(value) for value in text.split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share < 1 for share in shares):
        raise UserError(f"--shares {text}: expected numbers from 0 to below 1, separated by commas")
    return shares


def score_dropped(
    out: Path, plan: Plan, machine: Machine, rows: Sequence[str], shares: Sequence[float]
) -> Path:
    """Detect and score what is missing; return the file."""
    path, folder = out / FILE, out / "held_out"
    entries = _known(path)
    write_held_out(folder, plan.held_out, plan.world)
    dataset, clips = open_dataset(folder, VERSION), Work(plan, machine).clips(HELD_OUT_SEED)
    runs = [(run, file, share) for run, file in _weights(out, rows).items() for share in shares]
    for (method, seed), file, share in tqdm(runs, desc="dropped rounds", unit="run"):
        if (method, seed, share) in entries:
            continue
        found = out / "dropped" / f"{method}-{seed}-{share:g}.npz"
        model = load_model(file)
        predicting.predict(model, clips, plan.held_out, found, machine.device, drop=share)
        scores = score(found, dataset)
        entries[method, seed, share] = {
            "method": method, "seed": seed, "share": share, "mAP": scores["mAP"], "NDS": scores["NDS"],
            "samples": scores["samples"],
        }  # fmt: skip
        write_json(path, list(entries.values()))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Bad input is reported in one sentence with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m training.study.dropped_rounds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of a trained experiment")
    parser.add_argument("--rows", default="none,ftkd,ftkd_blind", help="comma-separated rows")
    parser.add_argument("--shares", default="0,0.1,0.3", help="shares of lost rounds (default 0,0.1,0.3)")
    parser.add_argument("--clips", type=Path, default=Path("build/clips"), help="folder of rendered scenes")
    parser.add_argument("--accelerator", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args(argv)
    try:
        shares = read_shares(options.shares)
        plan, rows = load_plan(options.out / "plan.json"), choose_rows(options.rows)
        machine = Machine(accelerator=options.accelerator, clips=options.clips)
        print(f"wrote {score_dropped(options.out, plan, machine, rows, shares)}")
    except UserError as error:
        print(f"dropped_rounds: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
