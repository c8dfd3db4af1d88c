# SPDX-License-Identifier: Apache-2.0
"""Images of cameras with a lens: pinhole images in up to six directions, read along the rays of the lens.

The directions are the faces of a cube around the camera centre, and only the parts of the faces that the
camera sees are rendered, at twice the density of its image. A lens with a moderate field sees one face: then
this is one larger pinhole image. All faces have the camera's centre, so their images fit together exactly.
Symbols: H/W camera image, S samples per pixel and axis.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Final, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.data.synthetic.rig import SurroundRig
from ftkd_core.geometry import make_transform
from ftkd_core.lens import Lens, unproject_pixels

Image = NDArray[np.uint8]
Array = NDArray[np.float64]
SAMPLES: Final = 2
"""Samples per pixel and axis of the camera image, and density of the pinhole images."""
_MARGIN: Final = 3  # pixels around the part of a face that is read

# Columns: x, y and z axes of each face in the camera frame (x right, y down, z forward).
_CAMERA_FROM_FACE: Final = tuple(
    np.array(rows, dtype=np.float64).T
    for rows in (
        ([1, 0, 0], [0, 1, 0], [0, 0, 1]),  # front
        ([0, 0, -1], [0, 1, 0], [1, 0, 0]),  # right
        ([0, 0, 1], [0, 1, 0], [-1, 0, 0]),  # left
        ([1, 0, 0], [0, 0, -1], [0, 1, 0]),  # down
        ([1, 0, 0], [0, 0, 1], [0, -1, 0]),  # up
        ([-1, 0, 0], [0, 1, 0], [0, 0, -1]),  # back
    )
)


class Face(NamedTuple):
    """Part of a face of the cube: a rig of one pinhole camera, the rows and columns of the sampled camera
    image that contain its samples, their positions in the face's image, and which samples belong to it."""

    rig: SurroundRig
    rows: slice
    columns: slice
    maps: NDArray[np.float32]
    own: NDArray[np.bool_]


def lens_faces(rig: SurroundRig, camera: int) -> tuple[Face, ...]:
    """Return the faces that a camera with a lens sees; they are cached."""
    lens = rig.lens(camera)
    assert lens is not None
    key = rig.intrinsics[camera].tobytes() + rig.ego_from_camera[camera].tobytes()
    return _faces(key, rig.width, rig.height, lens)


@lru_cache(maxsize=16)
def _faces(key: bytes, width: int, height: int, lens: Lens) -> tuple[Face, ...]:
    numbers = np.frombuffer(key, dtype=np.float64)
    intrinsics, ego_from_camera = numbers[:9].reshape(3, 3), numbers[9:].reshape(4, 4)
    columns = (np.arange(width * SAMPLES) + 0.5) / SAMPLES
    rows = (np.arange(height * SAMPLES) + 0.5) / SAMPLES
    pixels = np.stack(np.meshgrid(columns, rows), axis=-1)
    rays, valid = unproject_pixels(pixels.reshape(-1, 2), intrinsics, lens)
    rays, valid = rays.reshape(*pixels.shape[:2], 3), valid.reshape(pixels.shape[:2])
    axes = np.stack([rotation[:, 2] for rotation in _CAMERA_FROM_FACE], axis=1)
    nearest = np.where(valid, np.argmax(rays @ axes, axis=-1), -1)
    return tuple(
        _face(rotation, rays, nearest == index, ego_from_camera)
        for index, rotation in enumerate(_CAMERA_FROM_FACE)
        if (nearest == index).any()
    )


def _face(rotation: Array, rays: Array, own: NDArray[np.bool_], ego_from_camera: Array) -> Face:
    """Return the part of the face with this rotation (3, 3) to the camera that contains the samples `own`."""
    where = np.nonzero(own)
    rows, columns = (slice(int(axis.min()), int(axis.max()) + 1) for axis in where)
    own = own[rows, columns]
    local = rays[rows, columns] @ rotation
    depth = np.where(own, local[..., 2], 1.0)
    points = np.where(own[..., None], local[..., :2] / depth[..., None], 0.0)
    focal = 1.0 / _spacing(points, own)
    points *= focal
    low = np.floor(points[own].min(axis=0)) - _MARGIN
    high = np.ceil(points[own].max(axis=0)) + _MARGIN
    size = (high - low).astype(int)
    k = np.array([[focal, 0.0, -low[0]], [0.0, focal, -low[1]], [0.0, 0.0, 1.0]])
    rig = SurroundRig(
        channels=("face",), width=int(size[0]), height=int(size[1]), intrinsics=k[None],
        ego_from_camera=(ego_from_camera @ make_transform(rotation))[None], exposure_offsets_s=np.zeros(1),
    )  # fmt: skip
    return Face(rig, rows, columns, (points - low - 0.5).astype(np.float32), own)


def _spacing(points: Array, own: NDArray[np.bool_]) -> float:
    """Return the least distance of neighbouring samples on a face at focal length 1, up to outliers."""
    distances = [
        np.linalg.norm(np.diff(points, axis=axis), axis=-1)[both]
        for axis, both in ((0, own[1:] & own[:-1]), (1, own[:, 1:] & own[:, :-1]))
    ]
    found = np.concatenate(distances)
    return float(np.percentile(found, 1)) if len(found) else 1.0


def render_through_lens(
    rig: SurroundRig, camera: int, paint: Callable[[SurroundRig], tuple[Image, Array, Array]]
) -> tuple[Image, Array, Array]:
    """Return the image (H, W, 3) of a camera with a lens, and the visible and total pixels (M,) of each
    actor in it.

    paint: renders the camera of a rig of one pinhole camera. Pixels to which the lens maps no ray are black.
    """
    sampled = np.zeros((rig.height * SAMPLES, rig.width * SAMPLES, 3), dtype=np.uint8)
    counts = []
    for face in lens_faces(rig, camera):
        image, visible, total = paint(face.rig)
        density = face.rig.intrinsics[0, 0, 0] / rig.intrinsics[camera, 0, 0]
        counts.append((visible / density**2, total / density**2))
        part = cv2.remap(image, face.maps, None, cv2.INTER_LINEAR)  # type: ignore[call-overload]
        sampled[face.rows, face.columns][face.own] = part[face.own]
    visible, total = np.sum(counts, axis=0)
    averaged = cv2.resize(sampled, (rig.width, rig.height), interpolation=cv2.INTER_AREA)
    return np.asarray(averaged, dtype=np.uint8), visible, total
