# SPDX-License-Identifier: Apache-2.0
"""Key map of the public SparseBEV (names from MCG-NJU/SparseBEV).

Symbols: C channels, G groups, P points, L levels, T frames, K classes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from torch import Tensor

from ftkd_core.config import (
    SAMPLING_GROUPS,
    SAMPLING_POINTS,
    BackboneConfig,
    ImageConfig,
    SparseBEVConfig,
)
from ftkd_core.presets import sparse_bev_preset
from ftkd_core.weights.importing.conventions import model_from_ego, our_codes, our_offsets, our_regressor
from ftkd_core.weights.importing.key_map import Constant, KeyMap, Rule, affine, attention, linear, norm
from ftkd_core.weights.importing.resnet import resnet_rules

_HEAD: Final = "pts_bbox_head."
_LAYER: Final = f"{_HEAD}transformer.decoder.decoder_layer."
_OURS: Final = "decoder_layer."
_CODE_WEIGHTS: Final = (2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
_NECK_INPUTS: Final = (256, 512, 1024, 2048)


def sparse_bev_config(
    class_names: tuple[str, ...], *, depth: int = 50, num_queries: int = 900, large: bool = False
) -> SparseBEVConfig:
    """Return the configuration of a public model with 8 frames; `large` selects 1408x512 and five levels."""
    config = sparse_bev_preset("sparse_bev_r50_704x256")
    decoder = replace(config.decoder, as_published=True, num_queries=num_queries, levels=5 if large else 4)
    image = ImageConfig(width=1408, height=512) if large else config.image
    queries = "" if num_queries == 900 else f"_{num_queries}q"
    return replace(
        config, preset=f"sparse_bev_r{depth}_{image.width}x{image.height}{queries}", image=image,
        backbone=BackboneConfig(depth=depth), decoder=decoder, class_names=class_names,
        model_from_ego=model_from_ego(),
    )  # fmt: skip


def sparse_bev_map(config: SparseBEVConfig, boxes: str) -> KeyMap:
    """Return the key map of that model; boxes is its box convention, NEW_BOXES or OLD_BOXES."""
    rules = [
        *resnet_rules(config.backbone.depth, "img_backbone.", "backbone."),
        *_neck_rules(config.decoder.channels),
        *_query_rules(config, boxes),
        *_layer_rules(config, boxes),
        *_branch_rules(config, boxes),
    ]
    constant = Constant(source=f"{_HEAD}code_weights", values=_CODE_WEIGHTS)
    return KeyMap(rules=tuple(rules), constants=(constant,))


def _neck_rules(channels: int) -> list[Rule]:
    rules: list[Rule] = []
    for level, inputs in enumerate(_NECK_INPUTS):
        for kind, ours, shape in (
            ("lateral_convs", "lateral", (channels, inputs, 1, 1)),
            ("fpn_convs", "output", (channels, channels, 3, 3)),
        ):
            rules += affine(f"img_neck.{kind}.{level}.conv", f"neck.{ours}.{level}", shape, channels)
    return rules


def _query_rules(config: SparseBEVConfig, boxes: str) -> list[Rule]:
    labels = (len(config.class_names) + 1, config.decoder.channels - 1)
    return [
        Rule(
            source=f"{_HEAD}init_query_bbox.weight", shape=(config.decoder.num_queries, 10),
            targets=("query_boxes",), convert=_with(our_codes, boxes),
        ),
        Rule(source=f"{_HEAD}label_enc.weight", shape=labels, targets=("label_embedding.weight",)),
    ]  # fmt: skip


def _layer_rules(config: SparseBEVConfig, boxes: str) -> list[Rule]:
    decoder, channels = config.decoder, config.decoder.channels
    points, width = SAMPLING_GROUPS * SAMPLING_POINTS, channels // SAMPLING_GROUPS
    generated = SAMPLING_GROUPS * (width**2 + decoder.out_points * SAMPLING_POINTS * config.num_frames)
    layers = (
        ("position_encoder.0", "position_encoder.0", channels, 3),
        ("position_encoder.3", "position_encoder.3", channels, channels),
        ("self_attn.gen_tau", "self_attention.fade", decoder.num_heads, channels),
        ("sampling.scale_weights", "scale_weights", points * decoder.levels, channels),
        ("mixing.parameter_generator", "mixing.parameter_generator", generated, channels),
        ("mixing.out_proj", "mixing.out_proj", channels, width * decoder.out_points * SAMPLING_GROUPS),
        ("ffn.layers.0.0", "ffn.0", decoder.ffn_channels, channels),
        ("ffn.layers.1", "ffn.3", channels, decoder.ffn_channels),
    )
    norms = (
        ("position_encoder.1", "position_encoder.1"), ("position_encoder.4", "position_encoder.4"),
        ("norm1", "norm_self"), ("norm2", "norm_mix"), ("norm3", "norm_ffn"),
    )  # fmt: skip
    rules = attention(f"{_LAYER}self_attn.attention.attn", f"{_OURS}self_attention", channels)
    for source, target, outputs, inputs in layers:
        rules += linear(_LAYER + source, _OURS + target, outputs, inputs)
    for source, target in norms:
        rules += norm(_LAYER + source, _OURS + target, channels)
    offsets = linear(f"{_LAYER}sampling.sampling_offset", f"{_OURS}sampling_offset", points * 3, channels)
    return [*rules, *(replace(rule, convert=_with(our_offsets, boxes)) for rule in offsets)]


def _branch_rules(config: SparseBEVConfig, boxes: str) -> list[Rule]:
    channels, classes = config.decoder.channels, len(config.class_names)
    rules: list[Rule] = []
    for index, outputs in ((0, channels), (3, channels), (6, classes)):
        rules += linear(f"{_LAYER}cls_branch.{index}", f"{_OURS}classifier.{index}", outputs, channels)
    for index in (1, 4):
        rules += norm(f"{_LAYER}cls_branch.{index}", f"{_OURS}classifier.{index}", channels)
    for index in (0, 2):
        rules += linear(f"{_LAYER}reg_branch.{index}", f"{_OURS}regressor.{index}", channels, channels)
    last = linear(f"{_LAYER}reg_branch.4", f"{_OURS}regressor.4", 10, channels)
    return [*rules, *(replace(rule, convert=_with(our_regressor, boxes)) for rule in last)]


def _with(change: Callable[[Tensor, str], Tensor], boxes: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda tensor: (change(tensor, boxes),)
