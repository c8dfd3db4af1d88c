# SPDX-License-Identifier: Apache-2.0
"""`ftkd check-rig`: a bag of a vehicle -> rig.json and rig.html with one verdict per line.

For each camera: rate, time offset and drift, image size, calibration, frame, difference from the camera that
the weights were trained with, what its virtual camera sees and loses at each edge, the share of mAP to expect
(`rig_forecast`), and the image with a 10 m grid on the ground plane. If the grid does not lie on the road,
intrinsics or extrinsics are wrong.
"""

import base64
import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.canonical_cameras import CanonicalCamera, orientation
from ftkd_core.errors import UserError
from ftkd_core.geometry import invert_rigid, transform_points
from ftkd_core.json_files import write_json
from ftkd_core.lens import project_pixels
from ftkd_core.runtime.virtual_camera import AUTO_TOLERANCE_DEG, SeenCamera, VirtualCameras
from ftkd_core.types import CameraView
from ftkd_core.weights import SHIPPED, read_cameras, read_weights
from ftkd_ros.bag.io import BagReader, check_new
from ftkd_ros.bag.replay_rounds import SLOP_NS, Drive, camera_names, read_image_stamps
from ftkd_ros.bag.rig_forecast import RigForecast, read_forecast
from ftkd_ros.node.parameters import DetectorParameters
from ftkd_ros.sync.time_offsets import MIN_STAMPS, estimate_offset_ns

JSON_NAME: Final = "rig.json"
PAGE_NAME: Final = "rig.html"
_GRID_M: Final = 10
_REACH_M: Final = 60
_MAX_DRIFT_PPM: Final = 20.0
_MAX_HEIGHT_M: Final = 0.2
_LOW_SHARE: Final = 0.9
_LOW_EXPECTED: Final = 0.85


@dataclass(frozen=True, kw_only=True)
class Line:
    """One checked property of a camera: value for people, whether it is good, and what to do if not."""

    check: str
    value: str
    ok: bool
    advice: str = ""


def check_rig(
    bag: Path,
    output: Path,
    *,
    weights: Path | None = None,
    image_geometry: str = "auto",
    table: Path | None = None,
) -> dict[str, Any]:
    """Write rig.json and rig.html to the new folder `output` and return the content of rig.json.

    table: as in `read_forecast`. Raises UserError for a bag without camera images, unusable weights or table,
    and an output that exists.
    """
    check_new(output)
    path = SHIPPED if weights is None else weights
    _, config, _ = read_weights(path)
    canonical = read_cameras(path)
    forecast = read_forecast(path, canonical, config.image, table) if canonical else None
    with BagReader(bag) as source:
        names = _camera_names(source)
        drive = Drive(source, DetectorParameters(cameras=tuple(names), image_geometry=image_geometry))
        camera_round = next((found for found, _ in drive.rounds()), None)
        if camera_round is None:
            raise UserError(f"bag {str(bag)!r} has no usable round: {next(iter(drive.faults), 'no images')}")
        stamps = read_image_stamps(drive)
        decisions, faults = dict(drive.rig.decisions), dict(drive.faults)
    virtual = VirtualCameras(canonical, config.image, config.channels, "virtual" if canonical else "as_is")
    virtual.see(camera_round)
    cameras: list[dict[str, Any]] = []
    pictures: list[tuple[str, NDArray[np.uint8]]] = []
    reference = max(range(len(stamps)), key=lambda index: len(stamps[index]))
    for index, name in enumerate(names):
        lines = _time_lines(stamps[reference], stamps[index])
        view = camera_round.views[index]
        if view is None:
            reason = next((text for text in faults if text.startswith(name)), "no image in the first round")
            lines.append(Line(check="usable", value="no", ok=False, advice=reason))
        else:
            lines += _view_lines(view, decisions.get(name, ""))
            lines += _canonical_lines(index, view, virtual, canonical, forecast)
            pictures.append((name, draw_ground_grid(view)))
        cameras.append({"camera": name, "lines": [asdict(line) for line in lines]})
    ok = all(line["ok"] for camera in cameras for line in camera["lines"])
    result = {"bag": str(bag), "weights": path.name, "ok": ok, "cameras": cameras, "faults": faults}
    output.mkdir(parents=True)
    write_json(output / JSON_NAME, result)
    (output / PAGE_NAME).write_text(_page(result, pictures), encoding="utf-8")
    return result


def _camera_names(bag: BagReader) -> list[str]:
    """Return the cameras of a bag: topics <camera>/image or <camera>/image/compressed with a camera_info."""
    names = camera_names(bag)
    if not names:
        raise UserError(
            f"bag {str(bag.path)!r} has no topics <camera>/image or <camera>/image/compressed with "
            f"<camera>/camera_info; it has {', '.join(sorted(bag.topics)) or 'none'}"
        )
    return names


