# SPDX-License-Identifier: Apache-2.0
"""Bags and metrics.json -> report.html, bev.png and surround.png."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ftkd_core.errors import UserError
from ftkd_core.types import ObjectList
from ftkd_ros.bag.html_report import ReportFrame, ReportRun, draw_frame, write_pictures, write_runs
from ftkd_ros.bag.io import BagReader, check_new
from ftkd_ros.bag.recording import JOIN_WITHIN_NS, Recording, read_recording
from ftkd_ros.bag.replay_rounds import Drive, nearest
from ftkd_ros.bag.report_sections import Timeline
from ftkd_ros.node.parameters import typed_parameters

PAGE_NAME: Final = "report.html"
_PICTURE_NAMES: Final = ("bev.png", "surround.png")
_ROUND_WITHIN_NS: Final = 60_000_000


def report_results(
    results: Path, detections_path: Path, input_path: Path, *, max_frames: int | None = None
) -> Path:
    """Write report.html, bev.png and surround.png about one run to the folder of metrics.json; return the
    path of the page. See `report_runs`."""
    return report_runs([(results, detections_path, input_path)], results, max_frames=max_frames)


def report_runs(
    runs: Sequence[tuple[Path, Path, Path]], output: Path, *, max_frames: int | None = None
) -> Path:
    """Write report.html, bev.png and surround.png about one or several runs to `output`; return the path of
    the page.

    runs: (folder with metrics.json, bag with detections, bag that they were made from). The page shows all
    key frames, or at most `max_frames` of them, spread over the drive. Raises UserError if metrics.json is
    missing or damaged, if the bags do not belong together, or if an output exists.
    """
    if max_frames is not None and max_frames < 1:
        raise UserError(f"{max_frames} frames; expected at least 1")
    metrics = [_read_metrics(results / "metrics.json") for results, _, _ in runs]
    for name in (PAGE_NAME, *_PICTURE_NAMES):
        check_new(output / name)
    names = _names([results for results, _, _ in runs])
    parts = [
        _run(name, own, detections, source, max_frames)
        for name, own, (_, detections, source) in zip(names, metrics, runs, strict=True)
    ]
    output.mkdir(parents=True, exist_ok=True)
    write_pictures(output, parts[0].frames)
    write_runs(output / PAGE_NAME, parts)
    return output / PAGE_NAME


def _run(
    name: str, metrics: dict[str, Any], detections_path: Path, input_path: Path, max_frames: int | None
) -> ReportRun:
    parameters = typed_parameters(metrics.get("parameters") or {})
    with BagReader(detections_path) as detections, BagReader(input_path) as source:
        drive = Drive(source, parameters)
        if metrics.get("selection"):
            drive.select(**metrics["selection"])
        recording = read_recording(detections, drive, parameters.base_frame)
        frames = list(report_frames(drive, recording, max_frames))
        timeline = _timeline(drive.reference_stamps(), recording, metrics)
    return ReportRun(name, metrics, frames, timeline)


def _timeline(stamps: Sequence[int], recording: Recording, metrics: dict[str, Any]) -> Timeline:
    """Return times relative to the first round."""
    if not stamps:
        return Timeline()
    start_ns = stamps[0]
    found = sorted(recording.objects)
    detected = {s for s in stamps if nearest(found, s, JOIN_WITHIN_NS) is not None}
    return Timeline(
        latency=[
            ((stamp - start_ns) * 1e-9, float(value))
            for stamp, value in metrics.get("latency_timeline") or []
        ],
        detected=[(stamp - start_ns) * 1e-9 for stamp in stamps if stamp in detected],
        dropped=[(stamp - start_ns) * 1e-9 for stamp in stamps if stamp not in detected],
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ."""
    for depth in range(1, 1 + max(len(folder.resolve().parts) for folder in folders)):
        names = ["/".join(folder.resolve().parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"the same results {str(folders[0])!r} are given twice; give different runs")


def report_frames(drive: Drive, recording: Recording, max_frames: int | None) -> Iterator[ReportFrame]:
    """Yield pictures of key frames spread over the drive, in order of time."""
    indices = _spread(len(recording.joined), max_frames)
    pending = {recording.joined[index][0].stamp_ns: index for index in indices}
    truths = drive.ground_truth()
    start_ns = recording.joined[0][0].stamp_ns
    for camera_round, _ in drive.rounds(near_ns=sorted(pending)):
        stamp_ns = nearest(sorted(pending), camera_round.reference_stamp_ns, _ROUND_WITHIN_NS)
        if stamp_ns is None:
            continue
        # The previous sweep may be the first round nearby; the round of the key frame is closer.
        if abs(camera_round.reference_stamp_ns - stamp_ns) > JOIN_WITHIN_NS:
            continue
        index = pending.pop(stamp_ns)
        _, detected_ns = recording.joined[index]
        objects = _no_objects(stamp_ns) if detected_ns is None else recording.objects[detected_ns]
        found = "no detections" if detected_ns is None else f"{len(objects.boxes)} detections"
        caption = (
            f"key frame {index + 1} of {len(recording.joined)}, {(stamp_ns - start_ns) * 1e-9:.1f} s, {found}"
        )
        channels = tuple(camera.upper() for camera in drive.cameras)
        yield draw_frame(camera_round, objects, truths.get(stamp_ns), caption=caption, channels=channels)


def _spread(count: int, limit: int | None) -> Sequence[int]:
    """Return all, or at most `limit`, of the indices 0 .. count - 1, evenly spread, with both ends."""
    if limit is None or count <= limit:
        return range(count)
    return sorted({int(index) for index in np.linspace(0, count - 1, limit).round()})


def _no_objects(stamp_ns: int) -> ObjectList:
    return ObjectList(
        boxes=np.zeros((0, 9)), scores=np.zeros(0), labels=np.zeros(0, dtype=np.int64), stamp_ns=stamp_ns
    )


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {str(path)!r}; give the output folder of `ftkd evaluate`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}); run `ftkd evaluate` again") from error
    if not isinstance(metrics, dict):
        raise UserError(f"{str(path)!r} contains no metrics; run `ftkd evaluate` again")
    return metrics
