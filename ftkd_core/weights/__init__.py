# SPDX-License-Identifier: Apache-2.0
"""Weights files: safetensors whose metadata contains the resolved configuration.

No file is unpickled. Floating-point tensors may be stored in half precision; they are read as float32.
"""

import hashlib
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ftkd_core.canonical_cameras import CanonicalCamera, cameras_from_json, cameras_to_json
from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.config import BackboneConfig, ConfigT, DetectorConfig, SparseBEVConfig, from_dict, to_dict
from ftkd_core.data.synthetic.rig import canonical_cameras, nuscenes_rig
from ftkd_core.errors import UserError

FORMAT: Final = "ftkd-weights-1"
SHIPPED: Final = Path(__file__).parent / "tiny_synthetic.safetensors"
"""The small student trained on the synthetic world; tiny_synthetic.md is its model card."""

_KINDS: Final[dict[str, type[DetectorConfig] | type[SparseBEVConfig] | type[BackboneConfig]]] = {
    kind.__name__: kind for kind in (DetectorConfig, SparseBEVConfig, BackboneConfig)
}
_DEFINING_SETTINGS: Final = (
    "class_names", "model_from_ego", "num_past", "num_future",
    "backbone.auxiliary_stride", "decoder.as_published", "decoder.num_heads", "decoder.point_range_m",
)  # fmt: skip
"""Settings that define the meaning of weights, whatever their shapes."""


def save_weights(
    path: Path,
    state: dict[str, Tensor],
    config: DetectorConfig | SparseBEVConfig | BackboneConfig,
    *,
    half: bool = True,
    notes: dict[str, Any] | None = None,
    cameras: Sequence[CanonicalCamera] = (),
) -> None:
    """Write the state of a model or backbone with its configuration; `half` stores floats as float16.

    cameras: the canonical cameras, those of the training data.

    Raises ValueError if a tensor contains nan or inf or overflows half precision.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stored = tensor.detach().cpu()
        if half and stored.is_floating_point():
            stored = stored.half()
        if stored.is_floating_point() and not torch.isfinite(stored).all():
            raise ValueError(
                f"tensor {name} holds nan or inf, or overflows half precision; nothing was written"
            )
        tensors[name] = stored.contiguous().clone()
    metadata = {
        "format": FORMAT,
        "kind": type(config).__name__,
        "config": json.dumps(to_dict(config)),
        "notes": json.dumps(notes or {}),
    }
    if cameras:
        metadata["cameras"] = json.dumps(cameras_to_json(cameras))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)


def read_weights(path: Path) -> tuple[dict[str, Tensor], DetectorConfig, dict[str, Any]]:
    """Return state (float32), configuration and notes of the weights file of a streaming detector. Raises
    UserError if it is no such file."""
    return _read(path, DetectorConfig)


def read_window_weights(path: Path) -> tuple[dict[str, Tensor], SparseBEVConfig, dict[str, Any]]:
    """Return the same of a SparseBEV file: a teacher, or student B."""
    return _read(path, SparseBEVConfig)


def read_streaming_weights(
    path: Path,
) -> tuple[dict[str, Tensor], DetectorConfig | SparseBEVConfig, dict[str, Any]]:
    """Return the same of a model that runs on a stream: a streaming detector, or a SparseBEV without future
    frames. Raises UserError for any other file."""
    if _metadata(path).get("kind") != SparseBEVConfig.__name__:
        return read_weights(path)
    state, config, notes = read_window_weights(path)
    if config.num_future:
        raise UserError(
            f"weights {str(path)!r} belong to an offline teacher with {config.num_future} future frames; "
            "expected a model without future frames"
        )
    return state, config, notes


def read_backbone(path: Path) -> tuple[dict[str, Tensor], BackboneConfig, dict[str, Any]]:
    """Return the same of a backbone file: state with the names of `ResNet`, depth and width; the
    configuration's fields of the neck have no meaning."""
    return _read(path, BackboneConfig)


def load_backbone(path: Path, model: torch.nn.Module, config: BackboneConfig) -> None:
    """Load a backbone file into a detector's `backbone`. Raises UserError if depth or width differ."""
    state, found, _ = read_backbone(path)
    if (found.depth, found.base_channels) != (config.depth, config.base_channels):
        raise UserError(
            f"backbone {str(path)!r} is a ResNet-{found.depth} of {found.base_channels} channels; expected a "
            f"ResNet-{config.depth} of {config.base_channels}"
        )
    load_into(model.get_submodule("backbone"), state, str(path))


def start_from(
    path: Path, model: torch.nn.Module, config: DetectorConfig | SparseBEVConfig, parts: Sequence[str] = ()
) -> list[str]:
    """Initialise a model from a weights file: a whole model or a backbone, or with `parts` (`backbone`,
    `neck`, ...) those parts of any kind of model.

    Returns the tensors of these parts that are missing in the file; they stay unchanged. Raises UserError if
    tensors do not fit or the settings that define their meaning differ.
    """
    if parts:
        return load_parts(path, model, parts)
    if _metadata(path).get("kind") == BackboneConfig.__name__:
        load_backbone(path, model, config.backbone)
    else:
        read = read_weights if isinstance(config, DetectorConfig) else read_window_weights
        state, found, _ = read(path)
        _check_same_meaning(found, config, str(path))
        load_into(model, state, str(path))
    return []


