# SPDX-License-Identifier: Apache-2.0
"""The teacher's answers on disk: the frozen teacher runs once over the data set, and every student after that
reads.

A cache is a folder: one safetensors shard a scene, in half precision, and a manifest that names the teacher
(a hash of its weights), the data and the settings the answers depend on, and a checksum of every shard. It is
written shard by shard, so that a run that was killed goes on. Its answers are for the world as it is: a
mirrored or turned one is refused. Symbols as in ftkd.py; F frames of a scene.
"""

import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.data.clips import Clip
from ftkd_core.distillation.teacher_output import PreviousMaps, TeacherAnswer
from ftkd_core.errors import UserError
from ftkd_core.json_files import write_json

_FORMAT: Final = "ftkd-teacher-cache-2"
"""Raised with every change of the code that changes what the same weights answer: 2 since linking knows how
classes move."""
_MANIFEST: Final = "manifest.json"
Manifest = dict[str, Any]


def describe(
    *, teacher: str, data: str, map_target: str, strides: Iterable[int], with_previous: bool = False
) -> Manifest:
    """What answers depend on: `teacher` a hash of its weights, `data` the name and version of the clips,
    map_target (`FTKDConfig.pv_target`), the strides of the kept maps, and whether those of the frame before
    are kept too."""
    return {
        "format": _FORMAT,
        "teacher": teacher,
        "data": data,
        "map_target": map_target,
        "strides": sorted(strides),
        "with_previous": with_previous,
    }


def fill_cache(
    folder: Path,
    description: Manifest,
    answer: Callable[[Clip], Iterable[TeacherAnswer]],
    load: Callable[[int], Clip],
    num_clips: int,
) -> Path:
    """Run the teacher (`answer`, a clip to the answers of its frames in order, in batches) over those of the
    first num_clips clips whose shard is missing or not of its size; returns the folder. Errors: UserError
    where the folder holds a cache of something else, or an answer is beyond half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _read_manifest(folder) if (folder / _MANIFEST).exists() else {**description, "shards": {}}
    _check_same(folder, manifest, description)
    missing = [index for index in range(num_clips) if not _is_whole(folder, manifest, index)]
    for index in tqdm(missing, desc="teacher", unit="scene"):
        parts = [_to_tensors(part) for part in answer(load(index))]
        tensors = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
        name = f"scene-{index:05d}.safetensors"
        partial = folder / f"{name}.partial"
        save_file(tensors, partial)
        content = partial.read_bytes()
        partial.replace(folder / name)
        manifest["shards"][str(index)] = {"file": name, "bytes": len(content), "crc32": zlib.crc32(content)}
        _write_manifest(folder, manifest)
    return folder


class TeacherCache:
    """`answer = cache(clip, frame)`: a batch of one, in float32 on the CPU. Picklable; the sizes of all
    shards are checked at once, their content when they are first read.

    Errors: UserError where there is no cache, it is of another teacher, data set or setting, it lacks a
    scene, or a shard is damaged or cut off.
    """

    def __init__(self, folder: Path, description: Manifest, num_clips: int) -> None:
        if not (folder / _MANIFEST).is_file():
            raise UserError(f"teacher cache {str(folder)!r} not found; make it with --fill-cache")
        manifest = _read_manifest(folder)
        _check_same(folder, manifest, description)
        lacking = [index for index in range(num_clips) if str(index) not in manifest["shards"]]
        if lacking:
            raise UserError(
                f"teacher cache {str(folder)!r} lacks {len(lacking)} of {num_clips} scenes (the first is "
                f"{lacking[0]}); go on filling it with --fill-cache"
            )
        self.folder, self.shards = folder, manifest["shards"]
        for index in range(num_clips):
            if not _is_whole(folder, manifest, index):
                path, size = folder / self.shards[str(index)]["file"], self.shards[str(index)]["bytes"]
                raise UserError(
                    f"teacher cache shard {str(path)!r} has {_size(path)} bytes; expected {size}: missing "
                    "or cut off; --fill-cache makes it anew"
                )
        self._checked: set[int] = set()

    def __call__(self, clip: int, frame: int) -> TeacherAnswer:
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
    """UserError where students would be shown a world that cached answers are not about. Colours, blank
    squares and missing cameras are the student's own affair."""
    if augment.flip or augment.rotation or augment.scale:
        raise UserError(
            f"augment.flip {augment.flip}, augment.rotation {augment.rotation} and augment.scale "
            f"{augment.scale} change the world, but cached answers are of it as it is; set all to 0 or "
            "leave the cache out"
        )
    if (augment.zoom_least, augment.zoom_most) != (1.0, 1.0):
        raise UserError(
            f"augment.zoom_least {augment.zoom_least} and zoom_most {augment.zoom_most} draw the images "
            "anew, but cached maps are of the images as they are; set both to 1 or leave the cache out"
        )


