# SPDX-License-Identifier: Apache-2.0
"""GridMask (Chen et al. 2020): images of which a grid of squares is blank, so that a network does not rely on
any one part."""

import torch
from torch import Tensor


def grid_mask(height: int, width: int, generator: torch.Generator, ratio: float = 0.5) -> Tensor:
    """(height, width) bool, True where an image is kept: bands of rows and of columns, `ratio` of each
    period; between them squares are blank, about (1 - ratio)^2 of the image.

    The period is 2 to height - 1 pixels, equally probable, and where bands begin is any place in it, as
    StreamPETR and SparseBEV draw them (ratio 0.5, no rotation) [code]. Errors: ValueError below 3 rows.
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


def blank_some(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Normalised images (..., H, W), with that probability blanked by one grid for all of them [code].
    Nothing is drawn for a probability of 0."""
    if not probability or float(torch.rand((), generator=generator)) > probability:
        return images
    mask = grid_mask(images.shape[-2], images.shape[-1], generator)
    return images * mask.to(images.device, images.dtype)
