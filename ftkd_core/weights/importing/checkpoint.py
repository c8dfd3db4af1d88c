# SPDX-License-Identifier: Apache-2.0
"""Reading of public checkpoints without executing code from them.

torch files are read with `weights_only`, which creates tensors and plain values only; safetensors contain
nothing else.
"""

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ftkd_core.errors import UserError

_RESAVE: Final = (
    "open it in an environment in which you trust it and save its tensors alone: "
    'torch.save({"state_dict": torch.load(FILE)["state_dict"]}, NEW_FILE)'
)


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
    content = _read_torch(path)
    if not isinstance(content, dict):
        raise UserError(
            f"checkpoint {str(path)!r} contains a {type(content).__name__}; expected a dict of tensors"
        )
    found = content.get("state_dict", content)
    odd = [] if not isinstance(found, dict) else [k for k, v in found.items() if not isinstance(v, Tensor)]
    if not isinstance(found, dict) or odd or not found:
        fault = f"{odd[0]!r} is a {type(found[odd[0]]).__name__}" if odd else "there is none"
        raise UserError(f"checkpoint {str(path)!r}: expected tensors by name, but {fault}")
    meta, version = content.get("meta"), content.get("version")
    names = meta.get("CLASSES") if isinstance(meta, dict) else None
    return PublicCheckpoint(
        tensors={str(name): tensor for name, tensor in found.items()},
        class_names=tuple(map(str, names)) if isinstance(names, (list, tuple)) else None,
        version=version if isinstance(version, str) else None,
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"checkpoint {str(path)!r} cannot be read ({error}); expected an undamaged safetensors file"
        ) from None


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"checkpoint {str(path)!r} contains more than tensors: reading its {found[1]} would run code "
                f"from the file; {_RESAVE}"
            ) from None
        raise _damaged(path) from None
    except Exception:  # torch.load documents no list of errors for damaged files
        raise _damaged(path) from None


def _damaged(path: Path) -> UserError:
    return UserError(
        f"checkpoint {str(path)!r} cannot be read: it is damaged, incomplete or no torch file; fetch it again"
    )
