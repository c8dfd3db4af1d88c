# SPDX-License-Identifier: Apache-2.0
"""Comparison of the recipes with the public code, setting by setting.

Values of a recipe are read from its resolved configuration, so the table cannot differ from what is trained.
A row without such a value describes behaviour; tests of that behaviour are named in its note or are those of
the losses (test_published_losses.py), data (test_published_data.py) and models (research/parity.md).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Final

from ftkd_core.losses.matching import BOX_WEIGHT, CODE_WEIGHTS
from training.config import MAX_GRADIENT_NORM, WEIGHT_DECAY, TrainConfig, WindowTrainConfig
from training.recipes import RECIPES, Recipe
from training.train import TrainOptions, resolve_config

_STREAM: Final = "stream_petr_r50_flash_704_bs2_seq_{}.py"
_PAPER: Final = "arXiv 2512.08247"
_NAMES: Final = {"lr": "learning rate", "backbone": "rate of the backbone"}
_NOT_GIVEN: Final = dict.fromkeys(("lr", "backbone", "init"), "not given")


@dataclass(frozen=True)
class Row:
    """A setting: its public value and where it is, and ours, which is a dotted path in the configuration of
    the run or, if it starts with `=`, a text; why ours differs, or a note."""

    setting: str
    public: Any
    file: str
    ours: str
    note: str = ""
    differs: bool = False

    def cells(self, config: TrainConfig | WindowTrainConfig) -> tuple[str, str, str, str, str]:
        """Return setting, public value, file, our value and verdict."""
        if self.ours.startswith("="):
            value = self.ours[1:]
            equal = not self.differs
            if not isinstance(self.public, str) and equal:
                equal = value == _text(self.public)
        else:
            found = lookup(config, self.ours)
            value, equal = _text(found), _text(found) == _text(self.public)
        verdict = "equal" if equal else "differs"
        return (
            self.setting,
            _text(self.public),
            self.file,
            value,
            f"{verdict}{': ' * bool(self.note)}{self.note}",
        )


def lookup(config: Any, path: str) -> Any:
    """Return the value at a dotted path of a configuration."""
    for name in path.split("."):
        config = getattr(config, name)
    assert not is_dataclass(config), path
    return config


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _schedule(recipe: Recipe, file: str, published: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the rows that differ between the recipes of a model."""
    for setting, value in (("epochs", recipe.epochs), ("batch", recipe.batch)):
        public = published[setting]
        note = "" if public == value else "the student's [ours]"
        yield Row(setting, public, file, f"={value}", note, differs=public != value)
    for setting, path in (("lr", "optim.lr"), ("backbone", "optim.backbone_ratio")):
        given = published[setting] != "not given"
        note = "" if given else "StreamPETR's and SparseBEV's at this batch [code]"
        yield Row(_NAMES[setting], published[setting], file, path, note)
    given = published["init"] != "not given"
    yield Row("starts from", published["init"], file, f"={recipe.init}", "" if given else "[ours]", not given)
    yield Row("learned queries", published["queries"], file, "model.decoder.num_queries")


