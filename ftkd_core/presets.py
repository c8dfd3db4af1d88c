# SPDX-License-Identifier: Apache-2.0
"""Complete configurations by name. Each function's docstring says what it is for and where its numbers come
from."""

from collections.abc import Callable
from typing import Final

from ftkd_core.config import BackboneConfig, DecoderConfig, DetectorConfig, ImageConfig, LossConfig
from ftkd_core.errors import UserError


def tiny() -> DetectorConfig:
    """Half-width ResNet-18 at 352x128: fast on a CPU, trained from scratch on the synthetic world.

    Ours, meant to speed up training from scratch: queries that start at 2-D peaks, locality,
    content_from_position. The 2-D head reads stride 8, since a cone 25 m away is 4 pixels wide.
    """
    return DetectorConfig(
        preset="tiny",
        image=ImageConfig(width=352, height=128),
        backbone=BackboneConfig(
            depth=18, base_channels=32, token_stride=16, auxiliary_stride=8, neck_channels=96
        ),
        decoder=DecoderConfig(
            channels=128,
            num_layers=3,
            num_heads=4,
            ffn_channels=384,
            dropout=0.0,
            num_queries=64,
            num_image_queries=96,
            num_propagated=64,
            memory_length=256,
            num_depths=32,
            position_hidden=256,
            locality=True,
            content_from_position=True,
            anchored=True,
        ),
        loss=LossConfig(denoising_groups=1),
    )


def r50_704x256() -> DetectorConfig:
    """StreamPETR R50, 704x256, 300 + 128 queries, memory 512 (exiawsh/StreamPETR,
    stream_petr_r50_flash_704_bs2_seq_428q)."""
    return DetectorConfig(preset="r50_704x256")


PRESETS: Final[dict[str, Callable[[], DetectorConfig]]] = {"tiny": tiny, "r50_704x256": r50_704x256}


def preset(name: str) -> DetectorConfig:
    """The configuration of that name; UserError names what exists."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; expected one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()
