# SPDX-License-Identifier: Apache-2.0
"""Bags and metrics.json -> report.html, bev.png and surround.png."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ftkd_core.errors import UserError
from ftkd_core.types import ObjectList
from ftkd_ros.bag.evaluate import JOIN_WITHIN_NS, Recording, read_recording
from ftkd_ros.bag.html_report import ReportFrame, draw_frame, write_pictures, write_report
from ftkd_ros.bag.io import BagReader, check_new
from ftkd_ros.bag.replay_rounds import Drive, nearest

PAGE_NAME: Final = "report.html"
_PICTURE_NAMES: Final = ("bev.png", "surround.png")
_ROUND_WITHIN_NS: Final = 60_000_000


def report_results(results: Path, detections_path: Path, input_path: Path, *, max_frames: int = 20) -> Path:
    """Write report.html, bev.png and surround.png to the folder of metrics.json; return the path of the page.

    The page shows at most `max_frames` key frames, spread over the drive. Raises UserError if metrics.json is
    missing or damaged, if the bags do not belong together, or if an output exists.
    """
    if max_frames < 1:
        raise UserError(f"{max_frames} frames; expected at least 1")
    metrics = _read_metrics(results / "metrics.json")
    for name in (PAGE_NAME, *_PICTURE_NAMES):
        check_new(results / name)
    with BagReader(detections_path) as detections, BagReader(input_path) as source:
        drive = Drive(source)
        frames = list(report_frames(drive, read_recording(detections, drive), max_frames))
    write_pictures(results, frames)
    write_report(results / PAGE_NAME, metrics, frames)
    return results / PAGE_NAME


def report_frames(drive: Drive, recording: Recording, max_frames: int) -> Iterator[ReportFrame]:
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
        yield draw_frame(
            camera_round, objects, truths.get(stamp_ns), caption=caption, channels=drive.channels
        )


def _spread(count: int, limit: int) -> Sequence[int]:
    """Return at most `limit` of the indices 0 .. count - 1, evenly spread, with both ends."""
    if count <= limit:
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
