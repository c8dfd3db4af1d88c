# SPDX-License-Identifier: Apache-2.0
"""Camera images of a scene: ground by ray and plane, bodies by a painter whose order is exact, light, fog
and noise.

Symbols: B bodies, F faces, P = 8 points a face, H/W image size.
"""

import itertools
from functools import lru_cache
from typing import Any, Final, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.data.synthetic.ground import METRES_PER_PIXEL, NUM_LEVELS, X_RANGE, Y_RANGE, ground_texture
from ftkd_core.data.synthetic.mesh import Lamp, Mesh
from ftkd_core.data.synthetic.ordering import footprints, painting_order
from ftkd_core.data.synthetic.rig import SurroundRig
from ftkd_core.data.synthetic.world import Scene
from ftkd_core.geometry import invert_rigid, yaw_transform

_NEAR_M: Final = 0.3
_ACTOR_RANGE_M: Final = 90.0
_FIXTURE_RANGE_M: Final = 130.0
_SHIFT: Final = 4  # fractional bits of cv2's polygon coordinates
_DAY_SKY: Final = np.array([[205, 214, 226], [120, 160, 215]], dtype=np.float32)
_NIGHT_SKY: Final = np.array([[34, 34, 44], [10, 11, 20]], dtype=np.float32)

Floats = NDArray[np.floating[Any]]


class Rendering(NamedTuple):
    """image (H, W, 3) uint8 RGB; per actor, as `Scene.actors_at` orders them, (M,) pixels of its silhouette
    that are seen and pixels it would cover with nothing in front of it."""

    image: NDArray[np.uint8]
    visible_pixels: NDArray[np.float64]
    total_pixels: NDArray[np.float64]


class _View(NamedTuple):
    """What a mounted camera sees of a flat world; constant while the rig is. Arrays are (H, W) unless said
    otherwise."""

    x_ego: NDArray[np.float32]  # where the pixel's ray meets the ground, metres
    y_ego: NDArray[np.float32]
    distance: NDArray[np.float32]  # along the ground; very far above the horizon
    elevation: NDArray[np.float32]  # sine of the ray's elevation
    is_ground: NDArray[np.bool_]
    sky_rows: int  # rows from the top with any sky in them
    bands: tuple[tuple[int, int, int], ...]  # rows from, to, and the mip level that suits them


@lru_cache(maxsize=32)
def _view(key: bytes, width: int, height: int) -> _View:
    numbers = np.frombuffer(key, dtype=np.float64)
    intrinsics, ego_from_camera = numbers[:9].reshape(3, 3), numbers[9:].reshape(4, 4)
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    rays = (
        np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(intrinsics).T @ ego_from_camera[:3, :3].T
    )
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    down = rays[..., 2] < -2e-3
    scale = np.where(down, ego_from_camera[2, 3] / np.maximum(-rays[..., 2], 2e-3), 0.0)
    x = ego_from_camera[0, 3] + scale * rays[..., 0]
    y = ego_from_camera[1, 3] + scale * rays[..., 1]
    distance = np.where(down, scale, 1e4)
    # A pixel covers distance / focal metres across and more along the view: take their geometric mean.
    footprint = distance / intrinsics[0, 0] / np.sqrt(np.maximum(-rays[..., 2], 2e-3))
    level = np.clip(
        np.round(np.log2(np.maximum(footprint.mean(axis=1), 1e-6) / METRES_PER_PIXEL)), 0, NUM_LEVELS - 1
    )
    starts = [0, *(np.flatnonzero(np.diff(level)) + 1).tolist(), height]
    bands = tuple((a, b, int(level[a])) for a, b in itertools.pairwise(starts) if down[a:b].any())
    return _View(
        x.astype(np.float32), y.astype(np.float32),
        distance.astype(np.float32), rays[..., 2].astype(np.float32),
        down,
        int((~down.all(axis=1)).nonzero()[0].max(initial=-1)) + 1, bands,
    )  # fmt: skip


class _Bodies(NamedTuple):
    """Everything solid at one moment, actors first: meshes, poses (B, 3) x y yaw, sizes (B, 3), number of
    actors."""

    meshes: list[Mesh]
    poses: NDArray[np.float64]
    sizes: NDArray[np.float64]
    actors: int