def _common(file: str) -> Iterator[Row]:
    """Yield rows of both public models."""
    yield Row("optimizer", "AdamW", file, "=AdamW")
    yield Row("weight decay, of all parameters", 0.01, file, f"={WEIGHT_DECAY:g}")
    yield Row("warm-up steps", 500, file, "optim.warmup_steps")
    yield Row("first rate", 0.3333, file, "optim.warmup_start", "a third")
    yield Row("last rate of the cosine", 0.001, file, "optim.final_ratio")
    yield Row("start of the cosine", "step 0", "mmcv lr_updater.py", "=end of the warm-up",
              "at step 500 of 100,000 the rates differ by 0.006 %", differs=True)  # fmt: skip
    yield Row("gradient clipping, norm", 35, file, f"={MAX_GRADIENT_NORM:g}")
    yield Row("averaged weights", "none", file, "=none (optim.ema 0)")
    yield Row("precision", "float16 with loss scaling", file, "=bfloat16 on a GPU",
              "bfloat16 has the range of float32 and needs no scaling", differs=True)  # fmt: skip
    yield Row("image scale of 1600 pixels", "0.38 to 0.55", file, "=0.864 to 1.25 of 704 pixels")
    yield Row("mirrored images, probability", 0.5, file, "augment.flip", "images and cameras, not the world")
    yield Row("rotation, rad", 0.3925, file, "augment.rotation")
    yield Row("scale of the world", 0.05, file, "augment.scale", "0.95 to 1.05")
    yield Row("grid mask, probability", 0.7, "petr3d.py, sparsebev.py", "augment.grid_mask")
    yield Row("range of targets, m", 51.2, file, "=51.2",
              "ours is checked after the world is rotated and scaled, the public one before",
              differs=True)  # fmt: skip
    yield Row("objects without lidar and radar points", "left out (use_valid_flag)", file, "=left out")
    yield Row("unknown velocity", "trained as 0", "mmdet3d nuscenes_dataset.py", "=not trained",
              "8 of the 4,514 boxes of mini_val have none", differs=True)  # fmt: skip
    yield Row("classification", "focal, alpha 0.25, gamma 2, weight 2", file, "=the same")
    yield Row("box loss", 0.25, file, f"={BOX_WEIGHT:g}")
    yield Row("code weights", [2, 2, 1, 1, 1, 1, 1, 1, 1, 1], file, f"={_text(CODE_WEIGHTS)}",
              "ours has cz in the third place, the public code in the fifth; both weigh 1")  # fmt: skip
    yield Row("denoising groups", 10, file, "model.loss.denoising_groups")
    yield Row("layers", 6, file, "model.decoder.num_layers")
    yield Row("model", "public modules", "research/parity.md", "=as_published",
              "at most 1e-5 apart in float64")  # fmt: skip


def _stream_petr(name: str, recipe: Recipe) -> Iterator[Row]:
    """Yield the rows of a StreamPETR."""
    small = "428q" in recipe.preset
    config = _STREAM.format("428q_nui_60e" if small else "90e")
    published: dict[str, Any] = {
        "epochs": 60 if small else 90, "batch": 16, "lr": 4e-4, "backbone": 0.1 if small else 0.25,
        "init": "nuImages R50" if small else "ImageNet R50", "queries": 300 if small else 644,
    }  # fmt: skip
    if recipe.distilled:
        published |= {"epochs": 60, "batch": 8, **_NOT_GIVEN}
    yield from _schedule(recipe, _PAPER if recipe.distilled else config, published)
    yield Row("propagated queries", 128 if small else 256, config, "model.decoder.num_propagated")
    yield Row("memory", 512 if small else 1024, config, "model.decoder.memory_length")
    yield Row("image size", "704x256", config, "=704x256")
    yield from _common(config)
    head, data = "streampetr_head.py", "transform_3d.py"
    yield Row("activation checkpointing", "residual blocks, decoder layers", config, "=the same (recompute)")
    yield Row("matching", "focal 2, L1 0.25 with code weights, without velocity", head, "=the same")
    yield Row("denoising noise", "up to half the box, positive up to 0.75 of that", head, "=the same")
    yield Row("denoising averages", "classes by 0.221 of the queries, boxes by all", head, "=the same")
    yield Row("objects that divide class losses", "of one process", head, "=mean over all processes",
              "independent of how a batch is divided", differs=True)  # fmt: skip
    yield Row("backbone norms", "frozen", config, "optim.backbone_norms", "gain and offset too")
    yield Row("frozen stages", 0, config, "optim.frozen_stages")
    yield Row("streams", "halves of scenes, one random order per epoch", "nuscenes_dataset.py", "=the same",
              "data.segment 0")  # fmt: skip
    yield Row("augmentation of a stream", "drawn per frame", data, "=per frame, scale per half scene",
              "ours keeps poses rigid inside a stream", differs=True)  # fmt: skip
    yield Row("2-D head", "focal head, weights 2, 1, 5, 2, 10", config, "=the same")
    yield Row("2-D boxes", "without those hidden by nearer boxes", data, "=visible fraction above 0.15",
              "ours uses the annotated visibility", differs=True)  # fmt: skip


