# SPDX-License-Identifier: Apache-2.0
"""Recorded detections -> official nuScenes metrics, with the coverage of the recordings.

Detections are joined to key frames by stamp. The input bag provides the token of each key frame
(/sample_token) and the ego pose at the stamp of the detections (/tf). Therefore mAP and NDS measure the
published messages, and any recorder can write them.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any, Final

import numpy as np

from ftkd_core.data.nuscenes import open_dataset, scene_names
from ftkd_core.errors import UserError
from ftkd_core.evaluation.nuscenes import PosedObjects, evaluate, sample_tokens_of, to_devkit_results
from ftkd_core.evaluation.requirements import (
    Requirement,
    Verdict,
    check_requirements,
)
from ftkd_core.evaluation.results_check import check_coverage, load_results
from ftkd_core.evaluation.subsets import SubsetScorer
from ftkd_core.json_files import write_json
from ftkd_ros.bag.fleet import Workers, check_outcomes, run_tasks
from ftkd_ros.bag.io import BagReader
from ftkd_ros.bag.recording import Recording, coverage_notes, read_recording
from ftkd_ros.bag.replay_rounds import Drive
from ftkd_ros.bag.run_facts import (
    detector_summary,
    is_synthetic,
    library_versions,
    now_text,
    scenes_of,
)
from ftkd_ros.node.parameters import typed_parameters

CRITERIA_NAME: Final = "criteria.json"
_BANDS_M: Final = (0.0, 10.0, 20.0, 30.0, 40.0, 50.0)
_SMALL_MODEL_ON_REAL_DATA: Final = (
    "The images are real, but the weights were trained on synthetic scenes only, so these scores are not "
    "meaningful. The run shows that every stage works on real data."
)


_NO_TRUTH: Final = "There is no ground truth, so no score; results.json is for the evaluation server."


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """split: score all its key frames, also those of no bag; details: scores by distance, visibility and time
    in view, which take several times as long; requirements: see `ftkd_core.evaluation.requirements`."""

    split: str | None = None
    details: bool = False
    requirements: Sequence[Requirement] = ()


@dataclass(frozen=True)
class _Bag:
    """One recording with its poses at the key frames and the summary of its detector."""

    detections: Path
    source: Path
    recording: Recording
    posed: dict[str, PosedObjects]
    detector: dict[str, Any]


def evaluate_recording(
    detections_path: Path,
    input_path: Path,
    *,
    dataroot: Path,
    version: str,
    output: Path,
    summary_file: Path | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate one recording as `evaluate_recordings`; `extra` is added to the metrics."""
    pairs = [(detections_path, input_path)]
    metrics, _ = evaluate_recordings(
        pairs, dataroot=dataroot, version=version, output=output, summary_file=summary_file, extra=extra
    )
    return metrics


