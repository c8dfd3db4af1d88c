# SPDX-License-Identifier: Apache-2.0
"""Configuration: presets, overrides, and errors a user can act on."""

import json

import pytest

from ftkd_core.config import DetectorConfig, from_dict, override, to_dict
from ftkd_core.errors import UserError
from ftkd_core.presets import PRESETS, preset, sparse_bev_preset


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_survives_json(name: str) -> None:
    config = preset(name)
    assert config.preset == name
    assert from_dict(DetectorConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_override_changes_one_value_and_keeps_the_rest() -> None:
    config = override(preset("tiny"), ["decoder.num_layers=2", "loss.denoising=0", "image.width=704"])
    assert (config.decoder.num_layers, config.loss.denoising, config.image.width) == (2, 0.0, 704)
    assert config.decoder.channels == preset("tiny").decoder.channels


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "decoder.num_layer=2",
            "unknown configuration key decoder.num_layer; did you mean decoder.num_layers",
        ),
        ("decodr.num_layers=2", "unknown configuration key decodr"),
        ("decoder.num_layers=two", "decoder.num_layers is 'two'; expected int"),
        ("decoder.num_heads=3", "channels 128: expected a multiple of num_heads 3"),
        ("image.width=350", "image size 350x128: expected positive multiples of 16"),
        ("backbone.depth=19", "backbone depth 19"),
        (
            "decoder.num_image_queries=4225",
            "queries 4225: expected 0 to 4224, .* 6 352x128 images at stride 8",
        ),
        ("nothing", "expected path=value"),
        ("channels=front", "expected a list"),
    ],
)
def test_a_bad_override_names_the_value_and_what_was_expected(assignment: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(preset("tiny"), [assignment])


def test_image_queries_need_cells_to_start_at() -> None:
    tiny, sparse = preset("tiny"), sparse_bev_preset("sparse_bev_tiny")
    one = ["channels=[CAM_FRONT]", "image.width=64", "image.height=64", "backbone.auxiliary_stride=16"]
    for config in (tiny, sparse):
        assert override(config, [*one, "decoder.num_image_queries=16"]).decoder.num_image_queries == 16
        with pytest.raises(UserError, match="num_image_queries 17: expected 0 to 16, the cells of 1 64x64"):
            override(config, [*one, "decoder.num_image_queries=17"])


def test_an_unknown_preset_names_what_exists() -> None:
    with pytest.raises(UserError, match="unknown preset 'huge'; expected one of r18_352x128, .*, tiny"):
        preset("huge")