def _sparse_bev(name: str, recipe: Recipe) -> Iterator[Row]:
    """Yield the rows of a SparseBEV."""
    base, teacher, large = "r50_nuimg_704x256.py", "offline" in name, "r101" in name
    few = "400q" in name
    config = "r50_nuimg_704x256_400q_36ep.py" if few else "r101_nuimg_1408x512.py" if large else base
    published: dict[str, Any] = {
        "epochs": 36 if few else 24, "batch": 8, "lr": 2e-4, "backbone": 0.2 if large else 0.1,
        "init": f"nuImages R{101 if large else 50}", "queries": 400 if few else 900,
    }  # fmt: skip
    if recipe.distilled or teacher:
        config, published = _PAPER, published | _NOT_GIVEN
    if teacher:
        published["epochs"] = "not given"
    yield from _schedule(recipe, config, published)
    if teacher:
        yield Row("image size, levels", "not given", config, "=704x256, 4", "those of its students [ours]",
                  differs=True)  # fmt: skip
        yield Row("future frames", 7, config, "model.num_future")
        yield Row("future frames after the last", "images of the next scene", "nuscenes_dataset.py",
                  "=the last frame, repeated", "a defect of the public loader", differs=True)  # fmt: skip
    else:
        size = "1408x512, 5" if large else "704x256, 4"
        yield Row("image size, levels", size, config, f"={size}")
    yield Row("past frames", 7, base, "model.num_past")
    yield Row("rounds between frames", [4, 8], "loading.py", "data.sweeps", "needs the folder sweeps")
    yield Row("incomplete rounds of cameras", "replaced by the next round", "loading.py", "=left out",
              "rare", differs=True)  # fmt: skip
    yield from _common(base)
    yield Row("activation checkpointing", "residual blocks; attention, sampling, mixing",
              "sparsebev_transformer.py", "=residual blocks, decoder layers", "less memory",
              differs=True)  # fmt: skip
    yield Row("rate within an epoch", "constant (by_epoch)", base, "=constant", "optim.hold_steps")
    yield Row("steps of an epoch", 3517, "mmdet group_sampler.py", f"={recipe.steps_per_epoch}",
              "the public code fills up the last batch", differs=True)  # fmt: skip
    yield Row("rate of sampling_offset", 0.1, base, "=0.1", "optim.slow")
    yield Row("backbone norms", "keep_statistics", base, "optim.backbone_norms", "norm_eval=True, trained")
    yield Row("frozen stages", 1, base, "optim.frozen_stages", "stem and first stage")
    yield Row("colours", "of each image; each change with probability one half", "models/utils.py",
              "=the same, clipped to 0..255", "ours keeps 8 bits", differs=True)  # fmt: skip
    yield Row("stop_prev_grad", 0, base, "gradient_frames", "gradients of all frames")
    yield Row("matching", "focal 2, L1 0.25 with code weights and velocity", "sparsebev_head.py", "=the same")
    yield Row("denoising noise", "up to a quarter of the box, all positive", "sparsebev_head.py", "=the same")


def rows(name: str) -> list[Row]:
    """Return the rows of a recipe."""
    recipe = RECIPES[name]
    chosen = _stream_petr if "stream_petr" in name else _sparse_bev
    return list(chosen(name, recipe))


def comparison() -> str:
    """Return the comparison of all recipes as Markdown."""
    lines = [
        "Files are those of exiawsh/StreamPETR (recipes with stream_petr) and MCG-NJU/SparseBEV (sparse_bev)",
        "unless they begin with the name of another project.",
        "",
    ]
    for name in RECIPES:
        config = resolve_config(TrainOptions(out=Path(), recipe=name))
        lines += [f"## {name}", "", "| setting | public | file | ours | verdict |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(row.cells(config))} |" for row in rows(name)]
        lines.append("")
    return "\n".join(lines).rstrip()
