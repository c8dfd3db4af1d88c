# SPDX-License-Identifier: Apache-2.0
"""Interval of the difference in mAP between two rows of an experiment, by drawing held-out scenes.

    python -m training.study.bootstrap --out runs/matrix --rows ftkd,ftkd_blind --draws 1000

Scenes are drawn with replacement, the same for all runs; each draw gives the mean over seeds of the paired
difference in mAP. It shows how much of a difference depends on the choice of scenes, which the interval over
seeds (`training.study.table`) does not. The matches of each key frame are computed once, so a draw costs only
a sort; mAP of the whole set equals the devkit's.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ftkd_core.data.nuscenes import NuScenes, open_dataset
from ftkd_core.errors import UserError
from ftkd_core.evaluation.nuscenes import SubsetEvaluation
from ftkd_core.evaluation.scene_matches import SceneMatches, match_scenes, mean_ap
from training.study.json_files import write_json
from training.study.matrix import method_of, seed_of
from training.study.scoring import SPLIT, VERSION, devkit_results

_LEVEL: Final = 0.95


def bootstrap(
    pairs: Sequence[tuple[Sequence[Mapping[str, SceneMatches]], Sequence[Mapping[str, SceneMatches]]]],
    draws: int,
    seed: int = 0,
) -> dict[str, float]:
    """Return the mean difference in mAP, its interval over drawn scenes, and the share of draws above 0.

    pairs: matches of the first and the second row by seed, each with the same scenes.
    """
    random, scenes = np.random.default_rng(seed), len(pairs[0][0])
    changes = []
    for _ in range(draws):
        drawn = random.integers(scenes, size=scenes)
        parts = [
            mean_ap([first[scene] for scene in drawn]) - mean_ap([second[scene] for scene in drawn])
            for first, second in pairs
        ]
        changes.append(float(np.mean(parts)))
    low, high = np.quantile(changes, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return {
        "difference": float(np.mean([mean_ap(first) - mean_ap(second) for first, second in pairs])),
        "low": float(low),
        "high": float(high),
        "share_above_0": float(np.mean(np.array(changes) > 0)),
    }


def read_matches(file: Path, dataset: NuScenes) -> list[dict[str, SceneMatches]]:
    """Return the matches of a file of detections by scene. UserError as `scoring.score`."""
    tokens, results = devkit_results(file, dataset, SPLIT)
    evaluation = SubsetEvaluation(dataset, results["results"], tokens)
    scenes = {token: dataset.get("sample", token)["scene_token"] for token in tokens}
    return match_scenes(evaluation, scenes)


def _files(out: Path, rows: Sequence[str]) -> list[tuple[Path, Path]]:
    """Return the detections of both rows by seed. UserError if the rows share no seed."""
    found: dict[str, dict[int, Path]] = {row: {} for row in rows}
    for file in sorted((out / "predictions").glob("*.npz")):
        if method_of(file.stem) in found:
            found[method_of(file.stem)][seed_of(file.stem)] = file
    first, second = found.values()
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise UserError(f"{str(out)!r} has no seed of both rows {' and '.join(rows)}; train them first")
    return [(first[seed], second[seed]) for seed in seeds]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Bad input is reported in one sentence with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m training.study.bootstrap",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the experiment, already scored")
    parser.add_argument("--rows", default="ftkd,ftkd_blind", help="two rows (default ftkd,ftkd_blind)")
    parser.add_argument("--draws", type=int, default=1000, help="draws of scenes (default 1000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args(argv)
    rows = options.rows.split(",")
    try:
        if len(set(rows)) != 2 or options.draws < 1:
            raise UserError(
                f"--rows {options.rows}, --draws {options.draws}: expected two rows and 1 or more"
            )
        files = _files(options.out, rows)
        dataset = open_dataset(options.out / "held_out", VERSION)
        pairs = [(read_matches(a, dataset), read_matches(b, dataset)) for a, b in files]
        values: dict[str, Any] = {"rows": rows, "seeds": len(pairs), "scenes": len(pairs[0][0])}
        values |= {"draws": options.draws, **bootstrap(pairs, options.draws)}
    except UserError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 2
    print(json.dumps(values, indent=1))
    if options.json is not None:
        write_json(options.json, values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