def render_camera(
    scene: Scene, time_s: float, rig: SurroundRig, camera: int, noise_seed: int | None = None
) -> Rendering:
    """The image of one camera at a scene time. Deterministic: noise comes from scene, camera and time
    unless seeded."""
    x, y, yaw, _ = scene.ego.at(time_s)
    local_from_ego = yaw_transform(yaw, (x, y, 0.0))
    local_from_camera = local_from_ego @ rig.ego_from_camera[camera]
    intrinsics = rig.intrinsics[camera]
    key = np.concatenate([intrinsics.ravel(), rig.ego_from_camera[camera].ravel()]).tobytes()
    view = _view(key, rig.width, rig.height)
    image = _paint_ground(
        scene, view, local_from_ego, _backdrop(key, rig.width, rig.height, scene.fog_per_m, scene.night)
    )
    bodies = _bodies_at(scene, time_s)
    painter = _Painter(image, scene, intrinsics, local_from_camera, yaw)
    visible, total = painter.paint(bodies)
    seed = (
        noise_seed if noise_seed is not None else hash((scene.seed, camera, round(time_s * 1e6))) & 0x7FFFFFFF
    )
    _add_noise(image, seed, scene.night)
    return Rendering(image, visible, total)


def _bodies_at(scene: Scene, time_s: float) -> _Bodies:
    meshes = [actor.body for actor in scene.actors] + [fixture.body for fixture in scene.fixtures]
    poses = np.concatenate([scene.actor_poses_local(time_s), scene.fixture_solids[:, :3]])
    sizes = np.concatenate([scene.actor_sizes, scene.fixture_solids[:, 3:]])
    return _Bodies(meshes, poses, sizes, len(scene.actors))


def _sky_colors(scene: Scene) -> NDArray[np.float32]:
    return _NIGHT_SKY if scene.night else _DAY_SKY


class _Backdrop(NamedTuple):
    """What of ground and sky is the same in every frame of a drive: the image of the sky, that of haze, and
    the weights (H, W) of the ground's own colour and of the haze before it."""

    sky: NDArray[np.uint8]
    haze: NDArray[np.uint8]
    lit: NDArray[np.float32] | None  # (H, W, 3) light on the ground, None by day
    own: NDArray[np.float32]
    hazy: NDArray[np.float32]


@lru_cache(maxsize=32)
def _backdrop(key: bytes, width: int, height: int, fog_per_m: float, night: bool) -> _Backdrop:
    view = _view(key, width, height)
    horizon, zenith = _NIGHT_SKY if night else _DAY_SKY
    haze = np.empty((height, width, 3), dtype=np.uint8)
    haze[:] = horizon.astype(np.uint8)
    sky = haze.copy()
    blend = np.clip(view.elevation[: view.sky_rows] * 2.5, 0, 1)[..., None]
    sky[: view.sky_rows] = (horizon * (1 - blend) + zenith * blend).astype(np.uint8)
    clear = np.exp(-fog_per_m * view.distance).astype(np.float32)
    light = _brightness_at(night, view.distance, view.x_ego)
    lit = np.repeat(light[..., None], 3, axis=-1) if night else None
    return _Backdrop(sky, haze, lit, clear, 1 - clear)


