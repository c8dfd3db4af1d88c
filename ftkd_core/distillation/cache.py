# SPDX-License-Identifier: Apache-2.0
"""Cache of the teacher's outputs: the frozen teacher runs once over the data set, and every student reads its
outputs from disk.

A cache is a folder with one safetensors shard per scene, in half precision, and a manifest: the hash of the
teacher's weights, the data, the settings that the outputs depend on, and a checksum per shard. It is written
shard by shard, so that an interrupted run can resume. Outputs are valid for the world without augmentation;
geometric augmentation is refused. Symbols as in ftkd.py; F frames of a scene.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.distillation.teacher_output import PreviousMaps, TeacherOutput
from ftkd_core.errors import UserError
from ftkd_core.json_files import write_json

_FORMAT: Final = "ftkd-teacher-cache-2"
"""Version of the format; increase it with every change of the code that changes the outputs of the same
weights."""
_MANIFEST: Final = "manifest.json"
_GEOMETRY: Final = ("flip", "rotation", "zoom", "scale", "as_published")
"""Settings of the augmentation that change the teacher's outputs."""
Manifest = dict[str, Any]
ItemT = TypeVar("ItemT")


def describe(
    *, teacher: str, data: str, map_target: str, strides: Iterable[int], with_previous: bool = False,
    hide_future: bool = False, augment: AugmentConfig | None = None,
) -> Manifest:  # fmt: skip
    """Return the part of a manifest that the outputs depend on.

    Args: teacher, the hash of its weights; data, name and version of the clips; map_target as
    `FTKDConfig.pv_target`; strides of the stored maps; with_previous, whether the maps of the previous frame
    are stored too; hide_future, whether the teacher saw no future frames; augment, whose `views` are stored.
    The manifest has `hide_future` and `views` only if they are set, so that older caches stay valid.
    """
    description = {
        "format": _FORMAT,
        "teacher": teacher,
        "data": data,
        "map_target": map_target,
        "strides": sorted(strides),
        "with_previous": with_previous,
    }
    if augment is not None and augment.views:
        geometry = {name: getattr(augment, name) for name in _GEOMETRY}
        description["views"] = json.loads(json.dumps({"count": augment.views, **geometry}))
    return description | ({"hide_future": True} if hide_future else {})


