"""What is expected of latents at a condition, fitted to the conditions that were recorded.

Shapes: R recorded conditions, F features, K latent width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pdiff_plugin.fitting.training import seeded, with_gradients
from pdiff_plugin.generator.centres import CENTRES, Centre, CentreNetwork, choose_settings

_MAX_STEPS = 2000
_EVAL_EVERY = 25
_PATIENCE = 10
_BATCH = 64
_LR = 1e-3
_HELDOUT = 0.2


@with_gradients
def fit_centre(kind: str, features: Tensor, means: Tensor, seed: int = 0) -> Centre:
    """Fit one kind of centre; its settings are those that predict each condition best from the others.

    Args:
        kind: a key of ``CENTRES``, or ``network``: a small network that trains until it no longer improves on a fifth
            of the conditions, and then as long on all of them.
        features: of the recorded conditions, (R, F).
        means: their latents, (R, K).
        seed: of the network's weights and batches.
    """
    features, means = features.float().cpu(), means.float().cpu()
    if kind == "network":
        return Centre(kind, {}, features, means, _fit_network(features, means, seed))
    settings, _ = choose_settings(kind, features, means * leading(means).sqrt())
    return Centre(kind, settings, features, means)


def leading(means: Tensor) -> Tensor:
    """How much each coordinate counts in errors: its share of the variance between conditions, (R, K) -> (K,).

    So errors are those of the leading coordinates. With all of them alike, what hardly moves and cannot be predicted
    counts as much as what makes the difference, and centres are ranked in another order than by the task.
    """
    variance = means.double().var(dim=0, correction=0)
    return (variance / variance.sum().clamp_min(1e-300)).float()


def spread_choice(features: Tensor, fraction: float, seed: int) -> Tensor:
    """A share of the conditions to hold out, (R,) bool: at random, but none that is alone at an end of the range.

    At least one is held out and three are left, if there are as many.
    """
    R = len(features)
    count = min(max(1, round(fraction * R)), max(0, R - 3))
    is_end = torch.zeros(R, dtype=torch.bool)
    for column in features.T:
        for end in (column.min(), column.max()):
            mine = column == end
            is_end |= mine & (mine.sum() == 1)
    order = torch.randperm(R, generator=torch.Generator().manual_seed(seed))
    order = torch.cat([order[~is_end[order]], order[is_end[order]]])
    return torch.zeros(R, dtype=torch.bool).index_fill_(0, order[:count], True)


def _fit_network(features: Tensor, means: Tensor, seed: int) -> CentreNetwork:
    held = spread_choice(features, _HELDOUT, seed)
    scale = float(means.std(correction=0)) or 1.0
    steps, _ = _train(features[~held], means[~held] / scale, seed, _MAX_STEPS, (features[held], means[held] / scale))
    _, network = _train(features, means / scale, seed, max(steps, _EVAL_EVERY))
    with torch.no_grad():
        for parameter in network.layers[-1].parameters():
            parameter.mul_(scale)
    return network.requires_grad_(False).eval()


def _train(
    features: Tensor, means: Tensor, seed: int, max_steps: int, heldout: tuple[Tensor, Tensor] | None = None
) -> tuple[int, CentreNetwork]:
    """Regress; with held-out conditions the number of steps at which they were predicted best comes with it."""
    network = seeded(lambda: CentreNetwork(features.shape[1], means.shape[1]), seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LR, fused=True)
    rng = torch.Generator().manual_seed(seed)
    best_step, best_error, counts = 0, float("inf"), leading(means)
    for step in range(1, max_steps + 1):
        rows = torch.randint(len(features), (_BATCH,), generator=rng)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(functional.mse_loss(network(features[rows]), means[rows]))
        optimizer.step()
        if heldout is not None and step % _EVAL_EVERY == 0:
            with torch.no_grad():
                error = float(((network(heldout[0]) - heldout[1]).square() * counts).sum(dim=1).mean())
            if error < best_error:
                best_step, best_error = step, error
            elif step - best_step >= _PATIENCE * _EVAL_EVERY:
                break
    return best_step, network


ALL_KINDS = (*CENTRES, "network")
