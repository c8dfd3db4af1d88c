# SPDX-License-Identifier: Apache-2.0
"""Gate before a distillation experiment: check that a model predicts velocity with its learned weights.

    python -m training.study.gate --weights FILE --json FILE

All figures are over true positives on held-out scenes of the traffic world (greedy matching by score, same
class, centres within 2 m). Moving objects are faster than 0.5 m/s.

- velocity_change_moving_m_s: distance between the final velocity and the one that learned weights start
  from: that of the hand-written linking, or 0 with learned linking and without image queries
- ave_moving: velocity error of moving objects
- ave_moving_linker: velocity error of the hand-written linker (models/linking.py) on the same objects; it
  links the model's detections of all frames of the window
- probe_r2_velocity: R2 of a ridge regression from the last query features to velocity, fitted on other
  scenes: in the ego frame (_ego) or along and across the line of sight (_view), the larger one. Models with
  image queries compute in the second frame, and no linear regression turns one into the other
- wrong_future_ave: velocity error if the decoder gets the future frames of another scene
- passed: the decoder changes velocities by at least 0.5 m/s, ave_moving is at least 15 % below the linker's,
  R2 is at least 0.3, and a wrong future increases the error by at least 5 %

Exit codes: 0 passed, 1 not passed, 2 bad input.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from tqdm import tqdm

from ftkd_core.boxes import transform_codes
from ftkd_core.config import SparseBEVConfig
from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import Clip, make_sample
from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.data.windows import WindowBatch, collate_windows, hide_future, make_window, window_order
from ftkd_core.errors import UserError
from ftkd_core.geometry import invert_rigid, line_of_sight
from ftkd_core.losses.target_filter import filter_targets
from ftkd_core.models.anchors import Anchors
from ftkd_core.models.feature_ring import WindowFeatures
from ftkd_core.models.linking import FrameProposals, MotionPrior, link_proposals
from ftkd_core.models.predictions import Predictions
from ftkd_core.models.sparse_bev import SparseBEV
from training.distill import load_teacher
from training.feature_cache import network_input
from training.study.gate_figures import Matched, figures, join, match_greedily, mean_distance
from training.study.json_files import write_json
from training.study.plan import HELD_OUT_SEED

_LINKED_DETECTIONS: Final = 96  # per frame
_BATCH: Final = 4

Levels = tuple[Tensor, ...]


class Examiner:
    """Runs a model over clips and collects its true positives."""

    def __init__(self, model: SparseBEV, clips: Callable[[int], Clip]) -> None:
        self.model, self.config = model.eval(), model.config
        self.clip = lru_cache(maxsize=3)(clips)
        self.levels = lru_cache(maxsize=3)(self._extract)

    @torch.inference_mode()
    def _extract(self, number: int) -> Levels:
        clip = self.clip(number)
        frames = [make_sample(clip, index, Augmentation(), True).images for index in range(len(clip.times))]
        levels = [self.model.extract(network_input(images)) for images in frames]
        return tuple(torch.cat(level) for level in zip(*levels, strict=True))

    @torch.inference_mode()
    def examine(
        self, number: int, *, other: int | None = None, blind: bool = False, link: bool = False
    ) -> Matched:
        """Return the true positives of all frames of a clip.

        other: a clip whose frames replace the future frames in the decoder; blind: hide the future; link: run
        the hand-written linker too.
        """
        clip, levels = self.clip(number), self.levels(number)
        length, outputs = len(clip.times), []
        for first in range(0, length, _BATCH):
            chosen = list(range(first, min(first + _BATCH, length)))
            windows = self._windows(clip, chosen, blind=blind)
            pyramid = self._pyramid(levels, chosen, length, blind=blind)
            if other is not None:
                pyramid = self._with_future_of(pyramid, self.levels(other), chosen)
            window = WindowFeatures(pyramid, windows.rig, windows.time)
            outputs += self._frames(window, windows)
        detections = [_detections(predictions) for predictions, _, _ in outputs] if link else []
        parts = [
            self._match(*frame, self._linker(clip, index, detections) if link else None)
            for index, frame in enumerate(outputs)
        ]
        return join(parts)

    def _windows(self, clip: Clip, chosen: Sequence[int], *, blind: bool) -> WindowBatch:
        past, future = self.config.num_past, self.config.num_future
        windows = collate_windows([make_window(clip, i, Augmentation(), past, future) for i in chosen])
        return hide_future(windows, past) if blind else windows

    def _pyramid(self, levels: Levels, chosen: Sequence[int], length: int, *, blind: bool) -> Levels:
        past, future = self.config.num_past, self.config.num_future
        orders = [window_order(i, length, past, future)[0] for i in chosen]
        if blind:
            orders = [[*order[: 1 + past], *order[:1] * future] for order in orders]
        index = torch.tensor(orders)
        return tuple(level[index] for level in levels)

    def _with_future_of(self, pyramid: Levels, other: Levels, chosen: Sequence[int]) -> Levels:
        """Return the pyramid with future frames of another clip, half a clip away in time."""
        first, future, length = 1 + self.config.num_past, self.config.num_future, len(other[0])
        orders = [[(i + length // 2 + step) % length for step in range(1, future + 1)] for i in chosen]
        index = torch.tensor(orders)
        return tuple(
            torch.cat([level[:, :first], replacement[index]], dim=1)
            for level, replacement in zip(pyramid, other, strict=True)
        )

    def _frames(
        self, window: WindowFeatures, windows: WindowBatch
    ) -> list[tuple[Predictions, Tensor, WindowBatch]]:
        """Return per window: predictions, initial velocities (Q, 2) of the decoder, and the window."""
        predictions = self.model.decode_window(window)
        _, proposals = self.model.propose(window)
        boxes, _, _ = self.model.start(len(window.time), None, proposals)
        if self.model.linking is not None:  # it is learned: without it, every box stands
            boxes = torch.cat([boxes[..., :8], torch.zeros_like(boxes[..., 8:])], dim=-1)
        frames = []
        for row in range(len(window.time)):
            one = predictions._replace(
                logits=predictions.logits[:, row : row + 1],
                codes=predictions.codes[:, row : row + 1],
                features=predictions.features[row : row + 1],
            )
            targets = type(windows.targets)(*(value[row : row + 1] for value in windows.targets))
            frames.append((one, boxes[row, :, 8:10], windows._replace(targets=targets)))
        return frames

    def _match(
        self, predictions: Predictions, start: Tensor, windows: WindowBatch,
        linker: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> Matched:  # fmt: skip
        targets = filter_targets(windows.targets, self.config)
        real = targets.mask[0]
        boxes, labels = targets.boxes[0][real], targets.labels[0][real]
        codes, logits = predictions.codes[-1, 0].float(), predictions.logits[-1, 0].float()
        score, label = logits.sigmoid().max(-1)
        pairs = match_greedily(
            codes[:, :2].double().numpy(), score.double().numpy(), label.numpy(),
            boxes[:, :2].double().numpy(), labels.numpy(),
        )  # fmt: skip
        rows = torch.tensor([row for row, _ in pairs], dtype=torch.long)
        objects = torch.tensor([column for _, column in pairs], dtype=torch.long)
        linked = torch.full((len(rows), 2), torch.nan)
        if linker is not None and len(rows):
            linked = linker(codes[rows], logits[rows])
        values = (
            boxes[objects, 7:9], codes[rows, 8:10], start[rows], linked,
            predictions.features[0][rows].float(), line_of_sight(codes[rows, :3]),
        )  # fmt: skip
        return Matched(*(value.double().numpy() for value in values))

    def _linker(
        self, clip: Clip, index: int, detections: Sequence[Anchors]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function from codes (M, 10) and logits (M, K) of frame `index` to velocities (M, 2), which
        it computes by linking them over the frames of the window."""
        past, future = self.config.num_past, self.config.num_future
        order = [f for f in window_order(index, len(clip.times), past, future)[0][1:] if f != index]
        order = list(dict.fromkeys(order))
        now_from_global = invert_rigid(clip.global_from_ego[index])

        def link(codes: Tensor, logits: Tensor) -> Tensor:
            if not order:
                return torch.zeros(len(codes), 2)
            transforms = [torch.from_numpy(now_from_global @ clip.global_from_ego[frame]) for frame in order]
            in_now = [transform_codes(t, detections[f].codes) for t, f in zip(transforms, order, strict=True)]
            origin = torch.stack([transform[:2, 3] for transform in transforms]).float()
            time = torch.tensor([clip.times[frame] - clip.times[index] for frame in order]).float()
            others = FrameProposals(
                torch.stack(in_now)[None], torch.stack([detections[f].logits for f in order])[None],
                origin[None], time[None],
            )  # fmt: skip
            here = torch.zeros(1, 1, 2)
            now = FrameProposals(codes[None, None], logits[None, None], here, torch.zeros(1, 1))
            return link_proposals(now, others, MotionPrior(*self.model.motion_prior)).codes[0, :, 8:10]

        return link


