# SPDX-License-Identifier: Apache-2.0
"""Known public formats and their recognition by tensor names and shapes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.config import BackboneConfig, DetectorConfig, SparseBEVConfig
from ftkd_core.errors import UserError
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.resnet import ResNet
from ftkd_core.models.sparse_bev import build_sparse_bev
from ftkd_core.weights.importing.checkpoint import PublicCheckpoint
from ftkd_core.weights.importing.conventions import NEW_BOXES, OLD_BOXES, PUBLIC_CLASSES
from ftkd_core.weights.importing.key_map import KeyMap
from ftkd_core.weights.importing.resnet import MMDET_IGNORED, TORCHVISION_IGNORED, resnet_map
from ftkd_core.weights.importing.sparse_bev import sparse_bev_config, sparse_bev_map
from ftkd_core.weights.importing.stream_petr import stream_petr_config, stream_petr_map

Config = DetectorConfig | SparseBEVConfig | BackboneConfig
_MIN_SIMILARITY: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class PublicFormat:
    """A public format: configure returns our configuration for class names; map_keys the key map of a
    configuration and a box convention."""

    name: str
    summary: str
    configure: Callable[[tuple[str, ...]], Config]
    map_keys: Callable[[Config, str], KeyMap]


def _stream_petr(name: str, preset: str, summary: str) -> PublicFormat:
    def map_keys(config: Config, _boxes: str) -> KeyMap:
        assert isinstance(config, DetectorConfig)
        return stream_petr_map(config)

    return PublicFormat(
        name=name, summary=summary, map_keys=map_keys,
        configure=lambda class_names: stream_petr_config(preset, class_names),
    )  # fmt: skip


def _sparse_bev(name: str, summary: str, configure: Callable[[tuple[str, ...]], Config]) -> PublicFormat:
    def map_keys(config: Config, boxes: str) -> KeyMap:
        assert isinstance(config, SparseBEVConfig)
        return sparse_bev_map(config, boxes)

    return PublicFormat(name=name, summary=summary, configure=configure, map_keys=map_keys)


def _resnet(name: str, summary: str, depth: int, source: str, ignored: tuple[str, ...]) -> PublicFormat:
    return PublicFormat(
        name=name, summary=summary,
        configure=lambda _class_names: BackboneConfig(depth=depth),
        map_keys=lambda _config, _boxes: resnet_map(depth, source, ignored),
    )  # fmt: skip


FORMATS: Final = (
    _stream_petr(
        "stream_petr_r50_428q", "r50_704x256_428q",
        "StreamPETR R50, 300 + 128 queries, 704x256 (exiawsh/StreamPETR, ..._428q_nui_60e)",
    ),
    _stream_petr(
        "stream_petr_r50_900q", "r50_704x256_900q",
        "StreamPETR R50, 644 + 256 queries, 704x256 (exiawsh/StreamPETR, ..._704_bs2_seq_90e and _24e)",
    ),
    _sparse_bev(
        "sparse_bev_r50", "SparseBEV R50, 900 queries, 704x256 (MCG-NJU/SparseBEV, r50_nuimg_704x256)",
        sparse_bev_config,
    ),
    _sparse_bev(
        "sparse_bev_r50_400q", "SparseBEV R50, 400 queries, 704x256 (MCG-NJU/SparseBEV, ..._400q_36ep)",
        lambda class_names: sparse_bev_config(class_names, num_queries=400),
    ),
    _sparse_bev(
        "sparse_bev_r101", "SparseBEV R101, 900 queries, 1408x512 (MCG-NJU/SparseBEV, r101_nuimg_1408x512)",
        lambda class_names: sparse_bev_config(class_names, depth=101, large=True),
    ),
    *(
        _resnet(f"torchvision_resnet{depth}", f"torchvision's ResNet-{depth}: backbone", depth, "",
                TORCHVISION_IGNORED)
        for depth in (18, 34, 50, 101)
    ),
    *(
        _resnet(f"mmdet_resnet{depth}", f"ResNet-{depth} of an mmdet detector, such as nuImages': backbone",
                depth, "backbone.", MMDET_IGNORED)
        for depth in (50, 101)
    ),
)  # fmt: skip


def find_format(name: str) -> PublicFormat:
    """Return the format with that name. Raises UserError that lists the known formats."""
    for public in FORMATS:
        if public.name == name:
            return public
    raise UserError(f"unknown format {name!r}; expected one of {', '.join(f.name for f in FORMATS)}")


def recognise(checkpoint: PublicCheckpoint, origin: str) -> PublicFormat:
    """Return the format with the largest overlap of names and shapes with a checkpoint.

    A checkpoint with faults is recognised too, so that they can be listed. Raises UserError if the overlap is
    below one half.
    """
    found = {(name, tuple(tensor.shape)) for name, tensor in checkpoint.tensors.items()}

    def similarity(public: PublicFormat) -> float:
        key_map = public.map_keys(public.configure(PUBLIC_CLASSES), NEW_BOXES)
        expected = set(key_map.shapes().items())
        relevant = {entry for entry in found if not key_map.ignores(entry[0])}
        return len(expected & found) / len(expected | relevant)

    best = max(FORMATS, key=similarity)
    if similarity(best) < _MIN_SIMILARITY:
        sample = ", ".join(sorted(checkpoint.tensors)[:2])
        raise UserError(
            f"checkpoint {origin!r} has no known format ({len(found)} tensors such as {sample}); "
            "`ftkd import-weights --list-formats` lists the known ones"
        )
    return best


def box_convention(checkpoint: PublicCheckpoint, origin: str) -> str:
    """Return the box convention that a checkpoint names, or the public default. Raises UserError for another
    one."""
    version = NEW_BOXES if checkpoint.version is None else checkpoint.version
    if version not in (NEW_BOXES, OLD_BOXES):
        raise UserError(
            f"checkpoint {origin!r} has boxes of version {version!r}; expected {NEW_BOXES!r} or {OLD_BOXES!r}"
        )
    return version


def class_order(checkpoint: PublicCheckpoint, origin: str) -> tuple[str, ...]:
    """Return the class order that a 3-D detector's checkpoint names, or the public default. Raises UserError
    if the classes are not nuScenes' ten."""
    names = PUBLIC_CLASSES if checkpoint.class_names is None else checkpoint.class_names
    if sorted(names) != sorted(CLASS_NAMES):
        raise UserError(f"checkpoint {origin!r} has classes {', '.join(names)}; expected nuScenes' ten")
    return names


def blank_model(config: Config) -> nn.Module:
    """Return a model of a configuration on the meta device: names and shapes without values."""
    with torch.device("meta"):
        if isinstance(config, DetectorConfig):
            return build_stream_petr(config)
        if isinstance(config, SparseBEVConfig):
            return build_sparse_bev(config)
        return ResNet(config.depth, config.base_channels)
