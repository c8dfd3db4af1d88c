# SPDX-License-Identifier: Apache-2.0
"""Write docs/reference from the code: node parameters, topics, commands and settings.

python -m scripts.make_docs            # writes the pages
python -m scripts.make_docs --check    # exit code 1 if a page is not up to date
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Final

from scripts import docs_sources as sources
from scripts.docs_sources import ROOT, Parameter, Setting

FOLDER: Final = ROOT / "docs" / "reference"
_NOTICE: Final = "<!-- Written by `make docs`. Change the code, not this page. -->\n"
_INPUTS: Final = (
    (
        "`/{camera}/image/compressed`",
        "sensor_msgs/CompressedImage",
        "With `image_transport: compressed`. JPEG or PNG. `header.stamp` is the time of exposure.",
    ),
    (
        "`/{camera}/image`",
        "sensor_msgs/Image",
        "With `image_transport: raw`. rgb, bgr, rgba, bgra, mono, yuv422, yuyv, bayer; others by cv_bridge.",
    ),
    (
        "`/{camera}/camera_info`",
        "sensor_msgs/CameraInfo",
        "P for rectified images, K and D for raw ones (`image_geometry`). May change, may be latched.",
    ),
    (
        "`/tf`, `/tf_static`",
        "tf2_msgs/TFMessage",
        "`base_frame` to each camera frame; `map_frame` to `base_frame` up to the newest exposure.",
    ),
)
_OUTPUT_NOTES: Final = {
    "detections": "Boxes in `base_frame` at the reference stamp. `class_id` is the class name, "
    "`bbox.size.x` the length.",
    "detections/velocities": "Same header. Fields `x y z vx vy vz`, float32. Point i belongs to detection i. "
    "Velocity over ground, m/s.",
    "detections/label_info": "Latched. Class names and the score threshold.",
    "detections/markers": "Box edges, an arrow as long as the distance travelled in one second, and a label. "
    "Namespaces `boxes`, `velocities`, `labels`. Markers and pictures omit boxes whose centre lies in a "
    "stronger one; `detections` has them.",
    "detections/bird_eye": "Top view. Drawn only while the topic has a subscriber.",
    "detections/surround/compressed": "The same picture as JPEG, a tenth of the size.",
    "detections/surround": "The six images with boxes. Drawn only while the topic has a subscriber.",
    "/diagnostics": "1 Hz, and at once when a level changes. Cameras, rounds and latency of the last "
    "`health_window_s`, with reasons.",
    "~/statistics/wait_ms": "From the last image of a round to its processing, with the wait for tf.",
    "~/statistics/decode_ms": "Decoding of the images of a round.",
    "~/statistics/geometry_ms": "Lookup of calibration and transforms.",
    "~/statistics/detect_ms": "The network, with preprocessing.",
    "~/statistics/publish_ms": "Publication and drawing.",
    "~/statistics/latency_ms": "Last image of a round to publication.",
    "~/statistics/stamp_latency_ms": "`header.stamp` to publication.",
    "~/reset": "Clears the memory before the next round.",
}
"""Description of each topic and service; a topic without one, or one too many, is an error."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or compare them; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.make_docs", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not current")
    options = parser.parse_args(arguments)
    stale = []
    for name, text in pages().items():
        path = FOLDER / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    verb = "out of date" if options.check else "written"
    print(f"docs/reference: {', '.join(stale) or 'nothing'} {verb}")
    return 1 if stale and options.check else 0


def pages() -> dict[str, str]:
    """Return the text of each page by file name."""
    return {
        "parameters.md": parameters_page(),
        "topics.md": topics_page(),
        "commands.md": commands_page(),
        "settings.md": settings_page(),
        "recipes.md": recipes_page(),
    }


def parameters_page() -> str:
    """Parameters of the three nodes."""
    return _page(
        "Node parameters",
        "Set parameters in a parameter file or with "
        "`--ros-args -p NAME:=VALUE`. `score_threshold`, `class_score_thresholds`, `min_range_m`, "
        "`max_range_m` and `marker_min_score` of the detector can be changed with `ros2 param set`; the "
        "other parameters are read when a node starts.",
        "## detector",
        "[config/detector.yaml](../../config/detector.yaml) has neutral values; "
        "[config/nuscenes.yaml](../../config/nuscenes.yaml) has those of the nuScenes rig.",
        _parameter_table(sources.detector_parameters()),
        "## player",
        _parameter_table(sources.tool_parameters("player")),
        "## recorder",
        _parameter_table(sources.tool_parameters("recorder")),
    )


