# SPDX-License-Identifier: Apache-2.0
"""Official nuScenes detection metrics (`detection_cvpr_2019`) of detections in the vehicle frame.

The devkit loads, filters and scores the boxes. This module selects the key frames (a split of the devkit, one
of the data set's own `splits.json`, or scenes by name) and adds notes on conventions that distort results on
small data: a class without ground truth counts as AP 0 with errors of 1, and unknown velocities count as an
error of 1.
"""

import contextlib
import copy
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.common.data_classes import EvalBoxes
from nuscenes.eval.common.loaders import add_center_dist, filter_eval_boxes, load_gt_of_sample_tokens
from nuscenes.eval.detection.constants import TP_METRICS
from nuscenes.eval.detection.data_classes import (
    DetectionBox,
    DetectionConfig,
    DetectionMetricDataList,
    DetectionMetrics,
)
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.nuscenes import NuScenes
from scipy.spatial.transform import Rotation

from ftkd_core.classes import CLASS_NAMES, attribute_for
from ftkd_core.data.nuscenes import sample_pose, scene_samples, split_scenes
from ftkd_core.errors import UserError
from ftkd_core.evaluation.results_check import MAX_BOXES_PER_SAMPLE, check_coverage, load_results
from ftkd_core.geometry import transform_points
from ftkd_core.json_files import write_json
from ftkd_core.types import ObjectList

CONFIG_NAME: Final = "detection_cvpr_2019"
_CURVE_M: Final = 2.0
ERROR_NAMES: Final[dict[str, str]] = {
    "ATE": "trans_err",
    "ASE": "scale_err",
    "AOE": "orient_err",
    "AVE": "vel_err",
    "AAE": "attr_err",
}
"""Short names of the true-positive errors and the devkit's names."""


class PosedObjects(NamedTuple):
    """Detections in ego with global_from_ego (4, 4) at the stamp of `objects`."""

    objects: ObjectList
    global_from_ego: NDArray[np.float64]


def sample_tokens_of(
    dataset: NuScenes, *, split: str | None = None, scenes: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Return the tokens of the key frames of a split or of the named scenes (give exactly one), scene by
    scene in time order.

    A split is one of the devkit's or a key of `splits.json` in the data set. Raises UserError for an unknown
    split or scene.
    """
    if (split is None) == (scenes is None):
        raise ValueError(f"split {split!r} and scenes {scenes!r}; expected exactly one of the two")
    names = split_scenes(dataset, split) if split is not None else scenes or ()
    return tuple(token for name in names for token in scene_samples(dataset, name))


def to_devkit_results(detections: Mapping[str, PosedObjects], sample_tokens: Iterable[str]) -> dict[str, Any]:
    """Convert detections to the devkit's results dictionary with an entry for each of `sample_tokens`, which
    may be empty.

    Boxes are converted to the global frame with sizes (w, l, h); the best 500 per sample are kept; unknown
    attributes follow `classes.attribute_for`, with unknown velocity as zero. Raises UserError for boxes that
    are not finite or have no size, ValueError for detections of a sample outside `sample_tokens`.
    """
    results: dict[str, list[dict[str, Any]]] = {token: [] for token in sample_tokens}
    for token, posed in detections.items():
        if token not in results:
            raise ValueError(
                f"detections for sample {token!r}, which is not one of the {len(results)} evaluated samples"
            )
        results[token] = _sample_results(token, posed)
    meta = {
        "use_camera": True,
        "use_lidar": False,
        "use_radar": False,
        "use_map": False,
        "use_external": False,
    }
    return {"meta": meta, "results": results}


def evaluate(
    dataset: NuScenes,
    results: Mapping[str, Any] | str | Path,
    *,
    split: str | None = None,
    scenes: Sequence[str] | None = None,
    sample_tokens: Sequence[str] | None = None,
    output_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Compute the official metrics of a results dictionary or file on a split, on scenes, or on key frames by
    token.

    Returns mAP, NDS, mATE, mASE, mAOE, mAVE, mAAE (None if the devkit gives no number), `classes` (per class:
    AP, the five errors, number of ground-truth boxes), `mAP_present` (mean AP over the classes with ground
    truth), `samples`, `config`, `curves` (precision over recall per class at 2 m) and `notes` (sentences to
    show with the numbers). With `output_dir` the
    dictionary is written to `metrics_summary.json` and the devkit's own summary to `metrics_devkit.json`.
    Raises UserError if the results do not cover the key frames.
    """
    if sample_tokens is None:
        sample_tokens = sample_tokens_of(dataset, split=split, scenes=scenes)
    if not sample_tokens:
        raise UserError("no key frame to evaluate; expected a split or scene with at least one")
    evaluation = SubsetEvaluation(dataset, load_results(results), sample_tokens)
    metrics, data = evaluation.evaluate()
    summary = _summary(metrics, evaluation)
    summary["curves"] = _curves(data, [name for name, own in summary["classes"].items() if own["truths"]])
    if output_dir is not None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "metrics_summary.json", summary, allow_nan=False)
        write_json(folder / "metrics_devkit.json", _json_value(metrics.serialize()), allow_nan=False)
    return summary


