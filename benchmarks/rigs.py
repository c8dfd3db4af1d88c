# SPDX-License-Identifier: Apache-2.0
"""Official metrics of a weights file on rigs it was not trained on, with and without virtual cameras.

    python -m benchmarks.rigs --json benchmarks/results/rigs_tiny.json

Renders held-out synthetic scenes with each rig, runs the detector with the true calibration and scores its
key frames with the nuScenes devkit. Writes the table after every rig; the same command resumes an interrupted
run and computes only missing rows. Rows of other weights, scenes or code are computed again.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from benchmarks.report import write_figures
from benchmarks.rig_cases import TRAINED, RigCase, all_cases
from ftkd_core.data.nuscenes import open_dataset
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.data.synthetic.render import render_camera
from ftkd_core.data.synthetic.rig import LIDAR_OFFSET_S
from ftkd_core.data.synthetic.world import Scene, make_scene
from ftkd_core.data.synthetic_clips import KEY_FRAME_INTERVAL_S, key_times, world_version
from ftkd_core.errors import UserError
from ftkd_core.evaluation.nuscenes import PosedObjects, evaluate, sample_tokens_of, to_devkit_results
from ftkd_core.runtime.detector import Detector
from ftkd_core.types import CameraRound, CameraView
from ftkd_core.weights import SHIPPED, read_config, weights_hash

MODELS: Final = ("as_is", "virtual")
_FIRST_SEED: Final = 900_000
_SCORE_THRESHOLD: Final = 0.01


def rounds(scene: Scene, case: RigCase) -> Iterator[tuple[CameraRound, int | None]]:
    """Yield the rounds of a scene at the rate of a rig as its cameras see them, with the number of the key
    frame that is exposed with a round, if there is one."""
    random = np.random.default_rng(scene.seed)
    error_rad = np.deg2rad(case.extrinsics_error_deg)
    wrong = Rotation.from_rotvec(_unit(random, len(case.rig.channels)) * error_rad).as_matrix()
    poses = case.rig.ego_from_camera.copy()
    poses[:, :3, :3] = poses[:, :3, :3] @ wrong
    duration = len(key_times(scene)) * KEY_FRAME_INTERVAL_S
    for step in range(round(duration * case.rate_hz)):
        elapsed = step / case.rate_hz
        exposures = case.rig.exposures_s(elapsed)
        views = tuple(
            CameraView(
                image=render_camera(scene, float(exposure), case.rig, camera).image,
                intrinsics=case.rig.intrinsics[camera], ego_from_camera=poses[camera],
                global_from_ego=scene.ego_pose(float(exposure)), stamp_ns=round(float(exposure) * 1e9),
                lens=case.rig.lens(camera), name=case.rig.channels[camera],
            )
            for camera, exposure in enumerate(exposures)
        )  # fmt: skip
        reference = elapsed + LIDAR_OFFSET_S
        key_frame, rest = divmod(step * 2, case.rate_hz)
        camera_round = CameraRound(
            views=views, reference_stamp_ns=round(reference * 1e9), global_from_ego=scene.ego_pose(reference)
        )
        yield camera_round, key_frame if rest == 0 else None


def _unit(random: np.random.Generator, count: int) -> Any:
    axes = random.normal(size=(count, 3))
    return axes / np.linalg.norm(axes, axis=1, keepdims=True)


def run_case(
    case: RigCase, scenes: Sequence[Scene], dataset: Any, weights: Path | None
) -> list[dict[str, Any]]:
    """Return the rows of a rig, one per camera model.

    Key frames between two rounds are not scored: at 5 Hz every second one is.
    """
    detectors = {
        model: Detector.from_weights(
            weights, device="cpu", score_threshold=_SCORE_THRESHOLD, camera_model=model, runtime="fast"
        )
        for model in MODELS
    }
    found: dict[str, dict[str, PosedObjects]] = {model: {} for model in MODELS}
    for scene in scenes:
        tokens = sample_tokens_of(dataset, scenes=[scene.name])
        for detector in detectors.values():
            detector.reset()
        for camera_round, key_frame in rounds(scene, case):
            for model, detector in detectors.items():
                objects = detector.step(_padded(camera_round, detector, case))
                if key_frame is not None:
                    found[model][tokens[key_frame]] = PosedObjects(objects, camera_round.global_from_ego)
    rows = []
    for model, detections in found.items():
        scored = list(detections)
        metrics = evaluate(dataset, to_devkit_results(detections, scored), sample_tokens=scored)
        rows.append(
            {
                "rig": case.name,
                "camera_model": model,
                "weights": detectors[model].weights_name,
                **{name: round(metrics[name], 4) for name in ("mAP", "NDS", "mAVE")},
                "scenes": len(scenes),
                "frames": len(scored),
            }
        )
    return rows


def _padded(camera_round: CameraRound, detector: Detector, case: RigCase) -> CameraRound:
    """Return the round for a detector with more channels than the rig has cameras: the others are missing."""
    missing = len(detector.channels) - len(case.rig.channels)
    return replace(camera_round, views=(*camera_round.views, *[None] * missing))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table: mAP and NDS of each rig, without and with virtual cameras."""
    lines = ["| rig | mAP, NDS as is | mAP, NDS virtual | share of trained |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["rig"] for row in rows):
        own = {row["camera_model"]: row for row in rows if row["rig"] == name}
        pairs = " | ".join(f"{own[model]['mAP']:.3f} {own[model]['NDS']:.3f}" for model in MODELS)
        lines.append(f"| {name} | {pairs} | {own['virtual']['share_of_trained']:.2f} |")
    return "\n".join(lines)


def finished_rows(
    path: Path | None, cases: Sequence[RigCase], key: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Return by rig the rows of an earlier run with the same rig, weights, scenes and code. Raises UserError
    for a file that this benchmark did not write."""
    if path is None or not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        by_rig = {case.name: [row for row in rows if row["rig"] == case.name] for case in cases}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--json {str(path)!r} is no table of this benchmark ({error}); give another file"
        ) from None
    found = {}
    for case in cases:
        wanted = key | {"rig_hash": case.content_hash}
        same = [row for row in by_rig[case.name] if wanted.items() <= row.items()]
        if len(same) == len(MODELS):
            found[case.name] = same
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Bad input is reported in one sentence with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rigs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--weights", type=Path, help="weights file (default: the shipped one)")
    parser.add_argument("--scenes", type=int, default=4, help="held-out scenes, at least 1 (default 4)")
    parser.add_argument("--duration", type=float, default=20.0, help="seconds per scene (default 20)")
    parser.add_argument("--rigs", default="", help="only rigs whose name contains this text")
    arguments = parser.parse_args(argv)
    try:
        rows = _run(arguments)
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


def _run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    cases = all_cases()
    chosen = [cases[0], *(case for case in cases[1:] if arguments.rigs in case.name)]
    if arguments.scenes < 1 or (len(chosen) == 1 and arguments.rigs not in cases[0].name):
        names = ", ".join(case.name for case in cases)
        raise UserError(
            f"--scenes {arguments.scenes} --rigs {arguments.rigs!r}: expected at least 1, and part of {names}"
        )
    weights = SHIPPED if arguments.weights is None else arguments.weights
    read_config(weights)  # refuses a file that is missing or damaged
    key = {
        "scenes": arguments.scenes,
        "duration_s": arguments.duration,
        "weights_hash": weights_hash(weights),
        "code": world_version("any"),
    }
    done = finished_rows(arguments.json, cases, key)
    seeds = range(_FIRST_SEED, _FIRST_SEED + arguments.scenes)
    scenes = [make_scene(seed, arguments.duration) for seed in seeds]
    with tempfile.TemporaryDirectory() as folder:
        root = write_dataset(
            Path(folder) / "truth", list(seeds), version="v1.0-rigs", split="rigs", width=64, height=36,
            duration_s=arguments.duration, sweeps=False, progress=False,
        )  # fmt: skip
        dataset = open_dataset(root, "v1.0-rigs")
        for case in tqdm(chosen, desc="rigs", unit="rig"):
            if case.name not in done:
                own = key | {"rig_hash": case.content_hash}
                done[case.name] = [r | own for r in run_case(case, scenes, dataset, arguments.weights)]
            rows = _with_shares([row for case in cases for row in done.get(case.name, [])])
            if arguments.json is not None:
                write_figures(arguments.json, rows)
    return [row for row in rows if row["rig"] in {case.name for case in chosen}]


def _with_shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Set the share of the mAP of the trained rig with virtual cameras in all rows."""
    trained = next(row for row in rows if row["rig"] == TRAINED and row["camera_model"] == "virtual")
    for row in rows:
        row["share_of_trained"] = round(row["mAP"] / max(trained["mAP"], 1e-9), 4)
    return rows


if __name__ == "__main__":
    sys.exit(main())
