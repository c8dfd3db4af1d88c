# SPDX-License-Identifier: Apache-2.0
"""Complete configurations by name. The docstring of each function gives its purpose and the source of its
numbers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from ftkd_core.config import (
    BackboneConfig,
    DecoderConfig,
    DetectorConfig,
    ImageConfig,
    LossConfig,
    SparseBEVConfig,
    SparseDecoderConfig,
)
from ftkd_core.errors import UserError


def tiny() -> DetectorConfig:
    """Half-width ResNet-18 at 352x128: fast on a CPU, trained from scratch on the synthetic world [ours].

    Anchored queries and starts at 2-D peaks speed up training from scratch. The 2-D head reads stride 8
    because a cone at 25 m is 4 pixels wide.
    """
    return DetectorConfig(
        preset="tiny",
        image=ImageConfig(width=352, height=128),
        backbone=BackboneConfig(depth=18, base_channels=32, auxiliary_stride=8, neck_channels=96),
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
            memory_interval_s=0.4,
        ),
        loss=LossConfig(denoising_groups=1),
    )


def r50_704x256_428q() -> DetectorConfig:
    """StreamPETR R50, 704x256, 300 + 128 queries, memory 512, focal 2-D head (exiawsh/StreamPETR,
    stream_petr_r50_flash_704_bs2_seq_428q)."""
    return DetectorConfig(preset="r50_704x256_428q", auxiliary_kind="focal")


def r50_704x256_900q() -> DetectorConfig:
    """StreamPETR R50, 704x256, 644 + 256 queries, memory 1024, focal 2-D head (exiawsh/StreamPETR,
    stream_petr_r50_704_bs2_seq_90e)."""
    decoder = DecoderConfig(num_queries=644, num_propagated=256, memory_length=1024)
    return DetectorConfig(preset="r50_704x256_900q", decoder=decoder, auxiliary_kind="focal")


def r18_352x128() -> DetectorConfig:
    """ResNet-18 at 352x128 with a decoder as wide as StreamPETR's and the additions of `tiny`: for
    experiments on a small budget [ours; not trained yet]."""
    return DetectorConfig(
        preset="r18_352x128",
        image=ImageConfig(width=352, height=128),
        backbone=BackboneConfig(depth=18, auxiliary_stride=8),
        decoder=DecoderConfig(
            ffn_channels=1024, num_queries=172, num_image_queries=128, memory_interval_s=0.4,
        ),
        loss=LossConfig(denoising_groups=1),
    )  # fmt: skip


def sparse_bev_r50_704x256() -> SparseBEVConfig:
    """Student B: SparseBEV R50, 704x256, 900 queries, 8 frames (MCG-NJU/SparseBEV, r50_nuimg_704x256)."""
    return SparseBEVConfig(preset="sparse_bev_r50_704x256")


def sparse_bev_r101_704x256_offline() -> SparseBEVConfig:
    """The paper's teacher: SparseBEV R101, 900 queries, 7 past + current + 7 future frames. The
    image size is the student's [ours: the note does not give the teacher's]."""
    return SparseBEVConfig(
        preset="sparse_bev_r101_704x256_offline", backbone=BackboneConfig(depth=101), num_future=7
    )


def sparse_bev_tiny() -> SparseBEVConfig:
    """Half-width ResNet-18 at 352x128, 4 frames: student B for the synthetic world on a CPU [ours]. Backbone,
    neck and 2-D head have the shapes of `tiny`, so that either model can start from the other's."""
    return SparseBEVConfig(
        preset="sparse_bev_tiny",
        image=ImageConfig(width=352, height=128),
        backbone=BackboneConfig(depth=18, base_channels=32, auxiliary_stride=8),
        decoder=SparseDecoderConfig(
            channels=96, num_layers=3, num_heads=4, dropout=0.0, num_queries=100, num_image_queries=96,
            levels=3, out_points=32,
            point_range_m=(-61.2, -61.2, -5.0, 61.2, 61.2, 3.0),
        ),
        loss=LossConfig(denoising_groups=1),
        num_past=3,
    )  # fmt: skip


def sparse_bev_tiny_offline() -> SparseBEVConfig:
    """Teacher of the size of the preset above: 3 past, the current and 3 future frames."""
    return replace(sparse_bev_tiny(), preset="sparse_bev_tiny_offline", num_future=3)