class SubsetEvaluation(DetectionEval):  # type: ignore[misc]  # the devkit has no types
    """The devkit's evaluation on selected key frames, with its own loading, filtering and scoring.

    The devkit's constructor accepts only splits and files, and fails if there are no detections at all.
    """

    def __init__(self, dataset: NuScenes, results: Mapping[str, Any], sample_tokens: Sequence[str]) -> None:
        """results: entries by sample token, as `results_check.load_results` returns them."""
        self.nusc = dataset
        self.cfg = config_factory(CONFIG_NAME)
        self.verbose = False
        chosen = check_coverage(results, sample_tokens)
        self.pred_boxes = self._prepared(EvalBoxes.deserialize(chosen, DetectionBox))
        with contextlib.redirect_stderr(io.StringIO()):  # hides a progress bar that has no switch
            truth = load_gt_of_sample_tokens(dataset, list(sample_tokens), DetectionBox)
        self.gt_boxes = self._prepared(truth)
        self.sample_tokens = self.gt_boxes.sample_tokens

    def _prepared(self, boxes: EvalBoxes) -> EvalBoxes:
        if all("LIDAR_TOP" in self.nusc.get("sample", token)["data"] for token in boxes.sample_tokens):
            boxes = add_center_dist(self.nusc, boxes)
        else:  # the devkit requires a lidar
            for token in boxes.sample_tokens:
                ego = sample_pose(self.nusc, token)[:3, 3]
                for box in boxes[token]:
                    box.ego_translation = tuple(float(v) for v in np.asarray(box.translation) - ego)
        return filter_eval_boxes(self.nusc, boxes, self.cfg.class_range) if boxes.all else boxes

    def evaluate(self) -> tuple[DetectionMetrics, DetectionMetricDataList]:
        """Run the devkit's evaluation per class and merge the results, which are bit-identical to
        `DetectionEval.evaluate` (the plain twin). The plain twin searches matches among the boxes of all
        classes and computes each distance again for each threshold."""
        truths, found = _by_class(self.gt_boxes), _by_class(self.pred_boxes)
        metrics, data = DetectionMetrics(self.cfg), DetectionMetricDataList()
        for name in self.cfg.class_names:
            alone = copy.copy(self)
            alone.cfg, alone.gt_boxes, alone.pred_boxes = _OneClass(self.cfg, name), truths[name], found[name]
            part, part_data = DetectionEval.evaluate(alone)
            for threshold in self.cfg.dist_ths:
                metrics.add_label_ap(name, threshold, part.get_label_ap(name, threshold))
                data.set(name, threshold, part_data[(name, threshold)])
            for error in TP_METRICS:
                metrics.add_label_tp(name, error, part.get_label_tp(name, error))
        return metrics, data


class _OneClass(DetectionConfig):  # type: ignore[misc]
    """Configuration for one class that caches distances."""

    def __init__(self, whole: DetectionConfig, name: str) -> None:
        super().__init__(**whole.serialize())
        self.class_names = [name]
        measure = whole.dist_fcn_callable
        # Keys are ids of boxes, which are unique because the boxes outlive this object.
        known: dict[tuple[int, int], float] = {}

        def distance(truth: DetectionBox, detection: DetectionBox) -> float:
            key = id(truth), id(detection)
            if key not in known:
                known[key] = measure(truth, detection)
            return known[key]

        self._distance = distance

    @property
    def dist_fcn_callable(self) -> Callable[[DetectionBox, DetectionBox], float]:
        return self._distance


def _by_class(boxes: EvalBoxes) -> dict[str, EvalBoxes]:
    parts = {name: EvalBoxes() for name in CLASS_NAMES}
    for token in boxes.sample_tokens:
        for box in boxes[token]:
            parts[box.detection_name].boxes[token].append(box)
    return parts


