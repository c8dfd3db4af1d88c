# SPDX-License-Identifier: Apache-2.0
"""Parameters -> the matcher of a synchronization policy, for the node and for bags; without ROS."""

from typing import Any

from ftkd_ros.node.parameters import DetectorParameters
from ftkd_ros.sync.anchor import AnchorMatcher
from ftkd_ros.sync.auto import AutoMatcher
from ftkd_ros.sync.matcher_interface import Matcher
from ftkd_ros.sync.surround import SurroundMatcher


def make_matcher(parameters: DetectorParameters) -> Matcher:
    """Return the matcher of policy `auto`, `surround` or `anchor`."""
    offsets = parameters.camera_time_offsets_s
    anchor: AnchorMatcher[Any] = AnchorMatcher(
        parameters.cameras,
        anchor=parameters.anchor,
        max_difference_ns=round(parameters.max_camera_time_diff_s * 1e9),
        min_cameras=parameters.min_round_cameras,
    )
    if parameters.sync_policy == "anchor":
        return anchor
    automatic = parameters.sync_policy == "auto"
    surround: SurroundMatcher[Any] = SurroundMatcher(
        parameters.cameras,
        slop_ns=round(parameters.sync_slop_s * 1e9),
        deadline_ns=round(parameters.sync_deadline_s * 1e9),
        offsets_ns=[round(offset * 1e9) for offset in offsets] if offsets else None,
        min_cameras=parameters.min_round_cameras,
        hold_misfit=automatic,
    )
    return AutoMatcher(surround, anchor) if automatic else surround
