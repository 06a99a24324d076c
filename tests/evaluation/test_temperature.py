"""Temperature scaling against an optimiser, and what it may know."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional

from pdiff_plugin.evaluation.classification import CLASSIFICATION
from pdiff_plugin.evaluation.metrics import member_log_probs
from pdiff_plugin.evaluation.temperature import TEMPERATURES, chosen, scaled, scores_at
from pdiff_plugin.evaluation.verdict import half_mask


def overconfident(num_items: int, factor: float) -> tuple[Tensor, Tensor]:
    """Logits of seven classes that are ``factor`` times what the labels were drawn from."""
    rng = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(num_items, 7, generator=rng, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(dim=1), 1, generator=rng).squeeze(1)
    return factor * logits, targets


@pytest.mark.parametrize("factor", [0.7, 1.0, 2.5, 4.4])
def test_it_ends_where_an_optimiser_does(factor: float) -> None:
    logits, targets = overconfident(20_000, factor)
    best = minimize_scalar(
        lambda t: float(functional.cross_entropy(logits / t, targets)), bounds=(0.3, 10), method="bounded"
    )
    losses, confidence = scores_at(member_log_probs(logits), targets)
    half = half_mask(len(targets), 0)
    assert float(scaled(losses, losses, half).mean()) == pytest.approx(best.fun, rel=5e-3)
    assert float(TEMPERATURES[chosen(losses, half)].mean()) == pytest.approx(best.x, rel=0.1)
    # Calibrated: as often right as it says.
    is_right = (logits.argmax(dim=1) == targets).double().mean()
    assert float(scaled(confidence, losses, half).mean()) == pytest.approx(float(is_right), abs=0.02)


def test_no_item_has_a_say_in_its_own_temperature() -> None:
    losses = torch.ones(len(TEMPERATURES), 6)
    first = torch.tensor([True, True, True, False, False, False])
    losses[2, :3] = 0.0
    losses[9, 3:] = 0.0
    assert chosen(losses, first).tolist() == [9, 9, 9, 2, 2, 2]
    assert torch.equal(scaled(losses, losses, first), torch.ones(6, dtype=torch.float64))


def test_a_temperature_of_one_changes_nothing_however_small_a_probability() -> None:
    logits = torch.tensor([[[0.0, -2000.0]], [[0.0, -2000.0]]], dtype=torch.float64)
    found = CLASSIFICATION.score_batch(logits, torch.tensor([1]), torch.arange(2))
    at_one = int((TEMPERATURES == 1).nonzero())
    assert float(found["loss_at"][at_one]) == float(found["loss"][-1]) == 2000.0