def collate_answers(answers: list[TeacherAnswer]) -> TeacherAnswer:
    """One batch of several answers."""

    def maps(name: str) -> dict[int, Tensor]:
        return {s: torch.cat([getattr(a, name)[s] for a in answers]) for s in getattr(answers[0], name)}

    return TeacherAnswer(
        torch.cat([a.logits for a in answers], dim=1),
        torch.cat([a.codes for a in answers], dim=1),
        torch.cat([a.features for a in answers]),
        maps("targets"),
        maps("target_weights"),
        _collate_previous([a.previous for a in answers if a.previous is not None]),
    )


def _collate_previous(parts: list[PreviousMaps]) -> PreviousMaps | None:
    if not parts:
        return None
    maps = {stride: torch.cat([part.maps[stride] for part in parts]) for stride in parts[0].maps}
    return PreviousMaps(maps, torch.cat([part.known for part in parts]))


def _to_tensors(answer: TeacherAnswer) -> dict[str, Tensor]:
    """An answer as tensors with the frame first, in half precision: boxes are good to 2 cm at 64 m. Errors:
    UserError for a number that float16 cannot hold."""
    tensors = {
        "logits": answer.logits.transpose(0, 1),
        "codes": answer.codes.transpose(0, 1),
        "features": answer.features,
    }
    for stride, target in answer.targets.items():
        tensors[f"target{stride}"] = target
        tensors[f"weight{stride}"] = answer.target_weights[stride]
    if answer.previous is not None:
        tensors["known"] = answer.previous.known
        tensors |= {f"previous{stride}": maps for stride, maps in answer.previous.maps.items()}
    halves = {name: value.detach().cpu().half() for name, value in tensors.items()}
    for name, half in halves.items():
        if not torch.isfinite(half).all():
            largest = float(tensors[name].detach().abs().max())
            raise UserError(
                f"the teacher's {name} reach {largest:g}, beyond what the cache's float16 holds (65504); "
                "leave --cache out, or train a teacher whose answers are finite and smaller"
            )
    return halves


def _from_tensors(found: dict[str, Tensor]) -> TeacherAnswer:
    values = {name: value.float() for name, value in found.items()}
    strides = sorted(int(name.removeprefix("target")) for name in values if name.startswith("target"))
    previous = None
    if "known" in values:
        before = {stride: values[f"previous{stride}"] for stride in strides}
        previous = PreviousMaps(before, values["known"])
    return TeacherAnswer(
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
    """Whether the shard of a clip is there, and of the size it was written with."""
    shard = manifest["shards"].get(str(index))
    return shard is not None and _size(folder / shard["file"]) == shard["bytes"]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / _MANIFEST, manifest, indent=1)


def _check_same(folder: Path, manifest: Manifest, description: Manifest) -> None:
    """A cache may hold more than a run needs: maps of other strides, or of the frame before."""
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
                f"teacher cache {str(folder)!r} is of {name} {found!r}; this run has {wanted!r}: give another"
            )