def _sample_results(token: str, posed: PosedObjects) -> list[dict[str, Any]]:
    objects = posed.objects
    best = np.argsort(-objects.scores, kind="stable")[:MAX_BOXES_PER_SAMPLE]
    objects = objects.select(best)
    _check_boxes(objects)
    boxes = objects.boxes
    if not len(boxes):
        return []  # not every version of SciPy accepts an empty list of rotations
    pose = posed.global_from_ego
    centers = transform_points(pose, boxes[:, :3])
    velocities = np.nan_to_num(boxes[:, 7:9]) @ pose[:2, :2].T
    headings = Rotation.from_matrix(pose[:3, :3]) * Rotation.from_euler("z", boxes[:, 6, None])
    columns = (
        centers.tolist(),
        boxes[:, [4, 3, 5]].tolist(),
        headings.as_quat()[:, [3, 0, 1, 2]].tolist(),
        velocities.tolist(),
        np.hypot(*velocities.T).tolist(),
        objects.scores.tolist(),
        [CLASS_NAMES[label] for label in objects.labels.tolist()],
        objects.attributes or ("",) * len(boxes),
    )
    return [
        {
            "sample_token": token,
            "translation": center,
            "size": size,
            "rotation": rotation,
            "velocity": velocity,
            "detection_name": name,
            "detection_score": score,
            "attribute_name": attribute or attribute_for(name, speed),
        }
        for center, size, rotation, velocity, speed, score, name, attribute in zip(*columns, strict=True)
    ]


def _check_boxes(objects: ObjectList) -> None:
    """Raise UserError for a box with a value that is not finite or a size that is not positive."""
    boxes = objects.boxes
    bad = (
        ~np.isfinite(boxes[:, :7]).all(axis=1)
        | (boxes[:, 3:6] <= 0).any(axis=1)
        | ~np.isfinite(objects.scores)
    )
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise UserError(
            f"detection {boxes[first].tolist()} with score {objects.scores[first]} at {objects.stamp_ns} ns; "
            "expected finite numbers and sizes above 0"
        )


def _summary(metrics: DetectionMetrics, evaluation: SubsetEvaluation) -> dict[str, Any]:
    truths = dict.fromkeys(CLASS_NAMES, 0)
    known_velocity = 0
    for box in evaluation.gt_boxes.all:
        truths[box.detection_name] += 1
        known_velocity += int(np.all(np.isfinite(box.velocity)))
    average_precision = metrics.mean_dist_aps
    classes = {
        name: {
            "AP": average_precision[name],
            **{short: metrics.get_label_tp(name, long) for short, long in ERROR_NAMES.items()},
            "truths": truths[name],
        }
        for name in CLASS_NAMES
    }
    present = [average_precision[name] for name in CLASS_NAMES if truths[name]]
    errors = {f"m{short}": metrics.tp_errors[long] for short, long in ERROR_NAMES.items()}
    summary = {
        "mAP": metrics.mean_ap,
        "NDS": metrics.nd_score,
        **errors,
        "mAP_present": float(np.mean(present)) if present else None,
        "classes": classes,
        "samples": len(evaluation.sample_tokens),
        "config": CONFIG_NAME,
        "notes": _notes(truths, known_velocity, len(evaluation.pred_boxes.all)),
    }
    return _json_value(summary)  # type: ignore[no-any-return]


def _curves(data: DetectionMetricDataList, names: Iterable[str]) -> dict[str, dict[str, list[float]]]:
    """Return recall, precision and score of classes at a distance of 2 m, at every second of the 101 recalls
    of the devkit."""
    curves = {}
    for name in names:
        found = data[(name, _CURVE_M)]
        curves[name] = {
            key: [round(float(value), 4) for value in values[::2]]
            for key, values in (
                ("recall", found.recall),
                ("precision", found.precision),
                ("score", found.confidence),
            )
        }
    return curves


def _notes(truths: Mapping[str, int], known_velocity: int, predictions: int) -> list[str]:
    notes = []
    absent = [name for name, count in truths.items() if not count]
    if absent:
        notes.append(
            f"No ground-truth object of {', '.join(absent)} is in range; the official metric counts each "
            "such class as AP 0 and errors of 1, so that mAP cannot exceed "
            f"{1 - len(absent) / len(truths):.2f}."
        )
    if sum(truths.values()) and not known_velocity:
        notes.append("No ground-truth velocity is known; the official metric then counts mAVE as 1.")
    if not predictions:
        notes.append("Nothing was detected within the evaluation range.")
    return notes


def _json_value(value: Any) -> Any:
    """Convert a value to JSON types; numbers that are not finite become None, because JSON cannot represent
    them."""
    if isinstance(value, Mapping):
        return {str(key): _json_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(entry) for entry in value]
    if isinstance(value, np.generic):
        return _json_value(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