def _detections(predictions: Predictions) -> Anchors:
    """Return the best detections of a frame: codes (J, 10), logits (J, K)."""
    codes, logits = predictions.codes[-1, 0].float(), predictions.logits[-1, 0].float()
    best = logits.amax(-1).topk(min(_LINKED_DETECTIONS, len(logits))).indices
    return Anchors(codes[best], logits[best])


def run_gate(
    model: SparseBEV, clips: Callable[[int], Clip], scenes: int, probe_scenes: int
) -> dict[str, Any]:
    """Return all figures of a model, including `ave_moving_blind` with the future hidden. The first `scenes`
    clips are scored; the probe is fitted on the next `probe_scenes`."""
    examiner, future = Examiner(model, clips), model.config.num_future > 0
    found, wrong, blind = [], [], []
    for number in tqdm(range(scenes), desc="gate", unit="scene"):
        found.append(examiner.examine(number, link=True))
        if future:
            blind.append(examiner.examine(number, blind=True))
            wrong.append(examiner.examine(number, other=(number + 1) % max(scenes + probe_scenes, 2)))
    fitted = [examiner.examine(scenes + n) for n in tqdm(range(probe_scenes), desc="probe", unit="scene")]
    values = figures(join(found), join(wrong) if wrong else None, join(fitted))
    if blind:
        hidden = join(blind)
        values["ave_moving_blind"] = mean_distance(
            hidden.predicted[hidden.moving], hidden.true[hidden.moving]
        )
    return values | {"scenes": scenes, "probe_scenes": probe_scenes}


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.study.gate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--weights",
        type=Path,
        required=True,
        metavar="FILE",
        help="weights of a SparseBEV, usually the teacher",
    )
    add("--scenes", type=int, default=10, help="held-out scenes that are scored (default 10)")
    add("--probe-scenes", type=int, default=6, help="scenes the probe is fitted on (default 6)")
    add("--first-seed", type=int, default=HELD_OUT_SEED, help="seed of the first scene (default 900000)")
    add("--world", default="traffic", help="ordinary or traffic (default)")
    add("--duration", type=float, default=20.0, metavar="S", help="seconds per scene (default 20)")
    add("--clips", type=Path, default=Path("build/clips"), help="folder of rendered scenes")
    add("--threads", type=int, default=0, help="CPU threads (0: PyTorch's choice)")
    add("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Bad input is reported in one sentence with exit code 2."""
    options = parse_options(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.scenes < 1 or options.probe_scenes < 1:
            raise UserError("--scenes and --probe-scenes: expected at least 1")
        model = load_teacher(options.weights)
        assert isinstance(model.config, SparseBEVConfig)
        clips = SyntheticClips(
            options.first_seed, model.config.image, options.clips, options.duration, world=options.world
        )
        values = run_gate(model, clips, options.scenes, options.probe_scenes)
    except UserError as error:
        print(f"gate: {error}", file=sys.stderr)
        return 2
    values |= {"weights": options.weights.name, "world": options.world}
    print(json.dumps(values, indent=1))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, values)
    return 0 if values["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
