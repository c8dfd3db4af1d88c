# SPDX-License-Identifier: Apache-2.0
"""Train every recipe on one CPU process: some steps at full size, or more at reduced size on real scenes.

    python -m benchmarks.recipes --out build/recipes --json benchmarks/results/recipes_cpu.json
    python -m benchmarks.recipes --out build/recipes --json FILE --recipe sparse_bev_r50 --steps 5
    python -m benchmarks.recipes --out build/recipes --json FILE --steps 200 \\
        --reduced build/frames:v1.0-mini:photographs --reduced build/mini_val:v1.0-mini:mini_val

At full size each recipe runs with its own model, image size, losses, optimizer and augmentation, on synthetic
scenes in nuScenes format with sweeps. Differences from a real run: one sample per step, a random backbone
whose batch norms get their statistics from the first sample (recipes start from pretrained ones), the loader
in the process, and a few samples that are repeated, so that the first and the last loss are of the same
samples. Students are distilled from a teacher with random weights. `overrides` lists the changes that a
recipe needs to fit this machine.

With --reduced, small models train on the whole split of a data set (`benchmarks.real_scenes` makes two) and
are then scored on it with the official metrics; first and last loss are means of ten steps.

The run can be stopped at any time; the same command resumes it. The file has one entry per recipe that has
finished all steps; reduced runs are in its field `reduced`.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.utils.data import Dataset

from benchmarks.memory import count_parameters, recipe_memory
from benchmarks.report import environment, rounded, write_figures
from ftkd_core.config import DetectorConfig, SparseBEVConfig, override
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
from training.trainer import WEIGHTS_NAME, Trainer
from training.validate import ValidateOptions, score_weights

SEED: Final = 3
_DATA: Final = ("v1.0-synth", "recipes")  # version and split
_SAMPLES: Final = 2  # windows that are repeated
_FRAMES: Final = 4  # frames of the stream that is repeated


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


REDUCED: Final = (
    "image.width=192", "image.height=64", "backbone.depth=18", "backbone.base_channels=16",
    "decoder.channels=64", "decoder.num_layers=3", "decoder.ffn_channels=128", "decoder.num_heads=4",
)  # fmt: skip
"""Model of a reduced run."""
_REDUCED_SPARSE: Final = ("decoder.num_queries=100", "decoder.out_points=16", "num_past=3")
_REDUCED_STREAM: Final = (
    "backbone.neck_channels=64", "decoder.num_queries=64", "decoder.num_propagated=32",
    "decoder.memory_length=128", "decoder.position_hidden=128",
)  # fmt: skip
_WINDOW_MEAN: Final = 10  # steps of the first and last loss of a reduced run


@dataclass(frozen=True)
class Source:
    """A data set: folder, version and split; repeats: the first samples only, again and again."""

    root: Path
    version: str = _DATA[0]
    split: str = _DATA[1]
    repeats: bool = True


def read_source(text: str) -> Source:
    """Parse ROOT:VERSION:SPLIT of --reduced. Raise UserError if it has another form."""
    parts = text.rsplit(":", 2)
    if len(parts) != 3:
        raise UserError(f"--reduced {text!r}: expected ROOT:VERSION:SPLIT")
    return Source(Path(parts[0]), parts[1], parts[2], repeats=False)


def reduced_settings(model: DetectorConfig | SparseBEVConfig) -> list[str]:
    """Return the settings that shrink a recipe's model."""
    sparse = isinstance(model, SparseBEVConfig)
    own = _REDUCED_SPARSE if sparse else _REDUCED_STREAM
    future = ("num_future=3",) if isinstance(model, SparseBEVConfig) and model.num_future else ()
    return [f"model.{text}" for text in (*REDUCED, *own, *future)]


def settings_of(
    name: str, source: Source, cache: Path, overrides: Sequence[str]
) -> TrainConfig | WindowTrainConfig:
    """Return the configuration of a recipe with one sample per step on a data set."""
    own = [
        "streams=1", f"data.root={source.root}", f"data.nuscenes={source.version}",
        f"data.split={source.split}", f"data.cache={cache}", "data.workers=0", f"seed={SEED}",
    ]  # fmt: skip
    return train.resolve_config(train.TrainOptions(out=Path(), recipe=name, overrides=[*own, *overrides]))


