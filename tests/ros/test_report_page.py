# SPDX-License-Identifier: Apache-2.0
"""The report page of one and of several runs: charts, timelines, size, and its behaviour in Chromium."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftkd_core.errors import UserError
from ftkd_ros.bag import html_report
from ftkd_ros.bag.charts import Series, line_chart, time_strips
from ftkd_ros.bag.html_report import ReportRun, write_runs
from ftkd_ros.bag.report import report_runs
from ftkd_ros.bag.report_sections import NamedMetrics, Timeline, comparison
from tests.ros.test_html_report import Page, example_metrics, frames

CHROMIUM = os.environ.get("FTKD_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
BROWSER = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine; install it or set FTKD_CHROMIUM to its path"
)


def run(name: str, ap: float, count: int = 3) -> ReportRun:
    recall = np.linspace(0, 1, 51)
    metrics = example_metrics(
        mAP=ap,
        curves={"car": {"recall": recall.tolist(), "precision": (1 - recall * (1 - ap)).tolist()}},
        by_distance=[
            {
                "low_m": low,
                "high_m": low + 10,
                "AP": ap - low / 100,
                "ATE": 0.3,
                "AOE": None,
                "AVE": 0.5,
                "truths": 9,
            }
            for low in (0.0, 10.0, 20.0)
        ],
        stability={"flicker": 0.1, "jitter_m": 0.2},
    )
    timeline = Timeline(latency=[(0.0, 50.0), (0.5, 120.0)], detected=[0.0, 0.5, 1.5], dropped=[1.0])
    return ReportRun(name, metrics, frames(count), timeline)


def page_of(tmp_path: Path, *runs: ReportRun) -> tuple[Path, Page]:
    path = tmp_path / "report.html"
    write_runs(path, runs)
    return path, Page(path.read_text(encoding="utf-8"))


def test_one_run_has_curves_distance_and_timelines_but_no_comparison(tmp_path: Path) -> None:
    _, page = page_of(tmp_path, run("a", 0.5))
    for title in ("Precision and recall", "By distance", "Timeline", "position error", "velocity error"):
        assert title in page.text
    assert "Comparison" not in page.text
    labels = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg"]
    assert labels == ["car", "AP", "position error", "velocity error", "latency", "rounds over time"]
    assert sum(tag == "img" for tag, _ in page.tags) == 6


def test_runs_are_compared_side_by_side(tmp_path: Path) -> None:
    _, page = page_of(tmp_path, run("before", 0.5), run("after <2>", 0.4))
    assert "Comparison" in page.text and "after <2>" in page.text
    assert sum(tag == "figure" for tag, _ in page.tags) == 3
    assert sum(tag == "img" for tag, _ in page.tags) == 12
    lines = [attributes["class"] for tag, attributes in page.tags if tag == "polyline"]
    assert lines.count("line run0") == lines.count("line run1") == 5


def test_comparison_marks_better_and_worse_by_the_meaning_of_the_metric() -> None:
    first, second = ({"mAP": 0.4, "mATE": 0.5}, {"mAP": 0.5, "mATE": 0.6})
    text = comparison([NamedMetrics("a", first), NamedMetrics("b", second)])
    assert '<td class="better">0.500 <small>+0.100</small></td>' in text
    assert '<td class="worse">0.600 <small>+0.100</small></td>' in text
    assert comparison([NamedMetrics("a", first)]) == ""


def test_points_of_a_chart_are_inside_its_axes() -> None:
    svg = line_chart("t", [Series("s", [(0, 0), (5, 2), (10, 1)])], x_label="x", y_label="y")
    (points,) = re.findall(r'points="([^"]+)"', svg)
    places = np.array([[float(v) for v in p.split(",")] for p in points.split()])
    assert (places[:, 0] == np.sort(places[:, 0])).all()
    assert places.min() >= 0 and places[:, 0].max() <= 360 and places[:, 1].max() <= 220
    assert places[0, 1] > places[2, 1] > places[1, 1]  # larger values are higher
    assert "no values" in line_chart("t", [], x_label="x", y_label="y")


def test_strip_has_one_mark_per_round() -> None:
    svg = time_strips([("a", [0.0, 1.0], [2.0]), ("b", [0.5], [])], 2.0)
    assert svg.count("M") == 4 and svg.count("dropped") == 1


def test_pictures_are_compressed_until_the_page_is_small_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = page_of(tmp_path, run("a", 0.5, count=6))
    whole = path.stat().st_size
    pictures = whole - len(re.sub(r"base64,[^\"]+", "", path.read_text(encoding="utf-8")))
    monkeypatch.setattr(html_report, "_MAX_BYTES", int(pictures * 0.8))
    path, page = page_of(tmp_path, run("a", 0.5, count=6))
    assert path.stat().st_size < 0.9 * whole
    assert sum(tag == "img" for tag, _ in page.tags) == 12


def test_equal_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(example_metrics()))
    same = (tmp_path, tmp_path / "bag", tmp_path / "bag")
    with pytest.raises(UserError, match="given twice"):
        report_runs([same, same], tmp_path / "out")


def browse(path: Path, script: str, tmp_path: Path, *options: str) -> Any:
    """Open a page in headless Chromium, run a script after it and return what the script assigns to `result`;
    fails on any message on the console."""
    test_page = tmp_path / "test.html"
    end = f"<script>var result; {script}; document.title = 'RESULT' + JSON.stringify(result);</script></body>"
    test_page.write_text(path.read_text(encoding="utf-8").replace("</body>", end), encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", *options,
        "--dump-dom", test_page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    (found,) = re.findall(r"<title>RESULT(.*?)</title>", done.stdout, flags=re.DOTALL)
    return json.loads(found.replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))


@BROWSER
def test_slider_and_keys_show_the_frames_of_all_runs(tmp_path: Path) -> None:
    path, _ = page_of(tmp_path, run("before", 0.5, 4), run("after", 0.4, 4))
    script = """
      var slider = document.getElementById("slider");
      function shown() {
        var all = document.querySelectorAll(".frame");
        var visible = [].filter.call(all, function (frame) { return frame.offsetHeight > 0; });
        return [visible.length, visible[0].querySelectorAll("img").length,
                document.getElementById("caption").textContent, Number(slider.value)];
      }
      result = {first: shown()};
      slider.value = 3; slider.dispatchEvent(new Event("input"));
      result.last = shown();
      document.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
      result.wrapped = shown();
      result.max = slider.max;
      result.loaded = [].every.call(document.images, function (image) { return image.naturalWidth > 0; });
      result.rows = document.querySelectorAll("#comparison tbody tr").length;
    """
    found = browse(path, script, tmp_path)
    assert found["first"] == [1, 4, 'frame "2" <b>', 2]  # the frame with the most matches
    assert found["last"] == [1, 4, 'frame "3" <b>', 3]
    assert found["wrapped"] == [1, 4, 'frame "0" <b>', 0]
    assert (found["max"], found["loaded"]) == ("3", True)
    assert found["rows"] >= 20


@BROWSER
def test_page_fits_a_phone_and_follows_the_colour_scheme(tmp_path: Path) -> None:
    path, _ = page_of(tmp_path, run("before", 0.5), run("after", 0.4))
    script = """
      var main = document.querySelector("main");
      result = [window.innerWidth, document.documentElement.scrollWidth,
                getComputedStyle(document.body).backgroundColor];
    """
    width, needed, light = browse(path, script, tmp_path, "--window-size=500,900")
    assert width <= 500 and needed <= width
    *_, dark = browse(path, script, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert light == "rgb(255, 255, 255)" and dark == "rgb(20, 24, 30)"
