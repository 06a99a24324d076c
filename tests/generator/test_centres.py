"""Weights of recorded conditions at new ones, against closed forms and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF

from pdiff_plugin.generator.centres import CENTRES, Centre, choose_settings, leave_one_out


def features(R: int, F: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(R, F, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", CENTRES)
def test_weights_sum_to_one_so_that_a_constant_is_predicted_exactly(kind: str) -> None:
    for settings in CENTRES[kind].candidates():
        weights = CENTRES[kind].weights(features(5, 3, seed=1), features(12, 3), **settings)
        assert torch.allclose(weights.sum(dim=1), torch.ones(5, dtype=torch.float64), atol=1e-8)


def test_ridge_of_degree_one_with_little_penalty_is_least_squares() -> None:
    recorded, new = features(20, 3), features(4, 3, seed=1)
    truth = torch.tensor([[1.0, -2.0], [0.5, 0.0], [3.0, 1.0]], dtype=torch.float64)
    means = recorded.double() @ truth + torch.tensor([7.0, -1.0], dtype=torch.float64)

    weights = CENTRES["ridge"].weights(new, recorded, degree=1, penalty=1e-10)

    expected = new.double() @ truth + torch.tensor([7.0, -1.0], dtype=torch.float64)
    assert torch.allclose(weights @ means, expected, atol=1e-5)


def test_the_gaussian_process_is_that_of_scikit_learn_on_centred_means() -> None:
    recorded, new = features(15, 2), features(6, 2, seed=1)
    means = recorded.double().sin()
    length, noise = 1.5, 1e-2
    # A constant that is known to be zero: kriging with an unknown one, on means whose best constant is zero.
    ones = np.ones((15, 1))
    kernel = np.exp(-(torch.cdist(recorded.double(), recorded.double()) ** 2).numpy() / (2 * length**2 * 2))
    solved = np.linalg.solve(kernel + noise * np.eye(15), np.hstack([ones, means.numpy()]))
    constant = (ones.T @ solved[:, 1:]) / (ones.T @ solved[:, :1])

    weights = CENTRES["gp"].weights(new, recorded, length=length, noise=noise)

    other = GaussianProcessRegressor(RBF(length * 2**0.5, "fixed"), alpha=noise, optimizer=None)
    other.fit(recorded.numpy(), means.numpy() - constant)
    expected = other.predict(new.numpy()) + constant
    assert np.allclose((weights @ means).numpy(), expected, atol=1e-6)


def test_neighbours_at_a_recorded_condition_are_that_condition_alone() -> None:
    recorded = features(10, 2)
    weights = CENTRES["neighbours"].weights(recorded[[3]], recorded, k=3)
    assert torch.allclose(weights[0], torch.eye(10, dtype=torch.float64)[3], atol=1e-5)


def test_leaving_one_out_never_uses_the_condition_itself() -> None:
    for kind in CENTRES:
        weights = leave_one_out(kind, CENTRES[kind].candidates()[0], features(8, 2))
        assert weights.diagonal().abs().max() == 0


def test_settings_are_chosen_that_fit_what_is_to_be_predicted() -> None:
    recorded = features(30, 1)
    line = 2.0 * recorded.double()
    parabola = recorded.double().square()

    assert choose_settings("ridge", recorded, line)[1] < 1e-5
    assert choose_settings("ridge", recorded, parabola)[0]["degree"] >= 2


@pytest.mark.parametrize(
    ("document", "features", "text"),
    [
        ({"kind": "gp", "settings": {"length": 1.0, "noise": 0.0}}, torch.ones(3, 2), "singular"),
        ({"kind": "mean", "settings": {}}, torch.full((3, 2), torch.inf), "with NaN or Inf"),
    ],
)
def test_a_centre_that_leads_to_no_weights_is_refused_when_it_is_read(document, features, text):
    with pytest.raises((ValueError, RuntimeError), match=text):
        Centre.from_state(document, {"features": features, "means": torch.rand(3, 4)})
