# SPDX-License-Identifier: Apache-2.0
"""Weights files: initialisation of models, settings that must agree, and reading of configurations."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.config import DetectorConfig, override
from ftkd_core.errors import UserError
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.sparse_bev import build_sparse_bev
from ftkd_core.presets import preset, sparse_bev_preset
from ftkd_core.weights import read_config, save_weights, start_from
from ftkd_core.weights.importing.formats import blank_model, find_format


def test_a_model_is_initialised_from_parts_of_a_model_of_another_kind(tmp_path: Path) -> None:
    tiny = preset("tiny")
    student = build_stream_petr(tiny)
    save_weights(tmp_path / "tiny.safetensors", student.state_dict(), tiny, half=False)
    config = sparse_bev_preset("sparse_bev_tiny_offline")
    teacher = build_sparse_bev(config)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    parts = ("backbone", "neck", "auxiliary")
    missing = start_from(tmp_path / "tiny.safetensors", teacher, config, parts)
    assert missing == ["neck.output.2.weight", "neck.output.2.bias"]  # tiny has no pyramid level of stride 32
    after, given = teacher.state_dict(), student.state_dict()
    for name, value in after.items():
        shared = name.split(".")[0] in parts and name in given
        assert value.equal(given[name] if shared else before[name]), name
    assert after["neck.output.0.weight"].equal(given["neck.output.0.weight"])
    with pytest.raises(
        UserError, match="share no part 'head' with the model; expected some of .*auxiliary, backbone"
    ):
        start_from(tmp_path / "tiny.safetensors", teacher, config, ("head",))
    narrow = override(config, ["decoder.channels=64"])
    with pytest.raises(UserError, match=r"neck.lateral.0.weight is \(96, 64, 1, 1\), the model's \(64, 64"):
        start_from(tmp_path / "tiny.safetensors", build_sparse_bev(narrow), narrow, ("neck",))


def test_differing_settings_that_define_the_meaning_of_weights_are_listed(tmp_path: Path) -> None:
    def refused(*settings: str, message: str) -> None:
        config = override(preset("tiny"), [*settings])
        with pytest.raises(UserError, match=message):
            start_from(file, build_stream_petr(config), config)

    tiny, file = preset("tiny"), tmp_path / "tiny.safetensors"
    save_weights(file, build_stream_petr(tiny).state_dict(), tiny)
    refused(
        "decoder.num_heads=2",
        message=r"were made with decoder.num_heads 4 \(not 2\); take all of the file's",
    )
    refused(
        "class_names=[truck, car]",
        "decoder.point_range_m=[-51.2, -51.2, -5.0, 51.2, 51.2, 3.0]",
        message=r"class_names \('car', .* \.\.\. \(not \('truck', 'car'\)\), decoder.point_range_m \(-61",
    )
    changes = ["image.width=384", "decoder.memory_interval_s=0"]
    other = override(tiny, [*changes, "loss.denoising_groups=2"])
    assert start_from(file, build_stream_petr(other), other) == []
    window = sparse_bev_preset("sparse_bev_tiny_offline")
    save_weights(tmp_path / "window.safetensors", build_sparse_bev(window).state_dict(), window)
    past = override(window, ["num_past=6", "num_future=0"])
    with pytest.raises(UserError, match=r"num_past 3 \(not 6\), num_future 3 \(not 0\); .*--preset init"):
        start_from(tmp_path / "window.safetensors", build_sparse_bev(past), past)


def test_an_imported_model_does_not_initialise_a_preset(tmp_path: Path) -> None:
    """The error names the differing settings, not missing tensors."""
    config = find_format("stream_petr_r50_428q").configure(CLASS_NAMES)
    assert isinstance(config, DetectorConfig)
    save_weights(tmp_path / "imported.safetensors", {}, config)
    config = preset("r50_704x256_428q")
    names = "model_from_ego .*, decoder.as_published True .*, decoder.point_range_m "
    with pytest.raises(UserError, match=names):
        start_from(tmp_path / "imported.safetensors", blank_model(config), config)


@pytest.mark.parametrize("name", ["stream_petr_r50_900q", "sparse_bev_r50_400q", "torchvision_resnet18"])
def test_read_config_returns_the_configuration_of_any_kind(tmp_path: Path, name: str) -> None:
    config = find_format(name).configure(CLASS_NAMES)
    save_weights(tmp_path / "file.safetensors", {}, config)
    assert read_config(tmp_path / "file.safetensors") == config
    with pytest.raises(UserError, match="not found"):
        read_config(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="have format None; expected 'ftkd-weights-1'"):
        read_config(tmp_path / "other.safetensors")
