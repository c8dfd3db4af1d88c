# SPDX-License-Identifier: Apache-2.0
"""Published nuScenes trainings as settings of `training.train` and `training.distill`.

Sources: [note] the paper's public reading note (batch 8, AdamW, cosine decay, epochs); [code] StreamPETR's
and SparseBEV's public configurations; [ours] the rest. All start from a backbone trained on nuImages, given
by --init.
"""

from dataclasses import dataclass
from typing import Final

from ftkd_core.errors import UserError

TRAIN_KEY_FRAMES: Final = 28_130
"""Number of key frames in nuScenes' split `train`."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published training: preset, epochs over the split `train`, global batch size and learning rate; the
    backbone's settings and `slow` of `OptimConfig`; `colour` of `AugmentConfig`."""

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
        """Number of optimiser steps of the whole training."""
        return self.epochs * TRAIN_KEY_FRAMES // self.batch

    def settings(self, processes: int) -> list[str]:
        """Return configuration overrides for each process of a run of `processes`."""
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
            "optim.decay_all=true",
            "optim.warmup_steps=500",
            "optim.warmup_start=0.3333",
            "optim.final_ratio=0.001",
            "optim.ema=0",
            "augment.zoom=[0.864, 1.25]",
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
    """Return a recipe with SparseBEV's settings [code]: frozen norm statistics, stem and first stage;
    sampling offsets at a tenth of the rate; brightness changes up to 32 of 255 and contrast changes up to
    half."""
    return Recipe(
        preset=preset, epochs=24, backbone_ratio=backbone_ratio, backbone_norms="keep_statistics",
        frozen_stages=1, slow=("sampling_offset",), colour=0.5,
    )  # fmt: skip


RECIPES: Final = {
    # 60 epochs, batch 8 [note]; 2e-4 at batch 8, a tenth for the nuImages backbone, whose norms are frozen
    # [code].
    "stream_petr_r50": Recipe(preset="r50_704x256_900q", epochs=60, backbone_norms="frozen"),
    # 24 epochs, batch 8 [note]; 2e-4 at batch 8, a tenth for the backbone [code].
    "sparse_bev_r50": _sparse_bev("sparse_bev_r50_704x256", 0.1),
    # The teacher. The note gives no epochs: the student's are used [ours]. A fifth of the rate for R101
    # [code].
    "sparse_bev_r101_offline": _sparse_bev("sparse_bev_r101_704x256_offline", 0.2),
}
"""Known differences from the public code:

Both: a mirrored image shows a mirrored world (public code: only the camera is mirrored); bfloat16 (public
code: float16 with loss scaling).

StreamPETR: a segment has 20 consecutive frames. A scene of 41 frames therefore loses its first or last frame,
and a scene of 39 shows its middle frame twice per epoch (public code: one half is shorter or longer). All
frames of a segment share one augmentation (public code: one per frame). Objects up to 61.2 m are supervised
(public code: 51.2 m). Published training with 900 queries uses 90 epochs and an ImageNet backbone at a
quarter of the rate; the tenth and nuImages belong to 428 queries.

SparseBEV: past frames are key frames 0.5 s apart (public code: sweeps, a random 4 to 8 of them apart at
12 Hz). All images of a window share one colour change of brightness, contrast and channel gains, which is
always applied (public code: one per image, each part applied with probability one half; hue, saturation and
channel order instead of gains). R101 is published at 1408x512 with five levels and no future frames;
704x256, four levels and the future frames are the paper's or [ours].
"""