def sparse_bev_r18_352x128() -> SparseBEVConfig:
    """SparseBEV with ResNet-18 at 352x128, 4 frames: for experiments on a small budget [ours]. Backbone, neck
    and 2-D head have the shapes of `r18_352x128`."""
    return SparseBEVConfig(
        preset="sparse_bev_r18_352x128",
        image=ImageConfig(width=352, height=128),
        backbone=BackboneConfig(depth=18, auxiliary_stride=8),
        decoder=SparseDecoderConfig(
            num_queries=256, num_image_queries=144, levels=3, out_points=64,
            point_range_m=(-61.2, -61.2, -5.0, 61.2, 61.2, 3.0),
        ),
        loss=LossConfig(denoising_groups=1),
        num_past=3,
    )  # fmt: skip


def sparse_bev_r18_352x128_offline() -> SparseBEVConfig:
    """Teacher of the size of the preset above: 3 past, the current and 3 future frames."""
    return replace(sparse_bev_r18_352x128(), preset="sparse_bev_r18_352x128_offline", num_future=3)


def sparse_bev_small() -> SparseBEVConfig:
    """SparseBEV as published at small scale, 352x128, current + 4 past frames: student B whose boxes,
    headings and velocities are predicted from features alone, without image proposals and linking.

    Backbone, neck and the training-only 2-D head have the shapes of `sparse_bev_tiny`, so that they can start
    from its weights (ours).
    """
    return SparseBEVConfig(
        preset="sparse_bev_small",
        image=ImageConfig(width=352, height=128),
        backbone=BackboneConfig(depth=18, base_channels=32, auxiliary_stride=8),
        decoder=SparseDecoderConfig(
            channels=96, num_layers=3, num_heads=4, ffn_channels=384, dropout=0.0, num_queries=256, levels=3,
            out_points=32, point_range_m=(-61.2, -61.2, -5.0, 61.2, 61.2, 3.0),
        ),
        loss=LossConfig(weighted_matching=True, denoising_groups=1),
        num_past=4,
        dense_head=True,
    )  # fmt: skip


def sparse_bev_small_offline() -> SparseBEVConfig:
    """The teacher of `sparse_bev_small`: 4 past + current + 4 future frames."""
    return replace(sparse_bev_small(), preset="sparse_bev_small_offline", num_future=4)


PRESETS: Final[dict[str, Callable[[], DetectorConfig]]] = {
    builder.__name__: builder for builder in (tiny, r18_352x128, r50_704x256_428q, r50_704x256_900q)
}
SPARSE_BEV_PRESETS: Final[dict[str, Callable[[], SparseBEVConfig]]] = {
    builder.__name__: builder
    for builder in (
        sparse_bev_tiny, sparse_bev_tiny_offline, sparse_bev_r18_352x128, sparse_bev_r18_352x128_offline,
        sparse_bev_small, sparse_bev_small_offline, sparse_bev_r50_704x256, sparse_bev_r101_704x256_offline,
    )
}  # fmt: skip


def preset(name: str) -> DetectorConfig:
    """Return the StreamPETR configuration of a name. Errors: UserError that lists the known names."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; expected one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()


def sparse_bev_preset(name: str) -> SparseBEVConfig:
    """Return the SparseBEV configuration of a name. Errors: UserError that lists the known names."""
    if name not in SPARSE_BEV_PRESETS:
        raise UserError(
            f"unknown SparseBEV preset {name!r}; expected one of {', '.join(sorted(SPARSE_BEV_PRESETS))}"
        )
    return SPARSE_BEV_PRESETS[name]()


def streaming_preset(name: str) -> DetectorConfig | SparseBEVConfig:
    """Return the configuration of a preset that runs on a stream: a StreamPETR, or a SparseBEV without future
    frames. Errors: UserError that lists their names."""
    found = SPARSE_BEV_PRESETS[name]() if name in SPARSE_BEV_PRESETS else None
    if found is None or found.num_future == 0:
        return preset(name) if found is None else found
    online = [*PRESETS, *(key for key, make in SPARSE_BEV_PRESETS.items() if not make().num_future)]
    raise UserError(
        f"preset {name!r} needs {found.num_future} future frames; expected one of {', '.join(sorted(online))}"
    )
