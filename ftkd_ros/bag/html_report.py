# SPDX-License-Identifier: Apache-2.0
"""Self-contained HTML page about one evaluated run: metrics, tables and pictures."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.classes import CAMERA_CHANNELS, CLASS_NAMES
from ftkd_core.types import CameraRound, ObjectList
from ftkd_core.visualization import CLASS_COLORS, draw_bird_eye, draw_surround

MIN_SCORE: Final = 0.25
"""Minimum score of drawn detections; the metrics use all detections."""
_ERRORS: Final[dict[str, tuple[str, str]]] = {
    "ATE": ("translation", "m"),
    "ASE": ("scale", "1 - IoU"),
    "AOE": ("orientation", "rad"),
    "AVE": ("velocity", "m/s"),
    "AAE": ("attribute", "1 - accuracy"),
}


@dataclass(frozen=True, kw_only=True)
class ReportFrame:
    """Pictures (RGB) of one key frame; matched: number of true objects with a drawn detection nearby."""

    caption: str
    bird_eye: NDArray[np.uint8]
    surround: NDArray[np.uint8]
    matched: int


def draw_frame(
    camera_round: CameraRound,
    detections: ObjectList,
    ground_truth: ObjectList | None,
    *,
    caption: str,
    channels: tuple[str, ...] = CAMERA_CHANNELS,
    width: int = 1320,
) -> ReportFrame:
    """Draw one key frame.

    Detections and ground truth are in ego within milliseconds of the reference stamp.
    """
    visible = detections.select(detections.scores >= MIN_SCORE)
    return ReportFrame(
        caption=caption,
        bird_eye=draw_bird_eye(detections, ground_truth, size=760, min_score=MIN_SCORE),
        surround=draw_surround(
            camera_round, detections, ground_truth, width=width, min_score=MIN_SCORE, channels=channels
        ),
        matched=0 if ground_truth is None else count_matched(visible, ground_truth),
    )


def count_matched(detections: ObjectList, ground_truth: ObjectList, within_m: float = 2.0) -> int:
    """Return the number of true objects with a detection of their class within `within_m` metres on the
    ground.
    """
    offsets = ground_truth.boxes[:, None, :2] - detections.boxes[None, :, :2]
    near = np.linalg.norm(offsets, axis=-1) < within_m
    same = ground_truth.labels[:, None] == detections.labels[None, :]
    return int((near & same).any(axis=1).sum()) if near.size else 0


def best_frame(frames: Sequence[ReportFrame]) -> int:
    """Return the index of the first frame with the most matched objects."""
    return max(range(len(frames)), key=lambda index: frames[index].matched, default=0)


def write_pictures(folder: Path, frames: Sequence[ReportFrame]) -> None:
    """Write bev.png and surround.png of the frame with the most matched objects; no file if there is no
    frame.
    """
    if not frames:
        return
    chosen = frames[best_frame(frames)]
    for name, picture in (("bev.png", chosen.bird_eye), ("surround.png", chosen.surround)):
        (folder / name).write_bytes(_encoded(picture, ".png"))


def write_report(path: Path, metrics: Mapping[str, Any], frames: Sequence[ReportFrame]) -> None:
    """Write the page. `metrics` is the content of metrics.json; missing values are shown as a dash."""
    template = Template(
        resources.files(__package__).joinpath("templates/report.html").read_text(encoding="utf-8")
    )
    page = template.substitute(
        title="Camera detections, replayed and scored",
        subtitle=html.escape(str(metrics.get("data", ""))),
        tiles=_tiles(metrics),
        notices="".join(f'<p class="notice">{html.escape(note)}</p>' for note in metrics.get("notes", [])),
        min_score=MIN_SCORE,
        first_frame=best_frame(frames),
        frames="\n".join(_frame(frame) for frame in frames) or "<p>No key frame has pictures.</p>",
        config=html.escape(str(metrics.get("config", "nuScenes"))),
        summary_table=_summary_table(metrics),
        class_table=_class_table(metrics.get("classes", {})),
        rounds_table=_rounds_table(metrics),
        facts_table=_facts_table(metrics),
        footer=f"Written {html.escape(str(metrics.get('created', '')))} by ftkd_ros.",
    )
    path.write_text(page, encoding="utf-8")


def _tiles(metrics: Mapping[str, Any]) -> str:
    latency = metrics.get("latency_ms") or {}
    detected = f"{_count(metrics.get('rounds_detected'))} / {_count(metrics.get('rounds_in'))}"
    tiles = (
        (_number(metrics.get("mAP")), "mAP"),
        (_number(metrics.get("NDS")), "NDS"),
        (detected, "rounds detected / in"),
        (_count(metrics.get("rounds_dropped")), "rounds dropped"),
        (_milliseconds(latency.get("p50")), "latency, median"),
        (_milliseconds(latency.get("p95")), "latency, 95th percentile"),
    )
    return "".join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for value, label in tiles)


def _frame(frame: ReportFrame) -> str:
    caption = html.escape(frame.caption, quote=True)
    pictures = "".join(
        f'<img class="{name}" alt="{text}, {caption}" src="data:image/jpeg;base64,{_base64(picture)}">'
        for name, text, picture in (
            ("surround", "six cameras", frame.surround),
            ("bird-eye", "bird's-eye view", frame.bird_eye),
        )
    )
    text = f"<figcaption>{caption}</figcaption>"
    return f'<figure class="frame" data-caption="{caption}">{text}{pictures}</figure>'


def _summary_table(metrics: Mapping[str, Any]) -> str:
    rows = [
        ("mAP", _number(metrics.get("mAP")), "mean average precision over the ten classes"),
        ("NDS", _number(metrics.get("NDS")), "nuScenes detection score"),
        (
            "mAP, present classes",
            _number(metrics.get("mAP_present")),
            "mean over the classes with ground truth in this data",
        ),
    ]
    rows += [
        (f"m{name}", _number(metrics.get(f"m{name}")), f"mean {meaning} error of matched objects ({unit})")
        for name, (meaning, unit) in _ERRORS.items()
    ]
    return _table(("metric", "value", "meaning"), (tuple(map(html.escape, row)) for row in rows))


def _class_table(classes: Mapping[str, Any]) -> str:
    header = ("class", "true objects", "AP", *_ERRORS)
    rows = []
    for name in sorted(classes, key=lambda name: (not classes[name]["truths"], CLASS_NAMES.index(name))):
        values = classes[name]
        color = "#{:02x}{:02x}{:02x}".format(*CLASS_COLORS[name])
        width = round(100 * (values["AP"] or 0.0))
        bar = f'<span class="bar"><i style="width:{width}%;background:{color}"></i></span>'
        cells = (
            html.escape(name.replace("_", " ")),
            _count(values["truths"]),
            bar + _number(values["AP"]),
            *(_number(values[error]) for error in _ERRORS),
        )
        rows.append(_row(cells, css="" if values["truths"] else "absent"))
    return f"<table><thead>{_row(header, tag='th')}</thead><tbody>{''.join(rows)}</tbody></table>"


def _rounds_table(metrics: Mapping[str, Any]) -> str:
    latency = metrics.get("latency_ms") or {}
    coverage = metrics.get("coverage") or {}
    offset = coverage.get("offset_ms") or {}
    key_frames = f"{_count(coverage.get('with_detections'))} of {_count(coverage.get('key_frames'))}"
    rows = [
        ("Camera rounds in the recording", _count(metrics.get("rounds_in"))),
        ("Rounds detected", _count(metrics.get("rounds_detected"))),
        ("Rounds dropped", _count(metrics.get("rounds_dropped"))),
        ("Key frames with detections", key_frames),
        ("Mean delay of detections after the key frame stamp", _milliseconds(offset.get("mean"))),
        ("Detections and key frame stamps differ by at most", _milliseconds(offset.get("max"))),
        ("Latency, median", _milliseconds(latency.get("p50"))),
        ("Latency, 95th percentile", _milliseconds(latency.get("p95"))),
        ("Latency, maximum", _milliseconds(latency.get("max"))),
    ]
    rows += [
        (f"Stage: {name}, median", _milliseconds(value))
        for name, value in (metrics.get("stages_ms") or {}).items()
    ]
    if latency.get("meaning"):
        rows.append(("Meaning of latency", html.escape(str(latency["meaning"]))))
    return _facts(rows)


def _facts_table(metrics: Mapping[str, Any]) -> str:
    rows = [
        (label, html.escape(str(metrics[key])))
        for key, label in (
            ("data", "Data"),
            ("weights", "Weights"),
            ("training", "Training"),
            ("preset", "Model preset"),
            ("device", "Device"),
            ("command", "Command"),
        )
        if metrics.get(key)
    ]
    rows += [
        (html.escape(name), html.escape(str(value)))
        for name, value in (metrics.get("versions") or {}).items()
    ]
    return _facts(rows)


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    return f'<table class="facts"><tbody>{"".join(_row(row) for row in rows)}</tbody></table>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join(_row(row) for row in rows)
    return f"<table><thead>{_row(header, tag='th')}</thead><tbody>{body}</tbody></table>"


def _row(cells: Sequence[str], *, tag: str = "td", css: str = "") -> str:
    attribute = f' class="{css}"' if css else ""
    return f"<tr{attribute}>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _count(value: int | None) -> str:
    return "–" if value is None else str(value)


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} ms"


def _base64(picture: NDArray[np.uint8]) -> str:
    return base64.b64encode(_encoded(picture, ".jpg")).decode()


def _encoded(picture: NDArray[np.uint8], extension: str) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, 82] if extension == ".jpg" else []
    done, content = cv2.imencode(extension, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)
    if not done:
        raise ValueError(f"cannot encode a picture of shape {picture.shape} as {extension}")
    return content.tobytes()
