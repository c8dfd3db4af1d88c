# SPDX-License-Identifier: Apache-2.0
"""Export of driving scenes as a data set that the nuScenes devkit loads, draws and scores.

The data set is written to a hidden folder next to the output folder and renamed when it is complete, so an
interrupted run leaves no data set that looks complete.
"""

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tqdm import tqdm

from ftkd_core.data.synthetic.export_scene import ExportOptions, SceneWriter, key_frame_count, round_times
from ftkd_core.data.synthetic.export_tables import DatasetTables
from ftkd_core.data.synthetic.rig_presets import DEFAULT_RIG
from ftkd_core.data.synthetic.traffic import world_config
from ftkd_core.data.synthetic.varied_rigs import rig_of_scene
from ftkd_core.data.synthetic.world import make_scene
from ftkd_core.errors import UserError
from ftkd_core.json_files import write_json

DEFAULT_WIDTH: Final = 800
_OFFICIAL_SPLITS: Final = ("train", "val", "test", "mini_train", "mini_val", "train_detect", "train_track")
_DATA_FOLDERS: Final = ("samples", "sweeps", "maps")
# A longer drive would reach the end of the roads.
_LONGEST_SCENE_S: Final = 30.0
# Each seed starts a minute after the one before; larger seeds overflow ROS stamps (32-bit seconds).
_LARGEST_SEED: Final = 9_100_000


def run_synth(
    output: Path,
    scenes: int,
    first_seed: int,
    version: str,
    split: str,
    width: int,
    height: int | None,
    duration_s: float,
    world: str = "ordinary",
    rig: str = DEFAULT_RIG,
) -> Path:
    """Write `scenes` scenes of consecutive seeds and return the data set's folder (`ftkd synth`)."""
    if scenes < 1:
        raise UserError(f"number of scenes {scenes} is not positive; expected at least 1")
    seeds = range(first_seed, first_seed + scenes)
    return write_dataset(
        output, seeds, version=version, split=split, width=width, height=height, duration_s=duration_s,
        world=world, rig=rig,
    )  # fmt: skip


def write_dataset(
    dataroot: Path,
    scene_seeds: Sequence[int],
    *,
    version: str,
    split: str,
    width: int,
    height: int | None,
    duration_s: float = 20.0,
    world: str = "ordinary",
    rig: str = DEFAULT_RIG,
    sweeps: bool = True,
    jpeg_quality: int = 90,
    progress: bool = True,
) -> Path:
    """Render one scene per seed, write them as `version` with the custom split `split`, and return the
    folder.

    Images are width x height pixels (height None: with the aspect of the rig) at 12 Hz (2 Hz without
    `sweeps`). rig as in `varied_rigs.rig_of_scene`; a drawn rig is written as its calibration describes it,
    with its errors. Equal arguments give equal tokens and
    annotations. Raises UserError for arguments out of range and for a folder that exists and is not empty.
    """
    _check_arguments(scene_seeds, version, split, width, height, duration_s, jpeg_quality)
    rigs = [rig_of_scene(rig, seed).resized(width, height) for seed in scene_seeds]
    config = world_config(world)
    final = _free_folder(dataroot)
    partial = _hidden_folder(final)
    total = len(round_times(duration_s, sweeps)) * sum(len(driven.true.channels) for driven in rigs)
    names: list[str] = []
    try:
        with tqdm(total=total, unit="image", desc=final.name, disable=not progress) as bar:
            options = ExportOptions(sweeps=sweeps, jpeg_quality=jpeg_quality, on_image=bar.update)
            tables = DatasetTables()
            for seed, driven in zip(scene_seeds, rigs, strict=True):
                scene = make_scene(seed, duration_s, config)
                SceneWriter(scene, driven, partial, tables, options).write()
                names.append(scene.name)
        tables.write(partial / version)
        write_json(partial / version / "splits.json", {split: names})
        os.rename(partial, final)  # replaces an empty folder, fails on any other
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _free_folder(dataroot: Path) -> Path:
    """Return the resolved output folder. Raises UserError unless it is absent or empty."""
    final = Path(dataroot).expanduser().resolve()
    if final.exists() and not final.is_dir():
        raise UserError(f"output {str(final)!r} is a file; give a folder that is absent or empty")
    if final.is_dir() and any(final.iterdir()):
        raise UserError(
            f"output folder {str(final)!r} is not empty; give another folder or empty it "
            "(nothing is overwritten)"
        )
    if final.is_mount():
        raise UserError(f"output folder {str(final)!r} is a mount point; give a folder inside it")
    return final


def _hidden_folder(final: Path) -> Path:
    """Create a new hidden folder next to the output folder. Raises UserError if that is not possible."""
    partial = final.with_name(f".{final.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {str(final.parent)!r} ({error.strerror}); give another output folder"
        ) from error
    return partial


def _check_arguments(
    scene_seeds: Sequence[int],
    version: str,
    split: str,
    width: int,
    height: int | None,
    duration_s: float,
    jpeg_quality: int,
) -> None:
    if not scene_seeds or len(set(scene_seeds)) != len(scene_seeds):
        raise UserError(f"scene seeds {list(scene_seeds)[:10]}: expected at least one, each only once")
    if min(scene_seeds) < 0 or max(scene_seeds) > _LARGEST_SEED:
        raise UserError(
            f"scene seeds {min(scene_seeds)} to {max(scene_seeds)}: expected 0 to {_LARGEST_SEED}"
        )
    if not version or Path(version).name != version or version in _DATA_FOLDERS:
        raise UserError(f"version {version!r} cannot name a folder of tables; try 'v1.0-synth'")
    if not split or split in _OFFICIAL_SPLITS:
        raise UserError(
            f"split {split!r} is not usable: the devkit has its own list for {', '.join(_OFFICIAL_SPLITS)}; "
            "try 'synth_val'"
        )
    least = 32 if height is None else height
    if width < 64 or least < 32 or width > 4096 or least > 4096:
        raise UserError(f"image size {width}x{height or 'auto'} is out of range; expected 64x32 to 4096x4096")
    if not 0 < duration_s <= _LONGEST_SCENE_S or key_frame_count(duration_s) < 1:
        raise UserError(f"duration {duration_s} s is out of range; expected 0.5 to {_LONGEST_SCENE_S:g} s")
    if not 1 <= jpeg_quality <= 100:
        raise UserError(f"JPEG quality {jpeg_quality} is out of range; expected 1 to 100")
