# SPDX-License-Identifier: Apache-2.0
"""Key map of the public StreamPETR (R50; names from exiawsh/StreamPETR).

Symbols: C channels, K classes.
"""

from dataclasses import replace
from typing import Final

from torch import Tensor

from ftkd_core.config import DetectorConfig
from ftkd_core.presets import preset
from ftkd_core.weights.importing.conventions import NEW_BOXES, model_from_ego, our_regressor
from ftkd_core.weights.importing.key_map import (
    Constant,
    KeyMap,
    Rule,
    affine,
    attention,
    keep,
    linear,
    norm,
)
from ftkd_core.weights.importing.resnet import resnet_rules

POINT_RANGE_M: Final = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
POSITION_RANGE_M: Final = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)
_HEAD: Final = "pts_bbox_head."
_CODE_WEIGHTS: Final = (2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
_MOTION: Final = 180
_CONE: Final = 8


def stream_petr_config(name: str, class_names: tuple[str, ...]) -> DetectorConfig:
    """Return the configuration of the public model that has the sizes of our preset `name`."""
    config = preset(name)
    decoder = replace(config.decoder, as_published=True, point_range_m=POINT_RANGE_M)
    return replace(
        config,
        decoder=decoder,
        class_names=class_names,
        auxiliary_kind="focal",
        model_from_ego=model_from_ego(),
    )


def stream_petr_map(config: DetectorConfig) -> KeyMap:
    """Return the key map of that model."""
    rules = [
        *resnet_rules(config.backbone.depth, "img_backbone.", "backbone."),
        *_neck_rules(config.backbone.neck_channels),
        *_embedding_rules(config),
        *_decoder_rules(config),
        *_branch_rules(config),
        *_focal_head_rules(config),
    ]
    return KeyMap(rules=tuple(rules), constants=_constants(config))


def _neck_rules(channels: int) -> list[Rule]:
    levels = (("lateral_convs.0", "lateral.0", 1024, 1), ("lateral_convs.1", "lateral.1", 2048, 1),
              ("fpn_convs.0", "output.0", channels, 3))  # fmt: skip
    rules: list[Rule] = []
    for source, target, inputs, kernel in levels:
        shape = (channels, inputs, kernel, kernel)
        rules += affine(f"img_neck.{source}.conv", f"neck.{target}", shape, channels)
    return rules


def _embedding_rules(config: DetectorConfig) -> list[Rule]:
    decoder, channels = config.decoder, config.decoder.channels
    hidden, wide = decoder.position_hidden, channels // 2 * 3
    points = (
        ("reference_points.weight", "reference_points", decoder.num_queries),
        ("pseudo_reference_points.weight", "pseudo_points", decoder.num_propagated),
    )
    layers = (
        ("position_encoder.0", "position.encoder.0", hidden, decoder.num_depths * 3),
        ("position_encoder.2", "position.encoder.2", channels, hidden),
        ("memory_embed.0", "position.token_mlp.0", channels, config.backbone.neck_channels),
        ("memory_embed.2", "position.token_mlp.2", channels, channels),
        ("featurized_pe.conv_reduce", "position.gate.0", channels, channels),
        ("featurized_pe.conv_expand", "position.gate.2", channels, channels),
        ("query_embedding.0", "query_embedding.0", channels, wide),
        ("query_embedding.2", "query_embedding.2", channels, channels),
        ("time_embedding.0", "time_embedding.0", channels, channels),
    )
    conditional = (
        ("spatial_alignment", "position.alignment", _CONE),
        ("ego_pose_pe", "motion_position", _MOTION),
        ("ego_pose_memory", "motion_feature", _MOTION),
    )
    rules = [Rule(source=_HEAD + s, shape=(count, 3), targets=(t,)) for s, t, count in points]
    for source, target, outputs, inputs in layers:
        rules += linear(_HEAD + source, target, outputs, inputs)
    rules += norm(f"{_HEAD}time_embedding.1", "time_embedding.1", channels)
    for source, target, inputs in conditional:
        rules += linear(f"{_HEAD}{source}.reduce.0", f"{target}.reduce.0", channels, inputs)
        for part in ("gamma", "beta"):
            rules += linear(f"{_HEAD}{source}.{part}", f"{target}.{part}", channels, channels)
    return rules


def _decoder_rules(config: DetectorConfig) -> list[Rule]:
    decoder, channels = config.decoder, config.decoder.channels
    stem = f"{_HEAD}transformer.decoder."
    rules: list[Rule] = []
    for index in range(decoder.num_layers):
        source, target = f"{stem}layers.{index}.", f"layers.{index}."
        for place, name in enumerate(("self_attention", "cross_attention")):
            rules += attention(f"{source}attentions.{place}.attn", target + name, channels)
        rules += linear(f"{source}ffns.0.layers.0.0", f"{target}ffn.0", decoder.ffn_channels, channels)
        rules += linear(f"{source}ffns.0.layers.1", f"{target}ffn.3", channels, decoder.ffn_channels)
        for place, name in enumerate(("norm_self", "norm_cross", "norm_ffn")):
            rules += norm(f"{source}norms.{place}", target + name, channels)
    return [*rules, *norm(f"{stem}post_norm", "output_norm", channels)]


def _branch_rules(config: DetectorConfig) -> list[Rule]:
    """Return the rules of the class and box heads; the public code saves one copy per layer of the shared
    weights."""
    channels, classes = config.decoder.channels, len(config.class_names)
    square = (channels, channels)
    heads: list[tuple[str, str, list[tuple[int, tuple[int, ...]]]]] = [
        ("cls_branches", "classifier", [(0, square), (1, square[:1]), (3, square), (4, square[:1]),
                                        (6, (classes, channels))]),
        ("reg_branches", "regressor", [(0, square), (2, square), (4, (10, channels))]),
    ]  # fmt: skip
    rules: list[Rule] = []
    for source, target, layers in heads:
        for layer, weight in layers:
            for part, shape in (("weight", weight), ("bias", weight[:1])):
                names = [f"{_HEAD}{source}.{i}.{layer}.{part}" for i in range(config.decoder.num_layers)]
                last = target == "regressor" and layer == layers[-1][0]
                rules.append(
                    Rule(
                        source=names[0], copies=tuple(names[1:]), shape=shape,
                        targets=(f"{target}.{layer}.{part}",), convert=_our_box_layer if last else keep,
                    )
                )  # fmt: skip
    return rules


def _focal_head_rules(config: DetectorConfig) -> list[Rule]:
    """Return the rules of the 2-D head, which is used in training only, so that fine-tuning keeps its
    weights."""
    channels = config.backbone.neck_channels
    rules: list[Rule] = []
    for name in ("shared_cls", "shared_reg"):
        source, target = f"img_roi_head.{name}", f"auxiliary.{name}"
        rules += affine(f"{source}.0", f"{target}.0", (channels, channels, 3, 3), channels)
        rules += norm(f"{source}.1", f"{target}.1", channels)
    for name, outputs in (("cls", len(config.class_names)), ("centerness", 1), ("ltrb", 4), ("center2d", 2)):
        shape = (outputs, channels, 1, 1)
        rules += affine(f"img_roi_head.{name}", f"auxiliary.{name}", shape, outputs)
    return rules


def _constants(config: DetectorConfig) -> tuple[Constant, ...]:
    count = config.decoder.num_depths
    step = (POSITION_RANGE_M[3] - 1.0) / (count * (1 + count))
    values = {
        "code_weights": _CODE_WEIGHTS,
        "match_costs": _CODE_WEIGHTS,
        "pc_range": POINT_RANGE_M,
        "position_range": POSITION_RANGE_M,
        "coords_d": tuple(1.0 + step * i * (i + 1) for i in range(count)),
    }
    return tuple(Constant(source=_HEAD + name, values=value) for name, value in values.items())


def _our_box_layer(parameter: Tensor) -> tuple[Tensor, ...]:
    return (our_regressor(parameter, NEW_BOXES),)