def evaluate_recordings(
    pairs: Sequence[tuple[Path, Path]],
    *,
    dataroot: Path,
    version: str,
    output: Path,
    summary_file: Path | None = None,
    extra: Mapping[str, Any] | None = None,
    options: EvaluationOptions | None = None,
    workers: Workers | None = None,
) -> tuple[dict[str, Any], list[Verdict]]:
    """Evaluate recordings together, write results.json (devkit format), metrics.json and, with requirements,
    criteria.json to `output`; return the metrics and the verdicts.

    pairs: (bag with detections, bag that they were made from). All key frames of the input bags, or of the
    split, are evaluated; those without detections count as empty. `summary_file` is the summary of the
    detector (default: the one in a bag of `ftkd detect`, if any). Raises UserError for a data set, bag or
    summary that is missing or damaged, or that does not belong to the others.
    """
    options = options or EvaluationOptions()
    dataset = open_dataset(dataroot, version)
    bags = _read_bags(pairs, summary_file, workers or Workers())
    tokens = _tokens(dataset, bags, options.split)
    scenes = scenes_of(dataset, tokens)
    posed = {token: found for bag in bags for token, found in bag.posed.items() if token in set(tokens)}
    results = to_devkit_results(posed, tokens)
    if not dataset.has_ground_truth:
        if options.requirements:
            raise UserError(f"requirements cannot be checked. {_NO_TRUTH}")
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "results.json", results, allow_nan=False)
        return {"mAP": None, "notes": [_NO_TRUTH]}, []
    metrics = evaluate(dataset, results, sample_tokens=tokens)
    metrics |= _common_summary(bags, tokens)
    metrics["notes"] += [note for bag in bags for note in coverage_notes(bag.recording)]
    metrics["notes"] += _split_notes(bags, tokens, options.split)
    metrics["notes"] += list(dict.fromkeys(note for bag in bags for note in bag.detector.get("warnings", ())))
    synthetic = is_synthetic(dataset, scenes)
    if not synthetic and any("synthetic" in str(bag.detector["weights"]) for bag in bags):
        metrics["notes"].insert(0, _SMALL_MODEL_ON_REAL_DATA)
    metrics |= {
        "data": f"{'synthetic' if synthetic else 'nuScenes'} {version}, {', '.join(scenes)}",
        "versions": library_versions(),
        "created": now_text(),
    }
    verdicts = _add_details(metrics, dataset, results, tokens, options)
    metrics |= dict(extra or {})
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "results.json", results, allow_nan=False)
    _write(output, metrics, verdicts)
    return metrics, verdicts


def evaluate_results(
    results: Path,
    *,
    dataroot: Path,
    version: str,
    output: Path,
    options: EvaluationOptions | None = None,
) -> tuple[dict[str, Any], list[Verdict]]:
    """Score a nuScenes results file on a split or all scenes, write metrics.json, metrics_summary.json and
    metrics_devkit.json to `output`; return the metrics and the verdicts.

    Without ground truth, the checked file is copied for the evaluation server. Raises UserError for a file
    that does not cover the key frames or has a box that cannot be scored.
    """
    options = options or EvaluationOptions()
    dataset = open_dataset(dataroot, version)
    split = options.split
    scenes = scene_names(dataset) if split is None else None
    tokens = sample_tokens_of(dataset, split=split, scenes=scenes)
    if not dataset.has_ground_truth:
        if options.requirements:
            raise UserError(f"requirements cannot be checked. {_NO_TRUTH}")
        check_coverage(load_results(results), tokens)
        output.mkdir(parents=True, exist_ok=True)
        (output / "results.json").write_bytes(results.read_bytes())
        return {"mAP": None, "notes": [_NO_TRUTH]}, []
    metrics = evaluate(dataset, results, sample_tokens=tokens, output_dir=output)
    foreign = len(set(load_results(results)) - set(tokens))
    if foreign:
        metrics["notes"].append(f"{foreign} key frames of the results are not evaluated.")
    metrics |= {
        "data": f"nuScenes {version}, {split or 'all scenes'}, results {results.name}",
        "versions": library_versions(),
        "created": now_text(),
    }
    verdicts = _add_details(metrics, dataset, results, tokens, options)
    _write(output, metrics, verdicts)
    return metrics, verdicts


def _write(output: Path, metrics: Mapping[str, Any], verdicts: Sequence[Verdict]) -> None:
    write_json(output / "metrics.json", metrics, allow_nan=False)
    if verdicts:
        content = {
            "passed": all(verdict.passed for verdict in verdicts),
            "requirements": [verdict.as_dict() for verdict in verdicts],
        }
        write_json(output / CRITERIA_NAME, content, allow_nan=False)


