# SPDX-License-Identifier: Apache-2.0
"""Self-check of the fast engine on a GPU: it must compute what the plain engine computes.

There the fast engine is compiled, captured and in half precision. Each of these can fail on a version of
torch or on a GPU that it was not tried on. The check streams a few rounds of smooth images through both
engines; the result is cached per GPU, version of torch and weights.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import cv2
import numpy as np
import torch

from ftkd_core.json_files import write_json
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.runtime.engines import Engine, Rows
from ftkd_core.types import CameraRound, CameraView

ROUNDS: Final = 4
_TOP: Final = 50
_NEAR_M, _NEAR_SCORE = 0.1, 0.02
_LEAST_SHARE: Final = 0.9
_STORED: Final = 32  # verdicts; the oldest are dropped
_OPTICAL: Final = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])
_log = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """Whether the fast engine may be used, and the reason in words."""

    passed: bool
    reason: str


def check_engine(make: Callable[[], Engine], plain: Engine, model: StreamPETR) -> Verdict:
    """Compare an engine with the plain one over ROUNDS rounds. An engine that raises has not passed."""
    try:
        engine = make()
        shares = []
        for index in range(ROUNDS):
            camera_round = smooth_round(model, index)
            rows = [
                each.start(camera_round, time_s=0.5 * index, is_first=index == 0)()
                for each in (plain, engine)
            ]
            shares.append(agreement(*rows))
    except Exception as error:  # compilers, drivers and CUDA raise anything; the reason is reported
        _log.warning("the fast engine failed its self-check", exc_info=error)
        return Verdict(False, f"the fast engine failed its self-check: {type(error).__name__}")
    share = float(np.mean(shares))
    passed = share >= _LEAST_SHARE
    return Verdict(passed, f"self-check: {share:.1%} of boxes as the plain engine's")


def agreement(expected: Rows, found: Rows) -> float:
    """Share of the best expected boxes with a counterpart of their class near them in place and score."""
    best = expected[:_TOP]
    distance = np.linalg.norm(best[:, None, :3] - found[None, :, :3], axis=-1)
    near = (distance < _NEAR_M) & (np.abs(best[:, None, 9] - found[None, :, 9]) < _NEAR_SCORE)
    near &= best[:, None, 10] == found[None, :, 10]
    return float(near.any(axis=1).mean())


def smooth_round(model: StreamPETR, index: int) -> CameraRound:
    """A round of smooth random images: cameras all around a vehicle that drives straight on."""
    config = model.config
    width, height = config.image.width, config.image.height
    random = np.random.default_rng(index)
    pose = np.eye(4)
    pose[0, 3] = 2.0 * index
    views = []
    for camera in range(len(config.channels)):
        yaw = 2 * np.pi * camera / len(config.channels)
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]
        coarse = random.integers(0, 256, (8, 22, 3), dtype=np.uint8)
        image = np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
        focal = 0.8 * width
        views.append(
            CameraView(
                image=image,
                intrinsics=np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]),
                ego_from_camera=turn @ _OPTICAL,
                global_from_ego=pose,
                stamp_ns=index * 500_000_000,
            )
        )
    return CameraRound(views=tuple(views), reference_stamp_ns=index * 500_000_000, global_from_ego=pose)


def remembered(path: Path, key: str, check: Callable[[], Verdict]) -> Verdict:
    """The verdict of a key from a JSON file, or that of `check`, which is then stored.

    A damaged file is replaced; a file that cannot be written is reported in the log.
    """
    known = _read(path)
    if key in known:
        return known[key]
    verdict = check()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        newest = list((known | {key: verdict}).items())[-_STORED:]
        write_json(path, dict(newest))
    except OSError as error:
        _log.warning("cannot store the self-check in %s: %s", path, error)
    return verdict


def _read(path: Path) -> dict[str, Verdict]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): Verdict(bool(passed), str(reason)) for key, (passed, reason) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # missing, unreadable or of another form
        return {}


def self_check_key(device: torch.device, weights_hash: str) -> str:
    """What a verdict depends on: GPU, version of torch, weights."""
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {weights_hash}"
