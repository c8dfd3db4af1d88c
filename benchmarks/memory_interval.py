# SPDX-License-Identifier: Apache-2.0
"""Table for the choice of `memory_interval_s`: metrics by camera rate and phase on held-out synthetic scenes.

    python -m benchmarks.memory_interval --json FILE

The memory stores a frame if the last stored one is at least the interval old. If the interval is near a
multiple of the camera period, rounding decides which frames are stored. The phase is the number of rounds
between the start of the stream and the first key frame; metrics must not depend on it. Each rate is rendered
once; every interval and phase sees the same images. Only key frames at which a round is exposed are scored.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from tqdm import tqdm

from benchmarks.report import write_figures
from ftkd_core.data.nuscenes import open_dataset
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.data.synthetic.render import render_camera
from ftkd_core.data.synthetic.rig import LIDAR_OFFSET_S, SurroundRig
from ftkd_core.data.synthetic.world import Scene, make_scene
from ftkd_core.data.synthetic_clips import key_times
from ftkd_core.errors import UserError
from ftkd_core.evaluation.detector_benchmark import network_rig
from ftkd_core.evaluation.nuscenes import PosedObjects, evaluate, sample_tokens_of, to_devkit_results
from ftkd_core.models.build import build_stream_petr
from ftkd_core.runtime.detector import Detector, resolve_device
from ftkd_core.types import CameraRound, CameraView
from ftkd_core.weights import SHIPPED, load_into, read_cameras, read_weights

RATES_HZ: Final = (2.0, 5.0, 10.0, 12.0, 20.0, 30.0)
INTERVALS_S: Final = (0.4, 0.43, 0.45, 0.48)
_FIRST_SEED: Final = 900_000
_LONGEST_PHASE_S: Final = 0.5
_SCORE_THRESHOLD: Final = 0.05


def phases(rate_hz: float) -> range:
    """Return all phases of a rate: the rounds of half a second."""
    return range(max(1, round(_LONGEST_PHASE_S * rate_hz)))


def make_detector(weights: Path, interval_s: float) -> Detector:
    """Return the detector of a weights file with another memory interval."""
    state, config, _ = read_weights(weights)
    model = build_stream_petr(replace(config, decoder=replace(config.decoder, memory_interval_s=interval_s)))
    load_into(model, state, str(weights))
    return Detector(
        model,
        weights_name=weights.name,
        device=resolve_device("auto"),
        score_threshold=_SCORE_THRESHOLD,
        runtime="fast",
        canonical_cameras=read_cameras(weights),
    )


def round_times(scene: Scene, rate_hz: float) -> list[float]:
    """Return the times of all rounds: a round is at the first key frame, the longest phase before it."""
    keys = key_times(scene)
    first = len(phases(rate_hz)) - 1
    count = first + int((keys[-1] - keys[0]) * rate_hz + 1e-6) + 1
    return [float(keys[0] + (number - first) / rate_hz) for number in range(count)]


def render_round(scene: Scene, time_s: float, rig: SurroundRig) -> CameraRound:
    """Return the images and poses of a round that ends at `time_s`."""
    views = []
    for camera, channel in enumerate(rig.channels):
        exposure = float(time_s - LIDAR_OFFSET_S + rig.exposure_offsets_s[camera])
        view = CameraView(
            image=render_camera(scene, exposure, rig, camera).image,
            intrinsics=rig.intrinsics[camera],
            ego_from_camera=rig.ego_from_camera[camera],
            global_from_ego=scene.ego_pose(exposure),
            stamp_ns=round(exposure * 1e9),
            name=channel,
        )
        views.append(view)
    return CameraRound(
        views=tuple(views),
        reference_stamp_ns=round(time_s * 1e9),
        global_from_ego=scene.ego_pose(time_s),
    )


def key_frames(scene: Scene, times: Sequence[float], tokens: Sequence[str]) -> dict[int, str]:
    """Return the sample token by index of the round that is at its key frame."""
    found = {}
    for key_time, token in zip(key_times(scene), tokens, strict=True):
        index = int(np.abs(np.array(times) - key_time).argmin())
        if abs(times[index] - key_time) < 1e-3:
            found[index] = token
    return found


def run_rate(
    rate_hz: float,
    scenes: Sequence[Scene],
    dataset: Any,
    weights: Path,
    intervals: Sequence[float],
    max_phases: int,
) -> Iterator[dict[str, Any]]:
    """Yield one row per interval and phase."""
    detectors = {interval: make_detector(weights, interval) for interval in intervals}
    rig = network_rig(next(iter(detectors.values())).model)
    chosen = list(phases(rate_hz))[:: max(1, -(-len(phases(rate_hz)) // max_phases))]
    found: dict[tuple[float, int], dict[str, PosedObjects]] = {
        (interval, phase): {} for interval in intervals for phase in chosen
    }
    for scene in scenes:
        times = round_times(scene, rate_hz)
        named = key_frames(scene, times, sample_tokens_of(dataset, scenes=[scene.name]))
        rendered = [render_round(scene, time, rig) for time in times]
        for (interval, phase), detections in found.items():
            detectors[interval].reset()
            for index in range(len(phases(rate_hz)) - 1 - phase, len(times)):
                objects = detectors[interval].step(rendered[index])
                if index in named:
                    pose = rendered[index].global_from_ego
                    detections[named[index]] = PosedObjects(objects, pose)
    for (interval, phase), detections in found.items():
        tokens = tuple(detections)
        metrics = evaluate(dataset, to_devkit_results(detections, tokens), sample_tokens=tokens)
        row = {"rate_hz": rate_hz, "memory_interval_s": interval, "phase": phase, "key_frames": len(tokens)}
        yield row | {name: round(metrics[name], 4) for name in ("mAP", "NDS", "mAVE")}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return mean NDS over the phases, and the difference of the best and the worst phase, as Markdown."""
    intervals = sorted({row["memory_interval_s"] for row in rows})
    lines = ["| rate | " + " | ".join(f"{interval:g} s" for interval in intervals) + " |"]
    lines.append("|---" * (len(intervals) + 1) + "|")
    for rate in sorted({row["rate_hz"] for row in rows}):
        cells = []
        for interval in intervals:
            nds = [
                row["NDS"] for row in rows if (row["rate_hz"], row["memory_interval_s"]) == (rate, interval)
            ]
            cells.append(f"{np.mean(nds):.3f} ({max(nds) - min(nds):.3f})" if nds else "")
        lines.append(f"| {rate:g} Hz | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write the JSON file. Returns 2 for an error."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="weights file  [default: shipped]")
    parser.add_argument("--scenes", type=int, default=8, help="held-out scenes  [default: 8]")
    parser.add_argument("--duration", type=float, default=10.0, help="seconds per scene  [default: 10]")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES_HZ, help="camera rates in Hz")
    parser.add_argument("--intervals", type=float, nargs="+", default=INTERVALS_S, help="intervals in s")
    parser.add_argument("--max-phases", type=int, default=15, help="phases per rate  [default: all]")
    parser.add_argument("--json", type=Path, help="file for the results; written after each rate")
    options = parser.parse_args(arguments)
    seeds = list(range(_FIRST_SEED, _FIRST_SEED + options.scenes))
    rows: list[dict[str, Any]] = []
    try:
        if min(options.rates) < 2 or max(options.rates) > 60 or options.max_phases < 1:
            raise UserError("expected rates of 2 to 60 Hz and at least one phase")
        scenes = [make_scene(seed, options.duration) for seed in seeds]
        with tempfile.TemporaryDirectory() as folder:
            root = write_dataset(
                Path(folder) / "truth", seeds, version="v1.0-memory", split="memory", width=64, height=36,
                duration_s=options.duration, sweeps=False, progress=False,
            )  # fmt: skip
            dataset = open_dataset(root, "v1.0-memory")
            for rate in tqdm(options.rates, desc="rates", unit="rate"):
                rows += run_rate(
                    rate, scenes, dataset, options.weights, options.intervals, options.max_phases
                )
                if options.json is not None:
                    write_figures(options.json, rows)
    except UserError as error:
        print(f"benchmarks.memory_interval: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
