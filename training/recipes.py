# SPDX-License-Identifier: Apache-2.0
"""Published trainings on nuScenes as settings of `training.train` and `training.distill`.

What the paper's public note says (batch 8, AdamW, cosine decay, epochs) is [note]; what StreamPETR's and
SparseBEV's public configurations say is [code]; the rest is [ours]. All of them start from a backbone trained
on nuImages, given with --init.
"""

from dataclasses import dataclass
from typing import Final

from ftkd_core.errors import UserError

TRAIN_KEY_FRAMES: Final = 28_130
"""Key frames of nuScenes' split `train`."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A preset, epochs over the split `train` at a global batch, and the learning rate; how the backbone
    learns (its share of the rate, `OptimConfig`'s backbone_norms and frozen_stages), what learns at a tenth,
    and `AugmentConfig`'s colour."""

    preset: str
    epochs: int
    batch: int = 8
    lr: float = 2e-4
    backbone_ratio: float = 0.1
    backbone_norms: str
    frozen_stages: int = 0
    slow: tuple[str, ...] = ()
    colour: float = 0.0

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        return self.epochs * TRAIN_KEY_FRAMES // self.batch

    def settings(self, processes: int) -> list[str]:
        """Assignments for the configuration of each of that many processes."""
        if processes < 1 or self.batch % processes:
            raise UserError(
                f"{processes} processes cannot share a batch of {self.batch}; expected a divisor of it"
            )
        return [
            f"steps={self.steps}",
            f"streams={self.batch // processes}",
            f"optim.lr={self.lr}",
            f"optim.backbone_ratio={self.backbone_ratio}",
            f"optim.backbone_norms={self.backbone_norms}",
            f"optim.frozen_stages={self.frozen_stages}",
            f"optim.slow=[{', '.join(self.slow)}]",
            "optim.weight_decay=0.01",
            "optim.decay_all=true",
            "optim.warmup_steps=500",
            "optim.warmup_start=0.3333",
            "optim.final_ratio=0.001",
            "optim.clip_norm=35",
            "optim.ema=0",
            "augment.zoom_least=0.864",
            "augment.zoom_most=1.25",
            f"augment.colour={self.colour}",
            "augment.scale=0.05",
            "augment.grid_mask=0.7",
            "augment.camera_dropout=0",
            "data.segment=20",
            "data.order=epochs",
            "data.workers=8",
            "save_every=2000",
        ]


def _sparse_bev(preset: str, backbone_ratio: float) -> Recipe:
    """SparseBEV's configurations [code]: statistics, stem and first stage stay as they are, sampling offsets
    learn at a tenth; images are lighter or darker by up to 32 of 255 and differ in contrast by up to half."""
    return Recipe(
        preset=preset, epochs=24, backbone_ratio=backbone_ratio, backbone_norms="keep_statistics",
        frozen_stages=1, slow=("sampling_offset",), colour=0.5,
    )  # fmt: skip


RECIPES: Final = {
    # 60 epochs, batch 8 [note]; 2e-4 for a batch of 8, a tenth for a backbone of nuImages, whose norms are
    # frozen [code].
    "stream_petr_r50": Recipe(preset="r50_704x256_900q", epochs=60, backbone_norms="frozen"),
    # 24 epochs, batch 8 [note]; 2e-4 for a batch of 8, the backbone's tenth [code].
    "sparse_bev_r50": _sparse_bev("sparse_bev_r50_704x256", 0.1),
    # The teacher: its epochs are not in the note; the student's [ours]. A fifth for R101 [code].
    "sparse_bev_r101_offline": _sparse_bev("sparse_bev_r101_704x256_offline", 0.2),
}
"""What is known to be unlike the public code:

Both: a mirrored image is of a mirrored world (there the world stays and the camera is mirrored); bfloat16
(float16 with scaled losses).

StreamPETR: a segment is 20 frames in a row, so of a scene of 41 the first or the last is left out, and of
one of 39 the middle one comes twice an epoch (there one half is shorter or longer); all its frames are
augmented alike (there each for itself); objects up to 61.2 m are taught (51.2 m). 900 queries are
published with 90 epochs from an ImageNet backbone that learns at a quarter; the tenth, and nuImages, are
those of 428 queries.

SparseBEV: past frames are key frames, half a second apart (there sweeps, the same number of them apart, drawn
between 4 and 8 at 12 Hz); one change of colour for all images of a window, always made, brightness, contrast
and each channel's strength (there each image for itself, each change every second time, and instead of the
channels' strength hue, saturation and the order of channels). R101 is published at 1408x512 with five levels
and no future; 704x256, four levels and the future are the paper's or [ours].
"""
