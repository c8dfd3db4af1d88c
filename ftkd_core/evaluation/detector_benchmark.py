# SPDX-License-Identifier: Apache-2.0
"""What a detector costs, and how well its fast engine agrees with the plain one.

Times are taken from images in host memory to objects in host memory, so they hold the copies too.
"""

import copy
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ftkd_core.data.synthetic.render import render_camera
from ftkd_core.data.synthetic.rig import SurroundRig, nuscenes_rig
from ftkd_core.data.synthetic.world import make_scene
from ftkd_core.evaluation.latency import LatencySummary, summarize_ms
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.predictions import decode
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.presets import preset
from ftkd_core.runtime.detector import Detector
from ftkd_core.runtime.preprocess import round_to_frame
from ftkd_core.types import CameraRound, CameraView
from ftkd_core.weights import SHIPPED, load_into, read_weights

WEIGHTS_SEED: Final = 0
TOLERANCE_M: Final = 0.02
TOLERANCE_SCORE: Final = 0.005
"""How far a box of the fast engine may be from the plain one's; a few may be farther in half precision, where
peaks of an image are equally strong and rounding decides which is looked at."""
_SCENE_SEED: Final = 900_000
_PERIOD_S: Final = 0.5
_COUNTERPART_M: Final = 2.0


def preset_model(name: str, weights: Path | None = None) -> tuple[StreamPETR, str]:
    """A model of a preset on the CPU, and what its weights are: those of the file, the shipped ones where
    they are of this preset, else random with a seed. UserError for an unknown preset or unfit weights."""
    config = preset(name)
    path = SHIPPED if weights is None else weights
    state, stored, _ = read_weights(path)
    if weights is None and stored.preset != config.preset:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(WEIGHTS_SEED)
            return build_stream_petr(config).eval(), f"random, seed {WEIGHTS_SEED}"
    model = build_stream_petr(stored if stored.preset == config.preset else config)
    load_into(model, state, str(path))
    return model.eval(), path.name


def driving_rounds(count: int, rig: SurroundRig) -> list[CameraRound]:
    """Rounds of a rendered drive at 2 Hz, all cameras exposed at the reference stamp."""
    scene = make_scene(_SCENE_SEED)
    rounds = []
    for index in range(count):
        time_s = 1.0 + _PERIOD_S * index
        pose, stamp_ns = scene.ego_pose(time_s), round(time_s * 1e9)
        views = tuple(
            CameraView(
                image=render_camera(scene, time_s, rig, camera).image,
                intrinsics=rig.intrinsics[camera],
                ego_from_camera=rig.ego_from_camera[camera],
                global_from_ego=pose,
                stamp_ns=stamp_ns,
            )
            for camera in range(len(rig.channels))
        )
        rounds.append(CameraRound(views=views, reference_stamp_ns=stamp_ns, global_from_ego=pose))
    return rounds


def network_rig(model: StreamPETR) -> SurroundRig:
    """The cameras of nuScenes with images that have the network's size already."""
    width, height = model.config.image.width, model.config.image.height
    scaled = round(900 * width / 1600)
    return nuscenes_rig().resized(width, scaled, crop_top=scaled - height)


class StepTimes(NamedTuple):
    """Of one detector's steps: wall time, and the processor time of all threads, which other users of the
    machine hardly change."""

    wall: LatencySummary
    processor: LatencySummary


def time_detectors(
    detectors: Sequence[Detector], rounds: Sequence[CameraRound], *, repeats: int, warm_up: int
) -> list[StepTimes]:
    """Times of each detector's `step`, interleaved A-B-A-B over the same rounds, streaming. A step ends with
    its objects on the host, so a GPU has nothing left to do."""
    samples: list[list[tuple[float, float]]] = [[] for _ in detectors]
    for run in range(warm_up + repeats):
        camera_round = rounds[run % len(rounds)]
        for detector, collected in zip(detectors, samples, strict=True):
            if camera_round is rounds[0]:
                detector.reset()  # the drive starts again
            wall, processor = time.perf_counter(), time.process_time()
            detector.step(camera_round)
            times = (time.perf_counter() - wall, time.process_time() - processor)
            if run >= warm_up:
                collected.append((times[0] * 1e3, times[1] * 1e3))
    return [StepTimes(*(summarize_ms(clock) for clock in zip(*pairs, strict=True))) for pairs in samples]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The best boxes of one detector and their counterparts in another's answer, over a drive.

    center_m: largest distance in metres, and center_p99_m its 99th percentile; score: largest difference;
    unmatched: how many of those `compared` have no counterpart of their class within 2 m; within: the share
    of those compared whose counterpart is within `TOLERANCE_M` and `TOLERANCE_SCORE`.
    """

    center_m: float
    center_p99_m: float
    score: float
    unmatched: int
    compared: int
    within: float


def compare_detectors(
    reference: Detector, other: Detector, rounds: Sequence[CameraRound], top: int = 100
) -> Agreement:
    """Stream both over the rounds and match the reference's `top` boxes of each round.

    A counterpart is the box of the same class that is best in metres plus ten times the difference of scores:
    two queries may answer the same box.
    """
    reference.reset()
    other.reset()
    pairs: list[tuple[float, float]] = []
    compared = 0
    for camera_round in rounds:
        true, found = reference.step(camera_round), other.step(camera_round)
        for box, score, label in zip(true.boxes[:top], true.scores[:top], true.labels[:top], strict=True):
            distance = np.linalg.norm(found.boxes[:, :3] - box[:3], axis=1)
            scores = np.abs(found.scores - score)
            near = (found.labels == label) & (distance < _COUNTERPART_M)
            compared += 1
            if near.any():
                best = np.where(near, distance + 10 * scores, np.inf).argmin()
                pairs.append((float(distance[best]), float(scores[best])))
    centers, scores = np.array(pairs or [(0.0, 0.0)]).T
    return Agreement(
        center_m=float(centers.max()), center_p99_m=float(np.percentile(centers, 99)),
        score=float(scores.max()), unmatched=compared - len(pairs), compared=compared,
        within=sum(c <= TOLERANCE_M and s <= TOLERANCE_SCORE for c, s in pairs) / max(compared, 1),
    )  # fmt: skip


def count_parameters(model: StreamPETR, *, at_inference: bool = False) -> int:
    """Parameters of a model; batch norm's running statistics are none. at_inference: without a 2-D head that
    only training needs."""
    spared = "auxiliary." if at_inference and not model.config.decoder.num_image_queries else None
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if spared is None or not name.startswith(spared)
    )


@torch.inference_mode()
def count_gflops(model: StreamPETR, camera_round: CameraRound) -> float:
    """Floating-point operations in units of 1e9 of one frame, batch 1: matrix products, convolutions and
    attention as torch counts them, a multiply-add being two."""
    plain = copy.deepcopy(model).cpu().eval()
    config = model.config
    frame = round_to_frame(
        camera_round, config.image, config.channels, time_s=0.0, is_first=True, device=torch.device("cpu")
    )
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        predictions, _ = plain(frame, plain.start_memory())
        decode(predictions)
    return float(counter.get_total_flops()) / 1e9


def reset_peak_memory(device: torch.device) -> None:
    """Count a GPU's peak from here; a CPU's is that of the process and cannot be reset."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mb(device: torch.device) -> float:
    """Megabytes (1e6 bytes) of what `peak_memory_meaning` says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def peak_memory_meaning(device: torch.device) -> str:
    """What `peak_memory_mb` counts on a device."""
    if device.type == "cuda":
        return "torch's largest allocation on the GPU"
    return "largest resident size of the process, Python, torch and rendering included"
