# SPDX-License-Identifier: Apache-2.0
"""Recipes: published settings, the table that compares them, and one step of each at small size."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recipes as benchmark
from benchmarks.memory import sample_memory
from ftkd_core.config import SparseBEVConfig, override
from ftkd_core.errors import UserError
from ftkd_core.models.sparse_bev import build_sparse_bev
from training import recipes
from training.config import OptimConfig
from training.recipe_table import comparison, rows
from training.recipes import RECIPES
from training.train import TrainOptions, resolve_config


def resolve(recipe: str, devices: str = "1", overrides: tuple[str, ...] = ()) -> Any:
    return resolve_config(TrainOptions(out=Path("x"), recipe=recipe, devices=devices, overrides=overrides))


def test_recipes_have_the_published_settings() -> None:
    found = resolve("stream_petr_r50", "4")
    assert (found.model.preset, found.model.decoder.as_published) == ("r50_704x256_428q", True)
    assert (found.streams, found.steps, found.optim.lr) == (4, 60 * (28_130 // 16), 4e-4)
    assert (found.data.order, found.data.segment, found.data.sweeps) == ("epochs", 0, (0, 0))
    assert (found.optim.backbone_norms, found.optim.frozen_stages, found.optim.slow) == ("frozen", 0, ())
    assert (found.optim.backbone_ratio, found.augment.colour) == (0.1, 0.0)
    large = resolve("stream_petr_r50_900q")
    assert (large.model.decoder.num_queries, large.optim.backbone_ratio) == (644, 0.25)
    teacher = resolve("sparse_bev_r101_offline", overrides=("optim.lr=1e-4",))
    assert (teacher.model.backbone.depth, teacher.model.num_frames, teacher.optim.lr) == (101, 15, 1e-4)
    assert (teacher.optim.backbone_norms, teacher.optim.frozen_stages) == ("keep_statistics", 1)
    assert (teacher.optim.slow, teacher.data.sweeps) == (("sampling_offset",), (4, 8))
    assert (teacher.optim.backbone_ratio, teacher.augment.colour) == (0.2, 0.5)
    assert resolve("sparse_bev_r50_400q").model.decoder.num_queries == 400
    published = resolve("sparse_bev_r101").model
    assert (published.image.width, published.decoder.levels, published.num_future) == (1408, 5, 0)
    assert resolve("ftkd_stream_petr_r50").steps == 60 * (28_130 // 8)
    with pytest.raises(UserError, match="3 processes cannot share a batch of 8"):
        resolve("sparse_bev_r50", "3")


def test_rate_is_constant_within_an_epoch_after_the_warm_up() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=10, warmup_start=0.5, hold_steps=50)
    rates = [optim.rate(step, 200) for step in range(200)]
    assert rates[:9] == sorted(rates[:9]) and rates[0] < rates[8]
    assert len(set(rates[50:100])) == len(set(rates[150:])) == 1
    assert rates[50] > rates[100] > rates[150]
    assert optim.rate(100, 200) == OptimConfig(lr=1.0, warmup_steps=10, warmup_start=0.5).rate(100, 200)


@pytest.mark.parametrize("name", RECIPES)
def test_every_difference_has_a_reason(name: str) -> None:
    """Values of the table come from the configuration that is trained."""
    config = resolve(name)
    cells = [row.cells(config) for row in rows(name)]
    assert len({setting for setting, *_ in cells}) == len(cells) > 25
    for setting, public, file, ours, verdict in cells:
        assert public and file and ours, setting
        assert verdict == "equal" or ": " in verdict, f"{name} {setting}: differs without a reason"
    text = comparison()
    assert f"## {name}\n" in text


def test_the_table_shows_a_changed_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(row for row in rows("sparse_bev_r50") if row.setting == "rotation, rad")
    changed = resolve("sparse_bev_r50", overrides=("augment.rotation=0.1",))
    assert row.cells(changed)[3:] == ("0.1", "differs")
    assert row.cells(resolve("sparse_bev_r50"))[3:] == ("0.3925", "equal")


def test_command_prints_overview_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main([]) == 0
    overview = capsys.readouterr().out
    assert "| stream_petr_r50 | 54.6 / 44.9 | 60 | 16 |" in overview
    assert "| sparse_bev_r101 | 59.2 / unknown |" in overview
    assert recipes.main(["--table"]) == 0
    assert capsys.readouterr().out.strip() == comparison()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmark.prepare_data(tmp_path_factory.mktemp("recipes"), width=96, height=54, duration_s=2.0)


def small(name: str) -> list[str]:
    """Return settings that shrink a recipe's model until a step takes a fraction of a second."""
    config = RECIPES[name].model()
    shared = [
        "image.width=96", "image.height=32", "backbone.depth=18", "backbone.base_channels=8",
        "decoder.channels=32", "decoder.num_layers=2", "decoder.ffn_channels=32", "decoder.num_heads=2",
    ]  # fmt: skip
    if isinstance(config, SparseBEVConfig):
        own = ["decoder.num_queries=16", "decoder.out_points=8", "num_past=2"]
        own += ["num_future=2"] if config.num_future else []
    else:
        own = ["backbone.neck_channels=32", "decoder.num_queries=12", "decoder.num_propagated=6",
               "decoder.memory_length=18", "decoder.position_hidden=32"]  # fmt: skip
    return [f"model.{text}" for text in [*shared, *own]]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_and_resumes_at_small_size(name: str, root: Path, tmp_path: Path) -> None:
    source, teacher = benchmark.Source(root), small("sparse_bev_r101_offline")
    run = benchmark.RecipeRun(name, tmp_path / name, source, 2, small(name), teacher)
    run.run(save_every=1)
    again = benchmark.RecipeRun(name, tmp_path / name, source, 3, small(name), teacher)
    assert again.losses == run.losses and again.trainer.step == 2
    again.run(save_every=1)
    entry = again.entry()
    assert entry["steps_run"] == 3 and entry["images_per_step"] == 6 * again.data_frames
    assert all(loss > 0 for loss in entry["losses"])
    file = tmp_path / "results.json"
    benchmark.write_entry(file, entry)
    benchmark.write_entry(file, entry)
    assert file.read_text().count(f'"{name}"') == 1
    figures = {"steps_run": 200, "first_loss": 2.0, "last_loss": 1.0}
    benchmark.write_reduced(file, name, replace(source, root=Path("x/frames")), figures)
    benchmark.write_entry(file, entry)
    assert json.loads(file.read_text())[0]["reduced"] == {"frames": figures}