def fill_cache(
    folder: Path,
    description: Manifest,
    run_teacher: Callable[[ItemT], Iterable[TeacherOutput]],
    load: Callable[[int], ItemT],
    num_clips: int,
    rank: int = 0,
    ranks: int = 1,
) -> Path:
    """Write the shards of the first num_clips clips that are missing or incomplete; return the folder.

    run_teacher yields the outputs of a clip's frames, in order and in batches; load returns a clip. Each of
    `ranks` processes writes its share; one then calls `join_shards`. The content of finished shards is
    compared with its checksum. Errors: UserError if the folder holds the cache of another teacher, data set
    or setting, or if an output does not fit half precision.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _read_manifest(folder) if (folder / _MANIFEST).exists() else {**description, "shards": {}}
    _check_same(folder, manifest, description)
    manifest["shards"] |= _entries(folder)
    own = range(rank, num_clips, ranks)
    missing = [index for index in own if not is_intact(folder, manifest["shards"].get(str(index)))]
    for index in tqdm(missing, desc="teacher", unit="scene", disable=rank > 0):
        parts = [_to_tensors(part) for part in run_teacher(load(index))]
        tensors = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
        name = f"scene-{index:05d}.safetensors"
        partial = folder / f"{name}.partial"
        save_file(tensors, partial)
        content = partial.read_bytes()
        partial.replace(folder / name)
        entry = {"file": name, "bytes": len(content), "crc32": zlib.crc32(content)}
        write_json(folder / f"{name}.json", entry)
        if ranks == 1:
            join_shards(folder, description)
    return folder


def join_shards(folder: Path, description: Manifest) -> None:
    """Write the manifest of all shards in the folder. One process calls it after all have finished."""
    path = folder / _MANIFEST
    manifest = _read_manifest(folder) if path.exists() else {**description, "shards": {}}
    entries = _entries(folder)
    manifest["shards"] |= entries
    write_json(path, manifest, indent=1)
    for entry in entries.values():
        (folder / f"{entry['file']}.json").unlink()


def _entries(folder: Path) -> dict[str, Any]:
    """Return the entries of shards that are not in the manifest yet, by number."""
    found = {}
    for path in sorted(folder.glob("scene-*.safetensors.json")):
        number = path.name.removeprefix("scene-").removesuffix(".safetensors.json")
        found[str(int(number))] = json.loads(path.read_text(encoding="utf-8"))
    return found


def is_intact(folder: Path, entry: Mapping[str, Any] | None) -> bool:
    """Return whether a shard exists with the size and content it was written with."""
    if entry is None or _size(folder / entry["file"]) != entry["bytes"]:
        return False
    return zlib.crc32((folder / entry["file"]).read_bytes()) == int(entry["crc32"])


class TeacherCache:
    """Cached outputs: `output = cache(clip, frame)` is a batch of one, in float32 on the CPU.

    Picklable. The constructor checks the sizes of all shards; the first read of a shard checks its content.
    Errors: UserError if there is no cache, if it belongs to another teacher, data set or setting, if it lacks
    a scene, or if a shard is damaged or incomplete.
    """

    def __init__(self, folder: Path, description: Manifest, num_clips: int) -> None:
        if not (folder / _MANIFEST).is_file():
            raise UserError(f"teacher cache {str(folder)!r} not found; create it with --fill-cache")
        manifest = _read_manifest(folder)
        _check_same(folder, manifest, description)
        missing = [index for index in range(num_clips) if str(index) not in manifest["shards"]]
        if missing:
            raise UserError(
                f"teacher cache {str(folder)!r} lacks {len(missing)} of {num_clips} scenes (the first is "
                f"{missing[0]}); complete it with --fill-cache"
            )
        self.folder, self.shards = folder, manifest["shards"]
        for index in range(num_clips):
            if not _is_whole(folder, manifest, index):
                path, size = folder / self.shards[str(index)]["file"], self.shards[str(index)]["bytes"]
                raise UserError(
                    f"teacher cache shard {str(path)!r} has {_size(path)} bytes; expected {size}: missing "
                    "or cut off; write it again with --fill-cache"
                )
        self._checked: set[int] = set()

    def __call__(self, clip: int, frame: int) -> TeacherOutput:
        shard = self.shards[str(clip)]
        path = self.folder / shard["file"]
        try:
            if clip not in self._checked:
                if zlib.crc32(path.read_bytes()) != shard["crc32"]:
                    raise UserError(
                        f"teacher cache shard {str(path)!r} is damaged; delete the file, then --fill-cache"
                    )
                self._checked.add(clip)
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_slice(name)[frame : frame + 1] for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"teacher cache shard {str(path)!r} cannot be read ({error}); "
                "delete the file, then --fill-cache"
            ) from None
        return _from_tensors(found)


def refuse_augmentation(augment: AugmentConfig) -> None:
    """Raise a UserError for augmentation that changes the world or the image geometry, because cached outputs
    are valid without it, or in each of `augment.views`. Colours, grid masks and missing cameras change the
    student's input only."""
    if augment.views:
        return
    if augment.flip or augment.rotation or augment.scale:
        raise UserError(
            f"augment.flip {augment.flip}, augment.rotation {augment.rotation} and augment.scale "
            f"{augment.scale} change the world, but cached outputs are valid for the original one; "
            "set all to 0, set augment.views, or leave --cache out"
        )
    if augment.zoom != (1.0, 1.0):
        raise UserError(
            f"augment.zoom {list(augment.zoom)} changes the images, but cached maps are valid for the "
            "original ones; set it to [1, 1], set augment.views, or leave --cache out"
        )


