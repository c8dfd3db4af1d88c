# SPDX-License-Identifier: Apache-2.0
"""Clips of the synthetic world: cached separately, at any interval of the same moving world."""

from pathlib import Path

import numpy as np
import pytest

from ftkd_core.config import ImageConfig
from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.errors import UserError

IMAGE = ImageConfig(width=96, height=32)


def test_intervals_alternate_between_scenes(tmp_path: Path) -> None:
    clips = SyntheticClips(5, IMAGE, tmp_path, 2.0, intervals_s=(0.5, 0.125, 1.0))
    steps = [np.unique(np.diff(clips(index).times).round(6)).tolist() for index in range(4)]
    assert steps == [[0.5], [0.125], [1.0], [0.5]]
    assert [len(clips(index).times) for index in range(3)] == [4, 4, 2]
    assert "every 0.5, 0.125, 1 s" in clips.name


def test_shorter_interval_samples_the_same_world(tmp_path: Path) -> None:
    slow, fast = (SyntheticClips(7, IMAGE, tmp_path, 2.0, intervals_s=(i,))(0) for i in (0.5, 0.25))
    assert np.allclose(fast.times[::2], slow.times[:2])
    assert np.allclose(fast.global_from_ego[::2], slow.global_from_ego[:2])
    assert np.array_equal(fast.images[2], slow.images[1])
    assert np.allclose(fast.objects[2].boxes, slow.objects[1].boxes)
    assert len(list(next(tmp_path.iterdir()).iterdir())) == 2  # both are cached separately


def test_invalid_intervals_raise(tmp_path: Path) -> None:
    for intervals in ((), (0.5, 0.0), (3.0,)):
        with pytest.raises(UserError, match=r"expected one or more of 0.05 to 2 s"):
            SyntheticClips(0, IMAGE, tmp_path, intervals_s=intervals)
