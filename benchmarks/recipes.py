# SPDX-License-Identifier: Apache-2.0
"""Train every recipe for some steps at full size on one CPU process, and report its losses and its memory.

    python -m benchmarks.recipes --out build/recipes --json benchmarks/results/recipes_cpu.json
    python -m benchmarks.recipes --out build/recipes --json FILE --recipe sparse_bev_r50 --steps 5

Each recipe runs with its own model, image size, losses, optimizer and augmentation, on synthetic scenes in
nuScenes format with sweeps. Differences from a real run: one sample per step, a random backbone whose batch
norms get their statistics from the first sample (recipes start from pretrained ones), loader in the process,
and a few samples that are repeated, so that the first and the last loss are of the same samples. Students are
distilled from a teacher with random weights. `overrides` lists the changes that a recipe needs to fit this
machine.

The run can be stopped at any time; the same command resumes it. The file has one entry per recipe that has
finished all steps.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.utils.data import Dataset

from benchmarks.memory import count_parameters, recipe_memory
from benchmarks.report import environment, rounded, write_figures
from ftkd_core.config import SparseBEVConfig, override
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.distillation.methods import method_config
from ftkd_core.errors import UserError
from ftkd_core.json_files import write_json
from ftkd_core.models.resnet import ResNet
from ftkd_core.models.sparse_bev import SparseBEV, build_sparse_bev
from training import checkpoint, train
from training.config import TrainConfig, WindowTrainConfig
from training.datasets import open_clips
from training.devices import autocast_dtype, make_fabric
from training.distiller import Distiller, make_distiller
from training.feature_cache import network_input
from training.recipes import RECIPES
from training.teacher_source import TeacherSource
from training.trainer import Trainer

SEED: Final = 3
_DATA: Final = ("v1.0-synth", "recipes")  # version and split
_SAMPLES: Final = 2  # windows that are repeated
_FRAMES: Final = 4  # frames of the stream that is repeated
_TEACHER_OVERRIDES: Sequence[str] = ()  # of the students' teacher; tests make it small


class Repeated(Dataset[Any]):
    """The first `count` items of a data set, again and again."""

    def __init__(self, items: Dataset[Any], count: int) -> None:
        self.items, self.count = items, count

    def __getitem__(self, step: int) -> Any:
        return self.items[step % self.count]


def prepare_data(folder: Path, *, width: int = 1600, height: int = 900, duration_s: float = 8.0) -> Path:
    """Render two scenes with sweeps in nuScenes format, unless they exist; return the folder."""
    root = folder / "nuscenes"
    if not root.exists():
        write_dataset(
            root, (0, 1), version=_DATA[0], split=_DATA[1], width=width, height=height, duration_s=duration_s
        )
    return root


def settings_of(
    name: str, root: Path, cache: Path, overrides: Sequence[str]
) -> TrainConfig | WindowTrainConfig:
    """Return the configuration of a recipe with one sample per step on the data set in `root`."""
    own = [
        "streams=1", f"data.root={root}", f"data.nuscenes={_DATA[0]}", f"data.split={_DATA[1]}",
        f"data.cache={cache}", "data.workers=0", f"seed={SEED}",
    ]  # fmt: skip
    return train.resolve_config(train.TrainOptions(out=Path(), recipe=name, overrides=[*own, *overrides]))


class RecipeRun:
    """A recipe that trains step by step in a folder and resumes there."""

    def __init__(self, name: str, out: Path, root: Path, steps: int, overrides: Sequence[str]) -> None:
        self.name, self.out, self.steps, self.overrides = name, out, steps, list(overrides)
        self.config = settings_of(name, root, out.parent / "index", overrides)
        fabric = make_fabric("cpu")
        fabric.seed_everything(SEED, verbose=False)
        out.mkdir(parents=True, exist_ok=True)
        model = train._build_model(self.config, None, fabric)
        self.parameters = count_parameters(model)
        clips, scenes = open_clips(self.config, fabric)
        source = _random_teacher() if RECIPES[name].distilled else None
        distiller: Distiller | None = None
        if source is not None:
            distiller = make_distiller(source.teacher, model, source.method)
        data = train._make_dataset(self.config, clips, scenes, fabric, source, None)
        self.data = Repeated(data, _SAMPLES if isinstance(model, SparseBEV) else _FRAMES)
        self.trainer = Trainer(
            fabric, train.make_task(self.config, model, distiller), self.config.optim, out,
            steps=self.config.steps, seed=SEED, autocast=autocast_dtype("bf16-mixed", fabric.device),
        )  # fmt: skip
        self.losses: list[float] = []
        self.seconds = 0.0
        if (out / checkpoint.FILE_NAME).exists():
            self.trainer.resume(out / checkpoint.FILE_NAME)
            found = json.loads((out / "losses.json").read_text(encoding="utf-8"))
            self.losses, self.seconds = found["losses"][: self.trainer.step], found["seconds"]
        else:
            set_statistics(model.backbone, self.data[0])

    def run(self, save_every: int) -> None:
        """Train to the last step; write a checkpoint and the losses every save_every steps."""
        self.trainer.start_training()
        while self.trainer.step < self.steps:
            began = time.monotonic()
            terms, _ = self.trainer.train_step(self.data[self.trainer.step])
            self.trainer.step += 1
            self.losses.append(float(sum(terms.values())))
            self.seconds += time.monotonic() - began
            print(f"{self.name} step {self.trainer.step}: {self.losses[-1]:.3f}", flush=True)
            if self.trainer.step % save_every == 0 or self.trainer.step == self.steps:
                self.trainer.save()
                write_json(self.out / "losses.json", {"losses": self.losses, "seconds": self.seconds})

    @property
    def data_frames(self) -> int:
        """Frames of the student, or of the teacher that is trained, per step."""
        model = self.config.model
        return model.num_frames if isinstance(model, SparseBEVConfig) else 1

    def entry(self) -> dict[str, Any]:
        """Return the entry of the results file; losses are means over all repeated samples."""
        count = self.data.count
        first = sum(self.losses[:count]) / count
        last = sum(self.losses[-count:]) / count
        return {
            "recipe": self.name,
            "params_m": self.parameters,
            "steps_run": len(self.losses),
            "first_loss": first,
            "last_loss": last,
            "images_per_step": self.data_frames * len(self.config.model.channels),
            "losses": self.losses,
            "seconds_per_step": self.seconds / len(self.losses),
            "overrides": self.overrides,
        }


def _random_teacher() -> TeacherSource:
    """Return FTKD with the teacher of the recipes, with random weights."""
    model = RECIPES["sparse_bev_r101_offline"].model()
    assert isinstance(model, SparseBEVConfig)
    model = override(model, [text.removeprefix("model.") for text in _TEACHER_OVERRIDES])
    return TeacherSource(build_sparse_bev(model), method_config("ftkd"))


@torch.no_grad()
def set_statistics(backbone: ResNet, item: Any) -> None:
    """Set the statistics of a random backbone's batch norms to those of the current frame of an item."""
    batch = item if hasattr(item, "images") else item[0]
    images = batch.images[:, 0] if batch.images.ndim == 6 else batch.images
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    backbone(network_input(images).flatten(0, 1))
    for norm in norms:
        norm.momentum = 0.1
        norm.eval()


