# SPDX-License-Identifier: Apache-2.0
"""Models with a frame of their own: their inputs are moved into it and their outputs back to ego.

Public weights use the frame of nuScenes' LIDAR_TOP. `model_from_ego` is a float64 (4, 4) tensor, or None for
a model in ego; then every function returns its argument. Symbols: B batch, N cameras, R denoising queries.
"""

from torch import Tensor

from ftkd_core.boxes import transform_codes
from ftkd_core.geometry import full_precision, invert_rigid, transform_points
from ftkd_core.types import CameraRig, DenoisingQueries, Frame


@full_precision
def rig_in_model(rig: CameraRig, model_from_ego: Tensor | None) -> CameraRig:
    """Return the rig (..., N) with camera poses in the model's frame."""
    if model_from_ego is None:
        return rig
    poses = (model_from_ego @ rig.ego_from_camera.double()).to(rig.ego_from_camera.dtype)
    return rig._replace(ego_from_camera=poses)


@full_precision
def frame_in_model(frame: Frame, model_from_ego: Tensor | None) -> Frame:
    """Return the frame with camera poses and global pose of the model's frame."""
    if model_from_ego is None:
        return frame
    pose = frame.global_from_ego.double() @ invert_rigid(model_from_ego)
    return frame._replace(rig=rig_in_model(frame.rig, model_from_ego), global_from_ego=pose)


@full_precision
def denoising_in_model(
    denoising: DenoisingQueries | None, model_from_ego: Tensor | None
) -> DenoisingQueries | None:
    """Return denoising queries (B, R) in the model's frame."""
    if denoising is None or model_from_ego is None:
        return denoising
    points = transform_points(model_from_ego.to(denoising.points_ego), denoising.points_ego)
    return denoising._replace(points_ego=points, codes=transform_codes(model_from_ego, denoising.codes))


@full_precision
def codes_in_ego(codes_model: Tensor, model_from_ego: Tensor | None) -> Tensor:
    """Return codes (..., 10) of the model's frame in ego, in float32 because metres need it."""
    if model_from_ego is None:
        return codes_model
    return transform_codes(invert_rigid(model_from_ego), codes_model.float())
