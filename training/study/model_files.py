# SPDX-License-Identifier: Apache-2.0
"""Read models, presets and step counts from weights files of either kind of detector."""

from pathlib import Path

from ftkd_core.config import BackboneConfig, SparseBEVConfig
from ftkd_core.errors import UserError
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.weights import load_into, read_config, read_weights, read_window_weights
from training.distill import load_teacher


def load_model(weights: Path) -> StreamPETR | SparseBEV:
    """Return the model of a weights file, student or teacher."""
    if isinstance(read_config(weights), SparseBEVConfig):
        return load_teacher(weights)
    state, config, _ = read_weights(weights)
    model = build_stream_petr(config)
    load_into(model, state, str(weights))
    return model


def trained_steps(weights: Path) -> int:
    """Return the number of training steps of a weights file; 0 if it does not exist. Raise UserError if it is
    damaged."""
    if not weights.is_file():
        return 0
    window_model = isinstance(read_config(weights), SparseBEVConfig)
    notes = (read_window_weights if window_model else read_weights)(weights)[2]
    return int(notes.get("steps", 0))


def model_preset(weights: Path) -> str:
    """Return the preset in the configuration of a weights file."""
    found = read_config(weights)
    if isinstance(found, BackboneConfig):
        raise UserError(f"{str(weights)!r} holds only a backbone; expected a student or a teacher")
    return found.preset
