# SPDX-License-Identifier: Apache-2.0
"""Share of the variance of feature vectors that an estimate explains (R squared)."""

from collections.abc import Sequence

import torch
from torch import Tensor


class ExplainedVariance:
    """Share of the variance of vectors around their mean that an estimate explains, added in parts."""

    def __init__(self) -> None:
        self._error, self._square, self._count = 0.0, 0.0, 0
        self._sum: Tensor | float = 0.0

    def add(self, true: Tensor, estimate: Tensor) -> None:
        """Add vectors (M, C) and their estimates (M, C)."""
        true, estimate = true.double(), estimate.double()
        self._error += float((true - estimate).square().sum())
        self._square += float(true.square().sum())
        self._sum, self._count = self._sum + true.sum(0), self._count + len(true)

    def value(self) -> float | None:
        """Return 1 - error / variance; None without vectors, or if they do not vary."""
        if not self._count:
            return None
        assert isinstance(self._sum, Tensor)
        total = self._square - float(self._sum.square().sum()) / self._count
        return None if total <= 1e-12 * self._square else 1 - self._error / total


def linear_probe(fit: Sequence[tuple[Tensor, Tensor]], test: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """Return the share of the variance of targets (M, Ct) that the best linear map of inputs (M, Cs)
    explains, fitted on some (inputs, targets) and evaluated on others.

    None if the fitted pairs are fewer than twice the map's inputs.
    """
    (inputs, targets), (test_inputs, test_targets) = (
        [torch.cat(values).double() for values in zip(*pairs, strict=True)] if pairs else [torch.empty(0)] * 2
        for pairs in (fit, test)
    )
    if len(inputs) < 2 * (inputs.shape[-1] + 1) or not len(test_targets):
        return None
    with_bias, test_with_bias = (torch.nn.functional.pad(x, (0, 1), value=1.0) for x in (inputs, test_inputs))
    solution = torch.linalg.lstsq(with_bias, targets, driver="gelsd").solution
    variance = ExplainedVariance()
    variance.add(test_targets, test_with_bias @ solution)
    return variance.value()
