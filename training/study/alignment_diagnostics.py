# SPDX-License-Identifier: Apache-2.0
"""Diagnose teacher-student alignment: which teacher query each student query is matched to, and how much of
the teacher's features is reconstructed.

    python -m training.study.alignment_diagnostics --run runs/matrix/runs/ftkd-0 --teacher T.safetensors \\
        --cache runs/matrix/cache_teacher_future

Loads the last checkpoint of an FTKD run with a streaming student, including its generators, and runs the
first training scenes through the student. It reports, for foreground and background pairs: their number per
frame, the distance of the boxes, the teacher's score, and two shares of the variance of the teacher's
features: `features_rebuilt` by the generators, masked as in training (1: all of it; 0: no better than the
mean), and `linear_probe` by the best linear map of the student's unmasked features, fitted on every other
frame and evaluated on the rest. `maps_rebuilt` is the share for the image features. `future` is the share of
the variance of the image feature targets that no multiple of the current frame's features explains, in one
scene.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ftkd_core.config import DetectorConfig, from_dict
from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import Clip, make_sample
from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.distillation.cache import TeacherCache
from ftkd_core.distillation.config import FTKDConfig
from ftkd_core.distillation.ftkd import FTKD
from ftkd_core.distillation.logits import pair_distances
from ftkd_core.distillation.reconstruction import future_aware_target
from ftkd_core.distillation.teacher_output import TeacherOutput
from ftkd_core.errors import UserError
from ftkd_core.losses.target_filter import filter_targets
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.predictions import Predictions
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.types import Targets
from ftkd_core.weights import weights_hash
from training import checkpoint
from training.distill import load_teacher
from training.distiller import Distiller, make_distiller
from training.feature_cache import cache_features, network_input
from training.study.json_files import write_json
from training.study.variance import ExplainedVariance, linear_probe
from training.tasks import StreamingTask
from training.teacher_inference import by_stride, infer_clip

_NEAR_M: Final = 2.0


class PairStatistics:
    """Statistics of the matched pairs of one kind, collected frame by frame."""

    def __init__(self) -> None:
        self.frames, self.rebuilt = 0, ExplainedVariance()
        self._distances: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._features: list[tuple[Tensor, Tensor]] = []

    def add(self, distance: Tensor, score: Tensor, student: Tensor, teacher: Tensor) -> None:
        """Add the pairs (M,) of a frame: distance of the centres in metres, the teacher's best class score,
        features of student and teacher (M, C)."""
        self.frames += 1
        self._distances.append(distance)
        self._scores.append(score)
        self._features.append((student, teacher))

    def summary(self) -> dict[str, float | None]:
        """Return means over frames and pairs; None if undefined."""
        distances, scores = torch.cat(self._distances), torch.cat(self._scores)
        found: dict[str, float | None] = {"pairs_per_frame": len(distances) / self.frames}
        if len(distances):
            found |= {
                "median_distance_m": float(distances.median()),
                "within_2_m": float((distances < _NEAR_M).float().mean()),
                "teacher_score": float(scores.mean()),
            }
        probe = linear_probe(self._features[::2], self._features[1::2])
        return found | {"features_rebuilt": self.rebuilt.value(), "linear_probe": probe}


class AlignmentStatistics:
    """Statistics of the alignment between a student and its teacher, collected frame by frame."""

    def __init__(self, method: FTKD) -> None:
        self.method = method
        self.pairs = {"foreground": PairStatistics(), "background": PairStatistics()}
        self.maps = {stride: ExplainedVariance() for stride in method.strides}
        self.objects = 0

    def add(self, predictions: Predictions, teacher: TeacherOutput, targets: Targets, seed: int) -> None:
        """Add a frame of one stream: the student's predictions, the teacher's output and the ground truth.
        The seed draws the generators' masks."""
        alignment = self.method.alignments(predictions, teacher, targets)[-1]
        self.objects += int(targets.mask.sum())
        partner, generator = alignment.teacher[0].clamp(min=0), torch.Generator().manual_seed(seed)
        distance = pair_distances(predictions.codes[-1], teacher.codes[-1], alignment)[0]
        score = teacher.logits[-1, 0].sigmoid().amax(-1)[partner]
        branch = self.method.query_branch
        rebuilt = None if branch is None else branch.rebuild(predictions.features, generator)
        foreground = alignment.foreground[0]
        for name, of_kind in (("foreground", foreground), ("background", ~foreground)):
            chosen, pairs = of_kind & (alignment.teacher[0] >= 0), self.pairs[name]
            features = teacher.features[0, partner][chosen]
            pairs.add(distance[chosen], score[chosen], predictions.features[0][chosen], features)
            if rebuilt is not None:
                pairs.rebuilt.add(features, rebuilt[0][chosen])
        for stride, variance in self.maps.items():
            generate: Any = self.method.map_branches[str(stride)].rebuild
            estimate = generate(predictions.image_features, generator)
            variance.add(_cells(teacher.targets[stride]), _cells(estimate))

    def summary(self) -> dict[str, Any]:
        """Return the statistics over all frames."""
        frames = self.pairs["foreground"].frames
        return {
            "frames": frames,
            "objects_per_frame": self.objects / frames,
            **{name: found.summary() for name, found in self.pairs.items()},
            "maps_rebuilt": {str(stride): variance.value() for stride, variance in self.maps.items()},
        }


def _cells(maps: Tensor) -> Tensor:
    """Flatten maps (B, N, C, H, W) into vectors (M, C)."""
    return maps.movedim(2, -1).flatten(0, 3)


