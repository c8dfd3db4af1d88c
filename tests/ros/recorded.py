# SPDX-License-Identifier: Apache-2.0
"""A converted drive and detections of it, shared by the tests of what comes after the converter."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from driving_scene import SCENE, VERSION, write_drive

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.types import CameraRound, ObjectList
from ftkd_ros.bag.convert import convert_scene
from ftkd_ros.bag.io import BagReader
from ftkd_ros.bag.replay_rounds import Drive


@dataclass(frozen=True)
class Recorded:
    """A data set of one scene and its bags: all images, and key frames alone."""

    dataroot: Path
    sweeps: Path
    key_frames: Path
    version: str = VERSION
    scene: str = SCENE


def record(folder: Path) -> Recorded:
    """Write a drive of 25 rounds, 5 of them key frames, and convert it both ways."""
    dataroot = write_drive(folder / "data", sweeps=25)
    bags = folder / "sweeps", folder / "key_frames"
    for bag, sweeps in zip(bags, (True, False), strict=True):
        convert_scene(dataroot, VERSION, SCENE, bag, sweeps=sweeps, progress=False)
    return Recorded(dataroot, *bags)


class KnowingDetector:
    """Answers with the ground truth of the nearest key frame."""

    channels = CAMERA_CHANNELS
    weights_name = "knowing.safetensors"
    training = "300 steps, distilled by ftkd"
    preset = "none"
    device = "cpu"

    def __init__(self, bag: Path) -> None:
        with BagReader(bag) as reader:
            self._truths = Drive(reader).ground_truth()
        self.rounds: list[CameraRound] = []
        self.resets = 0

    def warm_up(self) -> None:
        return None

    def reset(self) -> None:
        self.resets += 1

    def step(self, camera_round: CameraRound) -> ObjectList:
        self.rounds.append(camera_round)
        stamp_ns = min(self._truths, key=lambda stamp: abs(stamp - camera_round.reference_stamp_ns))
        truth = self._truths[stamp_ns]
        return ObjectList(
            boxes=truth.boxes,
            scores=np.full(len(truth.boxes), 0.8),
            labels=truth.labels,
            stamp_ns=camera_round.reference_stamp_ns,
        )
