# SPDX-License-Identifier: Apache-2.0
"""Published nuScenes trainings as settings of `training.train` and `training.distill`.

    python -m training.recipes          # names, published scores, epochs
    python -m training.recipes --table  # every setting next to that of the public code

Sources: [note] the paper's public reading note; [code] the configurations of exiawsh/StreamPETR and
MCG-NJU/SparseBEV; [ours] the rest. recipe_table.py compares them setting by setting.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.config import DetectorConfig, SparseBEVConfig
from ftkd_core.errors import UserError
from ftkd_core.weights.importing.sparse_bev import sparse_bev_config
from ftkd_core.weights.importing.stream_petr import stream_petr_config

TRAIN_KEY_FRAMES: Final = 28_130
"""Number of key frames in nuScenes' split `train`."""
Model = DetectorConfig | SparseBEVConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published training: model, epochs over the split `train`, global batch size and learning rate; the
    backbone's settings and `slow` of `OptimConfig`; `colour` of `AugmentConfig`, `segment` and
    `sweeps` of `DataConfig`.

    init: name of the weights to start from, as of `ftkd fetch-weights`. published: NDS and mAP in percent on
    the split `val`, None if unknown. distilled: trained with `training.distill`.
    """

    model: Callable[[], Model]
    epochs: int
    batch: int = 8
    lr: float = 2e-4
    backbone_ratio: float = 0.1
    backbone_norms: str
    frozen_stages: int = 0
    slow: tuple[str, ...] = ()
    colour: float = 0.0
    segment: int = 10
    sweeps: tuple[int, int] = (0, 0)
    rate_by_epoch: bool = False
    init: str
    published: tuple[float | None, float | None] = (None, None)
    source: str
    distilled: bool = False

    @property
    def preset(self) -> str:
        """Name of the model's configuration."""
        return self.model().preset

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the split."""
        return TRAIN_KEY_FRAMES // self.batch

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the whole training."""
        return self.epochs * self.steps_per_epoch

    def settings(self, processes: int) -> list[str]:
        """Return configuration overrides for each process of a run of `processes`."""
        if processes < 1 or self.batch % processes:
            raise UserError(
                f"{processes} processes cannot share a batch of {self.batch}; expected a divisor of it"
            )
        return [
            f"steps={self.steps}",
            f"streams={self.batch // processes}",
            "recompute=true",
            f"optim.lr={self.lr}",
            f"optim.backbone_ratio={self.backbone_ratio}",
            f"optim.backbone_norms={self.backbone_norms}",
            f"optim.frozen_stages={self.frozen_stages}",
            f"optim.slow=[{', '.join(self.slow)}]",
            "optim.decay_all=true",
            "optim.warmup_steps=500",
            "optim.warmup_start=0.3333",
            "optim.final_ratio=0.001",
            f"optim.hold_steps={self.steps_per_epoch if self.rate_by_epoch else 1}",
            "optim.ema=0",
            "augment.as_published=true",
            "augment.zoom=[0.864, 1.25]",
            f"augment.colour={self.colour}",
            "augment.scale=0.05",
            "augment.grid_mask=0.7",
            "augment.camera_dropout=0",
            f"data.segment={self.segment}",
            f"data.sweeps=[{', '.join(map(str, self.sweeps))}]",
            "data.order=epochs",
            "data.workers=8",
            f"save_every={self.steps_per_epoch}",
        ]


def _stream_petr(preset: str, **settings: object) -> Recipe:
    """Return a recipe with StreamPETR's settings [code]: halves of scenes; 4e-4 at batch 16."""
    common = Recipe(
        model=lambda: stream_petr_config(preset, CLASS_NAMES), epochs=60, batch=16, lr=4e-4,
        backbone_norms="frozen", segment=0, init="nuimages_r50", source="",
    )  # fmt: skip
    return replace(common, **settings)  # type: ignore[arg-type]


