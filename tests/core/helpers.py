# SPDX-License-Identifier: Apache-2.0
"""Small models and seeded inputs for tests of models."""

import numpy as np
import pytest
import torch

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.config import DetectorConfig, override
from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.data.clips import Clip
from ftkd_core.data.targets import ClipObjects
from ftkd_core.geometry import invert_rigid, yaw_transform
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.predictions import Predictions
from ftkd_core.models.sparse_bev import SparseBEV, build_sparse_bev
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.presets import preset, sparse_bev_preset
from ftkd_core.types import CameraRig, Frame, FrameWindow

SMALL = [
    "image.width=96",
    "image.height=32",
    "backbone.base_channels=8",
    "backbone.neck_channels=16",
    "decoder.channels=32",
    "decoder.num_heads=2",
    "decoder.num_layers=2",
    "decoder.ffn_channels=32",
    "decoder.num_queries=12",
    "decoder.num_propagated=6",
    "decoder.memory_length=18",
    "decoder.num_depths=8",
    "decoder.position_hidden=32",
    "loss.denoising_groups=2",
]
FOCAL = ("auxiliary_kind=focal", "backbone.neck_channels=32")
NO_AUGMENTATION = AugmentConfig(flip=0.0, rotation=0.0, colour=0.0, camera_dropout=0.0)
RIGS = pytest.mark.parametrize(
    ("cameras", "width", "height"), [(1, 96, 32), (2, 96, 32), (6, 96, 32), (6, 80, 48), (1, 80, 48)]
)
"""Different numbers of cameras, and image sizes that are multiples of 16 but not of 32."""


def rig_settings(cameras: int, width: int, height: int) -> list[str]:
    """Return settings of a model for one of RIGS."""
    channels = ", ".join(CAMERA_CHANNELS[:cameras])
    return [f"channels=[{channels}]", f"image.width={width}", f"image.height={height}"]


def small_config(*extra: str, image_queries: int = 8) -> DetectorConfig:
    """Return the tiny preset shrunk until a step takes milliseconds. Without image queries, queries are
    points."""
    queries = f"decoder.num_image_queries={image_queries}"
    return override(preset("tiny"), [*SMALL, queries, *extra])


def small_model(*extra: str, image_queries: int = 8, seed: int = 0) -> StreamPETR:
    """Return a small model in eval mode; its conditional norms are randomised so that every input matters."""
    torch.manual_seed(seed)
    model = build_stream_petr(small_config(*extra, image_queries=image_queries))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gamma.weight", "beta.weight")):
                parameter.normal_(0, 0.1)
    return model.eval()


@torch.no_grad()
def stream(model: StreamPETR, frames: list[Frame]) -> list[Predictions]:
    """Return the predictions of a new stream for these frames."""
    memory, results = model.start_memory(1), []
    for frame in frames:
        predictions, memory = model(frame, memory)
        results.append(predictions)
    return results


def camera_ring(count: int = 6) -> torch.Tensor:
    """Return extrinsics (1, N, 4, 4) of cameras that look outwards in all directions."""
    optical = np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
    poses = []
    for index in range(count):
        yaw = 2 * np.pi * index / count
        poses.append(yaw_transform(yaw, (np.cos(yaw), np.sin(yaw), 1.5)) @ optical)
    return torch.from_numpy(np.stack(poses))[None].float()


def make_frame(
    config: DetectorConfig,
    seed: int,
    *,
    time: float = 0.0,
    first: bool = True,
    pose: np.ndarray | None = None,
    cameras: int = 6,
) -> Frame:
    """Return a frame of random images from a ring of cameras."""
    width, height = config.image.width, config.image.height
    images = torch.randn(1, cameras, 3, height, width, generator=torch.Generator().manual_seed(seed))
    k = torch.tensor([[80.0, 0, width / 2], [0, 80.0, height / 2], [0, 0, 1]]).expand(1, cameras, 3, 3)
    rig = CameraRig(k.clone(), camera_ring(cameras), torch.ones(1, cameras, dtype=torch.bool))
    global_from_ego = torch.from_numpy(np.eye(4) if pose is None else pose)[None]
    return Frame(
        images, rig, global_from_ego, torch.tensor([time], dtype=torch.float64), torch.tensor([first])
    )


