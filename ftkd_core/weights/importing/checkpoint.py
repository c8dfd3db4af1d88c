# SPDX-License-Identifier: Apache-2.0
"""Reading of public checkpoints without executing code from them.

torch files are read with `weights_only` and an allow-list; safetensors contain only tensors.
"""

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ftkd_core.errors import UserError
from ftkd_core.weights.importing.safe_globals import numpy_types, safe_global

_WRAPPERS: Final = ("state_dict", "model_state_dict", "model", "module", "ema_state_dict", "ema", "model_ema")
"""Keys below which public training code stores the tensors, in the order in which they are taken."""
_PREFIXES: Final = ("module.", "_orig_mod.", "ema_model.", "ema_", "model.")
"""Prefixes of all names that wrappers (several GPUs, torch.compile, averages of weights) add."""
_COUNTERS: Final = ("steps", "n_averaged")
"""Counters of averaged models, next to their tensors."""
_DEPTH: Final = 3


@dataclass(frozen=True, kw_only=True)
class PublicCheckpoint:
    """tensors by public name; class_names from the checkpoint's metadata, or None; version, the box
    convention that SparseBEV files may name, or None."""

    tensors: dict[str, Tensor]
    class_names: tuple[str, ...] | None = None
    version: str | None = None


def read_public(path: Path) -> PublicCheckpoint:
    """Return the checkpoint of a .pth, .pt or .safetensors file. Raises UserError if it is unreadable or
    contains objects other than tensors and plain values."""
    if not path.is_file():
        raise UserError(f"checkpoint {str(path)!r} not found; give a .pth, .pt or .safetensors file")
    if path.suffix == ".safetensors":
        return PublicCheckpoint(tensors=_read_safetensors(path))
    content = read_torch(path)
    if not isinstance(content, dict):
        raise UserError(
            f"checkpoint {str(path)!r} contains a {type(content).__name__}; expected a dict of tensors"
        )
    found = _tensors_of(content, str(path))
    meta, version = content.get("meta"), content.get("version")
    names = meta.get("CLASSES") if isinstance(meta, dict) else None
    return PublicCheckpoint(
        tensors=strip_prefixes(found),
        class_names=tuple(map(str, names)) if isinstance(names, (list, tuple)) else None,
        version=version if isinstance(version, str) else None,
    )


def _tensors_of(content: dict[Any, Any], path: str) -> dict[str, Tensor]:
    """Return the tensors by name of a checkpoint: its own, or those below a usual key. Numbers between them,
    such as a step counter, are left out."""
    found: Any = content
    for _ in range(_DEPTH):
        inner = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), dict)), None)
        if inner is None:
            break
        found = inner
    tensors = {
        str(name): value
        for name, value in found.items()
        if isinstance(value, Tensor) and name not in _COUNTERS
    }
    odd = [
        name
        for name, value in found.items()
        if not isinstance(value, Tensor | bool | int | float | np.generic)
    ]
    if odd or not tensors:
        fault = f"{odd[0]!r} is a {type(found[odd[0]]).__name__}" if odd else "there is none"
        raise UserError(f"checkpoint {path!r}: expected tensors by name, but {fault}")
    return tensors


def strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors without the prefixes of wrappers, which all names of a state share.

    Averages next to the weights (`ema_backbone_conv1_weight` of mmcv) are left out.
    """
    averaged = {name: f"ema_{name.replace('.', '_')}" for name in tensors}
    copies = {average for average in averaged.values() if average in tensors}
    tensors = {name: value for name, value in tensors.items() if name not in copies}
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"checkpoint {str(path)!r} cannot be read ({error}); expected an undamaged safetensors file"
        ) from None


def read_torch(path: Path) -> Any:
    """Return the content of a torch file, created without code of the file.

    Tensors, plain values and numpy numbers are created; objects of mmengine and mmcv beside the weights, such
    as histories of losses, become inert. Raises UserError for anything else and for a damaged file.
    """
    allowed = numpy_types()
    while True:
        try:
            with torch.serialization.safe_globals([(value, name) for name, value in allowed.items()]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            if found is None:
                raise _damaged(path) from None
            name = found[1]
            stand_in = safe_global(name)
            if stand_in is None or name in allowed:
                raise UserError(
                    f"checkpoint {str(path)!r} contains more than tensors: reading its {name} would run code "
                    f"from the file; open it in an environment in which you trust it and save its tensors "
                    f"alone: {resave_code(path)}"
                ) from None
            # Names of builtins come without a module.
            places = (name,) if "." in name else (name, f"builtins.{name}", f"__builtin__.{name}")
            allowed |= dict.fromkeys(places, stand_in)
        except Exception:  # torch.load documents no list of errors for damaged files
            raise _damaged(path) from None


def resave_code(path: Path) -> str:
    """Return Python code that saves the tensors of a trusted file next to it."""
    target = path.with_name(f"{path.stem}_tensors.pth")
    return (
        f"import torch; c = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
        f"c = c.get('state_dict', c.get('model', c)); "
        f"torch.save({{'state_dict': {{k: v for k, v in c.items() if torch.is_tensor(v)}}}}, {str(target)!r})"
    )


def _damaged(path: Path) -> UserError:
    return UserError(
        f"checkpoint {str(path)!r} cannot be read: it is damaged, incomplete or no torch file; fetch it again"
    )
