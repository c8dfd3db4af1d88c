# SPDX-License-Identifier: Apache-2.0
"""Draw solid bodies into a camera image with the painter's algorithm, in exact back-to-front order.

Symbols: B bodies, M actors, F faces, P = 8 points per face.
"""

import itertools
from typing import Final, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.data.synthetic.light import Floats, brightness_at, sky_colors
from ftkd_core.data.synthetic.mesh import Lamp, Mesh
from ftkd_core.data.synthetic.ordering import footprints, painting_order
from ftkd_core.data.synthetic.world import Scene
from ftkd_core.geometry import invert_rigid, rotate_about_z

_NEAR_M: Final = 0.3
_ACTOR_RANGE_M: Final = 90.0
_FIXTURE_RANGE_M: Final = 130.0
_SHIFT: Final = 4  # fractional bits of cv2's polygon coordinates


class Bodies(NamedTuple):
    """All solid bodies at one time, actors first: meshes, poses (B, 3) x, y, yaw, sizes (B, 3), number of
    actors."""

    meshes: list[Mesh]
    poses: NDArray[np.float64]
    sizes: NDArray[np.float64]
    actors: int


class _Faces(NamedTuple):
    """Faces in drawing order: points (F, P, 3) in the camera frame, pixels (F, P, 2), and pixels in fixed
    point for OpenCV. `whole`: all points lie beyond the near plane; `drawn`: whole and inside the image;
    `cut`: crosses the near plane."""

    local: NDArray[np.float64]
    pixels: NDArray[np.float64]
    fixed: NDArray[np.int32]
    whole: NDArray[np.bool_]
    drawn: list[bool]
    cut: list[bool]
    counts: list[int]
    colors: NDArray[np.float64]
    palette: list[list[int]]


def bodies_at(scene: Scene, time_s: float) -> Bodies:
    """Collect the bodies of all actors and fixtures at a scene time, in the local frame."""
    meshes = [actor.body for actor in scene.actors] + [fixture.body for fixture in scene.fixtures]
    poses = np.concatenate([scene.actor_poses_local(time_s), scene.fixture_solids[:, :3]])
    sizes = np.concatenate([scene.actor_sizes, scene.fixture_solids[:, 3:]])
    return Bodies(meshes, poses, sizes, len(scene.actors))


