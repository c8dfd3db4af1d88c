# SPDX-License-Identifier: Apache-2.0
"""Checked config dataclasses, and their conversion to and from dicts, overrides and descriptions.

`config_class` makes a frozen, keyword-only dataclass whose values pydantic checks. Wrong values raise a
`UserError` of one sentence with the path of the value. The classes are in config.py, distillation/config.py,
distillation/baselines.py, data/augmentation.py and training/config.py.
"""

import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import ErrorDetails
from typing_extensions import dataclass_transform

from ftkd_core.errors import UserError

ConfigT = TypeVar("ConfigT")
_ClassT = TypeVar("_ClassT", bound=type[Any])

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(gt=0)]

_CHECKS: Final = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field, dataclasses.field))
def config_class(cls: _ClassT) -> _ClassT:
    """Decorate a config class: frozen, keyword-only, with checked types and ranges.

    Types are strict: a bool is no int, a list no tuple, nan and inf no floats; an int is a float.
    `__post_init__` checks several fields together. One docstring per field follows its definition. Errors:
    UserError from the constructor.
    """
    made: Any = pydantic_dataclass(frozen=True, kw_only=True, config=_CHECKS)(cls)
    create = made.__init__

    @functools.wraps(create)
    def checked_init(self: Any, **values: Any) -> None:
        try:
            create(self, **values)
        except ValidationError as error:
            raise UserError(_sentence(made, error)) from None

    made.__init__ = checked_init
    return typing.cast(_ClassT, made)


def require(condition: bool, message: str) -> None:
    """Raise a UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as a nested dict of plain values, ready for JSON."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: to_dict(v) if dataclasses.is_dataclass(v) else v for name, v in values.items()}


def from_dict(kind: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Create a config from a nested dict as `to_dict` or JSON gives it.

    Fields that are missing get their default. Errors: UserError with the path of the value; for an unknown
    key it proposes the nearest name.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise UserError(_sentence(kind, error)) from None


def override(config: ConfigT, assignments: Sequence[str]) -> ConfigT:
    """Return a copy of a config with assignments such as `decoder.num_layers=2` applied.

    Values are YAML; `5e-4` is a float. Errors: UserError as `from_dict`, and for text that is no assignment.
    """
    values = to_dict(config)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        require(bool(separator), f"override {assignment!r}: expected path=value")
        *parents, last = path.split(".")
        target = values
        for depth, name in enumerate(parents):
            if not isinstance(target.get(name), dict):
                raise UserError(f"unknown configuration key {path}{_nearest(name, target, parents[:depth])}")
            target = target[name]
        try:
            target[last] = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            raise UserError(f"override {assignment!r}: expected a value in YAML after the =") from None
    return from_dict(type(config), values)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that 5e-4 and 1e5 are floats."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class Setting(NamedTuple):
    """One field of a config class: dotted path, readable type with its range, default (`dataclasses.MISSING`
    if a value is required) and docstring."""

    path: str
    type: str
    default: Any
    docstring: str


def describe(kind: type[Any], above: str = "") -> Iterator[Setting]:
    """Yield every setting of a config class, those of nested classes in place, in order of definition."""
    docstrings = {
        name: info.description
        for base in reversed(kind.__mro__)
        for name, info in getattr(base, "__pydantic_fields__", {}).items()
        if info.description
    }
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        path, hint = f"{above}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from describe(typing.cast(type[Any], hint), f"{path}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        text = " ".join(docstrings.get(field.name, "").split())
        yield Setting(path, _type_text(hint), default, text)


_BOUNDS: Final = (("gt", "> {}"), ("ge", ">= {}"), ("lt", "< {}"), ("le", "<= {}"))


def _type_text(hint: Any) -> str:
    """Return a type as a reader expects it: `int > 0`, `list of 3 floats`, `none | dense`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        limits: list[Any] = [limit for info in arguments[1:] for limit in getattr(info, "metadata", ())]
        bounds = [
            text.format(getattr(limit, name))
            for name, text in _BOUNDS
            for limit in limits
            if hasattr(limit, name)
        ]
        bounds += [f"multiple of {limit.multiple_of}" for limit in limits if hasattr(limit, "multiple_of")]
        return " ".join([_type_text(arguments[0]), ", ".join(bounds)]).strip()
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _type_text(part) for part in arguments)
    if origin is tuple:
        items = [_type_text(item) for item in dict.fromkeys(arguments) if item is not ...]
        count = "" if ... in arguments else f"{len(arguments)} "
        return f"list of {count}({', '.join(items)})"
    return str(getattr(hint, "__name__", hint))


def _sentence(kind: type[Any], error: ValidationError) -> str:
    """Return the first error of a ValidationError as one sentence: path, value and expectation."""
    errors = error.errors(include_url=False)
    first = errors[0]
    location, path = first["loc"], _dotted(first["loc"])
    match first["type"]:
        case "value_error":  # raised by a __post_init__
            cause = str(first.get("ctx", {}).get("error", first["msg"]))
            return f"{path}: {cause}" if path else cause
        case "unexpected_keyword_argument":
            known = {field.name for field in dataclasses.fields(_class_at(kind, location[:-1]))}
            return f"unknown configuration key {path}{_nearest(str(location[-1]), known, location[:-1])}"
        case "missing" if isinstance(location[-1], int):
            count = 1 + max(int(e["loc"][-1]) for e in errors if _is_beside(e, first))
            return f"{_dotted(location[:-1])} is {_short(first['input'])}; expected {count} values"
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"configuration key {path} is missing; give it a value"
        case "too_long" | "too_short" as kind_of_error:
            bound, limit = ("most", "max_length") if kind_of_error == "too_long" else ("least", "min_length")
            count = first["ctx"][limit]
            values = "value" if count == 1 else "values"
            return f"{path} is {_short(first['input'])}; expected at {bound} {count} {values}"
    return f"{path} is {_short(first['input'])}; expected {_expected(first['msg'])}"


def _is_beside(error: ErrorDetails, other: ErrorDetails) -> bool:
    """Return whether two errors are missing elements of the same list."""
    return error["type"] == "missing" and error["loc"][:-1] == other["loc"][:-1]


def _expected(message: str) -> str:
    """Return what a message of pydantic expects, without "Input should be"."""
    expected = message.removeprefix("Input should be ")
    expected = {"a valid array": "a list", "a valid tuple": "a tuple", "an object": "a mapping"}.get(
        expected, expected
    )
    return f"a value {expected}" if expected.startswith(("greater", "less")) else expected


def _short(value: Any, width: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 4]} ..."


def _dotted(location: Sequence[int | str]) -> str:
    """Return a path such as `image.mean[0]`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".")


def _class_at(kind: type[Any], location: Sequence[int | str]) -> type[Any]:
    """Return the config class that is nested at a path of field names."""
    for name in location:
        kind = typing.get_type_hints(kind)[str(name)]
    return kind


def _nearest(name: str, known: Iterable[str], location: Sequence[int | str] = ()) -> str:
    """Return the end of the sentence on an unknown key: the nearest known name, or all of them."""
    nearest = difflib.get_close_matches(name, known, n=1)
    if nearest:
        return f"; did you mean {_dotted([*location, nearest[0]])}?"
    return f"; expected one of {', '.join(sorted(known))}"
