# SPDX-License-Identifier: Apache-2.0
"""Whether a student follows its teacher: whom its queries are paired with, and how much of the teacher's
features is rebuilt.

    python -m training.study.alignment_diagnostics --run runs/matrix/runs/ftkd-0 --teacher T.safetensors \\
        --cache runs/matrix/answers_teacher_future

Reads a run of FTKD to a streaming student, with its generators as they were last saved, and shows it the
first scenes of the synthetic world that it was trained on. Pairs: how many there are, how far apart their
boxes are, how much the teacher believes in its own. Features: the share of their variance that the generators
rebuild, masked as in training (1: all of it; 0: no more than their mean does), apart for foreground and
background; and `features_held`, the share that the best linear map of the student's whole features, found on
every other frame, gives on the rest: what the student knows, whatever the generator makes of it. `future`: of
the variance of what the image features are taught, the share that a multiple of the present frame's own
feature does not hold, in one scene.
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
from training.distill import load_teacher
from training.feature_cache import keep_features, network_input
from training.tasks import Distiller, StreamLesson, difference, make_distiller
from training.teacher_inference import by_stride, view_clip

_NEAR_M: Final = 2.0


class Variance:
    """Of vectors that come a few at a time: what of their variance around their mean an estimate explains."""

    def __init__(self) -> None:
        self._error, self._square, self._count = 0.0, 0.0, 0
        self._sum: Tensor | float = 0.0

    def add(self, true: Tensor, estimate: Tensor) -> None:
        """More of them: (M, C) each."""
        true, estimate = true.double(), estimate.double()
        self._error += float((true - estimate).square().sum())
        self._square += float(true.square().sum())
        self._sum, self._count = self._sum + true.sum(0), self._count + len(true)

    def explained(self) -> float | None:
        """1 - error / variance; None of no vectors, or of vectors that do not vary."""
        if not self._count:
            return None
        assert isinstance(self._sum, Tensor)
        total = self._square - float(self._sum.square().sum()) / self._count
        return None if total <= 1e-12 * self._square else 1 - self._error / total


class Pairs:
    """What there is to say of the pairs of one kind, frame by frame."""

    def __init__(self) -> None:
        self.frames, self.features = 0, Variance()
        self._apart: list[Tensor] = []
        self._belief: list[Tensor] = []
        self._features: list[tuple[Tensor, Tensor]] = []

    def add(self, apart: Tensor, belief: Tensor, mine: Tensor, theirs: Tensor) -> None:
        """Of a frame's pairs (M,): distance of the centres in metres, the teacher's best score, and the
        features of student and teacher (M, C)."""
        self.frames += 1
        self._apart.append(apart)
        self._belief.append(belief)
        self._features.append((mine, theirs))

    def summary(self) -> dict[str, float | None]:
        """Means over frames and pairs; None of no pairs."""
        apart, belief = torch.cat(self._apart), torch.cat(self._belief)
        found: dict[str, float | None] = {"pairs_per_frame": len(apart) / self.frames}
        if len(apart):
            found |= {
                "median_apart_m": float(apart.median()),
                "within_2_m": float((apart < _NEAR_M).float().mean()),
                "teacher_score": float(belief.mean()),
            }
        held = linearly_held(self._features[::2], self._features[1::2])
        return found | {"features_rebuilt": self.features.explained(), "features_held": held}


def linearly_held(
    found_on: Sequence[tuple[Tensor, Tensor]], tried_on: Sequence[tuple[Tensor, Tensor]]
) -> float | None:
    """Of the variance of teacher features (M, Ct), the share that student features (M, Cs) explain by the
    linear map that is best on other pairs; None where these are fewer than twice the map's inputs."""
    (mine, theirs), (others, truth) = (
        [torch.cat(values).double() for values in zip(*pairs, strict=True)] if pairs else [torch.empty(0)] * 2
        for pairs in (found_on, tried_on)
    )
    if len(mine) < 2 * (mine.shape[-1] + 1) or not len(truth):
        return None
    known, asked = (torch.nn.functional.pad(x, (0, 1), value=1.0) for x in (mine, others))
    found = torch.linalg.lstsq(known, theirs, driver="gelsd").solution
    variance = Variance()
    variance.add(truth, asked @ found)
    return variance.explained()


