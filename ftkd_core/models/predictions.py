# SPDX-License-Identifier: Apache-2.0
"""Outputs of the models and the decoding of boxes, kept apart from the models so that losses need not import
them.

Symbols: B batch, N cameras, Q queries, R denoising queries, K classes, C channels, H/W feature size,
Y decoder layers, I image queries, V candidate velocities.
"""

from typing import Final, NamedTuple

from torch import Tensor

from ftkd_core.boxes import CODE_DIM, decode_boxes
from ftkd_core.models.anchors import Anchors
from ftkd_core.types import Detections

REFERENCE_FOCAL_PX: Final = 300.0
"""Focal length to which predicted depths are normalised, so that one depth range fits every field of view."""

IMPOSSIBLE: Final = -1e4
"""Score of a place without candidate."""


class DenseMaps(NamedTuple):
    """Output of `dense_head.DenseHead`.

    heat (B, N, K, H, W) logits; edges (B, N, 4, H, W) distances left, top, right, bottom in cells; offset
    (B, N, 2, H, W) projected 3-D centre minus cell centre in cells; log_depth (B, N, 1, H, W) of metres times
    REFERENCE_FOCAL_PX / focal length; log_size (B, N, 3, H, W) width, length, height; heading (B, N, 2, H, W)
    cosine and sine of the yaw relative to the cell's line of sight in the ground plane; axis (B, N, 2, H, W)
    cosine and sine of twice that angle, which does not distinguish front from rear.
    """

    heat: Tensor
    edges: Tensor
    offset: Tensor
    log_depth: Tensor
    log_size: Tensor
    heading: Tensor
    axis: Tensor


class FocalMaps(NamedTuple):
    """Output of `focal_head.FocalHead`.

    logits (B, N, H, W, K); centerness (B, N, H, W) logits; boxes (B, N, H, W, 4) `[x1, y1, x2, y2]` and
    centers (B, N, H, W, 2), the projected 3-D centres, in fractions 0..1 of the image.
    """

    logits: Tensor
    centerness: Tensor
    boxes: Tensor
    centers: Tensor


class LinkedProposals(NamedTuple):
    """Proposals with velocity.

    anchors (B, I), without gradient; content (B, I, C) to add to the query features; velocity (B, I, 2) in
    m/s, with gradient; scores (B, I, V) logits of the candidates; candidates (B, I, V, 2) in m/s.
    """

    anchors: Anchors
    content: Tensor
    velocity: Tensor
    scores: Tensor
    candidates: Tensor


class Predictions(NamedTuple):
    """Output of a 3-D detector.

    logits (Y, B, Q, K) and codes (Y, B, Q, 10) in ego metres of all decoder layers, in order; features
    (B, Q, C) of the last layer; image_features (B, N, C, H, W) at stride 16 (StreamPETR: at the token
    stride); auxiliary, the maps of the 2-D head if it ran; denoising_logits and denoising_codes (Y, B, R, .)
    in training with denoising queries, else None; linked, in training of a model with learned linking.
    """

    logits: Tensor
    codes: Tensor
    features: Tensor
    image_features: Tensor
    auxiliary: DenseMaps | FocalMaps | None = None
    denoising_logits: Tensor | None = None
    denoising_codes: Tensor | None = None
    linked: LinkedProposals | None = None


def decode(predictions: Predictions, max_detections: int = 300) -> Detections:
    """Return the highest-scoring boxes of the last layer over all queries and classes, best first.

    No non-maximum suppression, as in StreamPETR's and DETR3D's box coder.
    """
    scores = predictions.logits[-1].float().sigmoid()  # (B, Q, K)
    classes = scores.shape[-1]
    top, index = scores.flatten(1).topk(min(max_detections, scores[0].numel()), dim=1)
    query = (index // classes)[..., None].expand(-1, -1, CODE_DIM)
    return Detections(decode_boxes(predictions.codes[-1].float().gather(1, query)), top, index % classes)
