# SPDX-License-Identifier: Apache-2.0
"""Pass or fail: requirements such as `mAP>=0.35` or `car.AP@30m>=0.4`, for continuous integration.

`[CLASS.]METRIC[@RANGE] OPERATOR NUMBER`. METRIC is a path in metrics.json (`mAP`, `coverage.share`,
`latency_ms.p95`), or AP, ATE, ASE, AOE, AVE, AAE of a class. RANGE restricts AP and errors to objects by
distance from ego: `@30m` below 30 m, `@20-40m`, `@40m+`. A metric without a value fails.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.errors import UserError

_OPERATORS: Final[dict[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_CLASS_METRICS: Final = ("AP", "ATE", "ASE", "AOE", "AVE", "AAE")
_OF_RANGES: Final = (*_CLASS_METRICS, "mAP", "mATE", "mASE", "mAOE", "mAVE", "mAAE")
_PATTERN: Final = re.compile(
    r"\s*(?P<metric>[A-Za-z_][\w.]*)\s*(@\s*(?P<range>[^<>=\s]+))?\s*"
    r"(?P<operator>>=|<=|==|>|<)\s*(?P<limit>[-+]?[0-9.]+(e[-+]?\d+)?)\s*(?P<unit>%?)\s*",
    re.IGNORECASE,
)
_RANGE: Final = re.compile(r"(?:(?P<low>[0-9.]+)-)?(?P<high>[0-9.]+)m(?P<open>\+?)", re.IGNORECASE)

RangeScores = Callable[[float, float], Mapping[str, Any]]
"""Function of a distance range in metres that returns scores, as `subsets.SubsetScorer.score_range`."""


@dataclass(frozen=True)
class Requirement:
    """One requirement; path: keys in metrics.json, or in the scores of the distance range."""

    text: str
    path: tuple[str, ...]
    range_m: tuple[float, float] | None
    sign: str
    limit: float


@dataclass(frozen=True)
class Verdict:
    """A requirement with the measured value; None if the metric has none, which fails."""

    requirement: Requirement
    value: float | None

    @property
    def passed(self) -> bool:
        holds = _OPERATORS[self.requirement.sign]
        return self.value is not None and holds(self.value, self.requirement.limit)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "requirement": self.requirement.text,
            "value": self.value,
            "limit": self.requirement.limit,
            "passed": self.passed,
        }


def parse_requirement(text: str) -> Requirement:
    """Parse one requirement. Raises UserError with an example for a text that is none."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise UserError(f"requirement {text!r}; expected one such as 'mAP>=0.35' or 'car.AP@30m>=0.4'")
    path = _path(match["metric"], text, ranged=match["range"] is not None)
    try:
        limit = float(match["limit"]) / (100 if match["unit"] else 1)
    except ValueError:
        raise UserError(f"requirement {text!r}: {match['limit']!r} is not a number") from None
    range_m = None if match["range"] is None else _parse_range(match["range"], text)
    return Requirement(text.strip(), path, range_m, match["operator"], limit)


def read_criteria(path: Path) -> list[Requirement]:
    """Read requirements from YAML: a list of texts, or `require:` with such a list. UserError otherwise."""
    try:
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"criteria file {str(path)!r} does not exist") from None
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"criteria file {str(path)!r} cannot be read ({reason}); expected YAML") from error
    texts = content.get("require") if isinstance(content, Mapping) else content
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"criteria file {str(path)!r}: expected `require:` with a list of texts such as 'mAP>=0.35'"
        )
    return [parse_requirement(text) for text in texts]


def check_requirements(
    requirements: Sequence[Requirement], metrics: Mapping[str, Any], scores: RangeScores
) -> list[Verdict]:
    """Compare metrics.json, and the scores of distance ranges, with requirements.

    Raises UserError for a metric that does not exist; its name may be misspelt.
    """
    ranges: dict[tuple[float, float], Mapping[str, Any]] = {}
    verdicts = []
    for requirement in requirements:
        source = metrics
        if requirement.range_m is not None:
            if requirement.range_m not in ranges:
                ranges[requirement.range_m] = scores(*requirement.range_m)
            source = ranges[requirement.range_m]
        verdicts.append(Verdict(requirement, _value(source, requirement)))
    return verdicts


def verdict_table(verdicts: Sequence[Verdict]) -> list[str]:
    """Return one line per requirement, aligned, for a terminal."""
    width = max(len(verdict.requirement.text) for verdict in verdicts)
    return [
        f"{'pass' if verdict.passed else 'FAIL'}  {verdict.requirement.text:<{width}}  "
        f"{'no value' if verdict.value is None else f'{verdict.value:.4g}'}"
        for verdict in verdicts
    ]


def _path(metric: str, text: str, *, ranged: bool) -> tuple[str, ...]:
    first, *rest = metric.split(".")
    if first in CLASS_NAMES:
        if len(rest) != 1 or rest[0] not in _CLASS_METRICS:
            raise UserError(
                f"requirement {text!r}: {metric!r}; expected {first}.METRIC with one of "
                f"{', '.join(_CLASS_METRICS)}"
            )
        return "classes", first, rest[0]
    if ranged:
        if metric not in _OF_RANGES:
            raise UserError(
                f"requirement {text!r}: {metric!r} has no distance range; expected one of "
                f"{', '.join(_OF_RANGES)}, or CLASS.METRIC"
            )
        return (metric.removeprefix("m"),)
    return (first, *rest)


def _parse_range(text: str, requirement: str) -> tuple[float, float]:
    match = _RANGE.fullmatch(text)
    try:
        if match is not None:
            bound = float(match["high"])
            low = float(match["low"]) if match["low"] else bound if match["open"] else 0.0
            high = float("inf") if match["open"] else bound
            if low < high and not (match["low"] and match["open"]):
                return low, high
    except ValueError:
        pass
    raise UserError(
        f"requirement {requirement!r}: range {text!r}; expected '@30m' (below 30 m), '@20-40m' or '@40m+'"
    )


def _value(source: Mapping[str, Any], requirement: Requirement) -> float | None:
    value: Any = source
    for key in requirement.path:
        if not isinstance(value, Mapping) or key not in value:
            if requirement.path[0] == "classes" and key in CLASS_NAMES:
                return None  # the class has no object in the range
            known = sorted(value) if isinstance(value, Mapping) else []
            raise UserError(
                f"requirement {requirement.text!r}: there is no metric {key!r}; expected one of "
                f"{', '.join(map(str, known)) or 'none'}"
            )
        value = value[key]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"requirement {requirement.text!r}: {'.'.join(requirement.path)} is not a number")
    return float(value)
