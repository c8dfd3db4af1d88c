# SPDX-License-Identifier: Apache-2.0
"""Explicit key maps: the target and the conversion of every public tensor. Nothing is matched by
similarity."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

Convert = Callable[[Tensor], tuple[Tensor, ...]]


def keep(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the tensor unchanged."""
    return (tensor,)


def thirds(tensor: Tensor) -> tuple[Tensor, ...]:
    """Split a packed projection (3 C, ...) into those of query, key and value."""
    return tensor.chunk(3)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Conversion of the public tensor `source` of `shape` to `targets` by `convert`.

    copies: other public names of the same tensor (shared layers). optional: a counter that old files lack; it
    becomes 0.
    """

    source: str
    shape: tuple[int, ...]
    targets: tuple[str, ...]
    convert: Convert = keep
    copies: tuple[str, ...] = ()
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A public tensor that is a setting: it must have these values and is not converted."""

    source: str
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class KeyMap:
    """Key map of a public format. `ignored` lists names of training-only parts; names of whole parts end in a
    dot."""

    rules: tuple[Rule, ...]
    constants: tuple[Constant, ...] = ()
    ignored: tuple[str, ...] = ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every public tensor that is read."""
        found = {name: rule.shape for rule in self.rules for name in (rule.source, *rule.copies)}
        return found | {constant.source: (len(constant.values),) for constant in self.constants}

    def ignores(self, name: str) -> bool:
        """Return whether a public name belongs to a training-only part."""
        return any(name.startswith(part) if part.endswith(".") else name == part for part in self.ignored)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Differences between a checkpoint and a key map, each sorted.

    missing and unknown names, tensors of another shape, copies or constants with other values, tensors with
    nan or inf; and the numbers of mapped and ignored tensors.
    """

    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    misshaped: tuple[str, ...]
    differing: tuple[str, ...]
    not_finite: tuple[str, ...]
    mapped: int
    ignored: int

    @property
    def faults(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Return the kinds of faults that occur, with their tensors."""
        kinds = {
            "missing": self.missing, "unknown": self.unknown, "of another shape": self.misshaped,
            "of unexpected values": self.differing, "not finite": self.not_finite,
        }  # fmt: skip
        return tuple((kind, found) for kind, found in kinds.items() if found)


def examine(key_map: KeyMap, tensors: Mapping[str, Tensor]) -> Findings:
    """Compare public tensors with a key map, without conversion."""
    shapes = key_map.shapes()
    optional = {rule.source for rule in key_map.rules if rule.optional}
    ignored = {name for name in tensors.keys() - shapes.keys() if key_map.ignores(name)}
    misshaped = {
        name: f"{name} {tuple(tensors[name].shape)} for {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    }
    sound = {name: tensor for name, tensor in tensors.items() if name not in misshaped}
    return Findings(
        missing=tuple(sorted(shapes.keys() - tensors.keys() - optional)),
        unknown=tuple(sorted(tensors.keys() - shapes.keys() - ignored)),
        misshaped=tuple(misshaped[name] for name in sorted(misshaped)),
        differing=tuple(sorted(_differing(key_map, sound))),
        not_finite=tuple(sorted(_not_finite(shapes, sound))),
        mapped=len(shapes.keys() & sound.keys()),
        ignored=len(ignored),
    )


def _differing(key_map: KeyMap, tensors: Mapping[str, Tensor]) -> Iterable[str]:
    for rule in key_map.rules:
        for copy in rule.copies:
            if rule.source in tensors and copy in tensors and not tensors[copy].equal(tensors[rule.source]):
                yield f"{copy} (differs from {rule.source})"
    for constant in key_map.constants:
        if constant.source in tensors:
            found, expected = tensors[constant.source].float(), torch.tensor(constant.values)
            # A file in half precision has rounded settings.
            precisions = (torch.float32, torch.float16, torch.bfloat16)
            rounded = (expected.to(kind).float() for kind in precisions)
            if not any(torch.allclose(found, values, rtol=1e-5, atol=1e-6) for values in rounded):
                yield f"{constant.source} ({_short(found)} instead of {_short(expected)})"


def _not_finite(wanted: Iterable[str], tensors: Mapping[str, Tensor]) -> Iterable[str]:
    for name in wanted:
        tensor = tensors.get(name)
        if tensor is None or not tensor.is_floating_point():
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            yield f"{name} ({bad} of {tensor.numel()} values)"


def _short(values: Tensor) -> str:
    numbers = [f"{value:.6g}" for value in values.tolist()]
    return ", ".join(numbers if len(numbers) <= 6 else [*numbers[:5], "..."])


def convert(key_map: KeyMap, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our state of public tensors without faults; floats become float32."""
    state: dict[str, Tensor] = {}
    for rule in key_map.rules:
        tensor = tensors.get(rule.source)
        if tensor is None:
            tensor = torch.zeros(rule.shape, dtype=torch.int64)
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        state |= zip(rule.targets, (part.clone() for part in rule.convert(tensor)), strict=True)
    return state


_AFFINE: Final = ("weight", "bias")


def linear(source: str, target: str, outputs: int, inputs: int) -> list[Rule]:
    """Return the rules of a linear layer."""
    return affine(source, target, (outputs, inputs), outputs)


def norm(source: str, target: str, channels: int) -> list[Rule]:
    """Return the rules of a layer norm with gain and offset."""
    return affine(source, target, (channels,), channels)


def affine(source: str, target: str, weight: tuple[int, ...], bias: int) -> list[Rule]:
    """Return the rules of a layer with a bias and a weight of that shape."""
    shapes = (weight, (bias,))
    return [
        Rule(source=f"{source}.{part}", shape=shape, targets=(f"{target}.{part}",))
        for part, shape in zip(_AFFINE, shapes, strict=True)
    ]


def attention(source: str, target: str, channels: int) -> list[Rule]:
    """Return the rules of a torch.nn.MultiheadAttention, whose projections are packed, for our attention
    modules."""
    parts = ("query", "key", "value")
    packed = [
        Rule(
            source=f"{source}.in_proj_{part}", shape=shape, convert=thirds,
            targets=tuple(f"{target}.{name}.{part}" for name in parts),
        )
        for part, shape in zip(_AFFINE, ((3 * channels, channels), (3 * channels,)), strict=True)
    ]  # fmt: skip
    return [*packed, *linear(f"{source}.out_proj", f"{target}.output", channels, channels)]
