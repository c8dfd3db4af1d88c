# SPDX-License-Identifier: Apache-2.0
"""Import of public checkpoints: recognise the format, compare with an explicit key map, convert.

Tensors that do not fit are listed and refused. Differences between the public code and our presets are
settings in the configuration of the written file.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from ftkd_core.config import BackboneConfig
from ftkd_core.data.synthetic.rig import canonical_cameras, nuscenes_rig
from ftkd_core.errors import UserError
from ftkd_core.weights import check_fit, save_weights
from ftkd_core.weights.importing.checkpoint import PublicCheckpoint, read_public
from ftkd_core.weights.importing.formats import (
    FORMATS,
    Config,
    PublicFormat,
    blank_model,
    box_convention,
    class_order,
    find_format,
    recognise,
)
from ftkd_core.weights.importing.key_map import Findings, KeyMap, convert, examine

_SHOWN: Final = 5


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """Result of reading a checkpoint, before anything is written; boxes is its box convention."""

    path: Path
    public: PublicFormat
    config: Config
    boxes: str
    key_map: KeyMap
    checkpoint: PublicCheckpoint
    findings: Findings

    def lines(self) -> list[str]:
        """Return a readable summary."""
        found = self.findings
        kind = "backbone" if isinstance(self.config, BackboneConfig) else self.config.preset
        lines = [
            f"{self.path}: {self.public.name}, {self.public.summary}",
            f"{found.mapped} tensors map to ours ({kind}), {found.ignored} of training-only parts do not",
        ]
        if not isinstance(self.config, BackboneConfig):
            lines.append(
                f"boxes as {self.boxes}, frame of LIDAR_TOP, classes {', '.join(self.config.class_names)}"
            )
        for fault, names in found.faults:
            lines += [f"{fault}: {name}" for name in names]
        return lines

    def check(self) -> None:
        """Raise a UserError if anything does not fit; it names the first tensors of each kind of fault."""
        if not self.findings.faults:
            return
        parts = [
            f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} {fault} ({_sample(names)})"
            for fault, names in self.findings.faults
        ]
        raise UserError(
            f"checkpoint {str(self.path)!r} looks like {self.public.name}, but {'; '.join(parts)}; "
            "nothing was written"
        )

    def state(self) -> dict[str, Tensor]:
        """Return the converted state. Raises UserError as `check`."""
        self.check()
        state = convert(self.key_map, self.checkpoint.tensors)
        check_fit(blank_model(self.config), state, str(self.path))
        return state


def plan_import(path: Path, format_name: str | None = None) -> ImportPlan:
    """Read a checkpoint and determine its format, unless format_name is given. Raises UserError if it is
    unreadable or of unknown format."""
    checkpoint, origin = read_public(path), str(path)
    public = recognise(checkpoint, origin) if format_name is None else find_format(format_name)
    boxes = box_convention(checkpoint, origin)
    config = public.configure(())
    if not isinstance(config, BackboneConfig):
        config = public.configure(class_order(checkpoint, origin))
    key_map = public.map_keys(config, boxes)
    return ImportPlan(
        path=path, public=public, config=config, boxes=boxes, key_map=key_map, checkpoint=checkpoint,
        findings=examine(key_map, checkpoint.tensors),
    )  # fmt: skip


def import_weights(plan: ImportPlan, output: Path) -> Path:
    """Write the weights file of a plan in full precision. Raises UserError if the output exists or the
    checkpoint does not fit."""
    if output.suffix != ".safetensors":
        raise UserError(f"output {str(output)!r}: expected a name that ends in .safetensors")
    if output.exists():
        raise UserError(f"output {str(output)!r} exists; give another name, nothing is overwritten")
    notes: dict[str, Any] = {
        "imported_from": plan.path.name,
        "sha256": hashlib.sha256(plan.path.read_bytes()).hexdigest(),
        "format": plan.public.name,
        "boxes": plan.boxes,
    }
    cameras = canonical_cameras(nuscenes_rig())
    save_weights(output, plan.state(), plan.config, half=False, notes=notes, cameras=cameras)
    return output


def format_lines() -> list[str]:
    """Return the known formats, one per line."""
    width = max(len(public.name) for public in FORMATS)
    return [f"{public.name:{width}}  {public.summary}" for public in FORMATS]


def _sample(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
