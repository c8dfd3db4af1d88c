# SPDX-License-Identifier: Apache-2.0
"""The rows of the distillation experiment and the table of their scores (the matrix)."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ftkd_core.config import override
from ftkd_core.distillation.config import FTKDConfig
from ftkd_core.errors import UserError
from training.study.json_files import read_json

SCORES: Final = ("mAP", "NDS", "mATE", "mASE", "mAOE", "mAVE", "mAAE")
OFFLINE, BLIND = "teacher", "teacher_blind"
"""The teacher with its future frames, and the same weights with the future hidden."""


@dataclass(frozen=True)
class Row:
    """A row of the table: distillation method (empty: none), teacher (OFFLINE or BLIND), and factor on the
    number of steps."""

    method: str = ""
    teacher: str = OFFLINE
    step_factor: int = 1

    @property
    def hide_future(self) -> bool:
        """Whether the future is hidden from the teacher."""
        return self.teacher == BLIND


ROWS: Final[dict[str, Row]] = {
    "none": Row(),
    "none_long": Row(step_factor=2),
    "logits": Row("logits"),
    "mgd": Row("mgd"),
    "cwd": Row("cwd"),
    "stxd": Row("stxd"),
    "ftkd": Row("ftkd"),
    "ftkd_no_pv": Row("ftkd_no_pv"),
    "ftkd_no_bev": Row("ftkd_no_bev"),
    "ftkd_no_fld": Row("ftkd_no_fld"),
    "ftkd_blind": Row("ftkd", BLIND),
}
"""The student rows; teachers are scored as well."""


def choose_rows(names: str) -> list[str]:
    """Return the rows of a comma-separated list, all if it is empty. Raise UserError for an unknown row."""
    chosen = [name for name in names.split(",") if name] or list(ROWS)
    for name in chosen:
        if name not in ROWS:
            raise UserError(f"unknown row {name!r}; expected some of {', '.join(ROWS)}")
    return chosen


def check_settings(settings: Sequence[str]) -> None:
    """Raise UserError for settings that FTKD does not have."""
    override(FTKDConfig(), settings)


def row_settings(row: str, settings: Sequence[str]) -> list[str]:
    """Return the experiment's FTKD settings that apply to a row: all for FTKD rows, none for others."""
    return list(settings) if ROWS[row].method.startswith("ftkd") else []


def teachers_of(rows: Sequence[str]) -> list[str]:
    """Return the teachers that rows are distilled from: `teacher`, `teacher_blind`, both or none."""
    used = {ROWS[row].teacher for row in rows if ROWS[row].method}
    return [name for name in (OFFLINE, BLIND) if name in used]


def method_of(run: str) -> str:
    """Return the row or teacher of a run's name: `ftkd` for `ftkd-0`, `teacher` for `teacher`."""
    return run.rpartition("-")[0] or run


def seed_of(run: str) -> int:
    """Return the seed of a run's name: 0 for `ftkd-0`. Raise UserError if it has none."""
    method, _, seed = run.rpartition("-")
    if not method or not seed.isdigit():
        raise UserError(f"run {run!r} has no seed in its name; expected METHOD-SEED, e.g. ftkd-0")
    return int(seed)


def make_entry(
    run: tuple[str, int], summary: dict[str, Any], notes: dict[str, Any], predictions: str
) -> dict[str, Any]:
    """Return a run's matrix entry: scores, notes on its detections, and their checksum."""
    entry = {"method": run[0], "seed": run[1], **{name: summary[name] for name in SCORES}}
    return entry | notes | {"predictions": predictions, "samples": summary["samples"]}


def is_scored(entry: dict[str, Any] | None, predictions: str, *, subsets: bool) -> bool:
    """Return whether an entry has the scores of the detections with this checksum; with `subsets`, also the
    scores of object subsets."""
    if entry is None or entry.get("predictions") != predictions:
        return False
    return not subsets or "subsets" in entry


def checksum(predictions: Path) -> str:
    """Return the CRC-32 of a file of detections, as hexadecimal digits."""
    return f"{zlib.crc32(predictions.read_bytes()):08x}"


def read_matrix(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a matrix file, one per run. Raise UserError if it is missing, damaged or
    something else."""
    entries = read_json(path, "delete it and score again with --phase score")
    needed = {"method", "seed", *SCORES}
    if not isinstance(entries, list) or not all(isinstance(e, dict) and needed <= e.keys() for e in entries):
        raise UserError(
            f"{str(path)!r} is not a matrix: expected a list of runs with {', '.join(sorted(needed))}"
        )
    return entries


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: one line per method, mean and, for several seeds, sample standard deviation of
    each score."""
    lines = ["| method | runs | steps | " + " | ".join(SCORES) + " |", "|---" * (3 + len(SCORES)) + "|"]
    for method, runs in _by_method(entries).items():
        steps = sorted({int(run.get("steps", 0)) for run in runs})
        cells = [_mean(run[name] for run in runs) for name in SCORES]
        lines.append(f"| {method} | {len(runs)} | {', '.join(map(str, steps))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def subset_table(entries: Sequence[dict[str, Any]], score: str) -> str:
    """Return a Markdown table of `AP` or `AVE` per object subset; empty if no entry has subsets."""
    scored = [entry for entry in entries if entry.get("subsets")]
    if not scored:
        return ""
    names = list(scored[0]["subsets"])
    lines = [f"| {score} | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for method, runs in _by_method(scored).items():
        cells = [_mean(run["subsets"][name][score] for run in runs) for name in names]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_method(entries: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    known = [OFFLINE, BLIND, *ROWS]
    names = sorted({e["method"] for e in entries}, key=lambda n: (known.index(n) if n in known else 99, n))
    return {name: [e for e in entries if e["method"] == name] for name in names}


def _mean(values: Iterable[float | None]) -> str:
    found = [float(value) for value in values if value is not None]
    if not found:
        return "-"
    spread = f" ± {np.std(found, ddof=1):.3f}" if len(found) > 1 else ""
    return f"{np.mean(found):.3f}{spread}"