def drive(config: DetectorConfig, count: int = 4, seed: int = 0, cameras: int = 6) -> list[Frame]:
    """Return frames of a vehicle that drives forward and turns, at 2 Hz."""
    return [
        make_frame(
            config,
            seed + index,
            time=0.5 * index,
            first=index == 0,
            pose=yaw_transform(0.1 * index, (3.0 * index, 0, 0)),
            cameras=cameras,
        )
        for index in range(count)
    ]


def make_clip(
    frames: int = 6, objects: int = 4, seed: int = 0, width: int = 96, height: int = 32, cameras: int = 6
) -> Clip:
    """Return a clip of noise images with boxes around the vehicle."""
    random = np.random.default_rng(seed)
    intrinsics = np.tile(np.array([[80.0, 0, width / 2], [0, 80.0, height / 2], [0, 0, 1]]), (cameras, 1, 1))
    annotated = []
    for _ in range(frames):
        boxes = np.concatenate(
            [
                random.uniform(-25, 25, (objects, 2)),
                random.uniform(0.5, 1.5, (objects, 1)),
                random.uniform(1, 4, (objects, 3)),
                random.uniform(-3, 3, (objects, 1)),
                random.normal(size=(objects, 2)),
            ],
            axis=1,
        )
        annotated.append(
            ClipObjects(
                boxes=boxes,
                labels=random.integers(0, 10, objects),
                visible=np.ones(objects),
                num_points=np.full(objects, 5),
            )
        )
    return Clip(
        name=f"clip-{seed}",
        images=random.integers(0, 256, (frames, cameras, height, width, 3), dtype=np.uint8),
        intrinsics=intrinsics,
        ego_from_camera=np.tile(camera_ring(cameras)[0].double().numpy(), (frames, 1, 1, 1)),
        global_from_ego=np.stack([yaw_transform(0.05 * i, (100 + 2.0 * i, 50, 0)) for i in range(frames)]),
        times=np.arange(frames) * 0.5,
        objects=tuple(annotated),
    )


SMALL_SPARSE = [
    "image.width=96",
    "image.height=32",
    "backbone.base_channels=8",
    "decoder.channels=32",
    "decoder.num_heads=2",
    "decoder.num_layers=2",
    "decoder.ffn_channels=32",
    "decoder.num_queries=16",
    "decoder.out_points=8",
]


def small_sparse(*extra: str, past: int = 2, future: int = 0, image_queries: int = 0) -> SparseBEV:
    """Return a small model whose sampling, mixing and attention depend on the queries."""
    torch.manual_seed(0)
    config = override(
        sparse_bev_preset("sparse_bev_tiny"),
        [
            *SMALL_SPARSE,
            f"num_past={past}",
            f"num_future={future}",
            f"decoder.num_image_queries={image_queries}",
            *extra,
        ],
    )
    model = build_sparse_bev(config)
    with torch.no_grad():
        layer = model.decoder_layer
        for parameter in (
            layer.sampling_offset.weight,
            layer.mixing.parameter_generator.weight,
            layer.self_attention.fade.weight,
        ):
            parameter.normal_(0, 0.05)
        if image_queries:  # initial box changes are near 0
            layer.regressor[-1].weight.normal_(0, 0.1)
    return model.eval()


def window_of(frames: list[Frame], current: int, order: list[int]) -> FrameWindow:
    """Return the window of frame `current` over the frames in `order`, as a dataset builds it."""
    now = frames[current]
    chosen = [frames[current], *(frames[i] for i in order)]
    poses = [
        (invert_rigid(now.global_from_ego) @ f.global_from_ego)[:, None] @ f.rig.ego_from_camera.double()
        for f in chosen
    ]
    rig = CameraRig(
        torch.stack([f.rig.intrinsics for f in chosen], 1),
        torch.stack(poses, 1).float(),
        torch.stack([f.rig.mask for f in chosen], 1),
    )
    times = torch.stack([(f.time - now.time).float() for f in chosen], 1)
    return FrameWindow(torch.stack([f.images for f in chosen], 1), rig, times)