class Following:
    """Collects what `summary` says, a frame at a time."""

    def __init__(self, method: FTKD) -> None:
        self.method = method
        self.pairs = {"foreground": Pairs(), "background": Pairs()}
        self.maps = {stride: Variance() for stride in method.strides}
        self.objects = 0

    def add(self, predictions: Predictions, answer: TeacherOutput, targets: Targets, seed: int) -> None:
        """What a student said of a frame of one stream, what its teacher did, and the truth; the seed draws
        what is hidden from the generators."""
        alignment = self.method.alignments(predictions, answer, targets)[-1]
        self.objects += int(targets.mask.sum())
        partner, generator = alignment.teacher[0].clamp(min=0), torch.Generator().manual_seed(seed)
        apart = pair_distances(predictions.codes[-1], answer.codes[-1], alignment)[0]
        belief = answer.logits[-1, 0].sigmoid().amax(-1)[partner]
        branch = self.method.query_branch
        rebuilt = None if branch is None else branch.rebuild(predictions.features, generator)
        for name, of_kind in (
            ("foreground", alignment.foreground[0]),
            ("background", ~alignment.foreground[0]),
        ):
            chosen, pairs = of_kind & (alignment.teacher[0] >= 0), self.pairs[name]
            theirs = answer.features[0, partner][chosen]
            pairs.add(apart[chosen], belief[chosen], predictions.features[0][chosen], theirs)
            if rebuilt is not None:
                pairs.features.add(theirs, rebuilt[0][chosen])
        for stride, variance in self.maps.items():
            generate = self.method.map_branches[str(stride)].rebuild
            estimate = generate(predictions.image_features, generator)
            variance.add(_cells(answer.targets[stride]), _cells(estimate))

    def summary(self) -> dict[str, Any]:
        """Figures over all frames."""
        frames = self.pairs["foreground"].frames
        return {
            "frames": frames,
            "objects_per_frame": self.objects / frames,
            **{name: found.summary() for name, found in self.pairs.items()},
            "maps_rebuilt": {str(stride): variance.explained() for stride, variance in self.maps.items()},
        }


def _cells(maps: Tensor) -> Tensor:
    """Maps (B, N, C, H, W) as vectors (M, C)."""
    return maps.movedim(2, -1).flatten(0, 3)


class Run(NamedTuple):
    """A run of FTKD: the student, what it was taught with, and the steps it has learnt."""

    student: StreamPETR
    distiller: Distiller
    steps: int

    @property
    def method(self) -> FTKD:
        """With its generators."""
        assert isinstance(self.distiller.method, FTKD)
        return self.distiller.method


def read_run(folder: Path, teacher: SparseBEV) -> Run:
    """The run of a folder, as it was last saved. Errors: UserError where there is none, or it is no run of
    FTKD from this kind of teacher to a streaming student."""
    path = folder / "state.pt"
    if not path.is_file():
        raise UserError(f"no {str(path)!r}; expected a folder of python -m training.distill")
    state = torch.load(path, map_location="cpu", weights_only=True)
    settings = json.loads(state["settings"])
    method, model = settings.get("method", {}), settings["model"]
    if "pv_target" not in method or "memory_length" not in model["decoder"]:
        raise UserError(f"{str(folder)!r} is no run of FTKD to a streaming student")
    student = build_stream_petr(from_dict(DetectorConfig, model))
    distiller = make_distiller(teacher, student, from_dict(FTKDConfig, method))
    lesson = StreamLesson(student, 1, distiller)
    if differ := difference(settings, lesson.settings):
        raise UserError(
            f"{str(folder)!r} was taught with another configuration ({differ}); give its own teacher, "
            "or read it with the version that trained it"
        )
    lesson.eval().load_state_dict(state["lesson"])
    return Run(student, distiller, int(state["step"]))


