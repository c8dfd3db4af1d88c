# SPDX-License-Identifier: Apache-2.0
"""Sections of the report page that show one or several runs: charts, timelines, comparison table."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ftkd_core.classes import CLASS_NAMES
from ftkd_ros.bag.charts import Point, Series, legend, line_chart, time_strips

_COMPARED: Final = (
    ("mAP", "mAP", True),
    ("NDS", "NDS", True),
    ("mAP_present", "mAP, present classes", True),
    ("mATE", "mATE (m)", False),
    ("mASE", "mASE", False),
    ("mAOE", "mAOE (rad)", False),
    ("mAVE", "mAVE (m/s)", False),
    ("mAAE", "mAAE", False),
    ("stability.flicker", "flicker", False),
    ("stability.jitter_m", "jitter (m)", False),
    ("latency_ms.p50", "latency, median (ms)", False),
    ("latency_ms.p95", "latency, 95th percentile (ms)", False),
    ("rounds_dropped", "rounds dropped", False),
)
"""Metrics of the comparison: path, label, and whether more is better."""


@dataclass(frozen=True)
class Timeline:
    """Seconds since the first round: latency (s, ms) per round, and detected and dropped rounds."""

    latency: Sequence[Point] = ()
    detected: Sequence[float] = ()
    dropped: Sequence[float] = ()

    @property
    def end_s(self) -> float:
        """Time of the last round."""
        return max([*self.detected, *self.dropped], default=0.0)


@dataclass(frozen=True)
class NamedMetrics:
    """A run of the page: its name, metrics.json and timeline."""

    name: str
    metrics: Mapping[str, Any]
    timeline: Timeline = field(default_factory=Timeline)


def comparison(runs: Sequence[NamedMetrics]) -> str:
    """Return a table of the main metrics and the AP of each class with one column per run; the better or
    worse differences to the first run are marked. Empty for one run."""
    if len(runs) < 2:
        return ""
    rows = [
        (label, [_value(run.metrics, path.split(".")) for run in runs], more)
        for path, label, more in _COMPARED
    ]
    for name in CLASS_NAMES:
        if any(_value(run.metrics, ("classes", name, "truths")) for run in runs):
            values = [_value(run.metrics, ("classes", name, "AP")) for run in runs]
            rows.append((f"AP {name.replace('_', ' ')}", values, True))
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    body = "".join(
        f"<tr><td>{html.escape(label)}</td>{''.join(_cells(values, more))}</tr>"
        for label, values, more in rows
    )
    return (
        f'<h2>Comparison</h2><div class="scroll"><table id="comparison"><thead><tr><th>metric</th>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def precision_recall(runs: Sequence[NamedMetrics]) -> str:
    """Return one chart per class with ground truth, with one line per run."""
    charts = []
    for name in CLASS_NAMES:
        series = []
        for index, run in enumerate(runs):
            curve = (run.metrics.get("curves") or {}).get(name)
            if curve:
                points = list(zip(curve["recall"], curve["precision"], strict=True))
                text = f"{run.name}: AP {_text(_value(run.metrics, ('classes', name, 'AP')))}"
                series.append(Series(text, points, index))
        if series:
            charts.append(
                line_chart(
                    name.replace("_", " "), series, x_label="recall", y_label="precision",
                    x_range=(0, 1), y_range=(0, 1),
                )
            )  # fmt: skip
    if not charts:
        return ""
    return _section(
        "Precision and recall",
        "Official curves at a distance of 2 m between detection and object.",
        runs,
        charts,
    )


def error_by_distance(runs: Sequence[NamedMetrics]) -> str:
    """Return charts of AP and errors over the distance from ego; empty without `by_distance`."""
    charts = []
    for key, title, unit in (
        ("AP", "AP", ""),
        ("ATE", "position error", "m"),
        ("AOE", "orientation error", "rad"),
        ("AVE", "velocity error", "m/s"),
    ):
        series = []
        for index, run in enumerate(runs):
            bands = run.metrics.get("by_distance") or []
            points = [
                ((band["low_m"] + band["high_m"]) / 2, band[key]) for band in bands if band[key] is not None
            ]
            if points:
                series.append(Series(run.name, points, index))
        if series:
            y_range = (0.0, 1.0) if key == "AP" else None
            charts.append(
                line_chart(
                    title, series, x_label="distance (m)", y_label=unit, x_range=(0, 50), y_range=y_range,
                    markers=True,
                )
            )  # fmt: skip
    if not charts:
        return ""
    return _section("By distance", "Means over the classes with objects in each band of 10 m.", runs, charts)


def timelines(runs: Sequence[NamedMetrics]) -> str:
    """Return the latency over time and the detected and dropped rounds; empty without rounds."""
    parts = []
    latency = [
        Series(run.name, run.timeline.latency, index)
        for index, run in enumerate(runs)
        if run.timeline.latency
    ]
    if latency:
        chart = line_chart("latency", latency, x_label="time (s)", y_label="ms")
        parts.append(f'<div class="wide">{chart}</div>')
    rows = [(run.name, run.timeline.detected, run.timeline.dropped) for run in runs]
    if any(detected or dropped for _, detected, dropped in rows):
        end_s = max(run.timeline.end_s for run in runs)
        parts.append(f'<div class="wide">{time_strips(rows, end_s)}</div>')
    if not parts:
        return ""
    text = "Latency of each round, and rounds over time; red marks are dropped rounds."
    return f'<h2>Timeline</h2><p class="soft">{text}</p>{legend([run.name for run in runs])}{"".join(parts)}'


def _section(title: str, text: str, runs: Sequence[NamedMetrics], charts: Sequence[str]) -> str:
    names = legend([run.name for run in runs])
    return f'<h2>{title}</h2><p class="soft">{text}</p>{names}<div class="charts">{"".join(charts)}</div>'


def _cells(values: Sequence[float | None], more_is_better: bool) -> list[str]:
    first = values[0]
    cells = [f"<td>{_text(first)}</td>"]
    for value in values[1:]:
        if value is None or first is None or value == first:
            cells.append(f"<td>{_text(value)}</td>")
            continue
        style = "better" if (value > first) == more_is_better else "worse"
        cells.append(f'<td class="{style}">{_text(value)} <small>{value - first:+.3f}</small></td>')
    return cells


def _value(metrics: Mapping[str, Any], path: Sequence[str]) -> float | None:
    value: Any = metrics
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}" if isinstance(value, int) else f"{value:.3f}"