def _time_lines(reference: Sequence[int], own: Sequence[int]) -> list[Line]:
    """Return rate, and offset and drift against the camera with the most images."""
    if len(own) < MIN_STAMPS:
        advice = f"record at least {MIN_STAMPS} images"
        return [Line(check="images", value=str(len(own)), ok=False, advice=advice)]
    period_s = float(np.median(np.diff(own))) * 1e-9
    advice = "stamps repeat or run back; check the driver's clock"
    lines = [
        Line(
            check="rate",
            value=f"{1 / period_s:.1f} Hz" if period_s > 0 else "0",
            ok=period_s > 0,
            advice=advice,
        )
    ]
    offset = 0 if own is reference else estimate_offset_ns(reference, own)
    value = "none" if offset is None else f"{offset * 1e-6:.1f} ms"
    lines.append(
        Line(
            check="time offset", value=value, ok=offset is not None,
            advice="the stamps have no constant offset to the other cameras: other rate, free-running or "
            "another clock",
        )
    )  # fmt: skip
    if offset is not None and len(own) >= 10:
        near = np.asarray(reference)[
            np.abs(np.asarray(own)[:, None] - offset - np.asarray(reference)).argmin(1)
        ]
        rest = np.asarray(own) - offset - near
        inside = np.abs(rest) < SLOP_NS
        slope = (
            np.polyfit(np.asarray(own)[inside] - own[0], rest[inside], 1)[0] * 1e6
            if inside.sum() > 5
            else 0.0
        )
        lines.append(
            Line(
                check="clock drift", value=f"{slope:.1f} ppm", ok=bool(abs(slope) <= _MAX_DRIFT_PPM),
                advice="synchronise the clocks (PTP) or trigger the cameras together",
            )
        )  # fmt: skip
    return lines


def _view_lines(view: CameraView, decision: str) -> list[Line]:
    """Return size, intrinsics, lens and mounting of a camera."""
    height, width = view.image.shape[:2]
    k = view.intrinsics
    yaw, pitch, roll = np.rad2deg(orientation(view.ego_from_camera))
    x, y, z = view.ego_from_camera[:3, 3]
    lens = (
        "none" if view.lens is None else f"{view.lens.model} {[round(c, 5) for c in view.lens.coefficients]}"
    )
    center = 0.25 * width < k[0, 2] < 0.75 * width and 0.2 * height < k[1, 2] < 0.8 * height
    return [
        Line(check="image", value=f"{width} x {height}", ok=True),
        Line(check="image geometry", value=decision, ok=True),
        Line(
            check="intrinsics",
            value=f"fx {k[0, 0]:.1f}, fy {k[1, 1]:.1f}, cx {k[0, 2]:.1f}, cy {k[1, 2]:.1f}",
            ok=bool(center),
            advice="the principal point is far from the middle: calibration of another image?",
        ),
        Line(check="distortion", value=lens, ok=True),
        Line(
            check="mounting",
            value=f"x {x:.2f}, y {y:.2f}, z {z:.2f} m; yaw {yaw:.1f}, pitch {pitch:.1f}, roll {roll:.1f} deg",
            ok=bool(0.3 < z < 5.0 and abs(pitch) < 45 and abs(roll) < 30),
            advice="a camera of a vehicle is 0.3 to 5 m above the ground and looks at the horizon: check "
            "that the frame is the optical one (z forward) and that base_link is on the ground",
        ),
    ]  # fmt: skip


def _canonical_lines(
    index: int, view: CameraView, virtual: VirtualCameras, canonical: Sequence[CanonicalCamera],
    forecast: RigForecast | None,
) -> list[Line]:  # fmt: skip
    """Return how a camera differs from the one the weights were trained with."""
    if not canonical:
        return []
    seen = [camera for camera in virtual.seen if camera.camera == index]
    if not seen:
        reason = virtual.faults.get(view.name, "not assigned to a channel")
        return [Line(check="channel", value="none", ok=False, advice=reason)]
    lines = []
    for camera in seen:
        trained = canonical[camera.channel]
        height = float(view.ego_from_camera[2, 3] - trained.ego_from_camera[2, 3])
        same = camera.difference_deg <= AUTO_TOLERANCE_DEG
        value = "as in training" if same else f"{camera.difference_deg:.1f} degrees apart, corrected"
        lines += [
            Line(check=f"against {trained.channel}", value=value, ok=True),
            Line(
                check="visible part of the virtual camera", value=f"{camera.share:.0%}{_lost_edges(camera)}",
                ok=camera.share >= _LOW_SHARE,
                advice="the weights miss the rest: turn the camera, or use a wider lens or a taller image",
            ),
            Line(
                check="height against training", value=f"{height:+.2f} m",
                ok=bool(abs(height) <= _MAX_HEIGHT_M),
                advice="a virtual camera cannot correct height; docs/explanation/cameras.md lists the loss",
            ),
            _expected_line(height, camera.share, forecast),
        ]  # fmt: skip
    return lines