def _sparse_bev(model: Callable[[], SparseBEVConfig], **settings: object) -> Recipe:
    """Return a recipe with SparseBEV's settings [code]: frozen norm statistics, stem and first stage;
    sampling offsets at a tenth of the rate; photometric changes; sweeps; a constant rate per epoch."""
    common = Recipe(
        model=model, epochs=24, backbone_norms="keep_statistics", frozen_stages=1, slow=("sampling_offset",),
        colour=0.5, sweeps=(4, 8), rate_by_epoch=True, init="nuimages_r50", source="",
    )  # fmt: skip
    return replace(common, **settings)  # type: ignore[arg-type]


def _teacher() -> SparseBEVConfig:
    """Return the paper's teacher: R101, 7 past + current + 7 future frames [note]; 704x256 and four levels
    like its students [ours]."""
    config = sparse_bev_config(CLASS_NAMES, depth=101)
    return replace(config, preset="sparse_bev_r101_704x256_offline", num_future=7)


_STREAM_CONFIGS: Final = "exiawsh/StreamPETR projects/configs/StreamPETR"
RECIPES: Final = {
    "stream_petr_r50": _stream_petr(
        "r50_704x256_428q", published=(54.6, 44.9),
        source=f"{_STREAM_CONFIGS}/stream_petr_r50_flash_704_bs2_seq_428q_nui_60e.py",
    ),
    "stream_petr_r50_900q": _stream_petr(
        "r50_704x256_900q", epochs=90, backbone_ratio=0.25, init="imagenet_r50", published=(53.7, 43.2),
        source=f"{_STREAM_CONFIGS}/stream_petr_r50_flash_704_bs2_seq_90e.py",
    ),
    "sparse_bev_r50": _sparse_bev(
        lambda: sparse_bev_config(CLASS_NAMES), published=(55.6, 45.4),
        source="MCG-NJU/SparseBEV configs/r50_nuimg_704x256.py",
    ),
    "sparse_bev_r50_400q": _sparse_bev(
        lambda: sparse_bev_config(CLASS_NAMES, num_queries=400), epochs=36, published=(55.8, 44.8),
        source="MCG-NJU/SparseBEV configs/r50_nuimg_704x256_400q_36ep.py",
    ),
    "sparse_bev_r101": _sparse_bev(
        lambda: sparse_bev_config(CLASS_NAMES, depth=101, large=True), backbone_ratio=0.2,
        init="nuimages_r101", published=(59.2, None),
        source="MCG-NJU/SparseBEV configs/r101_nuimg_1408x512.py",
    ),
    "sparse_bev_r101_offline": _sparse_bev(
        _teacher, backbone_ratio=0.2, init="nuimages_r101",
        source="arXiv 2512.08247; the epochs are the student's [ours]",
    ),
    "ftkd_stream_petr_r50": _stream_petr(
        "r50_704x256_900q", batch=8, lr=2e-4, published=(56.3, 46.3), distilled=True,
        source="arXiv 2512.08247",
    ),
    "ftkd_sparse_bev_r50": _sparse_bev(
        lambda: sparse_bev_config(CLASS_NAMES), published=(56.5, 46.0), distilled=True,
        source="arXiv 2512.08247",
    ),
}  # fmt: skip


def overview() -> str:
    """Return the recipes as a Markdown table."""
    lines = ["| recipe | published NDS / mAP | epochs | batch | optimizer steps | starts from | source |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, recipe in RECIPES.items():
        scores = " / ".join("unknown" if score is None else str(score) for score in recipe.published)
        cells = (name, scores, recipe.epochs, recipe.batch, recipe.steps, recipe.init, recipe.source)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the recipes, or their comparison with the public code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", action="store_true", help="print every setting next to the public one")
    if parser.parse_args(argv).table:
        from training.recipe_table import comparison

        print(comparison())
    else:
        print(overview())
    return 0


if __name__ == "__main__":
    sys.exit(main())
