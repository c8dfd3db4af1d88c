# SPDX-License-Identifier: Apache-2.0
"""What of a model learns, and how fast: a backbone's norms and stages, slow parameters, and that a run goes
on only as it began."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from ftkd_core.config import override
from ftkd_core.errors import UserError
from ftkd_core.models.sparse_bev import SparseBEV
from tests.core.test_sparse_bev import small_sparse
from tests.training.test_train import make_data, make_trainer
from training.recipes import RECIPES
from training.tasks import WindowLesson
from training.trainer import OptimConfig, Trainer


def backbone_after_a_step(out: Path, optim: OptimConfig) -> tuple[set[str], Trainer]:
    """Names of all that changed in the backbone, statistics too."""
    trainer = make_trainer(out, 2, optim=optim)
    before = {name: value.clone() for name, value in trainer.raw.backbone.state_dict().items()}
    trainer.start_training()
    trainer.train_step(make_data()[0])
    after = trainer.raw.backbone.state_dict()
    return {name for name, value in before.items() if not after[name].equal(value)}, trainer


def norm_names(trainer: Trainer) -> tuple[set[str], set[str]]:
    """Gains and offsets of the backbone's norms, and their statistics."""
    norms = [
        name for name, module in trainer.raw.backbone.named_modules() if isinstance(module, nn.BatchNorm2d)
    ]
    kinds = ("weight", "bias"), ("running_mean", "running_var", "num_batches_tracked")
    learnt, counted = ({f"{norm}.{part}" for norm in norms for part in kind} for kind in kinds)
    return learnt, counted


@pytest.mark.parametrize("norms", ["learn", "keep_statistics", "frozen"])
def test_norms_of_the_backbone_learn_as_told(tmp_path: Path, norms: str) -> None:
    changed, trainer = backbone_after_a_step(tmp_path, OptimConfig(backbone_norms=norms))
    learnt, counted = norm_names(trainer)
    assert len(learnt) == 40 and "layer4.0.conv1.weight" in changed
    assert bool(changed & learnt) == (norms != "frozen")
    assert bool(changed & counted) == (norms == "learn")
    taught = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.raw.backbone.named_parameters():
        learns = norms != "frozen" or name not in learnt
        assert (id(parameter) in taught) == parameter.requires_grad == learns, name


def test_frozen_stages_keep_weights_and_statistics(tmp_path: Path) -> None:
    changed, trainer = backbone_after_a_step(tmp_path, OptimConfig(frozen_stages=2))
    assert {name.split(".")[0] for name in changed} == {"layer3", "layer4"}
    assert "layer3.0.bn1.running_mean" in changed
    taught = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert taught == sum(p.requires_grad for p in trainer.lesson.parameters())
    assert not trainer.raw.backbone.conv1.weight.requires_grad


