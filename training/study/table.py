# SPDX-License-Identifier: Apache-2.0
"""Print the means of an experiment and its differences between rows with intervals.

    python -m training.study.table FILE

FILE is a list of runs: `matrix.json` of `training.study.experiments`, or research/results/ftkd_protocol.json.
Differences are paired by seed. The interval is the 95 % t interval over seeds, p that of the exact two-sided
sign test. research/protocol.md declares the comparisons.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from scipy import stats

from ftkd_core.errors import UserError
from training.study.matrix import read_matrix, table

PRIMARY: Final = ("ftkd", "ftkd_blind")
_MEASURES: Final = ("mAP", "NDS", "mAVE", "ave_moving")
_LEVEL: Final = 0.95


class Difference(NamedTuple):
    """Paired difference of a measure between two rows: number of seeds, mean, interval and p of the sign test
    (nan for one seed)."""

    seeds: int
    mean: float
    low: float
    high: float
    sign_p: float


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Return the difference first - second of values by seed; None if they share no seed."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    change = np.array([first[seed] - second[seed] for seed in seeds])
    mean = float(change.mean())
    if len(seeds) == 1:
        return Difference(1, mean, float("nan"), float("nan"), float("nan"))
    half = float(stats.t.ppf((1 + _LEVEL) / 2, len(seeds) - 1) * change.std(ddof=1) / len(seeds) ** 0.5)
    changed = change[change != 0]
    sign_p = float(stats.binomtest(int((changed > 0).sum()), len(changed)).pvalue) if len(changed) else 1.0
    return Difference(len(seeds), mean, mean - half, mean + half, sign_p)


def values_by_seed(entries: Sequence[Mapping[str, Any]], method: str, measure: str) -> dict[int, float]:
    """Return the values of a measure of a row by seed; runs without the measure are left out."""
    return {
        int(entry["seed"]): float(entry[measure])
        for entry in entries
        if entry["method"] == method and entry.get(measure) is not None
    }


def comparisons(entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the pairs of rows to compare: the primary one, then each row with `none`."""
    methods = list(dict.fromkeys(str(entry["method"]) for entry in entries))
    pairs = [(name, "none") for name in methods if name != "none" and not name.startswith("teacher")]
    return [pair for pair in (PRIMARY, *pairs) if pair[0] in methods and pair[1] in methods]


def difference_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of the paired differences; empty if no rows can be compared."""
    lines = []
    for first, second in comparisons(entries):
        for measure in _MEASURES:
            values = (values_by_seed(entries, name, measure) for name in (first, second))
            found = paired_difference(*values)
            if found is None:
                continue
            interval = "-" if found.seeds == 1 else f"{found.low:+.4f} to {found.high:+.4f}"
            sign = "-" if found.seeds == 1 else f"{found.sign_p:.3f}"
            row = (f"{first} - {second}", measure, str(found.seeds), f"{found.mean:+.4f}", interval, sign)
            lines.append(f"| {' | '.join(row)} |")
    if not lines:
        return ""
    header = "| difference | measure | seeds | mean | 95 % interval | sign test p |"
    return "\n".join([header, "|---" * 6 + "|", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Bad input is reported in one sentence with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m training.study.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="matrix.json or ftkd_protocol.json")
    path = parser.parse_args(argv).file
    try:
        entries = read_matrix(path)
    except UserError as error:
        print(f"table: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(part for part in (table(entries), difference_table(entries)) if part))
    return 0


if __name__ == "__main__":
    sys.exit(main())
