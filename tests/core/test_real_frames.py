# SPDX-License-Identifier: Apache-2.0
"""Four real nuScenes key frames of two vehicles through virtual cameras: with their own calibration as the
canonical one, and as a foreign rig."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from nuscenes import NuScenes

from ftkd_core.canonical_cameras import CanonicalCamera
from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.config import ImageConfig
from ftkd_core.data import nuscenes as access
from ftkd_core.data.synthetic.rig import canonical_cameras, nuscenes_rig
from ftkd_core.geometry import invert_rigid, transform_points
from ftkd_core.runtime.detector import Detector
from ftkd_core.runtime.preprocess import network_intrinsics, resize_and_crop
from ftkd_core.runtime.virtual_camera import VirtualCameras
from ftkd_core.types import CameraRound, CameraView

FRAMES = Path(
    os.environ.get(
        "FTKD_NUSCENES_FRAMES", Path(__file__).resolve().parents[3] / "shared/data/nuscenes_four_frames"
    )
)
pytestmark = pytest.mark.skipif(
    not (FRAMES / "v1.0-mini").is_dir(),
    reason=f"the real nuScenes key frames are not at {FRAMES} (their licence does not allow them in the "
    "repository); set FTKD_NUSCENES_FRAMES to a folder that holds some",
)
IMAGE = ImageConfig(width=352, height=128)


@pytest.fixture(scope="module")
def dataset() -> NuScenes:
    return access.open_dataset(FRAMES, "v1.0-mini")


@pytest.fixture(scope="module")
def tokens(dataset: NuScenes) -> list[str]:
    """The samples that have images."""
    found = [row["token"] for row in dataset.sample if "CAM_FRONT" in row["data"]]
    assert len(found) == 4
    return found


@pytest.fixture(scope="module")
def rounds(dataset: NuScenes, tokens: list[str]) -> list[CameraRound]:
    return [access.camera_round(dataset, token) for token in tokens]


def own_cameras(camera_round: CameraRound) -> list[CanonicalCamera]:
    """Return the calibration of a round as canonical cameras."""
    return [
        CanonicalCamera(
            channel=channel, width=view.image.shape[1], height=view.image.shape[0],
            intrinsics=view.intrinsics, ego_from_camera=view.ego_from_camera,
        )
        for channel, view in zip(CAMERA_CHANNELS, camera_round.views, strict=True)
        if view is not None
    ]  # fmt: skip


@pytest.mark.parametrize("frame", range(4))
def test_frame_passes_unchanged_if_its_own_calibration_is_the_canonical_one(
    frame: int, rounds: list[CameraRound]
) -> None:
    cameras = VirtualCameras(own_cameras(rounds[frame]), IMAGE, CAMERA_CHANNELS, "auto")
    found = cameras.see(rounds[frame])
    assert all(a is b for a, b in zip(found.views, rounds[frame].views, strict=True))
    assert not cameras.faults and all(seen.difference_deg < 1e-6 for seen in cameras.seen)


@pytest.mark.parametrize("frame", range(4))
@pytest.mark.parametrize("canonical", ["synthetic", "the other vehicle"])
def test_frame_of_a_foreign_rig_shows_each_object_where_the_virtual_camera_expects_it(
    frame: int, canonical: str, rounds: list[CameraRound], dataset: NuScenes, tokens: list[str]
) -> None:
    """The virtual image around the projection of an object equals the raw image around its projection."""
    given = rounds[frame]
    other = rounds[(frame + 2) % 4]
    model = canonical_cameras(nuscenes_rig()) if canonical == "synthetic" else own_cameras(other)
    cameras = VirtualCameras(model, IMAGE, CAMERA_CHANNELS, "virtual")
    found = cameras.see(given)
    assert not cameras.faults and [seen.channel for seen in cameras.seen] == list(range(6))
    objects = access.ground_truth(dataset, tokens[frame])
    differences, far = [], []
    for seen in cameras.seen:
        raw, view = given.views[seen.camera], found.views[seen.channel]
        assert raw is not None and view is not None and seen.share > 0.8
        plain = resize_and_crop(raw.image, IMAGE)
        k = network_intrinsics(raw.intrinsics, IMAGE, raw.image.shape[1], raw.image.shape[0])
        before, ahead = project(objects.boxes[:, :3], raw, k, given)
        after, _ = project(objects.boxes[:, :3], view, view.intrinsics, given)
        for a, b in zip(before[ahead], after[ahead], strict=True):
            if inside(a) and inside(b):
                patch, seen_patch = patch_at(plain, a), patch_at(view.image, b)
                differences.append(np.abs(patch - seen_patch).mean())
                far.append(
                    np.abs(patch - patch_at(view.image, (a + np.array([40.0, 0.0])) % (300, 110))).mean()
                )
    assert len(differences) > 8
    assert np.median(differences) < 0.5 * np.median(far)
    assert np.median(differences) < 12


def project(
    points_ego: NDArray[np.float64], view: CameraView, intrinsics: NDArray[np.float64], given: CameraRound
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return pixels (P, 2) of points in ego at the reference stamp, and which lie ahead."""
    camera_from_ego = invert_rigid(view.global_from_ego @ view.ego_from_camera) @ given.global_from_ego
    local = transform_points(camera_from_ego, points_ego)
    ahead = local[:, 2] > 1.0
    pixels = local[:, :2] / np.where(ahead, local[:, 2], 1.0)[:, None]
    return pixels * intrinsics[(0, 1), (0, 1)] + intrinsics[:2, 2], ahead


def inside(pixel: NDArray[np.float64]) -> bool:
    return bool((pixel > 9).all() and (pixel < (IMAGE.width - 9, IMAGE.height - 9)).all())


def patch_at(image: NDArray[np.uint8], pixel: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 11x11 pixels around a position between pixels."""
    center = (float(pixel[0]) - 0.5, float(pixel[1]) - 0.5)
    return np.asarray(cv2.getRectSubPix(image, (11, 11), center), dtype=np.float64)


def test_detector_takes_all_frames_as_its_own_and_as_a_foreign_rig(rounds: list[CameraRound]) -> None:
    """With the own calibration, detections are bit-identical to those without virtual cameras."""
    results = {}
    for model in ("as_is", "auto", "virtual"):
        detector = Detector.from_weights(
            device="cpu", runtime="fast", score_threshold=0.05, camera_model=model
        )
        own = Detector(
            detector.model, weights_name="own", device=detector.device, runtime="fast", score_threshold=0.05,
            camera_model=model, canonical_cameras=own_cameras(rounds[0]),
        )  # fmt: skip
        results[model] = own.step(rounds[0])
        for camera_round in rounds:
            detector.reset()
            objects = detector.step(camera_round)
            assert np.isfinite(objects.boxes).all() and not detector.cameras.faults
        assert len(detector.cameras.seen) == 6
        assert any(seen.remap is not None for seen in detector.cameras.seen) == (model != "as_is")
    for model in ("auto", "virtual"):
        np.testing.assert_array_equal(results[model].boxes, results["as_is"].boxes)
        np.testing.assert_array_equal(results[model].scores, results["as_is"].scores)