class RecipeRun:
    """A recipe that trains step by step in a folder and resumes there; teacher: settings of the model that a
    student is distilled from."""

    def __init__(
        self, name: str, out: Path, source: Source, steps: int, overrides: Sequence[str],
        teacher: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.name, self.out, self.steps, self.overrides = name, out, steps, list(overrides)
        self.config = settings_of(name, source, out.parent / "index", overrides)
        fabric = make_fabric("cpu")
        fabric.seed_everything(SEED, verbose=False)
        out.mkdir(parents=True, exist_ok=True)
        model = train._build_model(self.config, None, fabric)
        self.parameters = count_parameters(model)
        clips, scenes = open_clips(self.config, fabric)
        guide = _random_teacher(teacher) if RECIPES[name].distilled else None
        distiller: Distiller | None = None
        if guide is not None:
            distiller = make_distiller(guide.teacher, model, guide.method)
        self.data: Dataset[Any] = train._make_dataset(self.config, clips, scenes, fabric, guide, None)
        self.count = _WINDOW_MEAN
        if source.repeats:
            self.count = _SAMPLES if isinstance(model, SparseBEV) else _FRAMES
            self.data = Repeated(self.data, self.count)
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
        """Return the entry of the results file; losses are means over the repeated samples, or ten steps."""
        first = sum(self.losses[: self.count]) / self.count
        last = sum(self.losses[-self.count :]) / self.count
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


def _random_teacher(settings: Sequence[str]) -> TeacherSource:
    """Return FTKD with the teacher of the recipes, with random weights."""
    model = RECIPES["sparse_bev_r101_offline"].model()
    assert isinstance(model, SparseBEVConfig)
    model = override(model, [text.removeprefix("model.") for text in settings])
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


def measure(name: str, options: argparse.Namespace, source: Source) -> dict[str, Any]:
    """Return the entry of a recipe at full size, after training it."""
    overrides = [*MACHINE_OVERRIDES.get(name, ()), *options.overrides]
    run = RecipeRun(name, options.out / name, source, options.steps, overrides)
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


def measure_reduced(name: str, options: argparse.Namespace, source: Source) -> dict[str, Any]:
    """Train a recipe at reduced size on a data set and score it there; return its figures."""
    overrides = [
        *reduced_settings(RECIPES[name].model()), "data.sweeps=[0, 0]", "optim.warmup_steps=20",
        *options.overrides,
    ]  # fmt: skip
    teacher = reduced_settings(RECIPES["sparse_bev_r101_offline"].model())
    out = options.out / f"{name}-{source.root.name}"
    run = RecipeRun(name, out, source, options.steps, overrides, teacher)
    run.run(options.steps)
    entry = run.entry()
    weights = ValidateOptions(
        dataroot=source.root, version=source.version, split=source.split, device="cpu",
        weights=out / WEIGHTS_NAME,
    )  # fmt: skip
    scores = score_weights(weights)
    kept = ("steps_run", "first_loss", "last_loss", "params_m", "images_per_step", "seconds_per_step")
    return {
        **{key: entry[key] for key in kept},
        **{key: scores[key] for key in ("NDS", "mAP", "samples")},
        "overrides": overrides,
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
        "--reduced", action="append", default=[], metavar="ROOT:VERSION:SPLIT",
        help="train at reduced size on this data set instead (repeatable)",
    )  # fmt: skip
    add(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a setting"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train the recipes one after the other and update the results file after each."""
    options = make_parser().parse_args(argv)
    try:
        sources = [read_source(text) for text in options.reduced]
        full = None if sources else Source(prepare_data(options.out))
        for name in options.recipe or RECIPES:
            if full is not None:
                write_entry(options.json, measure(name, options, full))
            for source in sources:
                write_reduced(options.json, name, source, measure_reduced(name, options, source))
            print(f"{name}: written to {options.json}", flush=True)
    except (UserError, FloatingPointError) as error:
        print(f"recipes: {error}", file=sys.stderr)
        return 2
    return 0


def read_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of a results file by recipe."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return {entry["recipe"]: entry for entry in known}


def write_entry(path: Path, entry: dict[str, Any]) -> None:
    """Add an entry to a results file, in the place of that of the same recipe, whose reduced runs are
    kept."""
    entries = read_entries(path)
    reduced = entries.get(entry["recipe"], {}).get("reduced")
    entry = entry if reduced is None else {**entry, "reduced": reduced}
    entries[entry["recipe"]] = {**rounded(entry), "environment": environment(None)}
    _write(path, entries)


def write_reduced(path: Path, name: str, source: Source, figures: dict[str, Any]) -> None:
    """Add the figures of a reduced run to the entry of its recipe, under the name of the data set."""
    entries = read_entries(path)
    entry = entries.setdefault(name, {"recipe": name})
    entry["reduced"] = {**entry.get("reduced", {}), source.root.name: rounded(figures)}
    _write(path, entries)


def _write(path: Path, entries: dict[str, dict[str, Any]]) -> None:
    write_figures(path, [entries[name] for name in RECIPES if name in entries])


if __name__ == "__main__":
    sys.exit(main())