def _lost_edges(camera: SeenCamera) -> str:
    """Return the share of the virtual image that is lost at each edge, empty if nothing is."""
    if camera.remap is None:
        return ""
    seen = camera.remap.visible >= 0.5
    rows, columns = seen.any(axis=1), seen.any(axis=0)
    lost = {
        "left": columns, "right": columns[::-1], "top": rows, "bottom": rows[::-1],
    }  # fmt: skip
    parts = {name: int(np.argmax(cells)) / len(cells) for name, cells in lost.items() if not cells[0]}
    return "".join(f", {part:.0%} lost at the {name}" for name, part in parts.items())


def _expected_line(height_m: float, visible: float, forecast: RigForecast | None) -> Line:
    """Return the share of mAP to expect if all cameras were like this one."""
    check = "expected mAP, share of the trained rig's"
    if forecast is None:
        advice = "no table of these weights; write one: python -m benchmarks.rigs --weights FILE --json TABLE"
        return Line(check=check, value="unknown", ok=False, advice=advice)
    share, inside = forecast.share(height_m, visible)
    return Line(
        check=check, value=f"{share:.0%}" if inside else f"at most {share:.0%}, beyond what was measured",
        ok=inside and share >= _LOW_EXPECTED,
        advice="train on varied rigs (data.rig=varied), or mount the camera as in training",
    )  # fmt: skip


def draw_ground_grid(view: CameraView) -> NDArray[np.uint8]:
    """Return the image (RGB) with a 10 m grid on the ground plane z = 0 of base_link, drawn through the
    lens."""
    image = view.image.copy()
    height, width = image.shape[:2]
    camera_from_ego = invert_rigid(view.ego_from_camera)
    steps = np.linspace(-_REACH_M, _REACH_M, 25 * _REACH_M)
    for offset in range(-_REACH_M, _REACH_M + 1, _GRID_M):
        for across in (False, True):
            fixed = np.full_like(steps, float(offset))
            x, y = (steps, fixed) if across else (fixed, steps)
            points = transform_points(camera_from_ego, np.stack([x, y, np.zeros_like(x)], axis=1))
            pixels, valid = project_pixels(points, view.intrinsics, view.lens)
            inside = ((pixels > -50) & (pixels < (width + 50, height + 50))).all(axis=1) & (
                points[:, 2] > 0.3
            )
            visible = valid & inside
            color = (255, 60, 60) if offset == 0 else (60, 220, 255)
            for first in np.flatnonzero(visible[:-1] & visible[1:]):
                ends = [tuple(int(v) for v in np.round(pixels[i])) for i in (first, first + 1)]
                cv2.line(image, ends[0], ends[1], color, max(1, width // 500), cv2.LINE_AA)
    return image


def _page(result: dict[str, Any], pictures: Sequence[tuple[str, NDArray[np.uint8]]]) -> str:
    """Return the self-contained page."""
    shown = dict(pictures)
    verdict, text = ("good", "all checks pass") if result["ok"] else ("bad", "see below")
    parts = [
        "<!doctype html><meta charset='utf-8'><title>Rig</title>",
        "<style>body{font:15px sans-serif;margin:2em}td{padding:2px 12px 2px 0}img{max-width:100%}",
        ".bad{color:#b00}.good{color:#070}</style>",
        f"<h1>Cameras of {html.escape(result['bag'])}</h1>",
        f"<p>Compared with the cameras of {html.escape(result['weights'])}:",
        f"<b class='{verdict}'>{text}</b></p>",
        "<p>The grid has 10 m cells on the ground; its red lines cross below base_link.",
        "It must lie on the road.</p>",
    ]
    for camera in result["cameras"]:
        parts.append(f"<h2>{html.escape(camera['camera'])}</h2><table>")
        for line in camera["lines"]:
            verdict, note = ("good", "ok") if line["ok"] else ("bad", html.escape(line["advice"]))
            parts.append(
                f"<tr><td>{html.escape(line['check'])}<td>{html.escape(line['value'])}"
                f"<td class='{verdict}'>{note}"
            )
        parts.append("</table>")
        if camera["camera"] in shown:
            bgr = cv2.cvtColor(shown[camera["camera"]], cv2.COLOR_RGB2BGR)
            _, content = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 80])
            data = base64.b64encode(content.tobytes()).decode()
            parts.append(f"<img alt='{html.escape(camera['camera'])}' src='data:image/jpeg;base64,{data}'>")
    return "\n".join(parts) + "\n"


def summary_lines(result: dict[str, Any]) -> list[str]:
    """Return the verdicts for the terminal, one line per check."""
    lines = []
    for camera in result["cameras"]:
        lines.append(f"{camera['camera']}")
        for line in camera["lines"]:
            note = "" if line["ok"] else f"  <- {line['advice']}"
            lines.append(f"  {'ok ' if line['ok'] else 'BAD'} {line['check']}: {line['value']}{note}")
    lines += [f"note: {count} x {fault}" for fault, count in result["faults"].items()]
    return lines
