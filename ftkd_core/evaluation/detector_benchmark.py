# SPDX-License-Identifier: Apache-2.0
"""Cost of a detector, and agreement of its fast engine with the plain one.

Times are measured from images in host memory to objects in host memory, so they include the copies.
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
from ftkd_core.models.build import StreamingModel, build_streaming
from ftkd_core.models.predictions import decode
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.percentiles import Summary, summarize
from ftkd_core.presets import preset, streaming_preset
from ftkd_core.runtime.detector import Detector
from ftkd_core.runtime.preprocess import round_to_frame
from ftkd_core.types import CameraRound, CameraView
from ftkd_core.weights import SHIPPED, load_into, read_streaming_weights

WEIGHTS_SEED: Final = 0
TOLERANCE_M: Final = 0.02
TOLERANCE_SCORE: Final = 0.005
"""Largest difference of a box between fast and plain engine that counts as equal. In half precision a few
boxes differ more, because rounding selects among image peaks of equal score."""
_SCENE_SEED: Final = 900_000
_PERIOD_S: Final = 0.5
_COUNTERPART_M: Final = 2.0


def load_streaming_model(name: str, weights: Path | None = None) -> tuple[StreamingModel, str]:
    """Build a model of a preset that runs on a stream, on the CPU, and describe its weights.

    Weights: those of the file; else the shipped ones if they belong to this preset; else random with a fixed
    seed. UserError for an unknown preset or unfit weights.
    """
    config = streaming_preset(name)
    path = SHIPPED if weights is None else weights
    state, stored, _ = read_streaming_weights(path)
    if weights is None and stored.preset != config.preset:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(WEIGHTS_SEED)
            return build_streaming(config).eval(), f"random, seed {WEIGHTS_SEED}"
    model = build_streaming(stored if stored.preset == config.preset else config)
    load_into(model, state, str(path))
    return model.eval(), path.name


def load_preset_model(name: str, weights: Path | None = None) -> tuple[StreamPETR, str]:
    """Return the same for a preset of StreamPETR only."""
    preset(name)  # raises for another preset
    model, described = load_streaming_model(name, weights)
    assert isinstance(model, StreamPETR)
    return model, described


def driving_rounds(count: int, rig: SurroundRig) -> list[CameraRound]:
    """Render rounds of a drive at 2 Hz, with all cameras exposed at the reference stamp."""
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


def network_rig(model: StreamingModel) -> SurroundRig:
    """Return the nuScenes cameras with images of the network's size."""
    width, height = model.config.image.width, model.config.image.height
    scaled = round(900 * width / 1600)
    return nuscenes_rig().resized(width, scaled, crop_top=scaled - height)


class StepTimes(NamedTuple):
    """Times of one detector's steps: wall time, and processor time of all threads, which depends little on
    other load."""

    wall: Summary
    processor: Summary


def time_detectors(
    detectors: Sequence[Detector], rounds: Sequence[CameraRound], *, repeats: int, warm_up: int
) -> list[StepTimes]:
    """Time `step` of each detector, interleaved A-B-A-B over the same rounds, streaming. A step ends when its
    objects are on the host, so no GPU work is left."""
    samples: list[list[tuple[float, float]]] = [[] for _ in detectors]
    for run in range(warm_up + repeats):
        camera_round = rounds[run % len(rounds)]
        for detector, collected in zip(detectors, samples, strict=True):
            if camera_round is rounds[0]:
                detector.reset()  # the drive restarts
            wall, processor = time.perf_counter(), time.process_time()
            detector.step(camera_round)
            times = (time.perf_counter() - wall, time.process_time() - processor)
            if run >= warm_up:
                collected.append((times[0] * 1e3, times[1] * 1e3))
    return [StepTimes(*(summarize(clock) for clock in zip(*pairs, strict=True))) for pairs in samples]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of the best boxes of one detector with another's over a drive.

    center_m, center_p99_m: largest distance in metres and its 99th percentile. score: largest difference.
    unmatched: boxes of those `compared` without a counterpart of their class within 2 m. within: fraction of
    those compared whose counterpart is within `TOLERANCE_M` and `TOLERANCE_SCORE`.
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
    """Run both detectors over the rounds and match the reference's `top` boxes of each round.

    The counterpart is the box of the same class with the smallest distance in metres plus ten times the score
    difference, because two queries may predict the same box.
    """
    reference.reset()
    other.reset()
    pairs: list[tuple[float, float]] = []
    compared = 0
    for camera_round in rounds:
        expected, found = reference.step(camera_round), other.step(camera_round)
        best = (expected.boxes[:top], expected.scores[:top], expected.labels[:top])
        for box, score, label in zip(*best, strict=True):
            distance = np.linalg.norm(found.boxes[:, :3] - box[:3], axis=1)
            scores = np.abs(found.scores - score)
            near = (found.labels == label) & (distance < _COUNTERPART_M)
            compared += 1
            if near.any():
                closest = np.where(near, distance + 10 * scores, np.inf).argmin()
                pairs.append((float(distance[closest]), float(scores[closest])))
    centers, scores = np.array(pairs or [(0.0, 0.0)]).T
    return Agreement(
        center_m=float(centers.max()), center_p99_m=summarize(centers.tolist()).p99 or 0.0,
        score=float(scores.max()), unmatched=compared - len(pairs), compared=compared,
        within=sum(c <= TOLERANCE_M and s <= TOLERANCE_SCORE for c, s in pairs) / max(compared, 1),
    )  # fmt: skip


def count_parameters(model: StreamPETR, *, at_inference: bool = False) -> int:
    """Count the parameters of a model, without the running statistics of batch norms. at_inference: without a
    2-D head that is used only in training."""
    training_only = at_inference and not model.config.decoder.num_image_queries
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not (training_only and name.startswith("auxiliary."))
    )


@torch.inference_mode()
def count_gflops(model: StreamPETR, camera_round: CameraRound) -> float:
    """Count floating-point operations in 1e9 for one frame, batch 1: matrix products, convolutions and
    attention as counted by torch; a multiply-add is two operations."""
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
    """Reset the peak memory of a GPU; the peak of a CPU is that of the process and cannot be reset."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory in megabytes (1e6 bytes) as defined by `peak_memory_definition`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def peak_memory_definition(device: torch.device) -> str:
    """Describe which memory `peak_memory_mb` counts on a device."""
    if device.type == "cuda":
        return "torch's largest allocation on the GPU"
    return "largest resident size of the process, Python, torch and rendering included"
