# SPDX-License-Identifier: Apache-2.0
"""Official metrics of a weights file on rigs it was not trained on, with and without virtual cameras.

    python -m benchmarks.rigs --json benchmarks/results/rigs_tiny.json

Renders held-out synthetic scenes (key frames at 2 Hz) with each rig, runs the detector with the true
calibration and scores it with the nuScenes devkit. Writes the table after every rig, so an interrupted run
keeps its rows.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from benchmarks.rig_cases import RigCase, all_cases, distort
from ftkd_core.data.nuscenes import open_dataset
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.data.synthetic.render import render_camera
from ftkd_core.data.synthetic.rig import LIDAR_OFFSET_S
from ftkd_core.data.synthetic.world import Scene, make_scene
from ftkd_core.data.synthetic_clips import key_times
from ftkd_core.errors import UserError
from ftkd_core.evaluation.nuscenes import PosedObjects, evaluate, sample_tokens_of, to_devkit_results
from ftkd_core.json_files import write_json
from ftkd_core.runtime.detector import Detector
from ftkd_core.types import CameraRound, CameraView

MODELS: Final = ("as_is", "virtual")
_FIRST_SEED: Final = 900_000
_SCORE_THRESHOLD: Final = 0.01


def rounds(scene: Scene, case: RigCase) -> Iterator[CameraRound]:
    """Yield the key frames of a scene as the cameras of a rig see them."""
    random = np.random.default_rng(scene.seed)
    error_rad = np.deg2rad(case.extrinsics_error_deg)
    wrong = Rotation.from_rotvec(_unit(random, len(case.rig.channels)) * error_rad).as_matrix()
    for key_time in key_times(scene):
        views = []
        for camera, channel in enumerate(case.rig.channels):
            exposure = float(key_time - LIDAR_OFFSET_S + case.rig.exposure_offsets_s[camera])
            image = render_camera(scene, exposure, case.render, camera).image
            pose = case.rig.ego_from_camera[camera].copy()
            pose[:3, :3] = pose[:3, :3] @ wrong[camera]
            view = CameraView(
                image=distort(case, camera, image), intrinsics=case.rig.intrinsics[camera],
                ego_from_camera=pose, global_from_ego=scene.ego_pose(exposure),
                stamp_ns=round(exposure * 1e9), lens=case.lens, name=channel,
            )  # fmt: skip
            views.append(view)
        yield CameraRound(
            views=tuple(views), reference_stamp_ns=round(float(key_time) * 1e9),
            global_from_ego=scene.ego_pose(float(key_time)),
        )  # fmt: skip


def _unit(random: np.random.Generator, count: int) -> Any:
    axes = random.normal(size=(count, 3))
    return axes / np.linalg.norm(axes, axis=1, keepdims=True)


def run_case(
    case: RigCase, scenes: Sequence[Scene], dataset: Any, weights: Path | None
) -> list[dict[str, Any]]:
    """Return the rows of a rig, one per camera model."""
    detectors = {
        model: Detector.from_weights(
            weights, device="cpu", score_threshold=_SCORE_THRESHOLD, camera_model=model
        )
        for model in MODELS
    }
    found: dict[str, dict[str, PosedObjects]] = {model: {} for model in MODELS}
    for scene in scenes:
        tokens = sample_tokens_of(dataset, scenes=[scene.name])
        for detector in detectors.values():
            detector.reset()
        for token, camera_round in zip(tokens, rounds(scene, case), strict=True):
            for model, detector in detectors.items():
                objects = detector.step(_padded(camera_round, detector, case))
                found[model][token] = PosedObjects(objects, camera_round.global_from_ego)
    tokens = sample_tokens_of(dataset, scenes=[scene.name for scene in scenes])
    rows = []
    for model, detections in found.items():
        metrics = evaluate(dataset, to_devkit_results(detections, tokens), sample_tokens=tokens)
        rows.append(
            {
                "rig": case.name,
                "camera_model": model,
                "weights": detectors[model].weights_name,
                **{name: round(metrics[name], 4) for name in ("mAP", "NDS", "mAVE")},
                "scenes": len(scenes),
            }
        )
    return rows


def _padded(camera_round: CameraRound, detector: Detector, case: RigCase) -> CameraRound:
    """Return the round for a detector with more channels than the rig has cameras: the others are missing."""
    missing = len(detector.channels) - len(case.rig.channels)
    return CameraRound(
        views=(*camera_round.views, *[None] * missing),
        reference_stamp_ns=camera_round.reference_stamp_ns,
        global_from_ego=camera_round.global_from_ego,
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table: mAP and NDS of each rig, without and with virtual cameras."""
    lines = ["| rig | mAP, NDS as is | mAP, NDS virtual | share of trained |", "|---|---|---|---|"]
    for plain, virtual in zip(rows[::2], rows[1::2], strict=True):
        pairs = " | ".join(f"{row['mAP']:.3f} {row['NDS']:.3f}" for row in (plain, virtual))
        lines.append(f"| {plain['rig']} | {pairs} | {virtual['share_of_trained']:.2f} |")
    return "\n".join(lines)


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
    seeds = range(_FIRST_SEED, _FIRST_SEED + arguments.scenes)
    scenes = [make_scene(seed, arguments.duration) for seed in seeds]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = write_dataset(
            Path(folder) / "truth", list(seeds), version="v1.0-rigs", split="rigs", width=64, height=36,
            duration_s=arguments.duration, sweeps=False, progress=False,
        )  # fmt: skip
        dataset = open_dataset(root, "v1.0-rigs")
        for case in tqdm(chosen, desc="rigs", unit="rig"):
            rows += run_case(case, scenes, dataset, arguments.weights)
            for row in rows:
                row["share_of_trained"] = round(row["mAP"] / max(rows[0]["mAP"], 1e-9), 4)
            if arguments.json is not None:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                write_json(arguments.json, rows)
    return rows


if __name__ == "__main__":
    sys.exit(main())
