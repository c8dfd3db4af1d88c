# SPDX-License-Identifier: Apache-2.0
"""Line charts and time strips as inline SVG, coloured by CSS variables, without a script."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

WIDTH: Final = 360
HEIGHT: Final = 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 26, 40
_TICKS: Final = 5
_MAX_RUNS: Final = 6
_STRIP: Final = 22

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line: name for the tooltip, points in order, index of the run for its colour."""

    name: str
    points: Sequence[Point]
    run: int = 0


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    markers: bool = False,
) -> str:
    """Return an SVG element. Ranges default to those of the points, y from 0; markers: dots at the points."""
    known = [point for line in series for point in line.points]
    if not known:
        return f'<div class="chart empty"><b>{html.escape(title)}</b><p class="soft">no values</p></div>'
    x_low, x_high = x_range or _span([x for x, _ in known], from_zero=False)
    y_low, y_high = y_range or _span([y for _, y in known], from_zero=True)

    def place(point: Point) -> str:
        x = _LEFT + (point[0] - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)
        y = HEIGHT - _BOTTOM - (point[1] - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">',
        f'<text class="title" x="{_LEFT}" y="16">{html.escape(title)}</text>',
        *_axes((x_low, x_high), (y_low, y_high), x_label, y_label),
    ]
    for line in series:
        color = f"run{line.run % _MAX_RUNS}"
        points = " ".join(place(point) for point in line.points)
        name = f"<title>{html.escape(line.name)}</title>"
        parts.append(f'<polyline class="line {color}" points="{points}">{name}</polyline>')
        if markers or len(line.points) == 1:
            for point in line.points:
                x, y = place(point).split(",")
                text = html.escape(f"{line.name}: {point[1]:.3g}")
                parts.append(
                    f'<circle class="dot {color}" cx="{x}" cy="{y}" r="3"><title>{text}</title></circle>'
                )
    return "".join([*parts, "</svg>"])


def time_strips(rows: Sequence[tuple[str, Sequence[float], Sequence[float]]], end_s: float) -> str:
    """Return an SVG element with one strip per run: name, times of detected rounds, times of dropped ones."""
    width, end_s = 2 * WIDTH, max(end_s, 1e-3)
    height = _STRIP * len(rows) + 24
    parts = [f'<svg class="strips" viewBox="0 0 {width} {height}" role="img" aria-label="rounds over time">']
    for index, (name, detected, dropped) in enumerate(rows):
        top = index * _STRIP
        parts.append(f'<text x="0" y="{top + 14}">{html.escape(name[:18])}</text>')
        for times, style in ((detected, f"run{index % _MAX_RUNS}"), (dropped, "dropped")):
            path = "".join(f"M{_strip_x(t, end_s, width):.1f} {top + 3}v{_STRIP - 6}" for t in times)
            if path:
                parts.append(
                    f'<path class="tick {style}" d="{path}"><title>{len(times)} rounds</title></path>'
                )
    for share in (0.0, 0.5, 1.0):
        x = _strip_x(share * end_s, end_s, width)
        anchor = "end" if share == 1.0 else "start" if share == 0.0 else "middle"
        parts.append(
            f'<text x="{x:.1f}" y="{height - 4}" text-anchor="{anchor}">{share * end_s:.1f} s</text>'
        )
    return "".join([*parts, "</svg>"])


def legend(names: Sequence[str]) -> str:
    """Return the names of the runs in their colours; empty for one run."""
    if len(names) < 2:
        return ""
    entries = (
        f'<span><i class="key run{index % _MAX_RUNS}"></i>{html.escape(name)}</span>'
        for index, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(entries)}</p>'


def _strip_x(time_s: float, end_s: float, width: int) -> float:
    return 130 + time_s / end_s * (width - 136)


def _axes(x_span: tuple[float, float], y_span: tuple[float, float], x_label: str, y_label: str) -> list[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for index in range(_TICKS + 1):
        share = index / _TICKS
        x, y = _LEFT + share * (right - _LEFT), bottom - share * (bottom - _TOP)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        x_text, y_text = (_text(low + share * (high - low)) for low, high in (x_span, y_span))
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{y_text}</text>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{x_text}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>')
    parts.append(f'<text x="{right}" y="16" text-anchor="end">{html.escape(y_label)}</text>')
    return parts


def _span(values: Sequence[float], *, from_zero: bool) -> tuple[float, float]:
    low, high = (0.0 if from_zero else min(values)), max(values)
    if from_zero:
        high = _round_up(high)
    return (low, high) if high > low else (low, low + 1.0)


def _round_up(value: float) -> float:
    """Return the next number with one or two digits, so that ticks are short."""
    if value <= 0:
        return 1.0
    step = 10.0 ** math.floor(math.log10(value)) / 2
    return float(math.ceil(value / step) * step)


def _text(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.2g}"