class FTKDRun(NamedTuple):
    """An FTKD run: student, distiller and trained steps."""

    student: StreamPETR
    distiller: Distiller
    steps: int

    @property
    def method(self) -> FTKD:
        """The method with its trained generators."""
        assert isinstance(self.distiller.method, FTKD)
        return self.distiller.method


def read_run(folder: Path, teacher: SparseBEV) -> FTKDRun:
    """Return the run of a folder from its last checkpoint. Raise UserError if there is none, or it is not an
    FTKD run from this teacher to a streaming student."""
    path = folder / checkpoint.FILE_NAME
    if not path.is_file():
        raise UserError(f"no {str(path)!r}; expected a folder of python -m training.distill")
    state = checkpoint.read_checkpoint(path, "cpu")
    settings = json.loads(state["settings"])
    method, model = settings.get("method", {}), settings["model"]
    if "pv_target" not in method or "memory_length" not in model["decoder"]:
        raise UserError(f"{str(folder)!r} is not an FTKD run with a streaming student")
    student = build_stream_petr(from_dict(DetectorConfig, model))
    distiller = make_distiller(teacher, student, from_dict(FTKDConfig, method))
    task = StreamingTask(student, 1, distiller)
    if differences := checkpoint.settings_difference(settings, task.settings):
        raise UserError(
            f"{str(folder)!r} was trained with another configuration ({differences}); give its own teacher"
        )
    task.eval().load_state_dict(state["task"])
    return FTKDRun(student, distiller, int(state["step"]))


@torch.inference_mode()
def measure_alignment(
    run: FTKDRun, clips: Callable[[int], Clip], cache: TeacherCache, scenes: int
) -> dict[str, Any]:
    """Return the alignment statistics of a student and its teacher's cached outputs over the first scenes."""
    found, student = AlignmentStatistics(run.method), run.student
    for scene in tqdm(range(scenes), desc="align", unit="scene"):
        clip, memory = clips(scene), student.start_memory(1)
        for index in range(len(clip.times)):
            batch = make_sample(clip, index, Augmentation(), index == 0)
            frame = batch.frame(network_input(batch.images))
            predictions, memory = student(frame, memory)
            targets = filter_targets(batch.targets, student.config)
            found.add(predictions, cache(scene, index), targets, 1000 * scene + index)
    return found.summary()


@torch.inference_mode()
def future_share(teacher: SparseBEV, clip: Clip, strides: Sequence[int], target: str) -> dict[str, float]:
    """Return, by stride, the share of the variance of the image feature targets of a clip that no multiple of
    the current frame's features explains."""
    pairs: dict[int, list[tuple[Tensor, Tensor]]] = {stride: [] for stride in strides}
    first_future = 1 + teacher.config.num_past
    for output in infer_clip(teacher, clip):
        levels, real = by_stride(output.pyramid), output.windows.real[:, first_future:]
        for stride, cells in pairs.items():
            current, future = levels[stride][:, 0], levels[stride][:, first_future:]
            true, weight = future_aware_target(current, future, real, target)
            cells.append((_cells(true[weight > 0]), _cells(current[weight > 0])))
    shares = {}
    for stride, cells in pairs.items():
        true, current = (torch.cat(values).double() for values in zip(*cells, strict=True))
        true, current = true - true.mean(0), current - current.mean(0)
        product = float((true * current).sum())
        shares[str(stride)] = 1 - product**2 / float(true.square().sum() * current.square().sum())
    return shares


def diagnose(options: argparse.Namespace) -> dict[str, Any]:
    """Return all statistics that the command line asks for."""
    device = torch.device("cpu")
    teacher = load_teacher(options.teacher)
    run = read_run(options.run, teacher)
    student = run.student
    rendered = SyntheticClips(options.first_seed, student.config.image, options.clips)
    description = run.distiller.describe(weights_hash(options.teacher), rendered.name)
    cache = TeacherCache(options.cache, description, options.scenes)
    student_clips: Callable[[int], Clip] = rendered
    teacher_clips: Callable[[int], Clip] = rendered
    if options.cache_features:
        student_clips = cache_features(student, rendered, options.clips, options.scenes, device)
        teacher_clips = cache_features(teacher, rendered, options.clips, 1, device)
    found = measure_alignment(run, student_clips, cache, options.scenes)
    strides = run.method.strides
    share = future_share(teacher, teacher_clips(0), strides, run.method.map_target) if strides else {}
    return {
        "run": options.run.name,
        "steps": run.steps,
        "scenes": options.scenes,
        **found,
        "future": share,
    }


def make_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(
        prog="python -m training.study.alignment_diagnostics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, help="folder of a run of python -m training.distill")
    add("--teacher", type=Path, required=True, help="weights of its teacher")
    add("--cache", type=Path, required=True, help="the cache of teacher outputs that it read")
    add("--scenes", type=int, default=2, help="number of its training scenes to run (default 2)")
    add("--first-seed", type=int, default=0, help="seed of its first training scene (default 0)")
    add("--clips", type=Path, default=Path("build/clips"), help="folder of rendered scenes")
    add("--cache-features", action="store_true", help="set this if the run had data.cache_features")
    add("--json", type=Path, metavar="FILE", help="also write the statistics to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Bad input is reported in one sentence with exit code 2."""
    options = make_parser().parse_args(argv)
    try:
        if options.scenes < 1:
            raise UserError(f"--scenes {options.scenes}: expected at least 1")
        found = diagnose(options)
    except UserError as error:
        print(f"alignment diagnostics: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1))
    if options.json is not None:
        write_json(options.json, found)
        print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
