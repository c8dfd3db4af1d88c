# SPDX-License-Identifier: Apache-2.0
"""Configuration: presets, checks of every config class, overrides, round trips and descriptions."""

import copy
import dataclasses
import json
import pickle
import typing
from dataclasses import replace
from typing import Annotated, Any, Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ftkd_core.config import (
    BackboneConfig,
    DecoderConfig,
    DetectorConfig,
    ImageConfig,
    SparseBEVConfig,
    SparseDecoderConfig,
    describe,
    from_dict,
    override,
    to_dict,
)
from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.distillation.baselines import BaselineConfig
from ftkd_core.distillation.config import FTKDConfig
from ftkd_core.errors import UserError
from ftkd_core.presets import PRESETS, SPARSE_BEV_PRESETS, preset, sparse_bev_preset
from training.config import DataConfig, OptimConfig, TrainConfig, WindowTrainConfig

MODELS = {**PRESETS, **SPARSE_BEV_PRESETS}
BASES: dict[str, Any] = {
    "student": TrainConfig(model=preset("tiny")),
    "window": WindowTrainConfig(model=sparse_bev_preset("sparse_bev_tiny")),
    "ftkd": FTKDConfig(),
    "baseline": BaselineConfig(name="mgd"),
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_preset_survives_json(name: str) -> None:
    config = MODELS[name]()
    assert config.preset == name
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


def test_override_changes_one_value_and_keeps_the_rest() -> None:
    config = override(preset("tiny"), ["decoder.num_layers=2", "loss.denoising_groups=0", "image.width=704"])
    assert (config.decoder.num_layers, config.loss.denoising_groups, config.image.width) == (2, 0, 704)
    assert config.decoder.channels == preset("tiny").decoder.channels


@pytest.mark.parametrize(
    ("text", "value"), [("5e-4", 5e-4), ("1E2", 100.0), ("-0.0", 0.0), ("1", 1.0), (".5", 0.5), ("2.", 2.0)]
)
def test_override_reads_numbers_as_yaml_with_exponents(text: str, value: float) -> None:
    assert override(OptimConfig(), [f"lr={text}"]).lr == value


def test_override_reads_lists_booleans_and_null() -> None:
    method = override(FTKDConfig(), ["bev_weight=0", "matching=prediction"])
    assert (method.bev_weight, method.matching) == (0.0, "prediction")
    optim = override(OptimConfig(), ["decay_all=true", "slow=[a, b]"])
    assert (optim.decay_all, optim.slow) == (True, ("a", "b"))
    assert override(preset("tiny"), ["model_from_ego=null"]) == preset("tiny")


WRONG: list[tuple[str, str, str]] = [
    ("student", "augment.zoom=[a,b]", "augment.zoom[0] is 'a'; expected a valid number"),
    ("student", "augment.zoom=[1]", "augment.zoom is [1]; expected 2 values"),
    ("student", "augment.zoom=[1,1,1]", "augment.zoom is [1, 1, 1]; expected at most 2 values"),
    ("student", "augment.zoom=[1,3]", "augment.zoom[1] is 3; expected a value less than or equal to 2"),
    ("student", "augment.zoom=[1.5,1]", "augment: zoom [1.5, 1.0]: expected the smallest scale first"),
    ("student", "model.image.width=350", "model.image.width is 350; expected a multiple of 16"),
    ("student", "model.image.height=-16", "model.image.height is -16; expected a value greater than 0"),
    ("student", "model.image=small", "model.image is 'small'; expected a mapping"),
    ("student", "model.backbone.depth=19", "model.backbone: depth 19: expected 18, 34, 50 or 101"),
    ("student", "model.backbone.auxiliary_stride=4", "auxiliary_stride is 4; expected 8 or 16"),
    ("student", "model.backbone.token_stride=8", "unknown configuration key model.backbone.token_stride"),
    ("student", "model.decoder.num_queries=-5", "num_queries is -5; expected a value greater than 0"),
    ("student", "model.decoder.num_layers=0", "num_layers is 0; expected a value greater than 0"),
    ("student", "model.decoder.num_layers=true", "num_layers is True; expected a valid integer"),
    ("student", "model.decoder.num_layers=two", "num_layers is 'two'; expected a valid integer"),
    ("student", "model.decoder.num_layers=null", "num_layers is None; expected a valid integer"),
    ("student", "model.decoder.dropout=7.0", "model.decoder.dropout is 7.0; expected a value less than 1"),
    ("student", "model.decoder.dropout=.nan", "model.decoder.dropout is nan; expected a finite number"),
    ("student", "model.decoder.point_range_m=[1,2]", "point_range_m is [1, 2]; expected 6 values"),
    ("student", "model.decoder.point_range_m=[1,1,1,0,2,2]", "expected low x, y, z and high x, y, z"),
    ("student", "model.decoder.num_heads=3", "channels 128: expected a multiple of num_heads 3"),
    ("student", "model.decoder.num_propagated=257", "num_propagated 257: expected at most memory_length 256"),
    ("student", "model.channels=front", "model.channels is 'front'; expected a list"),
    ("student", "model.channels=[a, a]", "names a, a: expected distinct names"),
    ("student", "model.channels=[]", "model.channels is []; expected at least 1 value"),
    ("student", "model.model_from_ego=[[1, 0], [0, 1]]", "expected the four rows of a rigid transform"),
    ("student", "model.auxiliary_kind=sharp", "is 'sharp'; expected 'none', 'dense' or 'focal'"),
    ("student", "model.auxiliary_kind=none", "auxiliary_kind none: expected dense"),
    ("student", "data.scenes=0", "data.scenes is 0; expected a value greater than 0"),
    ("student", "data.intervals_s=[0.5, -1]", "data.intervals_s[1] is -1; expected a value greater than 0"),
    ("student", "data.order=shuffled", "data.order is 'shuffled'; expected 'random' or 'epochs'"),
    ("student", "data.cache=7", "data.cache is 7; expected a valid string"),
    ("student", "augment.flip=2", "augment.flip is 2; expected a value less than or equal to 1"),
    ("student", "optim.lr=-1", "optim.lr is -1; expected a value greater than or equal to 0"),
    ("student", "optim.ema=1", "optim.ema is 1; expected a value less than 1"),
    ("student", "steps=1e3", "steps is 1000.0; expected a valid integer"),
    ("student", "seed=a", "seed is 'a'; expected a valid integer"),
    ("window", "model.decoder.levels=6", "levels is 6; expected a value less than or equal to 5"),
    ("window", "model.decoder.channels=90", "channels 90: expected a multiple of"),
    ("window", "model.num_past=-1", "model.num_past is -1; expected a value greater than or equal to 0"),
    ("ftkd", "pv_weight=-.inf", "pv_weight is -inf; expected a finite number"),
    ("ftkd", "pv_target=sum", "pv_target is 'sum'; expected 'mean_residual', 'cosine' or 'current'"),
    ("baseline", "name=fgd", "name is 'fgd'; expected 'mgd', 'cwd' or 'stxd'"),
    ("baseline", "weight=.inf", "weight is inf; expected a finite number"),
]


@pytest.mark.parametrize(("base", "assignment", "message"), WRONG, ids=[row[1] for row in WRONG])
def test_a_wrong_value_is_refused_with_its_path_in_one_sentence(
    base: str, assignment: str, message: str
) -> None:
    with pytest.raises(UserError) as refused:
        override(BASES[base], [assignment])
    assert message in str(refused.value)
    parent = assignment.partition("=")[0].rpartition(".")[0]
    assert parent in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("decoder.num_layer=2", "key decoder.num_layer; did you mean decoder.num_layers?"),
        ("decoder.num_layers.x=2", "key decoder.num_layers.x; did you mean decoder.num_layers?"),
        ("decodr.num_layers=2", "key decodr.num_layers; did you mean decoder?"),
        ("zzz=2", "key zzz; expected one of auxiliary_kind, backbone, "),
        ("nothing", "override 'nothing': expected path=value"),
        ("preset=[a", "override 'preset=[a': expected a value in YAML after the ="),
        (
            "decoder.num_image_queries=4225",
            "4225: expected 0 to 4224, the cells of 6 352x128 images at stride 8",
        ),
    ],
)
def test_an_override_that_does_not_fit_says_what_was_expected(assignment: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        override(preset("tiny"), [assignment])
    assert message in str(refused.value)


def test_constructors_and_replace_are_checked_too() -> None:
    with pytest.raises(UserError, match="width is 350; expected a multiple of 16"):
        ImageConfig(width=350)
    with pytest.raises(UserError, match=r"zoom is \[1, 2\]; expected a tuple"):
        AugmentConfig(zoom=[1, 2])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="num_layers is 0"):
        replace(preset("tiny").decoder, num_layers=0)
    with pytest.raises(UserError, match="unknown configuration key widht; did you mean width?"):
        ImageConfig(widht=352)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="configuration key preset is missing"):
        DetectorConfig()  # type: ignore[call-arg]
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("tiny").image.width = 16  # type: ignore[misc]


