# SPDX-License-Identifier: Apache-2.0
"""Models that do not think in ego: what goes in is moved into their frame and what comes out is moved back,
here and nowhere else.

Public weights live in the frame of nuScenes' lidar. `model_from_ego` is a float64 (4, 4) tensor, or None for
a model that thinks in ego; every function then returns its argument. Symbols: B batch, N cameras, R denoising
queries.
"""

from torch import Tensor

from ftkd_core.boxes import transform_codes
from ftkd_core.geometry import full_precision, invert_rigid, transform_points
from ftkd_core.types import CameraRig, DenoisingQueries, Frame


@full_precision
def rig_in_model(rig: CameraRig, model_from_ego: Tensor | None) -> CameraRig:
    """The rig (..., N) whose cameras' poses are given in the model's frame."""
    if model_from_ego is None:
        return rig
    poses = (model_from_ego @ rig.ego_from_camera.double()).to(rig.ego_from_camera.dtype)
    return rig._replace(ego_from_camera=poses)


@full_precision
def frame_in_model(frame: Frame, model_from_ego: Tensor | None) -> Frame:
    """The frame whose rig and place in the world are those of the model's frame."""
    if model_from_ego is None:
        return frame
    pose = frame.global_from_ego.double() @ invert_rigid(model_from_ego)
    return frame._replace(rig=rig_in_model(frame.rig, model_from_ego), global_from_ego=pose)


@full_precision
def denoising_in_model(
    denoising: DenoisingQueries | None, model_from_ego: Tensor | None
) -> DenoisingQueries | None:
    """Denoising queries (B, R) given in the model's frame."""
    if denoising is None or model_from_ego is None:
        return denoising
    points = transform_points(model_from_ego.to(denoising.points_ego), denoising.points_ego)
    return denoising._replace(points_ego=points, codes=transform_codes(model_from_ego, denoising.codes))


@full_precision
def codes_in_ego(codes_model: Tensor, model_from_ego: Tensor | None) -> Tensor:
    """Codes (..., 10) of the model's frame in ego; float32, since metres need it."""
    if model_from_ego is None:
        return codes_model
    return transform_codes(invert_rigid(model_from_ego), codes_model.float())
