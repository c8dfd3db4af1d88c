# SPDX-License-Identifier: Apache-2.0
"""Settings of FTKD, one for each choice that the public description of the paper leaves open.

Sources in the docstrings: [abs] the abstract of FTKD (arXiv 2512.08247), [note] its public reading note,
[code] the public code of a method, [ours] our decision.
"""

from typing import Final, Literal

from ftkd_core.config_class import NotNegative, config_class

MAP_STRIDES: Final = (16, 32)
"""Strides of the feature maps that are distilled, if the student has them; a streaming student has one [ours:
at stride 4 a 704x256 image has 11,000 cells, too many for attention]. Only the current frame's maps are
reconstructed [note: past and current; ours: current, as in a streaming student, which saves seven of eight
attentions]."""
MASK_RATIO: Final = 0.5
"""Share of the cells of a student's feature map, and of the channels of its query features, that are masked
[note: the ratio; ours: channels, because a generator per query learns nothing from a query that is masked as
a whole]."""


@config_class
class FTKDConfig:
    """Weights and variants of FTKD's three losses; a weight of 0 switches its part off.

    The reconstruction losses are means over elements, so that image size and channels do not change their
    balance; the logit losses are sums divided by the number of foreground objects [ours: the note gives no
    normalizer]. Choose weights so that each part starts at 5 to 20 % of the detection loss [ours;
    training/study/balance.py].
    """

    pv_weight: NotNegative = 1e-3
    """Reconstruction of image features (PV-FFR) [note]."""
    bev_weight: NotNegative = 16.0
    """Reconstruction of query features (BEV-FFR) [note]."""
    logits_weight: NotNegative = 1.0
    """Logit distillation (FLD) [note]."""
    pv_target: Literal["mean_residual", "cosine", "current"] = "mean_residual"
    """Target of the image features. `mean_residual`: the teacher's feature plus its attention to future
    frames, averaged over them [note: their sum alone; ours: the mean, whose size does not grow with the
    window, and the residual, a target for places where the future shows nothing]. `cosine`: the same with
    cosine attention, whose weights do not depend on the norm of the features [ours]. `current`: the teacher's
    feature, without the future [ours]."""
    matching: Literal["object", "prediction"] = "object"
    """Pairs of student and teacher queries. `object`: foreground queries that are matched to the same object,
    in the last decoder layer; background boxes are weighted by the teacher's score [ours]. `prediction`:
    Hungarian matching with the teacher's predictions in every layer, counted from the last if their numbers
    differ, all pairs of equal weight [DETRDistill, Chang et al. 2023]."""
    background_reach_m: NotNegative = 4.0
    """Largest distance in metres between the boxes of a background pair, for logits and BEV-FFR; 0 keeps all
    pairs [note: no limit; ours: half of all pairs are more than 6 m apart]."""
