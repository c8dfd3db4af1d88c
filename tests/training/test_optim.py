# SPDX-License-Identifier: Apache-2.0
"""Trained and frozen parameters and their learning rates, and that a run resumes only with the same ones."""

from pathlib import Path
from typing import Any

import pytest
from lightning_fabric import Fabric
from torch import nn

from ftkd_core.config import override
from ftkd_core.errors import UserError
from ftkd_core.models.sparse_bev import SparseBEV
from tests.core.helpers import small_sparse
from tests.training.helpers import cpu_fabric, stream_data, stream_trainer
from training.config import OptimConfig
from training.recipes import RECIPES
from training.tasks import WindowTask
from training.trainer import Trainer


def backbone_after_a_step(out: Path, optim: OptimConfig) -> tuple[set[str], Trainer]:
    """Return the names of the backbone's tensors that one step changes, statistics included, and the
    trainer."""
    trainer = stream_trainer(out, 2, optim=optim)
    before = {name: value.clone() for name, value in trainer.raw.backbone.state_dict().items()}
    trainer.start_training()
    trainer.train_step(stream_data()[0])
    after = trainer.raw.backbone.state_dict()
    return {name for name, value in before.items() if not after[name].equal(value)}, trainer


def norm_names(trainer: Trainer) -> tuple[set[str], set[str]]:
    """Return the names of the gains and offsets of the backbone's norms, and of their statistics."""
    norms = [
        name for name, module in trainer.raw.backbone.named_modules() if isinstance(module, nn.BatchNorm2d)
    ]
    kinds = ("weight", "bias"), ("running_mean", "running_var", "num_batches_tracked")
    affine, statistics = ({f"{norm}.{part}" for norm in norms for part in kind} for kind in kinds)
    return affine, statistics


@pytest.mark.parametrize("norms", ["learn", "keep_statistics", "frozen"])
def test_backbone_norms_follow_their_setting(tmp_path: Path, norms: str) -> None:
    changed, trainer = backbone_after_a_step(tmp_path, OptimConfig(backbone_norms=norms))
    affine, statistics = norm_names(trainer)
    assert len(affine) == 40 and "layer4.0.conv1.weight" in changed
    assert bool(changed & affine) == (norms != "frozen")
    assert bool(changed & statistics) == (norms == "learn")
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.raw.backbone.named_parameters():
        learns = norms != "frozen" or name not in affine
        assert (id(parameter) in trained) == parameter.requires_grad == learns, name


def test_frozen_stages_keep_weights_and_statistics(tmp_path: Path) -> None:
    changed, trainer = backbone_after_a_step(tmp_path, OptimConfig(frozen_stages=2))
    assert {name.split(".")[0] for name in changed} == {"layer3", "layer4"}
    assert "layer3.0.bn1.running_mean" in changed
    trained = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert trained == sum(p.requires_grad for p in trainer.task.parameters())
    assert not trainer.raw.backbone.conv1.weight.requires_grad


def test_every_parameter_given_to_ddp_gets_a_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP collects the trained parameters when it wraps the model and waits for a gradient of each."""
    setup, wrapped = Fabric.setup, []

    def spy(fabric: Fabric, task: nn.Module, *more: Any) -> Any:
        wrapped.append({name for name, p in task.named_parameters() if p.requires_grad})
        return setup(fabric, task, *more)

    monkeypatch.setattr(Fabric, "setup", spy)
    optim = OptimConfig(backbone_norms="frozen", frozen_stages=1)
    _, trainer = backbone_after_a_step(tmp_path, optim)
    with_gradient = {name for name, p in trainer.task.named_parameters() if p.grad is not None}
    backbone = {name for name in wrapped[0] if name.startswith("detector.backbone.")}
    assert {name.split(".")[2] for name in backbone} == {"layer2", "layer3", "layer4"}
    assert backbone <= with_gradient and not any(".bn" in name for name in backbone)


def window_trainer(out: Path, optim: OptimConfig) -> Trainer:
    model: SparseBEV = small_sparse(past=1)
    return Trainer(cpu_fabric(), WindowTask(model), optim, out, steps=4, seed=3)


def test_sparse_bev_recipes_slow_down_sampling_offsets(tmp_path: Path) -> None:
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
    assert len(ratios) == len({id(p) for p in trainer.task.parameters() if p.requires_grad})


def test_decay_all_includes_norms_and_biases(tmp_path: Path) -> None:
    for decay_all in (False, True):
        trainer = window_trainer(tmp_path, OptimConfig(decay_all=decay_all))
        decay = {
            id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]
        }
        layer = trainer.raw.decoder_layer.regressor[0]
        assert (decay[id(layer.weight)], decay[id(layer.bias)]) == (0.01, 0.01 if decay_all else 0.0)


def test_rate_warms_up_from_its_start_and_decays_to_its_final_value() -> None:
    optim = OptimConfig(lr=3.0, warmup_steps=10, warmup_start=1 / 3, final_ratio=0.1)
    rates = [optim.rate(step, 110) for step in range(110)]
    assert rates[0] == pytest.approx(1.2)  # a tenth of the way from 1 to 3
    assert rates[9] == max(rates) == pytest.approx(3.0)
    assert OptimConfig(lr=3.0, warmup_steps=10).rate(0, 110) == pytest.approx(0.3)
    assert optim.rate(60, 110) == pytest.approx(3.0 * 0.55) and optim.rate(110, 110) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("first", "resumed"),
    [
        ({}, {"backbone_norms": "keep_statistics"}),
        ({"backbone_norms": "keep_statistics"}, {"backbone_norms": "frozen"}),
        ({}, {"frozen_stages": 1}),
        ({}, {"slow": ("sampling_offset",)}),
        ({"backbone_ratio": 0.1}, {"backbone_ratio": 0.2}),
        ({}, {"decay_all": True}),
    ],
)
def test_run_resumes_only_with_the_same_trained_parameters(
    tmp_path: Path, first: dict[str, Any], resumed: dict[str, Any]
) -> None:
    window_trainer(tmp_path, OptimConfig(**first)).save()
    window_trainer(tmp_path, OptimConfig(**first)).resume(tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"trained other parameters.*backbone_norms, frozen_stages, slow"):
        window_trainer(tmp_path, OptimConfig(**resumed)).resume(tmp_path / "state.pt")


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


def test_slow_name_without_a_parameter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="optim.slow 'offset': no trained parameter has it in its name"):
        window_trainer(tmp_path, OptimConfig(slow=("sampling_offset", "offset")))
