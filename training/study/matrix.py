# SPDX-License-Identifier: Apache-2.0
"""The rows of the distillation experiment, and the table of their scores."""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ftkd_core.config import override
from ftkd_core.distillation.config import FTKDConfig
from ftkd_core.errors import UserError

SCORES: Final = ("mAP", "NDS", "mATE", "mASE", "mAOE", "mAVE", "mAAE")
OFFLINE, PAST = "teacher", "past_teacher"


@dataclass(frozen=True)
class Row:
    """A row of the table: which method (empty: none) from which teacher, and how many times the steps."""

    method: str = ""
    teacher: str = OFFLINE
    longer: int = 1


ROWS: Final[dict[str, Row]] = {
    "none": Row(),
    "none_long": Row(longer=2),
    "logits": Row("logits"),
    "mgd": Row("mgd"),
    "cwd": Row("cwd"),
    "stxd": Row("stxd"),
    "ftkd": Row("ftkd"),
    "ftkd_no_pv": Row("ftkd_no_pv"),
    "ftkd_no_bev": Row("ftkd_no_bev"),
    "ftkd_no_fld": Row("ftkd_no_fld"),
    "ftkd_past_teacher": Row("ftkd", PAST),
}
"""Of students; the teachers are scored beside them."""


def choose_rows(names: str) -> list[str]:
    """Rows of a comma-separated list, all for an empty one; UserError names what exists."""
    chosen = [name for name in names.split(",") if name] or list(ROWS)
    for name in chosen:
        if name not in ROWS:
            raise UserError(f"unknown row {name!r}; expected some of {', '.join(ROWS)}")
    return chosen


def check_settings(settings: Sequence[str]) -> None:
    """UserError for settings that FTKD does not have."""
    override(FTKDConfig(), settings)


def chosen_settings(row: str, settings: Sequence[str]) -> list[str]:
    """Those of the experiment's settings of FTKD that a row takes: all in FTKD's own rows, none in others."""
    return list(settings) if ROWS[row].method.startswith("ftkd") else []


def teachers_of(rows: Sequence[str]) -> list[str]:
    """The teachers that rows learn from: the offline one, the past-only one, both or none."""
    taught = {ROWS[row].teacher for row in rows if ROWS[row].method}
    return [name for name in (OFFLINE, PAST) if name in taught]


def method_of(run: str) -> str:
    """The row or the teacher of a run's name: `ftkd` of `ftkd-0`; a teacher's may lack its number."""
    return run.rpartition("-")[0] or run


def make_entry(
    run: tuple[str, int], summary: dict[str, Any], notes: dict[str, Any], predictions: str
) -> dict[str, Any]:
    """A run's entry in the matrix: its scores, what was noted of its detections, and their checksum."""
    entry = {"method": run[0], "seed": run[1], **{name: summary[name] for name in SCORES}}
    return entry | notes | {"predictions": predictions, "samples": summary["samples"]}


def is_scored(entry: dict[str, Any] | None, predictions: str, *, subsets: bool) -> bool:
    """Whether an entry holds the scores of detections of that checksum, `subsets` those of parts of the
    objects too. Entries from before there were checksums are taken as they are."""
    if entry is None or entry.get("predictions", predictions) != predictions:
        return False
    return not subsets or "subsets" in entry


def checksum(predictions: Path) -> str:
    """Tells files of detections apart."""
    return f"{zlib.crc32(predictions.read_bytes()):08x}"


def read_matrix(path: Path) -> list[dict[str, Any]]:
    """The entries of a matrix file, one a run; UserError where it is none."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"matrix {str(path)!r} cannot be read ({error}); make it with --out") from None
    needed = {"method", "seed", *SCORES}
    if not isinstance(entries, list) or not all(isinstance(e, dict) and needed <= e.keys() for e in entries):
        raise UserError(
            f"{str(path)!r} is no matrix: expected a list of runs with {', '.join(sorted(needed))}"
        )
    return entries


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a method, mean and, over several seeds, sample standard deviation of each score."""
    lines = ["| method | runs | steps | " + " | ".join(SCORES) + " |", "|---" * (3 + len(SCORES)) + "|"]
    for method, runs in _by_method(entries).items():
        steps = sorted({int(run.get("steps", 0)) for run in runs})
        cells = [_mean(run[name] for run in runs) for name in SCORES]
        lines.append(f"| {method} | {len(runs)} | {', '.join(map(str, steps))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def subset_table(entries: Sequence[dict[str, Any]], score: str) -> str:
    """Markdown of `AP` or `AVE` of part of the objects, where the entries hold them."""
    held = [entry for entry in entries if entry.get("subsets")]
    if not held:
        return ""
    names = list(held[0]["subsets"])
    lines = [f"| {score} | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for method, runs in _by_method(held).items():
        cells = [_mean(run["subsets"][name][score] for run in runs) for name in names]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_method(entries: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    known = [OFFLINE, PAST, *ROWS]
    names = sorted({e["method"] for e in entries}, key=lambda n: (known.index(n) if n in known else 99, n))
    return {name: [e for e in entries if e["method"] == name] for name in names}


def _mean(values: Any) -> str:
    found = [float(value) for value in values if value is not None]
    if not found:
        return "-"
    spread = f" ± {np.std(found, ddof=1):.3f}" if len(found) > 1 else ""
    return f"{np.mean(found):.3f}{spread}"