def _add_details(
    metrics: dict[str, Any],
    dataset: Any,
    results: Mapping[str, Any] | Path,
    tokens: Sequence[str],
    options: EvaluationOptions,
) -> list[Verdict]:
    """Add the scores of subsets to the metrics and return the verdicts of the requirements."""
    ranged = any(requirement.range_m is not None for requirement in options.requirements)
    scorer = SubsetScorer(dataset, results, tokens) if options.details or ranged else None
    if options.details and scorer is not None:
        metrics["subsets"] = scorer.score_all()
        metrics["by_distance"] = [
            {"low_m": low, "high_m": high, **_without_classes(scorer.score_range(low, high))}
            for low, high in itertools.pairwise(_BANDS_M)
        ]

    def score_range(low_m: float, high_m: float) -> Mapping[str, Any]:
        assert scorer is not None
        return scorer.score_range(low_m, high_m)

    return check_requirements(options.requirements, metrics, score_range)


def _without_classes(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in scores.items() if key != "classes"}


def _read_bags(pairs: Sequence[tuple[Path, Path]], summary_file: Path | None, workers: Workers) -> list[_Bag]:
    """Read all recordings in the order of the pairs. Raises UserError with all that failed."""
    absolute = [(a.resolve(), b.resolve()) for a, b in pairs] if workers.ray else list(pairs)
    if len(pairs) == 1:
        return [_read_bag(*absolute[0], summary_file)]
    names = [str(number) for number in range(len(pairs))]
    outcomes = list(run_tasks(partial(_read_numbered, absolute, summary_file), names, workers))
    check_outcomes([o._replace(name=str(pairs[int(o.name)][0])) for o in outcomes], "bags")
    return [outcome.value for outcome in sorted(outcomes, key=lambda outcome: int(outcome.name))]


def _read_numbered(pairs: Sequence[tuple[Path, Path]], summary_file: Path | None, name: str) -> _Bag:
    return _read_bag(*pairs[int(name)], summary_file)


def _read_bag(detections_path: Path, input_path: Path, summary_file: Path | None) -> _Bag:
    """Read one recording, with topics and frames of its detector if the summary has them."""
    detector = detector_summary(detections_path, summary_file)
    parameters = typed_parameters(detector.get("parameters") or {})
    with BagReader(detections_path) as detections, BagReader(input_path) as source:
        drive = Drive(source, parameters)
        selection = detector.get("selection") or {}
        if selection:
            drive.select(**selection)
        recording = read_recording(detections, drive, parameters.base_frame)
        posed = {
            key_frame.token: PosedObjects(recording.objects[stamp], drive.rig.global_from_ego(stamp))
            for key_frame, stamp in recording.joined
            if stamp is not None
        }
    return _Bag(detections_path, input_path, recording, posed, detector)


def _tokens(dataset: Any, bags: Sequence[_Bag], split: str | None) -> list[str]:
    """Return the key frames to score: of the split, or of the bags. UserError for one that is in two bags."""
    source: dict[str, Path] = {}
    for bag in bags:
        for key_frame, _ in bag.recording.joined:
            if key_frame.token in source:
                raise UserError(
                    f"key frame {key_frame.token!r} is in {str(source[key_frame.token])!r} and in "
                    f"{str(bag.source)!r}; give each scene once"
                )
            source[key_frame.token] = bag.source
    if split is None:
        return list(source)
    tokens = list(sample_tokens_of(dataset, split=split))
    if not set(tokens) & set(source):
        raise UserError(f"no key frame of the bags is in split {split!r}; give another split or other bags")
    scenes_of(dataset, source)
    return tokens


