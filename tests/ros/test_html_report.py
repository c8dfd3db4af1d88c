# SPDX-License-Identifier: Apache-2.0
"""The report is one complete HTML file with all pictures and escaped texts."""

import base64
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.types import ObjectList
from ftkd_ros.bag.html_report import ReportFrame, best_frame, count_matched, write_pictures, write_report

VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """Parses tags with attributes and text; asserts that all tags are closed in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(content)
        assert not self._open, f"unclosed tags: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def example_metrics(**changes: Any) -> dict[str, Any]:
    classes = {
        name: {"AP": 0.5, "ATE": 0.4, "ASE": 0.1, "AOE": 0.2, "AVE": None, "AAE": 0.3, "truths": index}
        for index, name in enumerate(CLASS_NAMES)
    }
    errors = dict.fromkeys(("mATE", "mASE", "mAOE", "mAVE", "mAAE"), 0.25)
    return {
        "mAP": 0.421,
        "NDS": 0.487,
        "mAP_present": 0.5,
        **errors,
        "classes": classes,
        "notes": ["Velocity <is> unknown & odd."],
        "rounds_in": 40,
        "rounds_detected": 38,
        "rounds_dropped": 2,
        "latency_ms": {"p50": 80.25, "p95": 120.5},
        "coverage": {"key_frames": 40, "with_detections": 38, "offset_ms": {"mean": -0.5, "max": 0.5}},
        "stages_ms": {"decode": 12.5},
        "device": "cpu",
        "weights": "tiny.safetensors",
        "training": "500 steps, distilled by ftkd",
        "data": "synthetic v1.0-synth, scene-1",
        "versions": {"Python": "3.11"},
        **changes,
    }


def frames(count: int) -> list[ReportFrame]:
    rng = np.random.default_rng(0)
    return [
        ReportFrame(
            caption=f'frame "{index}" <b>',
            bird_eye=rng.integers(0, 255, (60, 60, 3), dtype=np.uint8),
            surround=rng.integers(0, 255, (40, 120, 3), dtype=np.uint8),
            matched=index % 3,
        )
        for index in range(count)
    ]


def test_page_is_complete_and_has_no_external_resources(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", example_metrics(), frames(4))
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(content)
    assert "http" not in content.replace('http-equiv="', "")
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 8
    for source in images:
        kind, _, payload = source.partition(",")
        assert kind == "data:image/jpeg;base64"
        assert cv2.imdecode(np.frombuffer(base64.b64decode(payload), np.uint8), cv2.IMREAD_COLOR) is not None
    for _, attributes in page.tags:
        assert "href" not in attributes
        assert (attributes.get("src") or "data:").startswith("data:")


def test_page_contains_the_metrics(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", example_metrics(), frames(1))
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    for expected in (
        "0.421", "0.487", "38 / 40", "80.2 ms", "120.5 ms", "tiny.safetensors", "distilled by ftkd",
        "traffic cone",
    ):  # fmt: skip
        assert expected in text
    assert "Velocity <is> unknown & odd." in text


def test_texts_are_escaped(tmp_path: Path) -> None:
    metrics = example_metrics(data="<script>alert(1)</script>", weights='"><img src=x>')
    write_report(tmp_path / "report.html", metrics, frames(1))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "alert(1)" in page.text
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert all((attributes["src"] or "").startswith("data:") for tag, attributes in page.tags if tag == "img")


def test_missing_values_are_shown_as_a_dash(tmp_path: Path) -> None:
    metrics = example_metrics(
        mAP=None, latency_ms={"p50": None, "p95": None}, device=None, coverage={}, notes=[]
    )
    write_report(tmp_path / "report.html", metrics, [])
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "–" in page.text
    assert "None" not in page.text
    assert "No key frame has pictures." in page.text


def test_pictures_show_the_frame_with_the_most_matches(tmp_path: Path) -> None:
    five_frames = frames(5)
    assert best_frame(five_frames) == 2
    write_pictures(tmp_path, five_frames)
    for name, expected in (("bev.png", five_frames[2].bird_eye), ("surround.png", five_frames[2].surround)):
        picture = cv2.cvtColor(cv2.imread(str(tmp_path / name)), cv2.COLOR_BGR2RGB)
        np.testing.assert_array_equal(picture, expected)
    write_pictures(tmp_path / "none", [])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("shift", "label", "expected"), [(0.0, 0, 2), (1.9, 0, 2), (2.1, 0, 0), (0.0, 1, 0)])
def test_matches_are_nearby_and_of_the_same_class(shift: float, label: int, expected: int) -> None:
    boxes = np.zeros((2, 9))
    boxes[1, 0] = 30
    truth = ObjectList(boxes=boxes, scores=np.ones(2), labels=np.zeros(2, dtype=np.int64), stamp_ns=0)
    moved = boxes + np.array([0, shift, *[0] * 7])
    found = ObjectList(boxes=moved, scores=np.ones(2), labels=np.full(2, label), stamp_ns=0)
    assert count_matched(found, truth) == expected
    assert count_matched(found.select(np.zeros(2, dtype=bool)), truth) == 0