def test_reduced_runs_are_scored(root: Path, tmp_path: Path) -> None:
    file, text = tmp_path / "results.json", f"{root}:v1.0-synth:recipes"
    arguments = [
        "--out",
        str(tmp_path),
        "--json",
        str(file),
        "--recipe",
        "stream_petr_r50",
        "--reduced",
        text,
    ]
    small_images = ["--set", "model.image.width=96", "--set", "model.image.height=32"]
    assert benchmark.main([*arguments, "--steps", "10", *small_images]) == 0
    (entry,) = json.loads(file.read_text())
    figures = entry["reduced"]["nuscenes"]
    assert figures["steps_run"] == 10 and figures["samples"] > 0 and 0 <= figures["NDS"] <= 1
    assert benchmark.main(["--json", str(file), "--reduced", "no colons"]) == 2


def test_recomputation_brings_the_teacher_below_24_gb() -> None:
    """Counted at full size, without computing."""
    config = resolve("sparse_bev_r101_offline")
    found = sample_memory(config.model, config.optim, half=True, recompute=True)
    assert 4 < found["saved_activation_gb"] < found["peak_gb"] < 16


def test_counted_memory_is_that_of_the_tensors() -> None:
    """A small model, counted by hand: what is saved without recomputation is more than with it, and the peak
    holds parameters, gradients and moments."""
    model = override(RECIPES["sparse_bev_r50"].model(), [text[6:] for text in small("sparse_bev_r50")])
    optim = OptimConfig(backbone_norms="learn")
    plain, recomputed, first = (
        sample_memory(model, optim, half=False, recompute=recompute, gradient_frames=frames)
        for recompute, frames in ((False, 0), (True, 0), (True, 1))
    )
    assert plain["saved_activation_gb"] > recomputed["saved_activation_gb"] > first["saved_activation_gb"]
    assert isinstance(model, SparseBEVConfig)
    parameters = sum(p.numel() for p in build_sparse_bev(model).parameters())
    assert plain["peak_gb"] > plain["saved_activation_gb"] + 12 * parameters / 1e9