def _common_summary(bags: Sequence[_Bag], tokens: Sequence[str]) -> dict[str, Any]:
    """Return rounds, coverage, stability and detector of all bags, and one entry per bag."""
    parts = [bag.recording.summary() for bag in bags]
    offsets = np.array([offset for bag in bags for offset in bag.recording.offsets_ms])
    covered = [token for bag in bags for token in bag.posed if token in set(tokens)]
    summary: dict[str, Any] = {
        key: sum(part[key] for part in parts) for key in ("rounds_in", "rounds_detected", "rounds_dropped")
    }
    summary["coverage"] = {
        "key_frames": len(tokens),
        "with_detections": len(covered),
        "share": round(len(covered) / len(tokens), 4),
        "unmatched_tokens": [token for token in tokens if token not in set(covered)],
        "offset_ms": {
            "mean": round(float(offsets.mean()), 3) if offsets.size else None,
            "max": round(float(np.abs(offsets).max()), 3) if offsets.size else None,
        },
    }
    summary["stability"] = reduce(add, (bag.recording.stability for bag in bags)).summary()
    summary |= bags[0].detector if len(bags) == 1 else _common_detector(bags)
    summary["bags"] = [
        {"detections": str(bag.detections), "bag": str(bag.source), **part}
        for bag, part in zip(bags, parts, strict=True)
    ]
    return summary


def _common_detector(bags: Sequence[_Bag]) -> dict[str, Any]:
    """Return what all detectors have in common; the latency is that of the slowest bag."""
    common = {
        key: value
        for key, value in bags[0].detector.items()
        if key not in ("latency_ms", "latency_timeline")
        and all(bag.detector.get(key) == value for bag in bags)
    }
    unknown = {"device": None, "weights": None}
    known = [bag.detector["latency_ms"] for bag in bags if bag.detector["latency_ms"].get("p50") is not None]
    slowest = max(known, key=lambda latency: float(latency["p50"]), default={"p50": None, "p95": None})
    return {**unknown, **common, "latency_ms": slowest}


def _split_notes(bags: Sequence[_Bag], tokens: Sequence[str], split: str | None) -> list[str]:
    if split is None:
        return []
    present = {key_frame.token for bag in bags for key_frame, _ in bag.recording.joined}
    absent, outside = len(set(tokens) - present), len(present - set(tokens))
    notes = []
    if absent:
        notes.append(
            f"{absent} of {len(tokens)} key frames of split {split} are in no bag; they count as empty."
        )
    if outside:
        notes.append(f"{outside} key frames of the bags are not in split {split}; they are not scored.")
    return notes


def summary_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return the lines of text that summarize the metrics on a terminal."""
    if "NDS" not in metrics:
        return list(metrics["notes"])
    if "rounds_in" not in metrics:
        score = f"mAP {_number(metrics['mAP'])}   NDS {_number(metrics['NDS'])}"
        return [
            f"{score}   {metrics['samples']} key frames",
            *_detail_lines(metrics),
            *(f"note: {note}" for note in metrics["notes"]),
        ]
    latency = metrics.get("latency_ms") or {}
    score = f"mAP {_number(metrics['mAP'])}   NDS {_number(metrics['NDS'])}"
    counts = ", ".join(f"{name} {metrics[f'rounds_{name}']}" for name in ("in", "detected", "dropped"))
    present = f"mAP over classes with ground truth: {_number(metrics['mAP_present'])}"
    lines = [score, present, f"rounds {counts}"]
    if latency.get("p50") is not None:
        lines.append(
            f"latency p50 {latency['p50']:.1f} ms, p95 {latency['p95']:.1f} ms on {metrics.get('device')}"
        )
    stability = metrics.get("stability") or {}
    if stability.get("flicker") is not None:
        jitter = f", jitter {stability['jitter_m']:.2f} m" if stability["jitter_m"] is not None else ""
        lines.append(f"flicker {100 * stability['flicker']:.1f} %{jitter} between frames")
    lines += _detail_lines(metrics)
    return lines + [f"note: {note}" for note in metrics["notes"]]


def _detail_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return one line per subset."""
    return [
        f"{name.replace('_', ' ').strip():<22} AP {_number(values['AP'])}  ATE {_number(values['ATE'])}  "
        f"AVE {_number(values['AVE'])}  {values['truths']} objects"
        for name, values in metrics.get("subsets", {}).items()
        if values["truths"]
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