def topics_page() -> str:
    """Inputs and outputs of the detector node."""
    outputs = sources.detector_outputs()
    names = {output.name for output in outputs}
    if names != set(_OUTPUT_NOTES):
        raise RuntimeError(
            f"scripts/make_docs.py: describe these topics: {sorted(names ^ set(_OUTPUT_NOTES))}"
        )
    rows = [
        [f"`{item.name}`", item.type, "service" if item.is_service else "topic", _OUTPUT_NOTES[item.name]]
        for item in outputs
    ]
    return _page(
        "Topics of the detector node",
        "## Inputs",
        "Default names. The parameters `image_topic`, `camera_info_topic` and `cameras` change them.",
        _table(["topic", "type", "content"], _INPUTS),
        "## Outputs",
        _table(["name", "type", "kind", "content"], rows),
    )


def commands_page() -> str:
    """Help of every command."""
    commands = sources.command_help()
    parts = [
        "Every command prints its options with `--help`. Exit codes: 0, 2 for bad input, 130 after Ctrl-C."
    ]
    for name, text in commands.items():
        parts += [f"## ftkd {name}".rstrip(), _fenced(text)]
    same = [f"training.{name}" for name in commands if f"training.{name}" in sources.programs()]
    named = ", ".join(f"`python -m {module}`" for module in same)
    parts.append("# Programs")
    parts.append(
        f"{named} have the options of the `ftkd` command of the same name; `torchrun` needs this form."
    )
    for module in [name for name in sources.programs() if name not in same]:
        parts += [f"## python -m {module}", _fenced(sources.module_help(module))]
    return _page("Commands", *parts)


def settings_page() -> str:
    """Settings of training and distillation, presets, recipes and methods."""
    classes = sources.training_classes()
    student = sources.settings(classes["student"])
    shared = {setting.path for setting in student}
    teacher = [item for item in sources.settings(classes["teacher"]) if item.path not in shared]
    parts = [
        "Set any of these with `--set PATH=VALUE`; values are YAML. A wrong path or value is an error.",
    ]
    for title, entries in _grouped(student).items():
        parts += [f"## {title}", _setting_table(entries)]
    parts += ["## model, SparseBEV only", _setting_table(teacher)]
    parts += [
        "## FTKD",
        "Set these with `--set-method NAME=VALUE`. They apply to `ftkd`, its ablations and `logits`.",
        _setting_table(sources.settings(classes["ftkd"])),
        "## mgd, cwd and stxd",
        "Set these with `--set-method NAME=VALUE` as well.",
        _setting_table(item for item in sources.settings(classes["baseline"]) if item.path != "name"),
        "## Presets",
        _table(["preset", "what"], [[f"`{name}`", text] for name, text in sources.presets().items()]),
        "## Recipes",
        "See [recipes](recipes.md).",
        "## Distillation methods",
        ", ".join(f"`{name}`" for name in sources.methods()) + ".",
    ]
    return _page("Settings", *parts)


def recipes_page() -> str:
    """Recipes, their settings, their comparison with the public code, and the files to start from."""
    overview, comparison, files = sources.recipe_tables()
    return _page(
        "Recipes",
        "Published trainings on nuScenes. How to run them: [nuScenes data](../how-to/nuscenes.md). The "
        "scores are those that others published. None of these trainings was run to the end here.",
        overview,
        "## Files to start from",
        "`ftkd fetch-weights NAME` downloads and checks one.",
        files,
        "## Settings",
        "For one process; several divide `streams`.",
        *[
            f"`{name}`: {', '.join(f'`{text}`' for text in texts)}"
            for name, texts in sources.recipes().items()
        ],
        "# Setting by setting",
        "Printed by `python -m training.recipes --table`.",
        comparison,
    )


def _grouped(settings: Iterable[Setting]) -> dict[str, list[Setting]]:
    """Group settings by the part of the path before the last dot."""
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting.path.rpartition(".")[0] or "run", []).append(setting)
    return groups


def _setting_table(settings: Iterable[Setting]) -> str:
    rows = [[f"`{item.path}`", item.type, _code(item.default), item.description] for item in settings]
    return _table(["setting", "type", "default", "meaning"], rows)


def _parameter_table(parameters: Iterable[Parameter]) -> str:
    rows = [[f"`{item.name}`", _code(item.default), item.description] for item in parameters]
    return _table(["parameter", "default", "meaning"], rows)


def _code(text: str) -> str:
    return f"`{text}`" if text else "(empty)"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _fenced(text: str) -> str:
    return "```text\n" + "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n```"


def _page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", _NOTICE.strip(), *parts]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