MACHINE_OVERRIDES: Final[dict[str, tuple[str, ...]]] = {
    "sparse_bev_r101": ("gradient_frames=1",),
    "sparse_bev_r101_offline": ("gradient_frames=1",),
}
"""Settings with which the largest recipes fit 16 GB of memory; on a GPU they need none."""


def measure(name: str, options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Return the entry of a recipe, after training it."""
    overrides = [*MACHINE_OVERRIDES.get(name, ()), *options.overrides]
    run = RecipeRun(name, options.out / name, root, options.steps, overrides)
    run.run(options.save_every)
    entry = run.entry()
    del run
    gc.collect()
    memory = recipe_memory(name)["recipe"]
    return {
        **entry,
        "saved_activation_gb_per_sample": memory["saved_activation_gb"],
        "peak_gb_per_sample": memory["peak_gb"],
    }


def make_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("build/recipes"), help="folder of data and checkpoints")
    add("--json", type=Path, required=True, help="file of the entries; those of other recipes are kept")
    add("--recipe", choices=sorted(RECIPES), action="append", help="only this one (repeatable)")
    add("--steps", type=int, default=20, help="optimizer steps (default 20)")
    add("--save-every", type=int, default=5, help="steps between checkpoints (default 5)")
    add(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a setting"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train the recipes one after the other and update the results file after each."""
    options = make_parser().parse_args(argv)
    try:
        root = prepare_data(options.out)
        for name in options.recipe or RECIPES:
            entry = measure(name, options, root)
            write_entry(options.json, entry)
            print(json.dumps(rounded({k: v for k, v in entry.items() if k != "losses"})))
    except (UserError, FloatingPointError) as error:
        print(f"recipes: {error}", file=sys.stderr)
        return 2
    return 0


def write_entry(path: Path, entry: dict[str, Any]) -> None:
    """Add an entry to a results file, in the place of that of the same recipe, in the order of RECIPES."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    entries = {old["recipe"]: old for old in known}
    kept = {key: entries.get(entry["recipe"], {}).get(key) for key in ("reduced",)}
    entries[entry["recipe"]] = rounded({**entry, **{k: v for k, v in kept.items() if v}})
    entries[entry["recipe"]]["environment"] = environment(None)
    write_figures(path, [entries[name] for name in RECIPES if name in entries])


if __name__ == "__main__":
    sys.exit(main())