@torch.inference_mode()
def follow(run: Run, clips: Callable[[int], Clip], cache: TeacherCache, scenes: int) -> dict[str, Any]:
    """What a student makes of the cached answers of its teacher, over the first scenes."""
    found, student = Following(run.method), run.student
    for scene in tqdm(range(scenes), desc="follow", unit="scene"):
        clip, memory = clips(scene), student.start_memory(1)
        for index in range(len(clip.times)):
            batch = make_sample(clip, index, Augmentation(), index == 0)
            frame = batch.frame(network_input(batch.images, student.config.image))
            predictions, memory = student(frame, memory)
            targets = filter_targets(batch.targets, student.config)
            found.add(predictions, cache(scene, index), targets, 1000 * scene + index)
    return found.summary()


@torch.inference_mode()
def future_share(teacher: SparseBEV, clip: Clip, strides: Sequence[int], target: str) -> dict[str, float]:
    """By stride, the share of the variance of what image features are taught in a clip that a multiple of the
    present frame's features leaves."""
    taught: dict[int, list[tuple[Tensor, Tensor]]] = {stride: [] for stride in strides}
    first = 1 + teacher.config.num_past
    for view in view_clip(teacher, clip):
        levels, real = by_stride(view.pyramid), view.windows.real[:, first:]
        for stride, cells in taught.items():
            present, future = levels[stride][:, 0], levels[stride][:, first:]
            true, weight = future_aware_target(present, future, real, target)
            cells.append((_cells(true[weight > 0]), _cells(present[weight > 0])))
    shares = {}
    for stride, cells in taught.items():
        true, present = (torch.cat(values).double() for values in zip(*cells, strict=True))
        true, present = true - true.mean(0), present - present.mean(0)
        both = float((true * present).sum())
        shares[str(stride)] = 1 - both**2 / float(true.square().sum() * present.square().sum())
    return shares


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of a command line."""
    device = torch.device("cpu")
    teacher = load_teacher(options.teacher)
    chosen = read_run(options.run, teacher)
    student = chosen.student
    rendered = SyntheticClips(options.first_seed, student.config.image, options.clips)
    description = chosen.distiller.describe(weights_hash(options.teacher), rendered.name)
    cache = TeacherCache(options.cache, description, options.scenes)
    shown: Callable[[int], Clip] = rendered
    theirs: Callable[[int], Clip] = rendered
    if options.keep_features:
        shown = keep_features(student, rendered, options.clips, options.scenes, device)
        theirs = keep_features(teacher, rendered, options.clips, 1, device)
    found = follow(chosen, shown, cache, options.scenes)
    strides = chosen.method.strides
    share = future_share(teacher, theirs(0), strides, chosen.method.map_target) if strides else {}
    return {
        "run": options.run.name,
        "steps": chosen.steps,
        "scenes": options.scenes,
        **found,
        "future": share,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; bad input is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m training.study.alignment_diagnostics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, help="folder of a run of python -m training.distill")
    add("--teacher", type=Path, required=True, help="weights of its teacher")
    add("--cache", type=Path, required=True, help="the teacher's answers that it read")
    add("--scenes", type=int, default=2, help="how many of its scenes are shown (default 2)")
    add("--first-seed", type=int, default=0, help="of its scenes (default 0)")
    add("--clips", type=Path, default=Path("build/clips"), help="where rendered scenes are kept")
    add("--keep-features", action="store_true", help="read features of frozen backbones from disk, as it did")
    add("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args(argv)
    try:
        if options.scenes < 1:
            raise UserError(f"--scenes {options.scenes}: expected at least 1")
        found = run(options)
    except UserError as error:
        print(f"following: {error}", file=sys.stderr)
        return 2
    text = json.dumps(found, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")
        print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
