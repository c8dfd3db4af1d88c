# SPDX-License-Identifier: Apache-2.0
"""Detection in several bags: one task per bag, in local processes or on a Ray cluster."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ftkd_core.errors import UserError
from ftkd_ros.bag.detect import SUMMARY_NAME, DetectionSummary, Selection, detect_bag, offline_parameters
from ftkd_ros.bag.fleet import Outcome, Workers, check_outcomes, run_tasks
from ftkd_ros.node.parameter_files import changed_values
from ftkd_ros.node.parameters import DetectorParameters, typed_parameters


def detect_bags(
    bags: Sequence[Path],
    output: Path,
    *,
    parameters: DetectorParameters,
    selection: Selection,
    workers: Workers,
    on_text: Callable[[str], None] = print,
) -> None:
    """Write the detections of each bag to `output`/NAME; finished ones of an earlier run are kept.

    `on_text` gets one line per bag. Raises UserError at the end, with the sentences of all bags that failed.
    """
    targets = _targets(bags, output)
    settings = changed_values(offline_parameters(parameters))
    waiting = []
    for name, bag in targets.items():
        if _is_finished(output / name, settings, selection):
            on_text(f"{output / name}: kept")
        else:
            waiting.append(str(bag.resolve()))
    names = {str(bag.resolve()): name for name, bag in targets.items()}
    task = partial(_detect_one, names, output.resolve(), settings, asdict(selection))
    outcomes = list(_printed(run_tasks(task, waiting, workers), on_text))
    check_outcomes(outcomes, "bags")


def _targets(bags: Sequence[Path], output: Path) -> dict[str, Path]:
    """Return the bags by the name of their output: the name of the bag, which must differ."""
    names = [bag.resolve().stem if bag.is_file() else bag.resolve().name for bag in bags]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(
            f"{len(bags)} bags would share the output {str(output / repeated[0])!r}; give bags of different "
            "names, or run them one by one"
        )
    return dict(zip(names, bags, strict=True))


def _detect_one(
    names: Mapping[str, str],
    output: Path,
    settings: Mapping[str, Any],
    selection: Mapping[str, Any],
    bag: str,
) -> str:
    """Detect one bag in any process and return a sentence."""
    target = output / names[bag]
    summary = detect_bag(
        Path(bag),
        target,
        parameters=typed_parameters(settings),
        selection=Selection(**selection),
        progress=False,
    )
    return "\n".join(summary_lines(target, summary))


def summary_lines(output: Path, summary: DetectionSummary) -> list[str]:
    """Return the lines for a terminal about one bag."""
    resumed = summary.resumed_rounds
    source = f", {resumed} of them from a run that was stopped," if resumed else ""
    rounds = f"{summary.rounds_detected} of {summary.rounds_in} rounds{source}"
    return [
        f"{output}: {summary.detections} detections in {rounds} on {summary.device}",
        *(f"note: {count} x {fault}" for fault, count in summary.faults.items()),
        *(f"note: {warning}" for warning in summary.warnings),
    ]


def _printed(outcomes: Iterator[Outcome], on_text: Callable[[str], None]) -> Iterator[Outcome]:
    for outcome in outcomes:
        on_text(f"failed: {outcome.value}" if outcome.failed else outcome.value)
        yield outcome


def _is_finished(output: Path, settings: Mapping[str, Any], selection: Selection) -> bool:
    """Whether a bag of an earlier run was made with the same settings.

    Raises UserError if something else is at its place.
    """
    if not output.exists():
        return False
    try:
        summary = json.loads((output / SUMMARY_NAME).read_text(encoding="utf-8"))
        same = summary["parameters"] == dict(settings) and summary["selection"] == asdict(selection)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(
            f"output {str(output)!r} exists and was not made with these parameters; give another folder"
        )
    return True
