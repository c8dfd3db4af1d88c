# SPDX-License-Identifier: Apache-2.0
"""Self-contained HTML page about one evaluated run: metrics, tables and pictures."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
from ftkd_ros.bag.report_sections import (
    NamedMetrics,
    Timeline,
    comparison,
    error_by_distance,
    precision_recall,
    timelines,
)

_MAX_BYTES: Final = 18_000_000
_SIZES: Final = ((1.0, 82), (1.0, 65), (0.75, 65), (0.5, 60), (0.35, 50))
"""Scale and JPEG quality of pictures, from which the first one that is small enough is used."""
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


@dataclass(frozen=True)
class ReportRun:
    """One run of the page: metrics.json, pictures and timeline; the name is shown if there are several."""

    name: str
    metrics: Mapping[str, Any]
    frames: Sequence[ReportFrame]
    timeline: Timeline = field(default_factory=Timeline)


def write_report(path: Path, metrics: Mapping[str, Any], frames: Sequence[ReportFrame]) -> None:
    """Write the page of one run. `metrics` is the content of metrics.json; missing values are shown as a
    dash."""
    write_runs(path, [ReportRun("run", metrics, frames)])


def write_runs(path: Path, runs: Sequence[ReportRun]) -> None:
    """Write one page about one or several runs of the same key frames. Tables of single values are those of
    the first run. Pictures are compressed until the page has less than 18 MB per scene."""
    metrics, frames = runs[0].metrics, runs[0].frames
    named = [NamedMetrics(run.name, run.metrics, run.timeline) for run in runs]
    template = Template(
        resources.files(__package__).joinpath("templates/report.html").read_text(encoding="utf-8")
    )
    page = template.substitute(
        title="Camera detections, replayed and scored",
        subtitle=html.escape(str(metrics.get("data", ""))),
        comparison=comparison(named),
        precision_recall=precision_recall(named),
        error_by_distance=error_by_distance(named),
        timelines=timelines(named),
        tiles=_tiles(metrics),
        notices="".join(f'<p class="notice">{html.escape(note)}</p>' for note in metrics.get("notes", [])),
        min_score=MIN_SCORE,
        first_frame=best_frame(frames),
        frames=_frames(runs) or "<p>No key frame has pictures.</p>",
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


def _frames(runs: Sequence[ReportRun]) -> str:
    """Return one figure per key frame with the pictures of every run, small enough for the page."""
    scenes = max(1, len(str(runs[0].metrics.get("data", "")).split(",")) - 1)
    text = ""
    for shrink, quality in _SIZES:
        encoded = [[_Pictures.of(frame, shrink, quality) for frame in run.frames] for run in runs]
        count = max((len(own) for own in encoded), default=0)
        text = "\n".join(
            _figure(
                [(run.name, own[index]) for run, own in zip(runs, encoded, strict=True) if index < len(own)]
            )
            for index in range(count)
        )
        if len(text) <= _MAX_BYTES * scenes:
            break
    return text


@dataclass(frozen=True)
class _Pictures:
    """Caption and encoded pictures (base64 JPEG) of one key frame."""

    caption: str
    surround: str
    bird_eye: str

    @classmethod
    def of(cls, frame: ReportFrame, shrink: float, quality: int) -> "_Pictures":
        return cls(
            frame.caption, _base64(frame.surround, shrink, quality), _base64(frame.bird_eye, shrink, quality)
        )


def _figure(parts: Sequence[tuple[str, _Pictures]]) -> str:
    """Return the figure of one key frame; several runs are next to each other."""
    caption = html.escape(parts[0][1].caption, quote=True)
    blocks = []
    for name, pictures in parts:
        title = f"<b>{html.escape(name)}</b>" if len(parts) > 1 else ""
        images = "".join(
            f'<img class="{kind}" alt="{text}, {html.escape(pictures.caption, quote=True)}" '
            f'src="data:image/jpeg;base64,{content}">'
            for kind, text, content in (
                ("surround", "six cameras", pictures.surround),
                ("bird-eye", "bird's-eye view", pictures.bird_eye),
            )
        )
        blocks.append(f'<div class="run">{title}{images}</div>')
    content = f'<figcaption>{caption}</figcaption><div class="runs">{"".join(blocks)}</div>'
    return f'<figure class="frame" data-caption="{caption}">{content}</figure>'


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


def _base64(picture: NDArray[np.uint8], shrink: float, quality: int) -> str:
    small = picture
    if shrink < 1:
        size = max(1, round(picture.shape[1] * shrink)), max(1, round(picture.shape[0] * shrink))
        small = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    return base64.b64encode(_encoded(small, ".jpg", quality)).decode()


def _encoded(picture: NDArray[np.uint8], extension: str, quality: int = 82) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if extension == ".jpg" else []
    done, content = cv2.imencode(extension, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)
    if not done:
        raise ValueError(f"cannot encode a picture of shape {picture.shape} as {extension}")
    return content.tobytes()
