# SPDX-License-Identifier: Apache-2.0
"""Several nuScenes scenes -> one bag each: the tables are loaded once, scenes are converted in parallel.

A run can be repeated: finished bags are kept. A scene without images is skipped with a sentence; a scene that
fails is reported at the end and does not stop the others.
"""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ftkd_core.data import nuscenes
from ftkd_core.errors import UserError
from ftkd_ros.bag.convert import bag_label, convert_opened
from ftkd_ros.bag.convert_extras import Extras
from ftkd_ros.bag.fleet import Workers, run_tasks

ALL_SCENES: Final = "all"


@dataclass
class ScenesReport:
    """Sentences by kind: scenes that were written, kept from an earlier run, skipped, or failed."""

    written: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(
            f"{len(getattr(self, kind))} {kind}" for kind in ("written", "kept", "skipped", "failed")
        )

    def check(self) -> None:
        """Raise UserError if a scene failed or no scene has a bag."""
        if self.failed:
            raise UserError(f"{len(self.failed)} scenes failed: {'; '.join(self.failed)}")
        if not self.written and not self.kept:
            raise UserError(f"no scene was converted: {'; '.join(self.skipped) or 'none was chosen'}")


def choose_scenes(dataset: nuscenes.Dataset, names: Sequence[str], split: str | None) -> list[str]:
    """Return the scenes of a split, or those named; all without either.

    Raises UserError for an unknown scene or split.
    """
    if split is not None:
        return nuscenes.split_scenes(dataset, split)
    known = nuscenes.scene_names(dataset)
    if not names or ALL_SCENES in names:
        return known
    for name in names:
        if name not in known:
            nuscenes.scene_samples(dataset, name)  # raises with the names of the existing scenes
    return list(dict.fromkeys(names))


def convert_scenes(
    dataset: nuscenes.Dataset,
    scenes: Sequence[str],
    output: Path,
    *,
    sweeps: bool = False,
    extras: Extras | None = None,
    jobs: int = 1,
    ray: str = "",
    category_map: Mapping[str, str] | None = None,
    on_text: Callable[[str], None] = print,
) -> ScenesReport:
    """Write each scene to the bag `output`/SCENE with `jobs` processes, or on the Ray cluster `ray`, whose
    machines share data set and output. `on_text` gets one line per scene."""
    report = ScenesReport()
    waiting = []
    for scene in scenes:
        if _is_converted(output / scene, bag_label(dataset, scene, sweeps=sweeps, extras=extras)):
            report.kept.append(scene)
        elif reason := _nothing_to_convert(dataset, scene):
            report.skipped.append(f"scene {scene!r} {reason}")
            on_text(f"skipped {report.skipped[-1]}")
        else:
            waiting.append(scene)
    if ray:
        place = (str(dataset.dataroot), str(dataset.version), category_map)
        task = partial(_convert_opened_there, place, output.resolve(), sweeps, extras)
        results: Iterable[tuple[str, str, bool]] = run_tasks(task, waiting, Workers(ray=ray))
    else:
        results = _converted(dataset, waiting, output, sweeps, extras, jobs)
    for scene, text, failed in results:
        (report.failed if failed else report.written).append(text if failed else scene)
        on_text(f"failed: {text}" if failed else text)
    return report


def _converted(
    dataset: nuscenes.Dataset,
    scenes: Sequence[str],
    output: Path,
    sweeps: bool,
    extras: Extras | None,
    jobs: int,
) -> Iterator[tuple[str, str, bool]]:
    """Yield (scene, sentence, whether it failed) as scenes end."""
    convert = partial(_convert_one, output=output, sweeps=sweeps, extras=extras)
    if jobs <= 1 or len(scenes) <= 1:
        for scene in scenes:
            yield convert(scene, dataset=dataset)
        return
    _shared.append(dataset)  # forked processes see the tables without loading them again
    try:
        with ProcessPoolExecutor(min(jobs, len(scenes)), multiprocessing.get_context("fork")) as pool:
            futures = {pool.submit(convert, scene): scene for scene in scenes}
            for future in as_completed(futures):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    yield (
                        futures[future],
                        f"scene {futures[future]!r}: its process was killed; run again",
                        True,
                    )
    finally:
        _shared.clear()


_shared: list[nuscenes.Dataset] = []
_Place = tuple[str, str, Mapping[str, str] | None]
_opened: dict[str, nuscenes.Dataset] = {}


def _convert_opened_there(
    place: _Place, output: Path, sweeps: bool, extras: Extras | None, scene: str
) -> str:
    """Convert a scene in a process of a cluster, which loads the tables once."""
    key = repr(place)
    if key not in _opened:
        _opened[key] = nuscenes.open_dataset(*place)
    _, text, failed = _convert_one(scene, output=output, sweeps=sweeps, extras=extras, dataset=_opened[key])
    if failed:
        raise UserError(text)
    return text


def _convert_one(
    scene: str,
    *,
    output: Path,
    sweeps: bool,
    extras: Extras | None = None,
    dataset: nuscenes.Dataset | None = None,
) -> tuple[str, str, bool]:
    opened = dataset if dataset is not None else _shared[0]
    try:
        summary = convert_opened(opened, scene, output / scene, sweeps=sweeps, extras=extras, progress=False)
        return scene, "\n".join([str(summary), *(f"note: {note}" for note in summary.notes)]), False
    except UserError as error:
        return scene, str(error), True


def _nothing_to_convert(dataset: nuscenes.Dataset, scene: str) -> str | None:
    """Return why a scene has no image at all; None if it has one."""
    records = [
        record
        for channel in nuscenes.camera_channels(dataset)
        for record in nuscenes.camera_records(dataset, scene, channel, keyframes_only=True)
    ]
    if not records:
        return "has no camera data in the tables"
    if not any(record.path.is_file() for record in records):
        return f"has none of its {len(records)} key frame images, first {str(records[0].path)!r}"
    return None


def _is_converted(bag: Path, label: dict[str, str]) -> bool:
    """Whether a bag is a finished conversion of the same scene.

    Raises UserError if something else is at its place.
    """
    if not bag.exists():
        return False
    try:
        content = YAML(typ="safe").load((bag / "metadata.yaml").read_text(encoding="utf-8"))
        found = content["rosbag2_bagfile_information"]["custom_data"]
    except (OSError, YAMLError, KeyError, TypeError):
        found = None
    if not isinstance(found, dict) or {key: found.get(key) for key in label} != label:
        raise UserError(
            f"output {str(bag)!r} exists and is not this conversion ({label}); give another folder"
        )
    return True
