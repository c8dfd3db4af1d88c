# SPDX-License-Identifier: Apache-2.0
"""Complete configurations by name. Each function's docstring says what it is for and where its numbers come from."""

from collections.abc import Callable
from typing import Final

from ftkd_core.config import BackboneConfig, DecoderConfig, DetectorConfig, ImageConfig, LossConfig
from ftkd_core.errors import UserError


def tiny() -> DetectorConfig:
    """Half-width ResNet-18 at 352x128, stride 8: fast on a CPU, trained from scratch on the synthetic world.

    Stride 8 at 352 pixels gives 44x16 tokens a camera, the angular resolution StreamPETR has at 704 with stride 16.
    Ours: locality and content_from_position, so that training from scratch converges in hours.
    """
    return DetectorConfig(
        preset="tiny",
        image=ImageConfig(width=352, height=128),
        backbone=BackboneConfig(depth=18, base_channels=32, neck_stride=8, neck_channels=128),
        decoder=DecoderConfig(
            channels=128,
            num_layers=3,
            num_heads=8,
            ffn_channels=384,
            dropout=0.0,
            num_queries=192,
            num_propagated=96,
            memory_length=384,
            num_depths=32,
            position_hidden=256,
            locality=True,
            content_from_position=True,
        ),
        loss=LossConfig(denoising_groups=4),
    )


def r50_704x256() -> DetectorConfig:
    """StreamPETR R50, 704x256, 300 + 128 queries, memory 512 (exiawsh/StreamPETR, stream_petr_r50_flash_704_bs2_seq_428q)."""
    return DetectorConfig(preset="r50_704x256")


PRESETS: Final[dict[str, Callable[[], DetectorConfig]]] = {"tiny": tiny, "r50_704x256": r50_704x256}


def preset(name: str) -> DetectorConfig:
    """The configuration of that name; UserError names what exists."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; expected one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()
