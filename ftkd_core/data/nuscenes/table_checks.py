# SPDX-License-Identifier: Apache-2.0
"""Checks of nuScenes tables before the devkit uses them; errors name table, row and value."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from ftkd_core.errors import UserError

Row = dict[str, Any]

_LFS: Final = b"version https://git-lfs"
_LATEST_US: Final = 10**16  # the year 2286; nanoseconds of today are 100 times larger
_QUATERNION_TOLERANCE: Final = 0.01


def read_table(path: Path) -> list[Row]:
    """Return the rows of a table. Raises UserError if the file is no list of rows with different tokens."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"table {str(path)!r} cannot be read ({error.strerror}); copy it again") from error
    if content.startswith(_LFS):
        raise UserError(
            f"table {str(path)!r} is a Git LFS pointer, not the table; run `git lfs pull` in its repository"
        )
    try:
        rows = json.loads(content)
    except ValueError as error:
        raise UserError(f"table {str(path)!r} is not valid JSON ({error}); copy it again") from error
    if not isinstance(rows, list):
        raise UserError(f"table {str(path)!r} is a {type(rows).__name__}; expected a list of rows")
    seen: set[str] = set()
    for index, row in enumerate(rows):
        token = row.get("token") if isinstance(row, dict) else None
        if not isinstance(token, str) or token in seen:
            fault = "is used by an earlier row" if isinstance(token, str) else "is no text"
            raise UserError(f"table {str(path)!r}, row {index}: its token {token!r} {fault}; copy it again")
        seen.add(token)
    return rows


class _Field(NamedTuple):
    """expected: text for the error. valid(value): whether a value is usable."""

    expected: str
    valid: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_vector(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(map(_is_number, value))


def _is_quaternion(value: Any) -> bool:
    return _is_vector(value, 4) and abs(math.hypot(*value) - 1) <= _QUATERNION_TOLERANCE


def _is_stamp(value: Any) -> bool:
    return _is_number(value) and 0 <= value < _LATEST_US and value == int(value)


def _is_matrix(value: Any) -> bool:
    return value == [] or (
        isinstance(value, list) and len(value) == 3 and all(_is_vector(row, 3) for row in value)
    )


_TEXT: Final = _Field("a text", lambda value: isinstance(value, str))
_NUMBER: Final = _Field("a number", _is_number)
_VECTOR: Final = _Field("three finite numbers", lambda value: _is_vector(value, 3))
_SIZE: Final = _Field("three numbers above 0", lambda value: _is_vector(value, 3) and min(value) > 0)
_QUATERNION: Final = _Field("a quaternion w x y z of length 1", _is_quaternion)
_STAMP: Final = _Field("whole microseconds since 1970 (nanoseconds / 1000)", _is_stamp)
_FLAG: Final = _Field("true or false", lambda value: isinstance(value, bool))
_MATRIX: Final = _Field("a 3 x 3 matrix, or [] for a sensor that is no camera", _is_matrix)
_TOKENS: Final = _Field(
    "a list of tokens", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value)
)

_FIELDS: Final[Mapping[str, Mapping[str, _Field]]] = {
    "category": {"name": _TEXT},
    "attribute": {"name": _TEXT},
    "sensor": {"channel": _TEXT, "modality": _TEXT},
    "calibrated_sensor": {"translation": _VECTOR, "rotation": _QUATERNION, "camera_intrinsic": _MATRIX},
    "ego_pose": {"translation": _VECTOR, "rotation": _QUATERNION},
    "scene": {"name": _TEXT},
    "sample": {"timestamp": _STAMP},
    "sample_data": {
        "timestamp": _STAMP,
        "filename": _TEXT,
        "is_key_frame": _FLAG,
        "width": _NUMBER,
        "height": _NUMBER,
    },
    "sample_annotation": {
        "translation": _VECTOR,
        "size": _SIZE,
        "rotation": _QUATERNION,
        "num_lidar_pts": _NUMBER,
        "num_radar_pts": _NUMBER,
        "attribute_tokens": _TOKENS,
    },
}
_LINKS: Final[Mapping[str, Mapping[str, str]]] = {
    "calibrated_sensor": {"sensor_token": "sensor"},
    "instance": {"category_token": "category", "first_annotation_token": "sample_annotation"},
    "scene": {"log_token": "log", "first_sample_token": "sample"},
    "sample": {"scene_token": "scene", "prev": "sample", "next": "sample"},
    "sample_data": {
        "sample_token": "sample",
        "ego_pose_token": "ego_pose",
        "calibrated_sensor_token": "calibrated_sensor",
        "prev": "sample_data",
        "next": "sample_data",
    },
    "sample_annotation": {
        "sample_token": "sample",
        "instance_token": "instance",
        "prev": "sample_annotation",
        "next": "sample_annotation",
    },
}
_MAY_BE_EMPTY: Final = ("prev", "next")


def check_tables(tables: Mapping[str, Sequence[Row]]) -> None:
    """Raise UserError for the first row with a missing or unusable value, or with a token of no row."""
    for table, fields in _FIELDS.items():
        for name, field in fields.items():
            _check_field(table, tables[table], name, field)
    tokens = {name: {row["token"] for row in rows} for name, rows in tables.items()}
    for table, links in _LINKS.items():
        for name, target in links.items():
            _check_link(table, tables[table], name, target, tokens[target])
    attributes = tokens["attribute"]
    for row in tables["sample_annotation"]:
        found = row["attribute_tokens"]
        if len(found) > 1 or not attributes.issuperset(found):
            raise row_error(
                "sample_annotation",
                row,
                "attribute_tokens",
                f"at most one of the {len(attributes)} tokens of attribute.json",
            )
    _check_order(tables["sample"])
    _check_order(tables["sample_data"], table="sample_data")


def row_error(table: str, row: Row, field: str, expected: str) -> UserError:
    """Return an error that names table, row, field, value and what was expected."""
    value = repr(row[field]) if field in row else "missing"
    shown = value if len(value) <= 80 else f"{value[:77]}..."
    return UserError(
        f"table {table}.json, row with token {row['token']!r}: {field} is {shown}; expected {expected}"
    )


def _check_field(table: str, rows: Sequence[Row], name: str, field: _Field) -> None:
    for row in rows:
        if name not in row or not field.valid(row[name]):
            raise row_error(table, row, name, field.expected)


def _check_link(table: str, rows: Sequence[Row], name: str, target: str, tokens: set[str]) -> None:
    optional = name in _MAY_BE_EMPTY
    for row in rows:
        token = row.get(name)
        if token in tokens if isinstance(token, str) else False:
            continue
        if not (optional and token == ""):
            raise row_error(table, row, name, f"a token of {target}.json, which has {len(tokens)} rows")


def _check_order(rows: Sequence[Row], table: str = "sample") -> None:
    """Raise UserError if `next` does not lead to a later row, so that lists of rows end."""
    stamps = {row["token"]: row["timestamp"] for row in rows}
    for row in rows:
        for name, sign in (("next", 1), ("prev", -1)):
            if row[name] and np.sign(stamps[row[name]] - row["timestamp"]) != sign:
                later = "later" if sign > 0 else "earlier"
                raise row_error(table, row, name, f"a row with a {later} timestamp")
