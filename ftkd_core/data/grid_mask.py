# SPDX-License-Identifier: Apache-2.0
"""GridMask (Chen et al. 2020): mask a grid of squares in images, so that a network does not rely on one
region."""

import torch
from torch import Tensor


def grid_mask(height: int, width: int, generator: torch.Generator, ratio: float = 0.5) -> Tensor:
    """Draw a mask (height, width), True for pixels to keep: horizontal and vertical bands that cover `ratio`
    of each period. The squares between them, about (1 - ratio)^2 of the image, are masked.

    The period is uniform in 2..height - 1 pixels and the offset is uniform within the period, as in
    StreamPETR and SparseBEV (ratio 0.5, no rotation) [code]. Raises ValueError for fewer than 3 rows.
    """
    if height < 3:
        raise ValueError(f"images of {height} rows; expected at least 3")
    period = int(torch.randint(2, height, (), generator=generator))
    band = min(max(int(period * ratio + 0.5), 1), period - 1)
    down, right = torch.randint(period, (2,), generator=generator).tolist()
    rows = (torch.arange(height) + down) % period < band
    columns = (torch.arange(width) + right) % period < band
    kept: Tensor = rows[:, None] | columns
    return kept


def apply_grid_mask(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """With the given probability, mask all normalised images (..., H, W) with one grid [code]. A probability
    of 0 draws no random number."""
    if not probability or float(torch.rand((), generator=generator)) > probability:
        return images
    mask = grid_mask(images.shape[-2], images.shape[-1], generator)
    return images * mask.to(images.device, images.dtype)