def test_image_queries_need_cells_of_the_2d_head() -> None:
    tiny, sparse = preset("tiny"), sparse_bev_preset("sparse_bev_tiny")
    one = ["channels=[CAM_FRONT]", "image.width=64", "image.height=64", "backbone.auxiliary_stride=16"]
    for config in (tiny, sparse):
        assert override(config, [*one, "decoder.num_image_queries=16"]).decoder.num_image_queries == 16
        with pytest.raises(UserError, match="num_image_queries 17: expected 0 to 16, the cells of 1 64x64"):
            override(config, [*one, "decoder.num_image_queries=17"])


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown preset 'huge'; expected one of r18_352x128, .*, tiny"):
        preset("huge")


def test_descriptions_cover_every_field_and_each_has_a_docstring() -> None:
    found = {row.path: row for row in describe(TrainConfig)}
    leaves: set[str] = set()
    stack: list[tuple[str, Any]] = [("", to_dict(BASES["student"]))]
    while stack:
        above, values = stack.pop()
        for name, value in values.items():
            if isinstance(value, dict):
                stack.append((f"{above}{name}.", value))
            else:
                leaves.add(f"{above}{name}")
    assert found.keys() == leaves
    every = [found.values(), *map(describe, (SparseBEVConfig, FTKDConfig, BaselineConfig))]
    assert [row.path for rows in every for row in rows if not row.docstring] == []
    width = found["model.image.width"]
    assert (width.type, width.default, width.docstring) == ("int > 0, multiple of 16", 704, "Pixels.")
    assert found["model.preset"].default is dataclasses.MISSING
    assert found["augment.zoom"].type == "list of 2 (float >= 0.5, <= 2)"
    assert found["model.auxiliary_kind"].type == "none | dense | focal"


