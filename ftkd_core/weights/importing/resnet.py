# SPDX-License-Identifier: Apache-2.0
"""Key maps of ResNets. Names inside are those of torchvision and mmdet; prefixes and other parts differ."""

from typing import Final

from ftkd_core.weights.importing.key_map import KeyMap, Rule

BLOCKS: Final = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
"""Blocks per stage by depth."""

TORCHVISION_IGNORED: Final = ("fc.weight", "fc.bias")
"""The ImageNet classifier."""

MMDET_IGNORED: Final = ("neck.", "rpn_head.", "roi_head.")
"""Other parts of mmdet's two-stage 2-D detectors."""


def resnet_rules(depth: int, source: str, target: str) -> list[Rule]:
    """Return the rules of a ResNet without classifier; source and target are prefixes that end in a dot, or
    empty."""
    expansion = 1 if depth < 50 else 4
    rules = _conv_and_norm(source, target, "conv1", "bn1", (64, 3, 7, 7))
    inputs = 64
    for stage, count in enumerate(BLOCKS[depth]):
        width = 64 * 2**stage
        for block in range(count):
            place = f"layer{stage + 1}.{block}"
            for index, shape in enumerate(_block_shapes(depth, inputs, width), start=1):
                rules += _conv_and_norm(source, target, f"{place}.conv{index}", f"{place}.bn{index}", shape)
            if block == 0 and (stage > 0 or inputs != width * expansion):
                shape = (width * expansion, inputs, 1, 1)
                rules += _conv_and_norm(
                    source, target, f"{place}.downsample.0", f"{place}.downsample.1", shape
                )
            inputs = width * expansion
    return rules


def resnet_map(depth: int, source: str, ignored: tuple[str, ...]) -> KeyMap:
    """Return the key map of a backbone file, whose target names are those of `ResNet`."""
    return KeyMap(rules=tuple(resnet_rules(depth, source, "")), ignored=ignored)


def _block_shapes(depth: int, inputs: int, width: int) -> list[tuple[int, ...]]:
    if depth < 50:
        return [(width, inputs, 3, 3), (width, width, 3, 3)]
    return [(width, inputs, 1, 1), (width, width, 3, 3), (width * 4, width, 1, 1)]


def _conv_and_norm(source: str, target: str, conv: str, norm: str, shape: tuple[int, ...]) -> list[Rule]:
    rules = [Rule(source=f"{source}{conv}.weight", shape=shape, targets=(f"{target}{conv}.weight",))]
    for part in ("weight", "bias", "running_mean", "running_var"):
        name = f"{norm}.{part}"
        rules.append(Rule(source=source + name, shape=shape[:1], targets=(target + name,)))
    name = f"{norm}.num_batches_tracked"
    return [*rules, Rule(source=source + name, shape=(), targets=(target + name,), optional=True)]
