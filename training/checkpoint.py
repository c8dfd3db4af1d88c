# SPDX-License-Identifier: Apache-2.0
"""The checkpoint file `state.pt` of a training run: write, read, and compare it with the run that resumes
it."""

import json
import os
import pickle
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from ftkd_core.errors import UserError

FILE_NAME: Final = "state.pt"
_KEYS: Final = frozenset({"step", "seconds", "task", "average", "optimizer", "states", "settings"})
_MAX_DIFFERENCES: Final = 6  # in an error message


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically."""
    assert state.keys() == _KEYS
    partial = path.with_name(f"{path.name}.partial")
    torch.save(dict(state), partial)
    partial.replace(path)


def keep_copies(folder: Path, step: int, count: int, names: Sequence[str]) -> None:
    """Keep the files of the last `count` checkpoints as `checkpoints/STEP/NAME`; nothing for a count of 1,
    because the files themselves are the last."""
    if count < 2:
        return
    kept = folder / "checkpoints"
    own = kept / f"{step:07d}"
    own.mkdir(parents=True, exist_ok=True)
    for name in names:
        (own / name).unlink(missing_ok=True)
        try:
            os.link(folder / name, own / name)  # no space; files are replaced, never written in place
        except OSError:
            shutil.copyfile(folder / name, own / name)
    for old in sorted(path for path in kept.iterdir() if path.name.isdigit())[:-count]:
        shutil.rmtree(old)


def read_checkpoint(path: Path, device: torch.device | str) -> dict[str, Any]:
    """Return the content of a checkpoint. Raise UserError if the file is missing, damaged or something
    else."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"checkpoint {str(path)!r} cannot be read ({reason}); delete it to start again"
        ) from None
    if not isinstance(state, dict) or not state.keys() >= _KEYS:
        raise UserError(
            f"{str(path)!r} is not a checkpoint of this version of the training; give another --out"
        )
    return state


def check_resumable(
    path: Path, state: Mapping[str, Any], settings: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Raise UserError if a checkpoint has other settings or other parameter groups than the run."""
    if differences := settings_difference(json.loads(state["settings"]), settings):
        raise UserError(
            f"{str(path)!r} was trained with another configuration ({differences}); give another --out"
        )
    if [_signature(g) for g in state["optimizer"]["param_groups"]] != [_signature(g) for g in groups]:
        raise UserError(
            f"{str(path)!r} trained other parameters, or these at other rates (optim.backbone_ratio, "
            "backbone_norms, frozen_stages, slow, decay_all); give another --out"
        )


def _signature(group: Mapping[str, Any]) -> tuple[int, float, str]:
    return len(group["params"]), group["ratio"], group["norms"]


def settings_difference(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Describe how saved settings differ from current ones, e.g. `method.matching 'object', here
    'prediction'`.

    Empty if they are equal as JSON. Lists the first few; a setting that one side lacks is shown as `unset`.
    """
    before, now = _flatten(saved), _flatten(json.loads(json.dumps(current)))
    keys = sorted(key for key in {*before, *now} if before.get(key, _UNSET) != now.get(key, _UNSET))
    shown = keys[:_MAX_DIFFERENCES]
    texts = [f"{key} {before.get(key, _UNSET)!r}, here {now.get(key, _UNSET)!r}" for key in shown]
    if len(keys) > len(shown):
        texts.append(f"{len(keys) - len(shown)} more")
    return "; ".join(texts)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= (
            _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        )
    return found


class _Unset:
    def __repr__(self) -> str:
        return "unset"


_UNSET: Final = _Unset()