def _paint_ground(
    scene: Scene,
    view: _View,
    local_from_ego: NDArray[np.float64],
    backdrop: _Backdrop,
) -> NDArray[np.uint8]:
    texture = ground_texture(scene.seed)
    cos, sin = np.float32(local_from_ego[0, 0]), np.float32(local_from_ego[1, 0])
    offset = local_from_ego[:2, 3]
    image = backdrop.sky.copy()
    for top, bottom, level in view.bands:
        x, y = view.x_ego[top:bottom], view.y_ego[top:bottom]
        scale = np.float32(1.0 / (METRES_PER_PIXEL * 2**level))
        map_x, map_y = cos * x, sin * x
        for coordinate, across, start in (
            (map_x, -sin, offset[0] - X_RANGE[0]),
            (map_y, cos, offset[1] - Y_RANGE[0]),
        ):
            coordinate += across * y
            coordinate += np.float32(start)
            coordinate *= scale
            coordinate -= np.float32(0.5)
        band = cv2.remap(
            texture.levels[level], map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        if backdrop.lit is not None:  # blendLinear keeps brightness: weights alone cannot darken
            band = cv2.multiply(band, backdrop.lit[top:bottom], dtype=cv2.CV_8U)
        own, hazy = backdrop.own[top:bottom], backdrop.hazy[top:bottom]
        shaded = cv2.blendLinear(band, backdrop.haze[top:bottom], own, hazy)
        mixed = max(0, min(view.sky_rows, bottom) - top)
        image[top + mixed : bottom] = shaded[mixed:]
        ground = view.is_ground[top : top + mixed]
        image[top : top + mixed][ground] = shaded[:mixed][ground]
    return image


def _brightness_at(night: bool, distance: Floats, x_ego: Floats) -> NDArray[np.float32]:
    """Light on the ground or on a body: 1 by day; at night street light, and the ego's headlights ahead."""
    if not night:
        return np.ones_like(distance, dtype=np.float32)
    ahead = np.clip(x_ego / np.maximum(distance, 1.0) - 0.55, 0, 1) * 2.2
    beam = 0.9 * ahead * np.exp(-np.asarray(distance) / 30.0)
    return np.asarray(0.32 + beam, dtype=np.float32)


class _Painter:
    """Draws bodies into an image, back to front, and counts the pixels of each actor on a silhouette map."""

    _ID_SCALE: Final = 0.5

    def __init__(
        self,
        image: NDArray[np.uint8],
        scene: Scene,
        intrinsics: NDArray[np.float64],
        local_from_camera: NDArray[np.float64],
        ego_yaw: float,
    ) -> None:
        self.ego_yaw = ego_yaw
        self.image = image
        self.scene = scene
        self.k = intrinsics
        self.position = local_from_camera[:3, 3]
        self.camera_from_local = invert_rigid(local_from_camera)
        height, width = image.shape[:2]
        self.size = (width, height)
        self.frame = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=np.float32)
        self.ids = np.zeros(
            (max(1, round(height * self._ID_SCALE)), max(1, round(width * self._ID_SCALE))), dtype=np.int16
        )

    def paint(self, bodies: _Bodies) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Draw all that is in view; visible and total silhouette pixels (M,) of the actors."""
        total = np.zeros(bodies.actors)
        chosen = self._in_view(bodies)
        if len(chosen):
            corners = footprints(bodies.poses[chosen], bodies.sizes[chosen, :2])
            order = chosen[painting_order(corners, self.position[:2])]
            self._shadows(bodies, order[order < bodies.actors])
            self._faces(bodies, order, total)
        counts = np.bincount(self.ids.ravel(), minlength=bodies.actors + 1)[1 : bodies.actors + 1]
        scale = self._ID_SCALE**2
        visible = np.minimum(counts / scale, total)
        return visible, total

    def _in_view(self, bodies: _Bodies) -> NDArray[np.int64]:
        """Bodies whose bounding circle reaches into the view, within drawing range."""
        if not len(bodies.meshes):
            return np.zeros(0, dtype=np.int64)
        centers = np.concatenate([bodies.poses[:, :2], bodies.sizes[:, 2:] / 2], axis=1)
        local = centers @ self.camera_from_local[:3, :3].T + self.camera_from_local[:3, 3]
        radius = np.linalg.norm(bodies.sizes, axis=1) / 2 + 1.5
        left, right = self.k[0, 2] / self.k[0, 0], (self.size[0] - self.k[0, 2]) / self.k[0, 0]
        reach = np.where(np.arange(len(centers)) < bodies.actors, _ACTOR_RANGE_M, _FIXTURE_RANGE_M)
        x, z = local[:, 0], local[:, 2]
        seen = (z > -radius) & (np.hypot(x, z) < reach)
        seen &= (-x - left * z) / np.hypot(1, left) < radius
        seen &= (x - right * z) / np.hypot(1, right) < radius
        return np.flatnonzero(seen)

    def _project(self, points: Floats) -> NDArray[np.float64]:
        """Points (..., 3) in the camera frame with z > 0 -> pixels (..., 2)."""
        pixels: NDArray[np.float64] = (
            points[..., :2] / points[..., 2:] * self.k[(0, 1), (0, 1)] + self.k[:2, 2]
        )
        return pixels

    def _shadows(self, bodies: _Bodies, actors: NDArray[np.int64]) -> None:
        if not len(actors):
            return
        sizes = bodies.sizes[actors, :2] + 0.25
        corners = footprints(bodies.poses[actors], sizes)
        flat = np.concatenate([corners, np.full((*corners.shape[:2], 1), 0.005)], axis=-1)
        local = flat @ self.camera_from_local[:3, :3].T + self.camera_from_local[:3, 3]
        dark = 12.0 if self.scene.night else 46.0
        horizon = _sky_colors(self.scene)[0]
        clear = np.exp(-self.scene.fog_per_m * np.linalg.norm(local.mean(1), axis=-1))[:, None]
        colors = dark * clear + horizon * (1 - clear)
        whole = (local[..., 2] >= _NEAR_M).all(axis=1)
        pixels = self._project(np.where(whole[:, None, None], local, 1.0))
        for polygon, corners_px, color, is_whole in zip(local, pixels, colors, whole.tolist(), strict=True):
            if is_whole:
                self._fill(corners_px, color)
                continue
            clipped = _clip_near(polygon)
            if len(clipped) >= 3:
                self._fill(self._project(clipped), color)

    def _faces(self, bodies: _Bodies, order: NDArray[np.int64], total: NDArray[np.float64]) -> None:
        meshes = [bodies.meshes[index] for index in order]
        cameras = self._camera_in_bodies(bodies.poses[order])
        picks = [mesh.painting_order(camera) for mesh, camera in zip(meshes, cameras, strict=True)]
        owner = np.repeat(np.arange(len(order)), [len(pick) for pick in picks])
        firsts, normals = (
            np.concatenate(arrays).astype(np.float64)
            for arrays in (
                [mesh.points[pick, 0] for mesh, pick in zip(meshes, picks, strict=True)],
                [mesh.normals[pick] for mesh, pick in zip(meshes, picks, strict=True)],
            )
        )
        facing = ((cameras[owner] - firsts) * normals).sum(-1) > 0
        seen = [
            pick[part]
            for pick, part in zip(
                picks, np.split(facing, np.cumsum([len(p) for p in picks])[:-1]), strict=True
            )
        ]
        owner, normals = owner[facing], normals[facing]
        points, counts, lamps, colors = (
            np.concatenate([getattr(mesh, name)[pick] for mesh, pick in zip(meshes, seen, strict=True)])
            for name in ("points", "counts", "lamps", "colors")
        )
        points = points.astype(np.float64)
        poses = bodies.poses[order][owner]
        world = _turned(points, poses)
        local = world @ self.camera_from_local[:3, :3].T + self.camera_from_local[:3, 3]
        shaded = self._shade(colors, lamps, _turned_vectors(normals, poses[:, 2]), world.mean(1))
        self._draw(order, owner, local, counts, shaded, bodies.actors, total)

    def _camera_in_bodies(self, poses: NDArray[np.float64]) -> NDArray[np.float64]:
        relative = self.position - np.concatenate([poses[:, :2], np.zeros((len(poses), 1))], axis=1)
        return _turned_vectors(relative, -poses[:, 2])

    def _shade(
        self,
        colors: Floats,
        lamps: NDArray[np.int64],
        normals: NDArray[np.float64],
        centers: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Face colours (F, 3) under the scene's light, with fog."""
        offset = centers - self.position
        distance = np.linalg.norm(offset, axis=-1)
        if self.scene.night:
            ahead = _turned_vectors(offset, np.full(len(offset), -self.ego_yaw))[:, 0]
            lit = _brightness_at(True, distance, ahead) * (0.75 + 0.25 * np.clip(normals[:, 2], 0, 1))
            glow = np.isin(lamps, (Lamp.HEAD, Lamp.TAIL, Lamp.WINDOW))
            lit = np.where(glow, 1.0, lit)
        else:
            lit = 0.62 + 0.45 * np.clip(normals @ self.scene.sun, 0, 1)
        clear = np.exp(-self.scene.fog_per_m * distance)[:, None]
        result: NDArray[np.float64] = colors * lit[:, None] * clear + _sky_colors(self.scene)[0] * (1 - clear)
        return np.clip(result, 0, 255)

    def _draw(
        self,
        order: NDArray[np.int64],
        owner: NDArray[np.int64],
        local: NDArray[np.float64],
        counts: NDArray[np.int64],
        colors: NDArray[np.float64],
        num_actors: int,
        total: NDArray[np.float64],
    ) -> None:
        ahead = (local[..., 2] > _NEAR_M).sum(1)
        pixels = self._project(np.where(local[..., 2:] > _NEAR_M, local, 1.0))
        fixed = np.round((pixels - 0.5) * (1 << _SHIFT)).astype(np.int32)
        bounds = np.searchsorted(owner, np.arange(len(order) + 1)).tolist()
        whole = ahead == local.shape[1]
        # Faces whose bounding box (with a rim for smoothed edges) misses the image need no drawing.
        low, high = pixels.min(axis=1), pixels.max(axis=1)
        drawn = (whole & (high > -2).all(axis=1) & (low < np.array(self.size) + 2).all(axis=1)).tolist()
        cut = ((ahead > 0) & ~whole).tolist()
        palette, sides = colors.astype(int).tolist(), counts.tolist()
        any_actor = False
        for number, body in enumerate(order.tolist()):
            start, stop = bounds[number], bounds[number + 1]
            clipped: list[NDArray[np.float64]] = []
            for face in range(start, stop):
                if drawn[face]:
                    polygon = fixed[face, : sides[face]]
                    cv2.fillConvexPoly(self.image, polygon, palette[face], cv2.LINE_AA, _SHIFT)
                elif cut[face]:
                    left = _clip_near(local[face, : sides[face]])
                    if len(left) >= 3:
                        clipped.append(self._project(left))
                        self._fill(clipped[-1], colors[face])
            any_actor = any_actor or body < num_actors
            if not any_actor:
                continue  # the map of actors is still empty: a fixture hides nothing on it
            outline = pixels[start:stop][whole[start:stop]].reshape(-1, 2)
            if clipped:
                outline = np.concatenate([outline, *clipped])
            if len(outline):
                self._silhouette(outline, body, num_actors, total)

    def _silhouette(
        self, points: NDArray[np.float64], body: int, num_actors: int, total: NDArray[np.float64]
    ) -> None:
        """Mark the hull of a body on the id map; 0 for what is not an actor."""
        hull = cv2.convexHull(points.astype(np.float32))[:, 0]
        width, height = self.size
        (left, top), (right, bottom) = hull.min(axis=0).tolist(), hull.max(axis=0).tolist()
        if right < 0 or left > width or bottom < 0 or top > height:
            return
        if body < num_actors:
            total[body] = cv2.intersectConvexConvex(hull, self.frame)[0]
        fixed = np.rint((hull * self._ID_SCALE - 0.5) * (1 << _SHIFT)).astype(np.int32)
        cv2.fillConvexPoly(self.ids, fixed, [body + 1 if body < num_actors else 0], cv2.LINE_8, _SHIFT)

    def _fill(self, pixels: NDArray[np.float64], color: Floats) -> None:
        inner = np.minimum(np.maximum(pixels, -2e4), 2e4)
        fixed = np.rint((inner - 0.5) * (1 << _SHIFT)).astype(np.int32)
        cv2.fillConvexPoly(self.image, fixed, color.tolist(), cv2.LINE_AA, _SHIFT)


