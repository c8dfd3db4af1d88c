# SPDX-License-Identifier: Apache-2.0
"""Summary of repeated measurements: median, percentiles, mean and maximum."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Median, 95th and 99th percentile, mean, maximum and minimum of `count` samples, in the samples' unit;
    None if there are no samples."""

    p50: float | None
    p95: float | None
    p99: float | None
    mean: float | None
    max: float | None
    count: int
    min: float | None = None

    def as_dict(self) -> dict[str, float | int | None]:
        """Fields for JSON, rounded to three digits after the point (microseconds if samples are in ms)."""
        return {
            key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(self).items()
        }


def summarize(samples: Sequence[float]) -> Summary:
    """Summarise samples. Raises ValueError for a sample that is not finite."""
    values = np.asarray(samples, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"samples {values[~np.isfinite(values)][:3].tolist()}; expected finite numbers")
    if values.size == 0:
        return Summary(None, None, None, None, None, 0)
    p50, p95, p99 = (float(value) for value in np.percentile(values, [50, 95, 99]))
    return Summary(
        p50, p95, p99, float(values.mean()), float(values.max()), int(values.size),
        float(values.min()),
    )  # fmt: skip
