from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from torch import Tensor

from pdiff_plugin.evaluation import metrics
from pdiff_plugin.evaluation.classification import score_batch

M, N, C = 7, 500, 10


@pytest.fixture
def logits() -> Tensor:
    return 2 * torch.randn(M, N, C, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def targets() -> Tensor:
    return torch.randint(C, (N,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("num_bins", [5, 10, 15, 30])
def test_ece_agrees_with_torchmetrics(logits: Tensor, targets: Tensor, num_bins: int) -> None:
    classification = pytest.importorskip("torchmetrics.functional.classification")
    # Half the items follow the prediction: gaps of both signs, or wrong binning would go unseen.
    probs = logits[0].double().softmax(-1)
    targets = torch.where(torch.arange(N) % 2 == 0, probs.argmax(-1), targets)
    confidence, predicted = probs.max(-1)
    expected = classification.multiclass_calibration_error(probs, targets, num_classes=C, n_bins=num_bins, norm="l1")
    assert metrics.ece(confidence, predicted == targets, num_bins) == pytest.approx(float(expected), abs=1e-6)


def test_accuracy_of_the_ensemble_agrees_with_torchmetrics(logits: Tensor, targets: Tensor) -> None:
    classification = pytest.importorskip("torchmetrics.functional.classification")
    mean = logits.double().softmax(-1).mean(0)
    expected = classification.multiclass_accuracy(mean, targets, num_classes=C, average="micro")
    found = score_batch(logits, targets, torch.arange(M))["score"][-1]
    assert float(found.double().mean()) == pytest.approx(float(expected), abs=1e-6)


def test_the_first_members_of_the_order_are_averaged_by_their_probabilities(logits: Tensor, targets: Tensor) -> None:
    order = torch.randperm(M, generator=torch.Generator().manual_seed(2))
    found = score_batch(logits, targets, order)
    for place, size in enumerate((1, 2, 4, 7)):
        mean = logits[order[:size]].double().softmax(-1).mean(0)
        torch.testing.assert_close(found["confidence"][place], mean.max(-1).values)
        torch.testing.assert_close(found["loss"][place], -mean[torch.arange(N), targets].log())


def test_nll_agrees_with_scikit_learn(logits: Tensor, targets: Tensor) -> None:
    mean = logits.double().softmax(-1).mean(0)
    expected = log_loss(targets.numpy(), mean.numpy(), labels=list(range(C)))
    found = score_batch(logits, targets, torch.arange(M))["loss"][-1]
    assert float(found.mean()) == pytest.approx(expected, abs=1e-9)


def test_brier_agrees_with_scikit_learn_class_by_class(logits: Tensor, targets: Tensor) -> None:
    probs = logits[0].double().softmax(-1)
    expected = sum(brier_score_loss((targets == c).numpy(), probs[:, c].numpy()) for c in range(C))
    assert float(metrics.brier(probs, targets).mean()) == pytest.approx(expected, abs=1e-9)


def test_auroc_agrees_with_scikit_learn_when_scores_are_tied() -> None:
    rng = torch.Generator().manual_seed(0)
    score = torch.randint(12, (400,), generator=rng).double()
    positive = torch.rand(400, generator=rng) < 0.3
    assert metrics.auroc(score, positive) == pytest.approx(roc_auc_score(positive.numpy(), score.numpy()), abs=1e-12)


def test_auroc_of_one_kind_of_item_is_undefined() -> None:
    assert math.isnan(metrics.auroc(torch.ones(3), torch.ones(3, dtype=torch.bool)))


def test_wrong_iou_equals_a_loop_over_pairs() -> None:
    rng = np.random.default_rng(0)
    wrong, others = rng.random((5, 80)) < 0.3, rng.random((4, 80)) < 0.5
    expected = [[(a & b).sum() / (a | b).sum() for b in others] for a in wrong]
    np.testing.assert_array_equal(metrics.wrong_iou(wrong, others), np.array(expected))


def test_wrong_iou_returns_float64_of_the_kind_that_came_in() -> None:
    wrong = np.array([[True, False], [True, True]])
    assert metrics.wrong_iou(wrong).dtype == np.float64
    assert metrics.wrong_iou(torch.as_tensor(wrong)).dtype == torch.float64
    assert metrics.wrong_iou(wrong).tolist() == [[1.0, 0.5], [0.5, 1.0]]


def test_wrong_iou_of_two_perfect_members_is_one() -> None:
    wrong = np.array([[False, False], [False, False], [True, False]])
    assert metrics.wrong_iou(wrong).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_wrong_iou_of_400_members_on_10000_items_takes_under_half_a_second() -> None:
    wrong = np.random.default_rng(0).random((400, 10_000)) < 0.3
    metrics.wrong_iou(wrong[:10])
    seconds = []
    for _ in range(3):  # the least of three: other processes share the machine
        started = time.perf_counter()
        matrix = metrics.wrong_iou(wrong)
        seconds.append(time.perf_counter() - started)
    assert matrix.shape == (400, 400)
    assert min(seconds) < 0.5


def test_entropy_of_equal_classes_is_the_logarithm_of_their_number() -> None:
    log_probs = torch.stack([torch.full((4,), -math.log(4)), torch.tensor([0.0, -math.inf, -math.inf, -math.inf])])
    torch.testing.assert_close(metrics.entropy(log_probs), torch.tensor([math.log(4), 0.0]))


def test_a_member_whose_output_is_nan_counts_as_uniform() -> None:
    logits = torch.tensor([[1.0, math.nan], [0.0, 0.0]])
    assert metrics.member_log_probs(logits).exp().tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_best_is_chosen_on_one_half_and_scored_on_the_other() -> None:
    first_half = torch.tensor([True, True, False, False])
    correct = torch.tensor([[True, True, False, False], [False, False, True, True], [True, False, True, False]])
    # Member 0 wins the first half and fails the second, member 1 the reverse; the plain maximum would be 0.5.
    assert metrics.best_on_other_half(correct, first_half) == 0.0


def test_nearest_distance_leaves_out_what_is_excluded() -> None:
    distances = torch.tensor([[0.0, 1.0, 3.0], [1.0, 0.0, 2.0]])
    excluded = torch.tensor([[True, True, False], [True, True, True]])
    nearest = metrics.nearest_distance(distances, excluded)
    assert nearest[0] == 3.0
    assert nearest[1].isnan()


def test_pair_mean_leaves_out_the_diagonal() -> None:
    assert metrics.pair_mean(torch.tensor([[1.0, 0.2], [0.2, 1.0]])) == pytest.approx(0.2)
    assert math.isnan(metrics.pair_mean(torch.ones(1, 1)))


def test_standard_error_is_that_of_the_mean() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert metrics.standard_error(values) == pytest.approx(values.std().item() / 2)
