# SPDX-License-Identifier: Apache-2.0
"""Whether a model knows speeds: the devkit's velocity error by class, beside that of saying 0 of everything.

    python -m training.study.speeds --predictions FILE.npz --dataset runs/matrix/held_out

Reads the detections of an experiment (`training.study.experiments`) and its held-out data set, scores
them twice, as they are and with every velocity set to 0, and prints a table. A model whose errors are those
of 0 has learnt no speeds, whatever its mAVE.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftkd_core.data.nuscenes import NuScenes, open_dataset
from ftkd_core.errors import UserError
from ftkd_core.json_files import write_json
from training.study import scoring


def speeds(predictions: Path, dataset: NuScenes, split: str) -> dict[str, dict[str, Any]]:
    """Per class with true boxes, and as `mean` the devkit's mAVE: AVE, `still` (AVE had it said 0; both m/s,
    None where the devkit gives no number) and, of classes, truths. Errors as of `scoring.score`."""
    said = scoring.score(predictions, dataset, split)
    still = scoring.score(predictions, dataset, split, still=True)
    found: dict[str, dict[str, Any]] = {
        name: {"AVE": own["AVE"], "still": still["classes"][name]["AVE"], "truths": own["truths"]}
        for name, own in said["classes"].items()
        if own["truths"]
    }
    return found | {"mean": {"AVE": said["mAVE"], "still": still["mAVE"]}}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, a line a class."""
    lines = ["| class | true boxes | AVE, m/s | AVE of saying 0 |", "|---|---|---|---|"]
    for name, own in found.items():
        errors = ("-" if own[key] is None else f"{own[key]:.2f}" for key in ("AVE", "still"))
        lines.append(f"| {name} | {own.get('truths', '')} | {' | '.join(errors)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; bad input is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m training.study.speeds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--predictions", type=Path, required=True, help="a file of detections (.npz) of an experiment")
    add("--dataset", type=Path, required=True, help="its held_out folder")
    add("--version", default="v1.0-synth", help="version of that data set (default v1.0-synth)")
    add("--split", default="held_out", help="split that was detected on (default held_out)")
    add("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args(argv)
    try:
        if not options.predictions.is_file():
            raise UserError(f"no file {str(options.predictions)!r}; expected detections of an experiment")
        found = speeds(options.predictions, open_dataset(options.dataset, options.version), options.split)
    except UserError as error:
        print(f"speeds: {error}", file=sys.stderr)
        return 2
    print(table(found))
    if options.json is not None:
        write_json(options.json, found, indent=1)
        print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