def _turned_vectors(vectors: NDArray[np.float64], yaw: NDArray[np.float64]) -> NDArray[np.float64]:
    """Vectors (F, 3) turned about z by yaw (F,)."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    x = cos * vectors[:, 0] - sin * vectors[:, 1]
    y = sin * vectors[:, 0] + cos * vectors[:, 1]
    return np.stack([x, y, vectors[:, 2]], axis=-1)


def _turned(points: NDArray[np.float64], poses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (F, P, 3) of bodies at poses (F, 3) in the local frame."""
    cos, sin = np.cos(poses[:, 2])[:, None], np.sin(poses[:, 2])[:, None]
    x = cos * points[..., 0] - sin * points[..., 1] + poses[:, None, 0]
    y = sin * points[..., 0] + cos * points[..., 1] + poses[:, None, 1]
    return np.stack([x, y, points[..., 2]], axis=-1)


def _clip_near(polygon: Floats) -> NDArray[np.float64]:
    """The part of a polygon (P, 3) in the camera frame with z >= the near plane; (0, 3) where nothing is
    left."""
    result: list[NDArray[np.float64]] = []
    for current, following in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        inside, next_inside = current[2] >= _NEAR_M, following[2] >= _NEAR_M
        if inside:
            result.append(current)
        if inside != next_inside:
            result.append(
                current + (following - current) * (_NEAR_M - current[2]) / (following[2] - current[2])
            )
    return np.array(result).reshape(-1, 3)


@lru_cache(maxsize=1)
def _noise_bank() -> NDArray[np.uint8]:
    noise = np.random.default_rng(5).normal(128, 4.0, (1200, 2000, 3))
    return np.clip(noise, 0, 255).astype(np.uint8)


def _add_noise(image: NDArray[np.uint8], seed: int, night: bool) -> None:
    """Sensor noise in place: a window of a fixed bank, chosen by the seed; stronger at night."""
    bank = _noise_bank()
    height, width = image.shape[:2]
    random = np.random.default_rng(seed)
    if height > bank.shape[0] or width > bank.shape[1]:
        bank = np.tile(bank, (height // bank.shape[0] + 1, width // bank.shape[1] + 1, 1))
    row = int(random.integers(bank.shape[0] - height + 1))
    column = int(random.integers(bank.shape[1] - width + 1))
    gain = 1.6 if night else 1.0
    cv2.addWeighted(
        image, 1.0, bank[row : row + height, column : column + width], gain, -128.0 * gain, dst=image
    )
