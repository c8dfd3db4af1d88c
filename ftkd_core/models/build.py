# SPDX-License-Identifier: Apache-2.0
"""Construction of streaming detectors from configurations."""

from typing import TypeAlias

from ftkd_core.config import DetectorConfig, SparseBEVConfig
from ftkd_core.models.anchored_stream_petr import AnchoredStreamPETR
from ftkd_core.models.corrected_stream_petr import CorrectedStreamPETR
from ftkd_core.models.sparse_bev import SparseBEV, build_sparse_bev
from ftkd_core.models.stream_petr import StreamPETR

StreamingModel: TypeAlias = StreamPETR | SparseBEV
"""A detector that runs on a stream: a SparseBEV has no future frames then."""


def build_stream_petr(config: DetectorConfig) -> StreamPETR:
    """Return the streaming detector of a configuration with random weights.

    Image queries need anchored queries; without them queries are points, computed as published or corrected.
    """
    if config.decoder.num_image_queries:
        return AnchoredStreamPETR(config)
    return StreamPETR(config) if config.decoder.as_published else CorrectedStreamPETR(config)


def build_streaming(config: DetectorConfig | SparseBEVConfig) -> StreamingModel:
    """Return the streaming detector of a configuration of either kind with random weights."""
    return build_sparse_bev(config) if isinstance(config, SparseBEVConfig) else build_stream_petr(config)