class Scaled(nn.Module):
    """A module that reads its config in forward, as the models do."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.config.decoder.num_layers):
            x = x * self.config.decoder.num_heads
        return x + self.config.image.width if self.config.auxiliary_kind == "dense" else x


def test_models_that_hold_a_config_can_be_copied_exported_and_traced() -> None:
    config = preset("tiny")
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert hash(config) == hash(replace(config))
    model, x = Scaled(config), torch.ones(2)
    expected = model(x)
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for the values that a field's type and range allow."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is Annotated:
        limits = [limit for info in arguments[1:] for limit in getattr(info, "metadata", ())]
        bound = {
            k: getattr(x, k) for x in limits for k in ("gt", "ge", "lt", "le", "multiple_of") if hasattr(x, k)
        }
        if arguments[0] is int:
            low = bound.get("ge", bound.get("gt", -1) + 1)
            step = bound.get("multiple_of", 1)
            return st.integers(low, bound.get("le", 64)).map(lambda value: max(value * step, low))
        if arguments[0] is float:
            low, high = bound.get("ge", bound.get("gt", 0.0)), bound.get("le", bound.get("lt", 1e3))
            return st.floats(low, high, exclude_min="gt" in bound, exclude_max="lt" in bound)
        sizes = {k: getattr(x, k) for x in limits for k in ("min_length", "max_length") if hasattr(x, k)}
        return tuples_of(arguments[0], sizes.get("min_length", 0), sizes.get("max_length", 4))
    if origin is tuple:
        return tuples_of(hint, 0, 3)
    if type(None) in arguments:
        return st.none()
    simple = {
        int: st.integers(0, 999),
        float: st.floats(-1e3, 1e3),
        bool: st.booleans(),
        str: st.text(max_size=5),
    }
    return simple[hint]


def tuples_of(hint: Any, least: int, most: int) -> st.SearchStrategy[Any]:
    items = typing.get_args(hint)
    if ... in items:
        return st.lists(values_of(items[0]), min_size=least, max_size=most).map(tuple)
    return st.tuples(*map(values_of, items))


@st.composite
def changed(draw: st.DrawFn, config: Any) -> Any:
    """Draw a config with some of its fields changed, at any depth; combinations that are refused are not
    drawn."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    names = draw(st.sets(st.sampled_from([field.name for field in dataclasses.fields(config)]), max_size=4))
    for name in sorted(names):
        value = getattr(config, name)
        new = draw(changed(value) if dataclasses.is_dataclass(value) else values_of(hints[name]))
        try:
            config = replace(config, **{name: new})
        except UserError as refused:
            assume(":" in str(refused))  # fields that do not fit each other, not a wrong value
    return config


@pytest.mark.parametrize(
    "start",
    [
        *BASES.values(), preset("r50_704x256_428q"), DecoderConfig(), SparseDecoderConfig(), BackboneConfig(),
        AugmentConfig(), DataConfig(), OptimConfig(),
    ],
    ids=lambda config: type(config).__name__,
)  # fmt: skip
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_valid_config_survives_json(start: Any, data: st.DataObject) -> None:
    config = data.draw(changed(start))
    stored = json.dumps(to_dict(config))
    again = from_dict(type(config), json.loads(stored))
    assert again == config
    assert json.dumps(to_dict(again)) == stored