def collate_outputs(outputs: list[TeacherOutput]) -> TeacherOutput:
    """Return one batch of several outputs."""

    def maps(name: str) -> dict[int, Tensor]:
        return {s: torch.cat([getattr(a, name)[s] for a in outputs]) for s in getattr(outputs[0], name)}

    return TeacherOutput(
        torch.cat([a.logits for a in outputs], dim=1),
        torch.cat([a.codes for a in outputs], dim=1),
        torch.cat([a.features for a in outputs]),
        maps("targets"),
        maps("target_weights"),
        _collate_previous([a.previous for a in outputs if a.previous is not None]),
    )


def _collate_previous(parts: list[PreviousMaps]) -> PreviousMaps | None:
    if not parts:
        return None
    maps = {stride: torch.cat([part.maps[stride] for part in parts]) for stride in parts[0].maps}
    return PreviousMaps(maps, torch.cat([part.known for part in parts]))


def _to_tensors(output: TeacherOutput) -> dict[str, Tensor]:
    """Return an output as tensors with the frame first, in half precision (2 cm at 64 m). Errors: UserError
    for a value that does not fit float16."""
    tensors = {
        "logits": output.logits.transpose(0, 1),
        "codes": output.codes.transpose(0, 1),
        "features": output.features,
    }
    for stride, target in output.targets.items():
        tensors[f"target{stride}"] = target
        tensors[f"weight{stride}"] = output.target_weights[stride]
    if output.previous is not None:
        tensors["known"] = output.previous.known
        tensors |= {f"previous{stride}": maps for stride, maps in output.previous.maps.items()}
    halves = {name: value.detach().cpu().half() for name, value in tensors.items()}
    for name, half in halves.items():
        if not torch.isfinite(half).all():
            largest = float(tensors[name].detach().abs().max())
            raise UserError(
                f"the teacher's {name} reach {largest:g}, beyond what the cache's float16 holds (65504); "
                "leave --cache out, or train a teacher whose outputs are finite and smaller"
            )
    return halves


def _from_tensors(found: dict[str, Tensor]) -> TeacherOutput:
    values = {name: value.float() for name, value in found.items()}
    strides = sorted(int(name.removeprefix("target")) for name in values if name.startswith("target"))
    previous = None
    if "known" in values:
        before = {stride: values[f"previous{stride}"] for stride in strides}
        previous = PreviousMaps(before, values["known"])
    return TeacherOutput(
        values["logits"].transpose(0, 1),
        values["codes"].transpose(0, 1),
        values["features"],
        {stride: values[f"target{stride}"] for stride in strides},
        {stride: values[f"weight{stride}"] for stride in strides},
        previous,
    )


def _read_manifest(folder: Path) -> Manifest:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"manifest of the teacher cache {str(folder)!r} cannot be read ({error})") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("shards"), dict):
        raise UserError(f"{str(folder / _MANIFEST)!r} is not the manifest of a teacher cache")
    return manifest


def _is_whole(folder: Path, manifest: Manifest, index: int) -> bool:
    """Return whether the shard of a clip exists with the size it was written with."""
    shard = manifest["shards"].get(str(index))
    return shard is not None and _size(folder / shard["file"]) == shard["bytes"]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _check_same(folder: Path, manifest: Manifest, description: Manifest) -> None:
    """Raise a UserError if the cache does not fit a run's description. A cache may store more than a run
    needs: maps of other strides, or of the previous frame."""
    hidden = manifest.get("hide_future", False)
    if hidden != description.get("hide_future", False):
        seen, needed = ("without", "with") if hidden else ("with", "without")
        raise UserError(
            f"teacher cache {str(folder)!r} was written {seen} future frames, but this run needs outputs "
            f"{needed} them; give another folder"
        )
    if "views" in manifest and "views" not in description:
        raise UserError(
            f"teacher cache {str(folder)!r} has views of augmentations, but this run has none; set "
            "augment.views as for the cache, or give another folder"
        )
    for name, wanted in description.items():
        found = manifest.get(name)
        if name == "strides" and isinstance(found, list) and set(wanted) <= set(found):
            continue
        if name == "map_target" and not description["strides"]:
            continue
        if name == "with_previous" and not wanted:
            continue
        if found != wanted:
            raise UserError(
                f"teacher cache {str(folder)!r} was written for {name} {found!r}, but this run has "
                f"{wanted!r}; give another folder"
            )
