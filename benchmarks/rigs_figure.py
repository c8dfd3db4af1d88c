# SPDX-License-Identifier: Apache-2.0
"""Bar chart of the rows of `benchmarks.rigs`.

python -m benchmarks.rigs_figure benchmarks/results/rigs_tiny.json docs/images/rigs.svg
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_COLORS: Final = {"as_is": "#b8bcc4", "virtual": "#2a78c8"}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the mAP of each rig, as a share of the trained rig's, without and with virtual cameras."""
    names = list(dict.fromkeys(row["rig"] for row in rows))
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(names) + 1))
    for shift, model in ((-0.2, "as_is"), (0.2, "virtual")):
        shares = {row["rig"]: row["share_of_trained"] for row in rows if row["camera_model"] == model}
        places = [index + shift for index, name in enumerate(names) if name in shares]
        axes.barh(places, [shares[n] for n in names if n in shares], 0.38, color=_COLORS[model], label=model)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("mAP, share of the trained rig's")
    axes.axvline(1.0, color="#444444", linewidth=0.8)
    axes.legend(title="camera_model", loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rigs_figure", description=__doc__)
    parser.add_argument("json", type=Path, help="file that benchmarks.rigs wrote")
    parser.add_argument("figure", type=Path, help="picture to write (.svg or .png)")
    arguments = parser.parse_args(argv)
    if not arguments.json.is_file():
        print(f"figure: no file {str(arguments.json)!r}; write it with benchmarks.rigs", file=sys.stderr)
        return 2
    draw(json.loads(arguments.json.read_text(encoding="utf-8")), arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
