# SPDX-License-Identifier: Apache-2.0
"""Velocity errors per class, compared with those of predicting zero velocity everywhere.

    python -m training.study.velocity_errors --predictions FILE.npz --dataset runs/matrix/held_out

Scores the detections of an experiment (`training.study.experiments`) twice on its held-out data set: as they
are, and with every velocity set to 0. A model whose errors equal those of zero velocity has learned no
velocities even if its mAVE is low.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftkd_core.data.nuscenes import NuScenes, open_dataset
from ftkd_core.errors import UserError
from training.study import scoring
from training.study.json_files import write_json


def velocity_errors(predictions: Path, dataset: NuScenes, split: str) -> dict[str, dict[str, Any]]:
    """Return `AVE`, `zero_AVE` (AVE of zero velocity; both m/s, None if the devkit gives no number) and
    `truths` per class with true boxes, and the devkit's means as `mean`. Errors as for `scoring.score`."""
    predicted = scoring.score(predictions, dataset, split)
    zero = scoring.score(predictions, dataset, split, zero_velocity=True)
    found: dict[str, dict[str, Any]] = {
        name: {"AVE": own["AVE"], "zero_AVE": zero["classes"][name]["AVE"], "truths": own["truths"]}
        for name, own in predicted["classes"].items()
        if own["truths"]
    }
    return found | {"mean": {"AVE": predicted["mAVE"], "zero_AVE": zero["mAVE"]}}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table with one line per class."""
    lines = ["| class | true boxes | AVE, m/s | AVE of zero velocity |", "|---|---|---|---|"]
    for name, own in found.items():
        errors = ("-" if own[key] is None else f"{own[key]:.2f}" for key in ("AVE", "zero_AVE"))
        lines.append(f"| {name} | {own.get('truths', '')} | {' | '.join(errors)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Bad input is reported in one sentence with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m training.study.velocity_errors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--predictions", type=Path, required=True, help="detections of an experiment's run (.npz)")
    add("--dataset", type=Path, required=True, help="the experiment's held_out folder")
    add("--version", default=scoring.VERSION, help=f"version of the data set (default {scoring.VERSION})")
    add("--split", default=scoring.SPLIT, help=f"split of the detections (default {scoring.SPLIT})")
    add("--json", type=Path, metavar="FILE", help="also write the errors to this file")
    options = parser.parse_args(argv)
    try:
        if not options.predictions.is_file():
            raise UserError(
                f"no file {str(options.predictions)!r}; expected detections of an experiment's run"
            )
        dataset = open_dataset(options.dataset, options.version)
        found = velocity_errors(options.predictions, dataset, options.split)
    except UserError as error:
        print(f"velocity errors: {error}", file=sys.stderr)
        return 2
    print(table(found))
    if options.json is not None:
        write_json(options.json, found)
        print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
