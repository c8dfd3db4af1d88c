# SPDX-License-Identifier: Apache-2.0
"""Ground truth that a model can predict: within its range, with labels in its class order.

Datasets provide objects up to 61.2 m away and labels in the order of CLASS_NAMES. Symbols: B batch, G object
slots.
"""

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.config import DetectorConfig, SparseBEVConfig
from ftkd_core.errors import UserError
from ftkd_core.geometry import full_precision, optional_matrix, transform_points
from ftkd_core.types import Targets


def filter_targets(targets: Targets, config: DetectorConfig | SparseBEVConfig) -> Targets:
    """Return the targets (B, G) for training a model: `in_range`, with labels that are indices into its
    `class_names`.

    Raises UserError if its classes are not those of CLASS_NAMES.
    """
    targets = in_range(targets, config)
    if config.class_names == CLASS_NAMES:
        return targets
    if sorted(config.class_names) != sorted(CLASS_NAMES):
        raise UserError(f"class_names {config.class_names}: training expects {CLASS_NAMES}, in any order")
    places = targets.labels.new_tensor([config.class_names.index(name) for name in CLASS_NAMES])
    return targets._replace(labels=places[targets.labels])


@full_precision
def in_range(targets: Targets, config: DetectorConfig | SparseBEVConfig) -> Targets:
    """Return the targets without objects whose centre is outside the model's range of centres, in x or y of
    its frame; no query could reach them."""
    centers = targets.boxes[..., :3].float()
    matrix = optional_matrix(config.model_from_ego)
    if matrix is not None:
        centers = transform_points(matrix.to(centers), centers)
    low, high = (centers.new_tensor(bound) for bound in _ground_range(config))
    ground = centers[..., :2]
    inside = ((ground >= low) & (ground <= high)).all(-1)  # (B, G)
    return targets._replace(mask=targets.mask & inside, mask_2d=targets.mask_2d & inside[:, None])


def _ground_range(
    config: DetectorConfig | SparseBEVConfig,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return low and high x, y in metres of the centres that a model can predict."""
    return config.decoder.point_range_m[:2], config.decoder.point_range_m[3:5]