def _check_same_meaning(
    found: DetectorConfig | SparseBEVConfig, config: DetectorConfig | SparseBEVConfig, origin: str
) -> None:
    """Raise a UserError that lists the settings under which the weights have another meaning in the model."""
    pairs = [(name, _setting(found, name), _setting(config, name)) for name in _DEFINING_SETTINGS]
    differing = [
        f"{name} {_short(file)} (not {_short(model)})" for name, file, model in pairs if file != model
    ]
    if differing:
        raise UserError(
            f"weights {origin!r} were made with {', '.join(differing)}; take all of the file's settings "
            "(--preset init), set those that differ, or take parts of the file (--init-parts)"
        )


def _setting(config: DetectorConfig | SparseBEVConfig, path: str) -> Any:
    """Return the setting with a dotted name; None if the configuration has none."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _short(value: Any) -> str:
    return textwrap.shorten(str(value), 60, placeholder=" ...")


def load_parts(path: Path, model: torch.nn.Module, parts: Sequence[str]) -> list[str]:
    """Load some parts of a model from a weights file of any kind; returns their tensors that are missing in
    the file.

    Raises UserError if the file has no tensor of a part, or one of another shape.
    """
    kind = SparseBEVConfig if _metadata(path).get("kind") == SparseBEVConfig.__name__ else DetectorConfig
    state, own = _read(path, kind)[0], model.state_dict()
    wanted = [name for name in own if name.split(".")[0] in parts]
    taken = {name: state[name] for name in wanted if name in state}
    for part in parts:
        if not any(name.startswith(f"{part}.") for name in taken):
            has = ", ".join(sorted({name.split(".")[0] for name in own.keys() & state.keys() if "." in name}))
            raise UserError(
                f"weights {str(path)!r} share no part {part!r} with the model; expected some of {has}"
            )
    for name, value in taken.items():
        if value.shape != own[name].shape:
            found, expected = tuple(value.shape), tuple(own[name].shape)
            raise UserError(
                f"weights {str(path)!r}: {name} is {found}, the model's {expected}; leave that part out, or "
                "start from a model of the same widths"
            )
    model.load_state_dict(taken, strict=False)
    return [name for name in wanted if name not in taken]


def read_config(path: Path) -> DetectorConfig | SparseBEVConfig | BackboneConfig:
    """Return the configuration of a weights file of any kind. Raises UserError if it is no weights file."""
    kind = _KINDS.get(_metadata(path).get("kind", ""), DetectorConfig)
    return _read(path, kind)[1]


def read_cameras(path: Path) -> tuple[CanonicalCamera, ...]:
    """Return the canonical cameras of a weights file. Files without them that have nuScenes' channels were
    trained on nuScenes or its synthetic copy; others have none. UserError for damaged entries."""
    metadata = _metadata(path)
    if "cameras" in metadata:
        try:
            rows = json.loads(metadata["cameras"])
        except json.JSONDecodeError as error:
            raise UserError(f"weights {str(path)!r}: cameras are not JSON ({error})") from None
        return cameras_from_json(rows, str(path))
    config = read_config(path)
    channels = () if isinstance(config, BackboneConfig) else config.channels
    return canonical_cameras(nuscenes_rig()) if channels == CAMERA_CHANNELS else ()


def read_thresholds(path: Path) -> dict[str, float]:
    """Return the recommended score thresholds by class from FILE.thresholds.json next to FILE.safetensors;
    empty if there is no such file. UserError for a damaged file."""
    stored = path.with_suffix(".thresholds.json")
    if not stored.is_file():
        return {}
    try:
        found = json.loads(stored.read_text(encoding="utf-8"))["class_score_thresholds"]
        thresholds = {str(name): float(value) for name, value in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"thresholds {str(stored)!r} cannot be read ({error}); remove or rewrite them"
        ) from None
    for name, value in thresholds.items():
        if not 0.0 <= value <= 1.0:
            raise UserError(f"thresholds {str(stored)!r}: {name} has {value}; expected 0 to 1")
    return thresholds


def _metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; empty if it cannot be read (`_read` then raises the
    error)."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _read(path: Path, kind: type[ConfigT]) -> tuple[dict[str, Tensor], ConfigT, dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"weights {str(path)!r} not found; give a .safetensors file written by training")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"weights {str(path)!r} cannot be read ({error}); expected an undamaged safetensors file"
        ) from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"weights {str(path)!r} have format {metadata.get('format')!r}; expected {FORMAT!r}")
    found = metadata.get("kind")
    if found != kind.__name__:
        raise UserError(f"weights {str(path)!r} are of kind {found}; expected {kind.__name__}")
    config = from_dict(kind, json.loads(metadata["config"]))
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    return state, config, json.loads(metadata.get("notes", "{}"))


def weights_hash(path: Path) -> str:
    """Return the SHA-256 of a weights file; caches of derived data use it in their names."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_into(model: torch.nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load a state into a model. Raises UserError as `check_fit`."""
    check_fit(model, state, origin)
    model.load_state_dict(state)


def check_fit(model: torch.nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Raise a UserError that lists missing, unknown and mis-shaped tensors of a state."""
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    shapes = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in own.keys() & state.keys()
        if state[k].shape != own[k].shape
    ]
    if missing or unknown or shapes:
        parts = [
            f"{len(v)} {what} ({', '.join(v[:3])})"
            for what, v in (("missing", missing), ("unknown", unknown), ("of another shape", sorted(shapes)))
            if v
        ]
        raise UserError(
            f"weights {origin!r} do not fit: {'; '.join(parts)}; they belong to another preset or version"
        )
