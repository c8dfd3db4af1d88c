# SPDX-License-Identifier: Apache-2.0
"""nuScenes results files: loading, and checks as strict as those of the devkit with errors that name the box.

The devkit stops with an assertion that has no text, or reads a wrong size order without a word.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from nuscenes.eval.detection.constants import ATTRIBUTE_NAMES as ATTRIBUTE_NAMES  # noqa: PLC0414  (for modules without the devkit)

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.errors import UserError

MAX_BOXES_PER_SAMPLE: Final = 500
_LENGTHS: Final = {"translation": 3, "size": 3, "rotation": 4, "velocity": 2}
_FIELDS: Final = (
    "sample_token", *_LENGTHS, "detection_name", "detection_score", "attribute_name",
)  # fmt: skip


def load_results(results: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    """Load the entries of a results dictionary or file by sample token; UserError if it has none."""
    source = "the results"
    if not isinstance(results, Mapping):
        source = str(results)
        try:
            results = json.loads(Path(results).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {source} ({error}); expected a nuScenes results file") from error
    entries = results.get("results") if isinstance(results, Mapping) else None
    if not isinstance(entries, Mapping):
        raise UserError(
            f"{source} is not a nuScenes results file; expected a dictionary with a dictionary `results`"
        )
    return entries


def check_coverage(results: Mapping[str, Any], sample_tokens: Sequence[str]) -> dict[str, Any]:
    """Return the checked entries of some key frames. Raises UserError if one has no entry."""
    missing = [token for token in sample_tokens if token not in results]
    if missing:
        raise UserError(
            f"the results have no entry for {len(missing)} of {len(sample_tokens)} key frames, first "
            f"{missing[0]}; expected one for each (an empty list counts)"
        )
    chosen = {token: results[token] for token in sample_tokens}
    check_results(chosen)
    return chosen


def check_results(results: Mapping[str, Any]) -> None:
    """Check entries by sample token. Raises UserError with sample, number of the box and value."""
    for token, boxes in results.items():
        if isinstance(boxes, str) or not isinstance(boxes, Sequence):
            raise UserError(f"sample {token}: {boxes!r}; expected a list of boxes (an empty list counts)")
        if len(boxes) > MAX_BOXES_PER_SAMPLE:
            raise UserError(f"{len(boxes)} boxes for sample {token}; expected at most {MAX_BOXES_PER_SAMPLE}")
        for number, box in enumerate(boxes):
            problem = _problem(token, box)
            if problem is not None:
                raise UserError(f"sample {token}, box {number}: {problem}")


def _problem(token: str, box: Any) -> str | None:
    """Return what is wrong with a box; None if it can be scored."""
    if not isinstance(box, Mapping):
        return f"{box!r}; expected a dictionary"
    missing = [name for name in _FIELDS if name not in box]
    if missing:
        return f"has no {missing[0]}; expected {', '.join(_FIELDS)}"
    if box["sample_token"] != token:
        return f"sample_token {box['sample_token']!r}; expected that of its entry"
    for name, length in _LENGTHS.items():
        value = box[name]
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != length:
            return f"{name} {value!r}; expected {length} numbers"
        # An unknown velocity may be nan, as in the devkit.
        if not all(_is_number(entry, allow_nan=name == "velocity") for entry in value):
            return f"{name} {list(value)!r}; expected {length} finite numbers"
    if min(box["size"]) <= 0:
        return f"size {list(box['size'])!r}; expected width, length and height above 0"
    if not any(box["rotation"]):
        return f"rotation {list(box['rotation'])!r}; expected a quaternion w, x, y, z"
    if box["detection_name"] not in CLASS_NAMES:
        return f"detection_name {box['detection_name']!r}; expected one of {', '.join(CLASS_NAMES)}"
    if not _is_number(box["detection_score"]):
        return f"detection_score {box['detection_score']!r}; expected a finite number"
    if box["attribute_name"] not in (*ATTRIBUTE_NAMES, ""):
        return f'attribute_name {box["attribute_name"]!r}; expected "" or one of {", ".join(ATTRIBUTE_NAMES)}'
    return None


def _is_number(value: Any, *, allow_nan: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) or (allow_nan and math.isnan(value))