def test_processes_wait_for_nothing_that_does_not_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP asks what learns when it wraps the model; what it then counts must get a gradient in every step."""
    setup, asked = Fabric.setup, []

    def spy(fabric: Fabric, lesson: nn.Module, *more: Any) -> Any:
        asked.append({name for name, p in lesson.named_parameters() if p.requires_grad})
        return setup(fabric, lesson, *more)

    monkeypatch.setattr(Fabric, "setup", spy)
    optim = OptimConfig(backbone_norms="frozen", frozen_stages=1)
    _, trainer = backbone_after_a_step(tmp_path, optim)
    with_gradient = {name for name, p in trainer.lesson.named_parameters() if p.grad is not None}
    backbone = {name for name in asked[0] if name.startswith("detector.backbone.")}
    assert {name.split(".")[2] for name in backbone} == {"layer2", "layer3", "layer4"}
    assert backbone <= with_gradient and not any(".bn" in name for name in backbone)


def window_trainer(out: Path, optim: OptimConfig) -> Trainer:
    model: SparseBEV = small_sparse(past=1)
    return Trainer(Fabric(accelerator="cpu", devices=1), WindowLesson(model), optim, out, steps=4, seed=3)


def test_recipes_of_sparse_bev_slow_its_sampling_offsets(tmp_path: Path) -> None:
    settings = [s.removeprefix("optim.") for s in RECIPES["sparse_bev_r50"].settings(1) if s[:6] == "optim."]
    optim = override(OptimConfig(), settings)
    trainer = window_trainer(tmp_path, optim)
    ratios = {id(p): group["ratio"] for group in trainer.optimizer.param_groups for p in group["params"]}
    layer, backbone = trainer.raw.decoder_layer, trainer.raw.backbone
    assert ratios[id(layer.sampling_offset.weight)] == ratios[id(layer.sampling_offset.bias)] == 0.1
    assert ratios[id(layer.regressor[0].weight)] == 1.0
    assert ratios[id(backbone.layer2[0].conv1.weight)] == ratios[id(backbone.layer2[0].bn1.weight)] == 0.1
    assert id(backbone.layer1[0].conv1.weight) not in ratios and id(backbone.bn1.weight) not in ratios
    trainer.start_training()
    assert not any(m.training for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
    assert len(ratios) == len({id(p) for p in trainer.lesson.parameters() if p.requires_grad})


def test_all_that_learns_is_decayed_where_that_is_asked_for(tmp_path: Path) -> None:
    for decay_all in (False, True):
        trainer = window_trainer(tmp_path, OptimConfig(decay_all=decay_all))
        decay = {
            id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]
        }
        layer = trainer.raw.decoder_layer.regressor[0]
        assert (decay[id(layer.weight)], decay[id(layer.bias)]) == (0.01, 0.01 if decay_all else 0.0)


def test_the_rate_warms_up_from_where_it_shall_and_falls_to_its_last() -> None:
    optim = OptimConfig(lr=3.0, warmup_steps=10, warmup_start=1 / 3, final_ratio=0.1)
    rates = [optim.rate(step, 110) for step in range(110)]
    assert rates[0] == pytest.approx(1.2)  # a tenth of the way from 1 to 3
    assert rates[9] == max(rates) == pytest.approx(3.0)
    assert OptimConfig(lr=3.0, warmup_steps=10).rate(0, 110) == pytest.approx(0.3)
    assert optim.rate(60, 110) == pytest.approx(3.0 * 0.55) and optim.rate(110, 110) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("began", "goes_on"),
    [
        ({}, {"backbone_norms": "keep_statistics"}),
        ({"backbone_norms": "keep_statistics"}, {"backbone_norms": "frozen"}),
        ({}, {"frozen_stages": 1}),
        ({}, {"slow": ("sampling_offset",)}),
        ({"backbone_ratio": 0.1}, {"backbone_ratio": 0.2}),
        ({}, {"decay_all": True}),
    ],
)
def test_a_run_goes_on_only_as_it_began(
    tmp_path: Path, began: dict[str, Any], goes_on: dict[str, Any]
) -> None:
    window_trainer(tmp_path, OptimConfig(**began)).save()
    window_trainer(tmp_path, OptimConfig(**began)).resume(tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"trained other parameters .*backbone_norms, frozen_stages, slow"):
        window_trainer(tmp_path, OptimConfig(**goes_on)).resume(tmp_path / "state.pt")


def test_a_state_of_before_these_settings_goes_on(tmp_path: Path) -> None:
    """As one of norms that learn, which is what they all did, and as nothing else."""
    began = window_trainer(tmp_path, OptimConfig())
    began.step = 7
    began.save()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        del group["norms"]
    torch.save(state, tmp_path / "state.pt")
    resumed = window_trainer(tmp_path, OptimConfig())
    assert resumed.step == 0
    resumed.resume(tmp_path / "state.pt")
    assert resumed.step == 7
    for name, value in began.lesson.state_dict().items():
        assert value.equal(resumed.lesson.state_dict()[name]), name
    with pytest.raises(UserError, match="trained other parameters"):
        window_trainer(tmp_path, OptimConfig(backbone_norms="keep_statistics")).resume(tmp_path / "state.pt")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "backbone_norms=eval",
            "backbone_norms is 'eval'; expected 'learn', 'keep_statistics' or 'frozen'",
        ),
        ("frozen_stages=5", "frozen_stages is 5; expected a value less than or equal to 4"),
        ("warmup_start=2", "warmup_start is 2; expected a value less than or equal to 1"),
        ("slow=sampling_offset", "slow is 'sampling_offset'; expected a list"),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(OptimConfig(), [setting])


def test_a_slow_name_that_nothing_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="optim.slow 'offset': no parameter that learns has it in its name"):
        window_trainer(tmp_path, OptimConfig(slow=("sampling_offset", "offset")))