class BodyPainter:
    """Draws bodies into `image` (H, W, 3) in place, back to front, and counts the pixels of each actor.

    Pixels are counted on a map of actor silhouettes at half resolution. intrinsics (3, 3);
    local_from_camera (4, 4); ego_yaw: direction of the headlights in the local frame.
    """

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

    def paint(self, bodies: Bodies) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Draw all bodies in view; return the visible and the total silhouette pixels (M,) of the actors."""
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

    def _in_view(self, bodies: Bodies) -> NDArray[np.int64]:
        """Indices of the bodies within drawing range whose bounding circle intersects the view."""
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
        """Pixels (..., 2) of points (..., 3) in the camera frame with z > 0."""
        pixels: NDArray[np.float64] = (
            points[..., :2] / points[..., 2:] * self.k[(0, 1), (0, 1)] + self.k[:2, 2]
        )
        return pixels

    def _shadows(self, bodies: Bodies, actors: NDArray[np.int64]) -> None:
        """Draw the contact shadow of each actor on the ground."""
        if not len(actors):
            return
        sizes = bodies.sizes[actors, :2] + 0.25
        corners = footprints(bodies.poses[actors], sizes)
        flat = np.concatenate([corners, np.full((*corners.shape[:2], 1), 0.005)], axis=-1)
        local = flat @ self.camera_from_local[:3, :3].T + self.camera_from_local[:3, 3]
        dark = 12.0 if self.scene.night else 46.0
        horizon = sky_colors(self.scene.night)[0]
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

    def _faces(self, bodies: Bodies, order: NDArray[np.int64], total: NDArray[np.float64]) -> None:
        """Draw the front-facing faces of all bodies in the given order."""
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
        world = rotate_about_z(points, poses[:, None, 2])
        world[..., :2] += poses[:, None, :2]
        local = world @ self.camera_from_local[:3, :3].T + self.camera_from_local[:3, 3]
        shaded = self._shade(colors, lamps, rotate_about_z(normals, poses[:, 2]), world.mean(1))
        self._draw(order, owner, local, counts, shaded, bodies.actors, total)

    def _camera_in_bodies(self, poses: NDArray[np.float64]) -> NDArray[np.float64]:
        """Camera positions (B, 3) in the frames of the bodies."""
        relative = self.position - np.concatenate([poses[:, :2], np.zeros((len(poses), 1))], axis=1)
        return rotate_about_z(relative, -poses[:, 2])

    def _shade(
        self,
        colors: Floats,
        lamps: NDArray[np.int64],
        normals: NDArray[np.float64],
        centers: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Colours (F, 3) of faces after light and fog; normals (F, 3) and centers (F, 3) are in the local
        frame."""
        offset = centers - self.position
        distance = np.linalg.norm(offset, axis=-1)
        if self.scene.night:
            ahead = rotate_about_z(offset, np.full(len(offset), -self.ego_yaw))[:, 0]
            lit = brightness_at(True, distance, ahead) * (0.75 + 0.25 * np.clip(normals[:, 2], 0, 1))
            glow = np.isin(lamps, (Lamp.HEAD, Lamp.TAIL, Lamp.WINDOW))
            lit = np.where(glow, 1.0, lit)
        else:
            lit = 0.62 + 0.45 * np.clip(normals @ self.scene.sun, 0, 1)
        clear = np.exp(-self.scene.fog_per_m * distance)[:, None]
        result: NDArray[np.float64] = colors * lit[:, None] * clear + sky_colors(self.scene.night)[0] * (
            1 - clear
        )
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
        """Draw faces body by body; `local` (F, P, 3) are their points in the camera frame."""
        faces = self._prepare(local, counts, colors)
        bounds = np.searchsorted(owner, np.arange(len(order) + 1)).tolist()
        any_actor = False
        for body, (start, stop) in zip(order.tolist(), itertools.pairwise(bounds), strict=True):
            clipped = self._draw_body(faces, start, stop)
            any_actor = any_actor or body < num_actors
            if not any_actor:
                continue  # the id map is still empty, so a fixture hides no actor on it
            outline = faces.pixels[start:stop][faces.whole[start:stop]].reshape(-1, 2)
            if clipped:
                outline = np.concatenate([outline, *clipped])
            if len(outline):
                self._silhouette(outline, body, num_actors, total)

    def _prepare(
        self, local: NDArray[np.float64], counts: NDArray[np.int64], colors: NDArray[np.float64]
    ) -> "_Faces":
        """Project all faces and select those that are drawn as they are and those that are clipped."""
        pixels = self._project(np.where(local[..., 2:] > _NEAR_M, local, 1.0))
        points_ahead = (local[..., 2] > _NEAR_M).sum(1)
        whole = points_ahead == local.shape[1]
        # Faces whose bounding box (with a margin for anti-aliased edges) misses the image are skipped.
        low, high = pixels.min(axis=1), pixels.max(axis=1)
        drawn = whole & (high > -2).all(axis=1) & (low < np.array(self.size) + 2).all(axis=1)
        return _Faces(
            local=local,
            pixels=pixels,
            fixed=np.round((pixels - 0.5) * (1 << _SHIFT)).astype(np.int32),
            whole=whole,
            drawn=drawn.tolist(),
            cut=((points_ahead > 0) & ~whole).tolist(),
            counts=counts.tolist(),
            colors=colors,
            palette=colors.astype(int).tolist(),
        )

    def _draw_body(self, faces: "_Faces", start: int, stop: int) -> list[NDArray[np.float64]]:
        """Draw the faces start..stop in their order; return the polygons that were clipped, in pixels."""
        clipped: list[NDArray[np.float64]] = []
        for face in range(start, stop):
            if faces.drawn[face]:
                polygon = faces.fixed[face, : faces.counts[face]]
                cv2.fillConvexPoly(self.image, polygon, faces.palette[face], cv2.LINE_AA, _SHIFT)
            elif faces.cut[face]:
                left = _clip_near(faces.local[face, : faces.counts[face]])
                if len(left) >= 3:
                    clipped.append(self._project(left))
                    self._fill(clipped[-1], faces.colors[face])
        return clipped

    def _silhouette(
        self, points: NDArray[np.float64], body: int, num_actors: int, total: NDArray[np.float64]
    ) -> None:
        """Draw the convex hull of a body on the id map: its row + 1, or 0 for a fixture."""
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
        """Fill a convex polygon (P, 2) in pixels."""
        inner = np.minimum(np.maximum(pixels, -2e4), 2e4)
        fixed = np.rint((inner - 0.5) * (1 << _SHIFT)).astype(np.int32)
        cv2.fillConvexPoly(self.image, fixed, color.tolist(), cv2.LINE_AA, _SHIFT)


def _clip_near(polygon: Floats) -> NDArray[np.float64]:
    """Clip a polygon (P, 3) in the camera frame at the near plane; (0, 3) if nothing is left."""
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
