# SPDX-License-Identifier: Apache-2.0
"""Parts that limit errors of the teacher: background pairs by score, cosine attention to the future."""

import torch

from ftkd_core.distillation.logits import Alignment, logit_losses, pair_weights
from ftkd_core.distillation.reconstruction import future_aware_target

PAIRS = Alignment(torch.tensor([[1, 0, -1]]), torch.tensor([[True, False, False]]))
SCORES = torch.tensor([[[0.2, 0.1], [0.3, 0.6]]])


def test_background_pairs_are_weighted_by_the_teachers_score_if_set() -> None:
    torch.testing.assert_close(pair_weights(SCORES, PAIRS), torch.tensor([[1.0, 0.2, 0.0]]))
    weighted = pair_weights(SCORES, PAIRS, background_by_score=False)
    torch.testing.assert_close(weighted, torch.tensor([[1.0, 1.0, 0.0]]))


def test_the_box_term_of_the_background_scales_with_the_score() -> None:
    arguments = (torch.zeros(1, 3, 2), torch.ones(1, 3, 10), SCORES.logit(), torch.zeros(1, 2, 10), PAIRS)
    full = logit_losses(*arguments, torch.ones(10), background_by_score=False)
    weighted = logit_losses(*arguments, torch.ones(10))
    torch.testing.assert_close(weighted["background_box"], 0.2 * full["background_box"])
    torch.testing.assert_close(weighted["foreground_box"], full["foreground_box"])


def test_cosine_attention_ignores_the_norm_of_the_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    current = torch.randn(1, 1, 8, 2, 3, generator=generator)
    future = torch.randn(1, 1, 1, 8, 2, 3, generator=generator)
    loud = future.clone()
    loud[..., 0, 0] *= 50.0
    real = torch.ones(1, 1, dtype=torch.bool)
    target, weight = future_aware_target(current, future, real, "cosine")
    query, key = (value.flatten(-2).squeeze().T for value in (current, future))
    normal = [torch.nn.functional.normalize(value, dim=-1) for value in (query, key)]
    expected = query + (normal[0] @ normal[1].T / 0.1).softmax(-1) @ key
    torch.testing.assert_close(target[0, 0].flatten(1).T, expected, atol=1e-5, rtol=1e-5)
    assert weight.tolist() == [1.0]
    # The attention to the loud key is unchanged, so the target moves by that share only.
    moved = future_aware_target(current, loud, real, "cosine")[0] - target
    share = (normal[0] @ normal[1].T / 0.1).softmax(-1)[:, :1]
    torch.testing.assert_close(moved[0, 0].flatten(1).T, share * 49.0 * key[:1], atol=1e-3, rtol=1e-4)
