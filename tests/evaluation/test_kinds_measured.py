"""The figures of each kind of task are those of scikit-learn, of torchmetrics and of closed forms."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from sklearn import metrics as sklearn_metrics
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pdiff_plugin import Task
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.evaluation import metrics
from pdiff_plugin.evaluation.custom import custom
from pdiff_plugin.evaluation.kind import MAX_COMPARED, Measured, Scores, TaskKind, compared, ensemble_sizes, halves
from pdiff_plugin.evaluation.kinds import KINDS
from pdiff_plugin.evaluation.positions import IGNORED, dense
from pdiff_plugin.evaluation.scores import score_sets
from pdiff_plugin.evaluation.verdict import Differences, Nearness, ScoredSet, compare, judge, standard_error
from pdiff_plugin.generator.weights import WeightSet

Outcome = tuple[Tensor, Any]
M, N = 5, 60
_OF_EVERY_KIND = ("member_loss", "member_score", "loss", "score", "half_difference", "uncertainty")


def scores_of(kind: TaskKind, outputs: Tensor, targets: Any, *, batch: int = 23) -> Scores:
    """Scores of outputs (M, n, ...), met in several batches."""
    order = torch.randperm(len(outputs), generator=torch.Generator().manual_seed(3))
    parts = []
    for out, truth in zip(outputs.split(batch, dim=1), targets.split(batch), strict=True):
        truth = kind.check_targets(truth, "data")
        parts.append(kind.score_batch(kind.check_outputs(out, truth, "data"), truth, order))
    found = kind.joined(parts)
    every = {key: found.pop(key) for key in _OF_EVERY_KIND}
    return Scores(**every, more=found, sizes=ensemble_sizes(len(outputs)), forward_passes=None, seconds=0.0)


def figure(kind: TaskKind, scores: Scores, key: str) -> float:
    return kind.metric(key).of(Measured(scores))


def synthetic(name: str) -> Outcome:
    rng = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    def classes(count: int, *shape: int) -> Tensor:
        return torch.randint(count, shape, generator=rng)

    if name == "classification":
        return 2 * normal(M, N, 4), classes(4, N)
    if name in ("regression", "custom"):
        y = 3 * normal(N, 2) + 1
        return y + normal(1, N, 2) + 0.5 * normal(M, N, 2), y
    if name == "gaussian-regression":
        y = 3 * normal(N, 2) + 1
        mean = y + normal(1, N, 2) + 0.5 * normal(M, N, 2)
        return torch.stack([mean, (0.3 * normal(M, N, 2)).exp()], dim=-1), y
    if name == "multilabel":
        y = classes(2, N, 3)
        return 2 * y - 1 + 2 * normal(M, N, 3), y
    if name == "dense":
        y = classes(4, N, 3, 5)
        y[classes(5, N, 3, 5) == 0] = IGNORED
        y[7] = IGNORED
        return 2 * normal(M, N, 4, 3, 5), y
    y = classes(6, N, 9)
    for row, length in enumerate(classes(9, N).tolist()):
        y[row, length + 1 :] = IGNORED
    return 2 * normal(M, N, 9, 6), y


ALL = {name: custom(lambda out, y: (out - y).abs().mean(1)) if name == "custom" else KINDS[name] for name in KINDS}


@pytest.mark.parametrize("name", list(ALL))
def test_leaving_out_a_member_and_halving_are_what_doing_it_gives(name: str) -> None:
    kind, (outputs, targets) = ALL[name], synthetic(name)
    scores = scores_of(kind, outputs, targets)

    for i in range(M):
        others = outputs[torch.arange(M) != i]
        expected = scores_of(kind, others, targets).loss[-1].mean()
        assert float(kind.left_out(scores)[i]) == pytest.approx(float(expected), rel=1e-9)
    found = scores.half_difference.double().mean(dim=1)
    for number, mask in enumerate(halves(M).bool()):
        one, other = (scores_of(kind, outputs[mine], targets).score[-1].double().mean() for mine in (mask, ~mask))
        assert float(found[number]) == pytest.approx(float(one - other), abs=1e-12)


@pytest.mark.parametrize("name", list(ALL))
def test_copies_of_one_member_are_that_member(name: str) -> None:
    kind, (outputs, targets) = ALL[name], synthetic(name)
    copies = scores_of(kind, outputs[:1].expand(4, *outputs.shape[1:]), targets)
    alone = scores_of(kind, outputs[:1], targets)

    torch.testing.assert_close(copies.loss[-1], alone.member_loss[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(copies.score[-1].double(), alone.member_score[0].double())
    likeness = kind.likeness.of(kind.errors(copies), None)
    assert bool((likeness == 1).all())
    assert math.isfinite(float(copies.uncertainty.sum()))
    assert float(kind.likeness.of(kind.errors(scores_of(kind, outputs, targets)), None)[0, 1]) < 0.999


@pytest.mark.parametrize("name", list(ALL))
def test_a_batch_more_or_less_changes_nothing(name: str) -> None:
    kind, (outputs, targets) = ALL[name], synthetic(name)
    some, one = scores_of(kind, outputs, targets, batch=7), scores_of(kind, outputs, targets, batch=N)
    torch.testing.assert_close(some.loss, one.loss)
    torch.testing.assert_close(some.score, one.score)
    assert torch.equal(kind.errors(some), kind.errors(one)) or torch.allclose(kind.errors(some), kind.errors(one))


@pytest.mark.parametrize("columns", [1, 2])
def test_regression_against_scikit_learn(columns: int) -> None:
    outputs, y = (part[..., :columns] for part in synthetic("regression"))
    kind = KINDS["regression"]
    scores = scores_of(kind, outputs, y[:, 0] if columns == 1 else y)
    mean = outputs.mean(0)

    r2 = sklearn_metrics.r2_score(y.numpy(), mean.numpy(), multioutput="variance_weighted")
    assert figure(kind, scores, "ensemble_r2") == pytest.approx(r2, abs=1e-9)
    members = [sklearn_metrics.r2_score(y.numpy(), out.numpy(), multioutput="variance_weighted") for out in outputs]
    assert figure(kind, scores, "r2_mean") == pytest.approx(np.mean(members), abs=1e-9)
    assert figure(kind, scores, "r2_worst") == pytest.approx(min(members), abs=1e-9)
    assert figure(kind, scores, "ensemble_mse") == pytest.approx(sklearn_metrics.mean_squared_error(y, mean))
    assert figure(kind, scores, "ensemble_mae") == pytest.approx(sklearn_metrics.mean_absolute_error(y, mean))
    pairs = (outputs[:, None] - outputs[None]).abs().mean((0, 1))
    crps = ((outputs - y).abs().mean(0) - pairs / 2).mean()
    assert figure(kind, scores, "ensemble_crps") == pytest.approx(float(crps), rel=1e-9)
    low, high = np.quantile(outputs.numpy(), [0.05, 0.95], axis=0)
    inside = (low <= y.numpy()) & (y.numpy() <= high)
    assert figure(kind, scores, "ensemble_coverage") == pytest.approx(inside.mean())
    residuals = (outputs - y).flatten(1).numpy()
    np.testing.assert_allclose(kind.likeness.of(kind.errors(scores), None), np.corrcoef(residuals), rtol=1e-9)


def test_a_gaussian_mixture_against_scipy() -> None:
    outputs, y = synthetic("gaussian-regression")
    kind = KINDS["gaussian-regression"]
    scores = scores_of(kind, outputs, y)
    mean, std = outputs[..., 0].numpy(), outputs[..., 1].sqrt().numpy()
    truth = y.numpy()

    nll = -np.log(norm.pdf(truth, mean, std).mean(0)).mean()
    assert figure(kind, scores, "ensemble_nll") == pytest.approx(nll, rel=1e-9)
    loss = nn.GaussianNLLLoss(full=True)
    alone = np.mean([float(loss(out[..., 0], y, out[..., 1])) for out in outputs])
    assert figure(kind, scores, "member_nll_mean") == pytest.approx(alone, rel=1e-9)
    inside = np.abs(norm.cdf(truth, mean, std).mean(0) - 0.5) <= 0.45
    assert figure(kind, scores, "ensemble_coverage") == pytest.approx(inside.mean())
    assert figure(kind, scores, "ensemble_r2") == pytest.approx(
        sklearn_metrics.r2_score(y.numpy(), np.asarray(mean.mean(0)), multioutput="variance_weighted")
    )
    variance = (std**2).mean(0) + mean.var(0)
    np.testing.assert_allclose(scores.uncertainty, variance.mean(1), rtol=1e-9)


def test_the_crps_of_a_mixture_is_the_integral_that_defines_it() -> None:
    mean, std = np.array([-1.0, 0.3, 2.0]), np.array([0.5, 1.5, 0.2])
    for target in (-3.0, 0.1, 1.9):
        found = metrics.crps_of_gaussians(
            *(torch.tensor(v)[:, None] for v in (mean, std**2)), torch.tensor([target]).double()
        )

        def below(x: float) -> float:
            return float(norm.cdf(x, mean, std).mean()) ** 2

        def above(x: float) -> float:
            return (1 - float(norm.cdf(x, mean, std).mean())) ** 2

        points = [-1.0, 0.3, 2.0]
        integral = quad(below, -20, target, points=[p for p in points if p < target] or None, limit=200)[0]
        integral += quad(above, target, 20, points=[p for p in points if p > target] or None, limit=200)[0]
        assert float(found) == pytest.approx(integral, abs=1e-7)


def test_one_sharp_gaussian_has_the_crps_of_its_point() -> None:
    mean, y = torch.tensor([[2.0], [5.0]]).double(), torch.tensor([3.0]).double()
    sharp = metrics.crps_of_gaussians(mean, torch.full_like(mean, 1e-12), y)
    assert float(sharp) == pytest.approx(float(metrics.crps_of_members(mean, y)), abs=1e-5)


def test_several_labels_against_scikit_learn_and_torchmetrics() -> None:
    classification = pytest.importorskip("torchmetrics.functional.classification")
    outputs, y = synthetic("multilabel")
    kind = KINDS["multilabel"]
    scores = scores_of(kind, outputs, y)
    probs = outputs.sigmoid().mean(0)
    told = probs > 0.5

    bce = sklearn_metrics.log_loss(y.flatten(), probs.flatten())
    assert figure(kind, scores, "ensemble_bce") == pytest.approx(bce, rel=1e-9)
    assert figure(kind, scores, "ensemble_hamming") == pytest.approx(1 - sklearn_metrics.hamming_loss(y, told))
    assert figure(kind, scores, "ensemble_subset_accuracy") == pytest.approx(sklearn_metrics.accuracy_score(y, told))
    assert figure(kind, scores, "ensemble_f1") == pytest.approx(sklearn_metrics.f1_score(y, told, average="macro"))
    precision = sklearn_metrics.average_precision_score(y, probs, average="macro")
    assert figure(kind, scores, "ensemble_map") == pytest.approx(precision, abs=1e-9)
    ece = classification.binary_calibration_error(probs.flatten(), y.flatten(), n_bins=15)
    assert figure(kind, scores, "ensemble_ece") == pytest.approx(float(ece), abs=1e-6)
    wrong = ((outputs > 0) != y).flatten(1)
    assert torch.equal(
        kind.errors(scores),
        torch.cat([((o > 0) != t).flatten(1) for o, t in zip(outputs.split(23, 1), y.split(23), strict=True)], 1),
    )
    assert float(kind.likeness.of(kind.errors(scores), None)[0, 1]) == pytest.approx(
        sklearn_metrics.jaccard_score(wrong[0], wrong[1])
    )


def test_average_precision_takes_equal_scores_together() -> None:
    score = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.1])
    positive = torch.tensor([False, True, False, True, True])
    expected = sklearn_metrics.average_precision_score(positive, score)
    assert metrics.average_precision(score, positive) == pytest.approx(expected)
    assert math.isnan(metrics.average_precision(score, positive & False))


def test_pixels_against_torchmetrics() -> None:
    classification = pytest.importorskip("torchmetrics.functional.classification")
    outputs, y = synthetic("dense")
    kind = KINDS["dense"]
    scores = scores_of(kind, outputs, y)
    probs = outputs.softmax(2).mean(0)

    counted = y != IGNORED
    nll = -probs.gather(1, y.clamp_min(0)[:, None])[:, 0][counted].log().mean()
    assert figure(kind, scores, "ensemble_nll") == pytest.approx(float(nll), rel=1e-9)
    options = {"num_classes": 4, "ignore_index": IGNORED}
    accuracy = classification.multiclass_accuracy(probs, y, average="micro", **options)
    assert figure(kind, scores, "ensemble_accuracy") == pytest.approx(float(accuracy), abs=1e-6)
    overlap = classification.multiclass_jaccard_index(probs, y, average="macro", **options)
    assert figure(kind, scores, "ensemble_miou") == pytest.approx(float(overlap), abs=1e-6)
    ece = classification.multiclass_calibration_error(probs, y, n_bins=15, **options)
    assert figure(kind, scores, "ensemble_ece") == pytest.approx(float(ece), abs=1e-6)
    wrong = (outputs.argmax(2) != y) & counted
    expected = metrics.wrong_iou(wrong.flatten(1))
    torch.testing.assert_close(kind.likeness.of(kind.errors(scores), None), expected)
    means = [float((~wrong[i])[counted].double().mean()) for i in range(M)]
    assert figure(kind, scores, "accuracy_worst") == pytest.approx(min(means), rel=1e-9)


def test_dense_classes_in_one_dimension_are_a_classification_of_each_position() -> None:
    outputs, y = synthetic("dense")
    flat = scores_of(KINDS["classification"], outputs.movedim(2, -1).flatten(1, -2), y.clamp_min(0).flatten())
    whole = scores_of(KINDS["dense"], outputs, y.clamp_min(0))
    for key in ("ensemble_nll", "ensemble_accuracy", "ensemble_ece", "ensemble_brier", "accuracy_mean"):
        assert figure(KINDS["dense"], whole, key) == pytest.approx(figure(KINDS["classification"], flat, key), rel=1e-9)


def test_another_value_may_be_ignored() -> None:
    outputs, y = synthetic("dense")
    usual = scores_of(dense(), outputs, y)
    other = scores_of(dense(255), outputs, y.masked_fill(y == IGNORED, 255))
    assert torch.equal(usual.loss, other.loss)


@pytest.mark.parametrize("name", ["tokens", "language"])
def test_tokens_against_torchmetrics(name: str) -> None:
    text = pytest.importorskip("torchmetrics.functional.text")
    outputs, y = synthetic(name)
    kind = KINDS[name]
    scores = scores_of(kind, outputs, y)
    if name == "language":
        outputs, y = outputs[:, :, :-1], y[:, 1:]
    probs = outputs.softmax(-1).mean(0)

    perplexity = text.perplexity(probs.log(), y, ignore_index=IGNORED)
    assert figure(kind, scores, "ensemble_perplexity") == pytest.approx(float(perplexity), rel=1e-6)
    loss = cross_entropy(outputs[0].flatten(0, 1), y.flatten())
    assert float(scores.member_loss[0].mean()) == pytest.approx(float(loss), rel=1e-9)
    counted = y != IGNORED
    accuracy = (probs.argmax(-1) == y)[counted].double().mean()
    assert figure(kind, scores, "ensemble_accuracy") == pytest.approx(float(accuracy), rel=1e-9)


def test_standard_errors_of_tokens_are_those_of_a_ratio_over_sequences() -> None:
    outputs, y = synthetic("tokens")
    kind = KINDS["tokens"]
    one, other = (scores_of(kind, outputs[members], y) for members in (slice(0, 2), slice(2, 5)))
    nll = [
        -o.softmax(-1).mean(0).gather(-1, y.clamp_min(0)[..., None])[..., 0].log() for o in (outputs[:2], outputs[2:])
    ]
    counted = (y != IGNORED).double()
    sums, counts = ((nll[0] - nll[1]) * counted).sum(1), counted.sum(1)
    ratio = sums.sum() / counts.sum()
    expected = (sums - ratio * counts).std() / N**0.5 / counts.mean()

    difference = one.loss[-1] - other.loss[-1]
    assert float(difference.mean()) == pytest.approx(float(ratio), rel=1e-9)
    assert standard_error(difference) == pytest.approx(float(expected), rel=1e-9)


def test_a_loss_of_ones_own_is_asked_of_the_mean_output_or_of_what_combines() -> None:
    outputs, y = synthetic("custom")
    kind = custom(lambda out, truth: (out - truth).abs().amax(1))
    scores = scores_of(kind, outputs, y)
    expected = (outputs.mean(0) - y).abs().amax(1)
    torch.testing.assert_close(scores.loss[-1], expected)
    torch.testing.assert_close(scores.score[-1], -expected)
    np.testing.assert_allclose(
        kind.likeness.of(kind.errors(scores), None), np.corrcoef((outputs - y).abs().amax(2)), rtol=1e-9
    )
    median = custom(lambda out, truth: (out - truth).abs().amax(1), lambda out: out.median(0).values)
    torch.testing.assert_close(scores_of(median, outputs, y).loss[-1], (outputs.median(0).values - y).abs().amax(1))


def test_classes_by_a_loss_of_ones_own_are_a_classification() -> None:
    outputs, y = synthetic("classification")
    kind = custom(
        lambda logits, truth: cross_entropy(logits, truth, reduction="none"),
        lambda logits: logits.softmax(-1).mean(0).log(),
    )
    usual = scores_of(KINDS["classification"], outputs, y)
    torch.testing.assert_close(scores_of(kind, outputs, y).loss, usual.loss)
    torch.testing.assert_close(kind.left_out(scores_of(kind, outputs, y)), KINDS["classification"].left_out(usual))


def test_what_gain_counts_does_not_depend_on_the_sign_of_a_loss() -> None:
    outputs, y = synthetic("gaussian-regression")
    kind = KINDS["gaussian-regression"]
    small = torch.stack([outputs[..., 0] / 1e3, outputs[..., 1] / 1e6], dim=-1)
    one, other = (ScoredSet(kind, "x", [scores_of(kind, small[half], y / 1e3)]) for half in (slice(0, 2), slice(2, 5)))
    compared_ = compare("other", one, other)
    assert compared_.other_loss < 0
    assert compared_.needed == 0.01
    again = type(compared_).from_json(compared_.to_json(kind), kind)
    assert again == compared_

    signed = custom(lambda out, truth: (out - truth).mean(1))
    sets = [ScoredSet(signed, "x", [scores_of(signed, out, truth)]) for out, truth in [synthetic("custom")] * 2]
    assert compare("other", *sets).needed == pytest.approx(0.01 * float(sets[0].loss.abs().mean()))


def test_a_member_that_is_not_a_number_spoils_no_figure() -> None:
    for name in ("regression", "gaussian-regression", "multilabel", "dense", "tokens"):
        kind, (outputs, targets) = KINDS[name], synthetic(name)
        broken = outputs.clone()
        broken[1] = torch.nan
        scores = scores_of(kind, broken, targets)
        assert bool(scores.loss.isfinite().all())
        assert float(scores.member_score[1].mean()) < float(scores_of(kind, outputs, targets).member_score[1].mean())


def test_errors_are_compared_at_the_same_random_positions_of_each_item() -> None:
    errors = torch.arange(3 * MAX_COMPARED).expand(2, 4, -1)
    found = compared(errors).reshape(2, 4, MAX_COMPARED)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0, 0], found[0, 3])
    assert len(found[0, 0].unique()) == MAX_COMPARED
    assert torch.equal(compared(errors[:, :, :5]), errors[:, :, :5].flatten(1))


def test_correlation_is_one_for_copies_and_nothing_for_what_does_not_vary() -> None:
    rows = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).double()
    found = metrics.correlation(torch.cat([rows, rows[:1], torch.ones(1, 1000)]))
    assert float(found[0, 3]) == 1
    assert float(found[4, 0]) == float(found[4, 4]) == 0


def task_of(name: str, outputs: Tensor, targets: Any, **options: Any) -> Task:
    """A task whose model adds its weight to given outputs (n, ...), which are its inputs."""

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    return Task(Shift(), [(outputs, targets)], kind=name, **options)


@pytest.mark.parametrize(
    ("name", "outputs", "targets", "text"),
    [
        ("classification", (4, 3), torch.rand(4), 'targets are floating point: is this kind="regression"'),
        ("classification", (4, 3), torch.ones(4, 3), 'zeros and ones for several labels: is this kind="multilabel"'),
        ("classification", (4, 3, 2, 2), torch.full((4, 2, 2), 2), 'a map of integers per item: is this kind="dense"'),
        ("classification", (4, 7, 9), torch.full((4, 7), 5), 'a row of integers per item: is this kind="language"'),
        ("regression", (4, 3), torch.arange(4), 'is this kind="classification"'),
        ("regression", (4, 2), torch.rand(4), 'is this kind="gaussian-regression"'),
        ("regression", (4, 2), torch.rand(4, 3), r"must be of the shape \(4, 3\) that the targets of eval_loader have"),
        ("multilabel", (4, 3), torch.arange(4), 'one integer per item: is this kind="classification"'),
        ("multilabel", (4, 3), torch.rand(4, 3), 'is this kind="regression"'),
        ("multilabel", (4, 3), torch.ones(4, 2), r"must be logits of shape \(4, 2\), one per label"),
        ("dense", (4, 3), torch.arange(4), 'is this kind="classification"'),
        ("dense", (4, 3, 2, 2), torch.zeros(4, 3, 2).long(), r"must be logits of shape \(4, C, 3, 2\)"),
        ("dense", (4, 3, 2, 2), torch.full((4, 2, 2), 255), r"from 255 to 255.*ignore_index"),
        ("dense", (4, 3, 2, 2), torch.full((4, 2, 2), IGNORED), "ignored everywhere"),
        ("language", (4, 7), torch.full((4, 7), 5), r"must be logits of shape \(4, 7, C\)"),
        ("tokens", (4, 7, 3), torch.rand(4, 7), 'is this kind="regression"'),
        ("gaussian-regression", (4, 2), torch.rand(4), r"must be a pair \(mean, variance\).*select"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_the_kind_that_would(
    name: str, outputs: tuple[int, ...], targets: Tensor, text: str
) -> None:
    weights = WeightSet({"shift": torch.zeros(2)})
    with pytest.raises(ConfigError, match=text):
        score_sets(task_of(name, torch.rand(outputs), targets), {"a": weights})


def test_answers_can_be_picked_out_of_what_a_model_returns() -> None:
    weights = WeightSet({"shift": torch.zeros(2)})
    outputs, y = torch.rand(4, 2), torch.rand(4)
    task = task_of("gaussian-regression", outputs, y, select=lambda out: (out[:, 0], out[:, 1].exp()))
    expected = nn.GaussianNLLLoss(full=True)(outputs[:, 0], y, outputs[:, 1].exp())
    scores, _ = score_sets(task, {"a": weights})
    assert float(scores["a"].loss[-1].mean()) == pytest.approx(float(expected), rel=1e-6)
    named = dataclasses.replace(task, select=lambda out: {"mean": out[:, 0], "log_variance": out[:, 1]})
    assert torch.equal(score_sets(named, {"a": weights})[0]["a"].loss, scores["a"].loss)
    normal = dataclasses.replace(task, select=lambda out: torch.distributions.Normal(out[:, 0], (out[:, 1] / 2).exp()))
    torch.testing.assert_close(score_sets(normal, {"a": weights})[0]["a"].loss, scores["a"].loss)
    negative = dataclasses.replace(task, select=lambda out: (out[:, 0], -out[:, 1]))
    with pytest.raises(ConfigError, match="must not be negative; an output named log_variance may be"):
        score_sets(negative, {"a": weights})


def test_a_loss_of_ones_own_is_checked() -> None:
    model, data = nn.Linear(2, 1), [(torch.rand(4, 2), {"low": torch.rand(4), "high": torch.rand(4)})]
    task = Task(model, data, loss=lambda out, y: (out.squeeze(1) - y["low"]).abs() + y["high"])
    weights = WeightSet({"bias": torch.zeros(3, 1)})
    assert (task.kind, dataclasses.replace(task, name="again").kind) == ("custom", "custom")
    scores, marks = score_sets(task, {"a": weights})
    assert scores["a"].member_loss.shape == (3, 4)
    assert len(marks.unique()) == 4
    with pytest.raises(
        ConfigError, match=r"what loss returns = '.*\(4, 1\)': it must be the loss of each item, \(4,\)"
    ):
        score_sets(dataclasses.replace(task, loss=lambda out, y: out), {"a": weights})
    for options in ({"kind": "custom"}, {"combine": torch.mean}):
        with pytest.raises(ConfigError, match="must be given for a task of kind custom"):
            Task(model, data, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be left out where there is a loss of your own"):
        Task(model, data, kind="regression", loss=lambda out, y: out)


def test_marks_of_many_targets_tell_another_order_and_another_value() -> None:
    weights = WeightSet({"shift": torch.zeros(2)})
    outputs, y = (part.float() if part.is_floating_point() else part for part in synthetic("dense"))
    _, marks = score_sets(task_of("dense", outputs[0], y), {"a": weights})
    assert marks.shape == (N,)
    changed = y.clone()
    changed[0, 1, 2], changed[0, 1, 3] = y[0, 1, 3], y[0, 1, 2]
    changed[0, 1, 2] = 3 - changed[0, 1, 2] if changed[0, 1, 2] != IGNORED else 0
    _, others = score_sets(task_of("dense", outputs[0], changed), {"a": weights})
    assert (marks != others).nonzero().flatten().tolist() == [0]
    _, turned = score_sets(task_of("dense", outputs[0], y.flip(0)), {"a": weights})
    assert torch.equal(turned.flip(0), marks)


@pytest.mark.parametrize(
    ("name", "likeness", "reference", "is_copy"),
    [
        ("regression", 0.995, 0.98, False),
        ("regression", 0.99995, 0.98, True),
        ("regression", 0.99995, 0.99992, False),
        ("regression", 1.0, 0.99992, True),
        ("dense", 0.995, 0.98, True),
    ],
)
def test_a_correlation_is_a_copy_later_than_errors_in_common(
    name: str, likeness: float, reference: float, is_copy: bool
) -> None:
    kind, (outputs, targets) = KINDS[name], synthetic(name)
    one, other = (
        ScoredSet(kind, "x", [scores_of(kind, outputs[half], targets)]) for half in (slice(0, 2), slice(2, 5))
    )
    nearness = Nearness(1.0, 1.0, likeness=likeness, reference_likeness=reference)
    found, _ = judge(one, {"other": other}, nearness, Differences(kind, 1, 0.1, 0.5, 0.005, 0.5, None))
    assert (found.outcome == "copies the snapshots") == is_copy
    if is_copy:
        threshold = "99%" if name == "dense" else "0.9999"
        assert f"({threshold} and more counts as a copy)" in found.sentence
    else:
        assert ("that tells nothing of copies" in found.sentence) == (reference > 0.9999)


def test_too_few_errors_are_counted_in_what_the_kind_errs_on() -> None:
    outputs = torch.full((2, 5, 2, 3, 3), 9.0)
    outputs[:, :, 1] = 0.0
    kind, targets = KINDS["dense"], torch.zeros(5, 3, 3).long()
    targets[0, 0, 0] = 1
    scored = ScoredSet(kind, "x", [scores_of(kind, outputs, targets)])
    nearness = Nearness(1.0, 1.0, likeness=0.5, reference_likeness=0.5)
    found, _ = judge(scored, {}, nearness, Differences(kind, 1, 0.1, 0.5, 0.005, 0.5, None))
    assert found.sentence.startswith("Too few data to tell: members make 1.0 errors on 45 pixels; it takes 10")
