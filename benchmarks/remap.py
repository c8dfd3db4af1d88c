# SPDX-License-Identifier: Apache-2.0
"""Milliseconds per frame that virtual cameras cost more than scaling and cropping.

    python -m benchmarks.remap --json benchmarks/results/remap_cpu.json

Both ways from six camera images to the network's images are measured in turn in the same process, so other
load on the machine affects both alike. On a GPU the images are uploaded and resampled there.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import torch

from benchmarks.report import report
from benchmarks.rig_cases import turned
from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.config import ImageConfig
from ftkd_core.data.synthetic.rig import SurroundRig, canonical_cameras, nuscenes_rig
from ftkd_core.errors import UserError
from ftkd_core.lens import Lens
from ftkd_core.runtime.detector import resolve_device
from ftkd_core.runtime.header import Header, pack_header
from ftkd_core.runtime.preprocess import round_rig, stack_images
from ftkd_core.runtime.uploads import DeviceImages
from ftkd_core.runtime.virtual_camera import VirtualCameras
from ftkd_core.types import CameraRound, CameraView

SIZES: Final = ((352, 128), (704, 256))
_LENS: Final = Lens("plumb_bob", (-0.28, 0.09, 0.0005, -0.0004, -0.012))


def camera_round(rig: SurroundRig, lens: Lens | None, seed: int) -> CameraRound:
    """Return a round of six random images."""
    random = np.random.default_rng(seed)
    views = tuple(
        CameraView(
            image=random.integers(0, 256, (rig.height, rig.width, 3), dtype=np.uint8),
            intrinsics=rig.intrinsics[camera], ego_from_camera=rig.ego_from_camera[camera],
            global_from_ego=np.eye(4), stamp_ns=0, lens=lens, name=name,
        )
        for camera, name in enumerate(rig.channels)
    )  # fmt: skip
    return CameraRound(views=views, reference_stamp_ns=0, global_from_ego=np.eye(4))


def image_step(given: CameraRound, image: ImageConfig, device: torch.device) -> Callable[[], Any]:
    """Return a function from camera images to network images as the detector computes them; it waits for a
    GPU."""
    cameras = VirtualCameras(
        canonical_cameras(nuscenes_rig()), image, CAMERA_CHANNELS, "auto", log_decisions=False
    )
    if device.type == "cpu":
        return lambda: stack_images(cameras.see(given).views, image)
    images = DeviceImages(image, len(CAMERA_CHANNELS), device, lambda function: function)
    header = Header(len(CAMERA_CHANNELS), device)
    seen = cameras.see(given, leave_to_engine=True)
    header.upload(pack_header(round_rig(seen, image, CAMERA_CHANNELS), np.eye(4), 0.0, True))

    def step() -> None:
        images.upload(cameras.see(given, leave_to_engine=True).views, header.device_values)
        torch.cuda.synchronize(device)

    return step


def measure(image: ImageConfig, device: torch.device, repeats: int) -> dict[str, float]:
    """Return median milliseconds per frame of scaling the trained rig, of a pitched rig and of one with a
    lens, measured in turn, and the median of the differences."""
    trained = nuscenes_rig()
    pitched = turned(trained, pitch=3.0, roll=1.0)
    steps = {
        "scaled": image_step(camera_round(trained, None, 0), image, device),
        "virtual": image_step(camera_round(pitched, None, 0), image, device),
        "virtual_lens": image_step(camera_round(pitched, _LENS, 0), image, device),
    }
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 2):  # the first two create buffers and maps
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if repeat >= 2:
                spent[name].append((time.perf_counter() - started) * 1e3)
    base = np.array(spent["scaled"])
    medians = {f"{name}_ms": float(np.median(values)) for name, values in spent.items()}
    extra = {
        f"{name}_extra_ms": float(np.median(np.array(values) - base))
        for name, values in spent.items()
        if name != "scaled"
    }
    return medians | extra


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Bad input is reported in one sentence with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.remap",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=2, help="OpenCV's threads on the CPU (default 2)")
    parser.add_argument("--repeats", type=int, default=100, help="measured frames, at least 1 (default 100)")
    parser.add_argument("--note", help="free text, such as other load on the machine")
    arguments = parser.parse_args(argv)
    try:
        if arguments.repeats < 1 or arguments.threads < 1:
            raise UserError(
                f"--repeats {arguments.repeats} --threads {arguments.threads}: expected at least 1 each"
            )
        device = resolve_device(arguments.device)
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    cv2.setNumThreads(arguments.threads)
    figures = {
        f"{width}x{height}": measure(ImageConfig(width=width, height=height), device, arguments.repeats)
        for width, height in SIZES
    }
    about = {"device": str(device), "threads": arguments.threads, "cameras": "six of 1600x900"}
    report(about | {"network_images": figures}, arguments.json, arguments.note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
