# SPDX-License-Identifier: Apache-2.0
"""A converted drive and a detector that returns its ground truth, for tests of detection and evaluation."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.types import CameraRound, ObjectList
from ftkd_ros.bag.convert import convert_scene
from ftkd_ros.bag.io import BagReader
from ftkd_ros.bag.replay_rounds import Drive
from tests.ros.driving_scene import SCENE, VERSION, write_drive


@dataclass(frozen=True)
class RecordedDrive:
    """A data set of one scene and two bags:

    `sweeps` has all images, `key_frames` only those of key frames.
    """

    dataroot: Path
    sweeps: Path
    key_frames: Path
    version: str = VERSION
    scene: str = SCENE


def record_drive(folder: Path) -> RecordedDrive:
    """Write a drive of 25 rounds, 5 of them key frames, and convert it to both bags."""
    dataroot = write_drive(folder / "data", sweeps=25)
    bags = folder / "sweeps", folder / "key_frames"
    for bag, sweeps in zip(bags, (True, False), strict=True):
        convert_scene(dataroot, VERSION, SCENE, bag, sweeps=sweeps, progress=False)
    return RecordedDrive(dataroot, *bags)


class GroundTruthDetector:
    """Returns the ground truth of the nearest key frame."""

    channels = CAMERA_CHANNELS
    assigns_by_yaw = True
    weights_name = "ground_truth.safetensors"
    training = "300 steps, distilled by ftkd"
    preset = "none"
    device = "cpu"

    def __init__(self, bag: Path) -> None:
        with BagReader(bag) as reader:
            self._truths = Drive(reader).ground_truth()
        self.rounds: list[CameraRound] = []
        self.faults: dict[str, str] = {}
        self.recommended_thresholds: dict[str, float] = {}
        self.warnings: list[str] = []
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
