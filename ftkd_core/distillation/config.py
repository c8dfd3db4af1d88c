# SPDX-License-Identifier: Apache-2.0
"""Settings of the distillation: every choice that the paper's public note leaves open is one of them.

Marks as in the method notes of this project: [note] from the public reading note of the paper (arXiv
2512.08247), [ours] our decision, argued where it stands.
"""

from dataclasses import dataclass
from typing import Final

from ftkd_core.errors import UserError

_BEV_MASKS: Final = ("channel", "query", "both", "none")
_BEV_NORMS: Final = ("first", "last")
_PV_TARGETS: Final = ("mean_residual", "sum", "current")
_PV_FRAMES: Final = ("current", "all")
_STRIDES: Final = (4, 8, 16, 32)
_MATCHINGS: Final = ("object", "prediction")
_LOGIT_LAYERS: Final = ("last", "all")


@dataclass(frozen=True, kw_only=True)
class FTKDConfig:
    """Weights and choices of FTKD's three losses; a weight of 0 leaves its part out.

    pv_weight, bev_weight, logits_weight: 1e-3, 16 and 1 [note]; what they multiply is a mean over elements
    for the two reconstructions (so that image size and channels do not change their balance) and a sum
    divided by the number of foreground objects for the logits [ours: the note gives no normaliser]. Retune so
    that each part starts at 5 to 20 % of the detection loss [ours].
    pv_mask_ratio, bev_mask_ratio: share of student features that are hidden, 0.5 [note].
    pv_target: `mean_residual` is the teacher's own feature plus what it attends to in each future frame,
    averaged over those frames; `sum` is the note's formula, the sum over future frames without the feature
    itself [ours: with a sum the target's size grows with the window, and without the residual a place where
    the future shows nothing has no target of its own]; `current` is the teacher's own feature alone.
    pv_strides: of the maps that are rebuilt, where the student has them; a streaming student has one [ours:
    16 and 32, for at stride 4 a 704x256 view has 11,000 cells, and attention relates each with each].
    pv_frames: which frames of a window student's are rebuilt, `current` or, with the past ones, `all`, each
    from the same future [note: past and current frames]. A streaming student has one frame a step, and each
    is current once; so the default asks the same of both [ours: and spares a window of eight frames seven
    attentions].
    bev_mask: what is hidden of a query's feature. A generator that works query by query learns nothing from
    a query that is hidden whole, so the default hides channels [ours]; `query` and `both` are offered for
    comparison, `none` reconstructs from the whole feature.
    bev_norm: where the BEV generator's layer norm is, `first` or `last` [note: an FFN with layer norm, not
    where]. Last, its answers vary as much as the features they stand for, however little of these it
    knows, and a norm's gain learns slowly; hence first [ours: research/appendix.md].
    bev_by_score: in the BEV reconstruction, a background pair counts as much as the teacher believes in its
    box [ours; off, for in the one run made it gave less: research/appendix.md].
    foreground, background: which parts of the logit distillation are on; both [note]. matching: `object`
    pairs the foreground through the object both answer for [ours], `prediction` by Hungarian matching with
    the teacher's predictions, as DETRDistill (Chang et al. 2023) does.
    class_weight, box_weight: 2.0 and 0.25 [note]. logit_layers: the last decoder layer, or layer k to layer
    k, counted from the last where the numbers of layers differ [ours].
    background_by_score: a background box counts as much as the teacher believes in it [ours: the teacher's
    box of an empty place says nothing]. background_reach_m: background queries whose boxes are farther apart
    are no pair, for the logits and for the BEV reconstruction; 0 keeps all [note: it names no limit]. Half of
    all such pairs are more than 6 m apart, of different places; hence 4 m [ours: research/appendix.md].
    """

    pv_weight: float = 1e-3
    bev_weight: float = 16.0
    logits_weight: float = 1.0
    pv_mask_ratio: float = 0.5
    bev_mask_ratio: float = 0.5
    pv_target: str = "mean_residual"
    pv_strides: tuple[int, ...] = (16, 32)
    pv_frames: str = "current"
    bev_mask: str = "channel"
    bev_norm: str = "first"
    bev_by_score: bool = False
    foreground: bool = True
    background: bool = True
    matching: str = "object"
    class_weight: float = 2.0
    box_weight: float = 0.25
    logit_layers: str = "last"
    background_by_score: bool = True
    background_reach_m: float = 4.0

    def __post_init__(self) -> None:
        for name in (
            "pv_weight", "bev_weight", "logits_weight", "class_weight", "box_weight", "background_reach_m"
        ):  # fmt: skip
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise UserError(f"distillation {name} {value}: expected a number of at least 0")
        for name in ("pv_mask_ratio", "bev_mask_ratio"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UserError(f"distillation {name} {value}: expected 0 up to, not including, 1")
        for name, known in (
            ("pv_target", _PV_TARGETS), ("pv_frames", _PV_FRAMES), ("bev_mask", _BEV_MASKS),
            ("bev_norm", _BEV_NORMS), ("logit_layers", _LOGIT_LAYERS), ("matching", _MATCHINGS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise UserError(
                    f"distillation {name} {getattr(self, name)!r}: expected one of {', '.join(known)}"
                )
        given = self.pv_strides
        if not given or not set(_STRIDES).issuperset(given) or len(set(given)) < len(given):
            names = ", ".join(map(str, _STRIDES))
            raise UserError(f"distillation pv_strides {list(given)}: expected some of {names}")
