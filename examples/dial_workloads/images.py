"""How images change with a condition.

Shapes: B images of C channels, H high and W wide, of about zero mean and unit variance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rotated(x: Tensor, degrees: Tensor | float) -> Tensor:
    """Images turned by an angle, or each by its own, (B, C, H, W); what comes in from outside is zero."""
    angles = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float64)).expand(len(x))
    cos, sin, zero = angles.cos().float(), angles.sin().float(), torch.zeros(len(x))
    turns = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)  # (B, 2, 3)
    return F.grid_sample(x, F.affine_grid(turns, list(x.shape), align_corners=False), align_corners=False)


def disc(size: int) -> Tensor:
    """One inside the circle that touches the edges, zero in the corners, which would give an angle away; (H, W)."""
    place = torch.linspace(-1, 1, size)
    return ((place[:, None].square() + place.square()) <= 1).float()


def noisy(x: Tensor, std: float, rng: torch.Generator) -> Tensor:
    return x + std * torch.randn(x.shape, generator=rng)


def blurred(x: Tensor, std: float) -> Tensor:
    """A Gaussian blur of that many pixels."""
    if std < 0.05:
        return x
    place = torch.arange(-4, 5)
    kernel = torch.exp(-0.5 * (place / std) ** 2)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(F.pad(x, (4, 4, 4, 4), mode="replicate"), kernel, groups=x.shape[1])
    return F.conv2d(x, kernel.transpose(2, 3), groups=x.shape[1])


def recoloured(x: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Added to all values, multiplied with them, and multiplied with what differs from grey."""
    grey = x.mean(dim=1, keepdim=True)
    return contrast * (grey + saturation * (x - grey)) + brightness
