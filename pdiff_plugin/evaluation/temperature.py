"""Temperature scaling: the cheapest way to better probabilities, and so what any other gain has to survive.

Probabilities are raised to 1/T and normalised (Guo et al. 2017, arXiv 1706.04599). T is chosen on one half of the items
by their mean loss and used on the other, both ways, so that no item has a say in its own.

Shapes: B or n items, C classes, T temperatures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdiff_plugin.evaluation import metrics

TEMPERATURES = 2.0 ** torch.linspace(-1, 3, 17, dtype=torch.float64)
"""From 0.5 to 8, a fifth apart: by the middle between two, the loss is all but as low as at the best."""


def scores_at(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """NLL and largest probability of each item at each temperature, (T, B) float32 both.

    Args:
        log_probs: of an ensemble, (B, C).
        targets: class indices, (B,).
    """
    at = (log_probs / TEMPERATURES[:, None, None]).log_softmax(dim=-1)  # (T, B, C)
    return metrics.nll(at, targets).float(), at.amax(dim=-1).exp().float()


def chosen(losses: Tensor, first_half: Tensor) -> Tensor:
    """Place of each item's temperature, (n,): the best on the half of the items that it is not in.

    Args:
        losses: at each temperature, (T, n).
        first_half: (n,) bool.
    """
    best_of_first, best_of_second = (
        losses[:, half].double().mean(dim=1).argmin() for half in (first_half, ~first_half)
    )
    return torch.where(first_half, best_of_second, best_of_first)


def scaled(values: Tensor, losses: Tensor, first_half: Tensor) -> Tensor:
    """Values (T, n) at each item's temperature, (n,) float64."""
    return values.gather(0, chosen(losses, first_half)[None]).squeeze(0).double()
