"""Each kind of task from snapshots to report: small networks on diabetes, digits and the bytes of the licence."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.metrics import average_precision_score, jaccard_score, mean_squared_error, r2_score
from torch import Tensor, nn
from torch.nn import functional as F

from pdiff_plugin import (
    DiffusionConfig,
    DiffusionEnsemble,
    Evaluation,
    FitConfig,
    SnapshotStore,
    Task,
    WeightGenerator,
    WeightSet,
    evaluate,
    fit,
    sweep,
    write_report,
)
from pdiff_plugin.ensemble.soup import greedy_soup
from pdiff_plugin.evaluation.gate import keep_accurate
from pdiff_plugin.evaluation.rows import evenly_spaced
from pdiff_plugin.evaluation.scores import score_sets
from pdiff_plugin.evaluation.search_score import EnsembleNLL
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

from .conftest import digits

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "evaluation.md"
LICENCE = Path(__file__).parents[2] / "LICENSE"
WINDOW, VOCABULARY = 24, 128
NUM_SNAPSHOTS, NUM_MEMBERS = 40, 6


class Gaussian(nn.Module):
    """Mean and variance of each item."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.body(x).unbind(1)
        return mean, F.softplus(raw) + 0.01


class Causal(nn.Module):
    """The next byte from the last three."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.mix = nn.Conv1d(8, 16, 3)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = F.pad(self.embedding(input_ids).transpose(1, 2), (2, 0))
        return {"logits": self.head(self.mix(x).relu().transpose(1, 2))}


@dataclass
class Problem:
    """A model, its data and how it is trained."""

    model: Callable[[], nn.Module]
    inputs: Tensor
    targets: Any
    loss: Callable[[Any, Any], Tensor]
    kind: str
    num_train: int
    as_dictionary: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def batches(self, start: int, stop: int, size: int = 64) -> list[Any]:
        places = [slice(i, min(i + size, stop)) for i in range(start, stop, size)]
        if self.as_dictionary:
            return [{"input_ids": self.inputs[p], "labels": self.targets[p]} for p in places]
        return [(self.inputs[p], self.targets[p]) for p in places]

    @property
    def held_out(self) -> tuple[Tensor, Any]:
        return self.inputs[self.num_train :], self.targets[self.num_train :]


def diabetes() -> tuple[Tensor, Tensor]:
    data = load_diabetes()
    x, y = (torch.tensor(values, dtype=torch.float32) for values in (data.data * 20, data.target))
    return x, (y - y.mean()) / y.std()


def windows() -> tuple[Tensor, Tensor]:
    text = torch.tensor(list(LICENCE.read_bytes())[: 200 * WINDOW]).clamp_max(VOCABULARY - 1)
    tokens = text[: len(text) // WINDOW * WINDOW].reshape(-1, WINDOW)
    labels = tokens.clone()
    for row in range(0, len(labels), 3):
        labels[row, WINDOW - 1 - row % 7 :] = -100
    return tokens, labels


def noisy_digits() -> tuple[Tensor, Tensor]:
    """Digits in noise; a pixel is paper, ink of an even or ink of an odd digit, and 255 where that is hard to tell."""
    x, y = digits()
    image = x.reshape(-1, 1, 8, 8)
    target = torch.where(image[:, 0] > 0.6, 1 + y[:, None, None] % 2, 0)
    target[(image[:, 0] > 0.4) & (image[:, 0] <= 0.6)] = 255
    noise = 0.2 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return (image + noise)[:700], target[:700]


def labels_of_digits() -> tuple[Tensor, Tensor]:
    x, y = digits()
    has_loop = (y == 0) | (y == 6) | (y == 8) | (y == 9)
    return x[:900], torch.stack([has_loop, y % 2 == 0, y > 4], dim=1).float()[:900]


def next_byte(out: dict[str, Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(out["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def pinball(out: Tensor, y: Tensor) -> Tensor:
    """Loss of the 80 % quantile."""
    error = y - out.squeeze(1)
    return torch.maximum(0.8 * error, -0.2 * error)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "regression": lambda: Problem(
        lambda: mlp(10, 8, 1), *diabetes(), lambda out, y: F.mse_loss(out[:, 0], y), "regression", 240
    ),
    "gaussian-regression": lambda: Problem(
        Gaussian, *diabetes(), lambda out, y: F.gaussian_nll_loss(out[0], y, out[1]), "gaussian-regression", 240
    ),
    "multilabel": lambda: Problem(
        lambda: mlp(64, 8, 3), *labels_of_digits(), F.binary_cross_entropy_with_logits, "multilabel", 300
    ),
    "dense": lambda: Problem(
        lambda: nn.Sequential(nn.Conv2d(1, 4, 5, padding=2), nn.ReLU(), nn.Conv2d(4, 3, 5, padding=2)),
        *noisy_digits(),
        lambda out, y: F.cross_entropy(out, y, ignore_index=255),
        "dense",
        300,
        options={"ignore_index": 255},
    ),
    "language": lambda: Problem(Causal, *windows(), next_byte, "language", 100, as_dictionary=True),
    "custom": lambda: Problem(
        lambda: mlp(10, 8, 1), *diabetes(), lambda out, y: pinball(out, y).mean(), "custom", 240,
        options={"loss": pinball},
    ),
}  # fmt: skip


@dataclass
class Judged:
    problem: Problem
    task: Task
    store: SnapshotStore
    generator: WeightGenerator
    evaluation: Evaluation


def trained(problem: Problem, path: Path) -> tuple[nn.Module, SnapshotStore]:
    """Train 80 steps, then record each of a few dozen more."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = problem.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    layout = Layout.from_tensors(dict(model.named_parameters()))
    rng, rows = torch.Generator().manual_seed(0), []
    for step in range(80 + NUM_SNAPSHOTS):
        pick = torch.randint(problem.num_train, (64,), generator=rng)
        optimizer.zero_grad()
        problem.loss(model(problem.inputs[pick]), problem.targets[pick]).backward()
        optimizer.step()
        if step >= 80:
            rows.append(layout.flatten({name: p.detach() for name, p in model.named_parameters()}))
    TrajectoryWriter(path, layout).write_chunk(torch.stack(rows), range(1, NUM_SNAPSHOTS + 1))
    return model.eval(), SnapshotStore.open(path)


@pytest.fixture(scope="module", params=list(PROBLEMS))
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    problem = PROBLEMS[request.param]()
    model, store = trained(problem, tmp_path_factory.mktemp(request.param) / "store")
    strange = 3 * torch.rand_like(problem.inputs[:40]) if problem.inputs.is_floating_point() else problem.inputs[:40]
    shifted = problem.batches(problem.num_train, problem.num_train + 50)
    task = Task(
        model,
        problem.batches(problem.num_train, len(problem.inputs)),
        kind="classification" if request.param == "custom" else problem.kind,
        name=f"small {request.param}",
        shifted={"first": shifted},
        out_of_distribution={"strange": [{"input_ids": strange} if problem.as_dictionary else strange]},
        **problem.options,
    )
    generator = fit(store.path, FitConfig(diffusion=DiffusionConfig(max_steps=30, width=16)))
    result = evaluate(task, store, generator, num_members=NUM_MEMBERS, num_draws=2, sets="core")
    return Judged(problem, task, store, generator, result)


def numbers(figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from numbers(value)
        else:
            yield key, math.nan if value is None else value


def members_of(judged: Judged) -> list[nn.Module]:
    """The members of the set of snapshots."""
    found = []
    for place in evenly_spaced(len(judged.store), NUM_MEMBERS).tolist():
        model = judged.problem.model()
        model.load_state_dict(judged.store.state_dict(place))
        found.append(model.eval())
    return found


def test_every_figure_of_every_set_is_a_number(judged: Judged) -> None:
    result = judged.evaluation
    assert result.kind.name == judged.problem.kind
    for name, figures in result.sets.items():
        missing = [key for key, value in numbers(figures) if not math.isfinite(value)]
        assert missing == [], name
    assert all(math.isfinite(c.loss_error) and c.needed > 0 for c in result.comparisons)
    assert result.sets["generated"]["ensemble_" + result.kind.loss.key + "_std"] >= 0
    assert 0 <= result.sets["snapshots"]["ood_auroc/strange"] <= 1


def test_the_snapshots_have_learned_something(judged: Judged) -> None:
    kind, snapshots = judged.evaluation.kind, judged.evaluation.sets["snapshots"]
    untrained = {"r2": 0.3, "hamming": 0.75, "accuracy": 0.2 if kind.name == "language" else 0.85, "score": -0.3}
    assert snapshots[kind.ensemble_score] > untrained[kind.score.key]
    assert snapshots[kind.within] < 1


def test_the_result_is_told_saved_read_and_drawn(judged: Judged, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = judged.evaluation
    text = result.table_text()
    assert result.kind.loss.title in text
    assert result.verdict.sentence in text

    loaded = Evaluation.load(result.save(tmp_path))
    assert (loaded.table(), loaded.comparisons) == (result.table(), result.comparisons)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert f"{result.kind.metric(result.kind.ensemble_loss).title} (lower is better)" in page
    assert result.kind.likeness.help in page
    drawn = {path.stem for path in (tmp_path / "report-figures").iterdir()}
    assert {"accuracy-novelty", "paired-differences", "plane", "overlap", "densities"} <= drawn
    assert f'<figure id="cost-{result.kind.loss.key}"' in page


def test_generators_are_swept_gated_averaged_and_ranked(judged: Judged, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    task, kind = judged.task, judged.evaluation.kind
    curves = sweep(task, judged.store, judged.generator, diversities=(0.5,), settings={"average": (4,)}, num_members=4)
    assert kind.metric(kind.mean_score).title in curves.table()[0]
    assert all(math.isfinite(point[kind.ensemble_loss]) for point in curves.points)
    assert curves.save_picture(tmp_path / "curves.png").stat().st_size > 5000

    weights = judged.generator.sample(4, rng=torch.Generator().manual_seed(0))
    scores = keep_accurate(task, weights, -1e9).member_scores
    kept = keep_accurate(task, weights, sorted(scores)[2])
    assert (len(kept.indices), kept.num_dropped) == (2, 2)
    soup = greedy_soup(
        task.model, weights, lambda model: keep_accurate(task, weights.select([0]), -1e9).member_scores[0]
    )
    assert soup.score == pytest.approx(scores[0])
    rank = EnsembleNLL(task, 4)
    assert kind.loss.text in str(rank)
    assert math.isfinite(rank(judged.generator, 1.0))


def test_figures_of_the_snapshots_are_those_of_other_libraries(judged: Judged) -> None:
    x, y = judged.problem.held_out
    found = judged.evaluation.sets["snapshots"]
    with torch.no_grad():
        outputs = [model(x) for model in members_of(judged)]
    if judged.problem.kind == "regression":
        mean = torch.stack(outputs).mean(0)[:, 0]
        assert found["ensemble_r2"] == pytest.approx(r2_score(y.numpy(), mean.numpy()), abs=1e-6)
        assert found["ensemble_mse"] == pytest.approx(mean_squared_error(y, mean), abs=1e-6)
    elif judged.problem.kind == "gaussian-regression":
        mean, variance = (torch.stack(parts) for parts in zip(*outputs, strict=True))
        mixture = torch.distributions.Normal(mean, variance.sqrt()).log_prob(y).exp().mean(0)
        assert found["ensemble_nll"] == pytest.approx(float(-mixture.log().mean()), abs=1e-6)
    elif judged.problem.kind == "multilabel":
        probs = torch.stack(outputs).sigmoid().mean(0)
        assert found["ensemble_map"] == pytest.approx(average_precision_score(y, probs), abs=1e-6)
    elif judged.problem.kind == "dense":
        told = torch.stack(outputs).softmax(2).mean(0).argmax(1)
        overlap = jaccard_score(y[y != 255], told[y != 255], average="macro")
        assert found["ensemble_miou"] == pytest.approx(overlap, abs=1e-6)
    elif judged.problem.kind == "language":
        probs = torch.stack([out["logits"] for out in outputs]).double().softmax(-1).mean(0)
        perplexity = next_byte({"logits": probs.log()}, y).exp()
        assert found["ensemble_perplexity"] == pytest.approx(float(perplexity), rel=1e-6)
    else:
        expected = pinball(torch.stack(outputs).mean(0), y).mean()
        assert found["ensemble_loss"] == pytest.approx(float(expected), abs=1e-6)


def test_the_ensemble_that_was_judged_can_be_had(judged: Judged) -> None:
    kind, task = judged.evaluation.kind, judged.task
    weights = judged.generator.sample(4, rng=torch.Generator().manual_seed(0))
    scores, _ = score_sets(task, {"generated": weights})
    assert kind.ensemble_options is not None
    ensemble = DiffusionEnsemble(task.model, weights, **kind.ensemble_options)

    class AsOne(nn.Module):
        """The ensemble in the place of the model; the weight is there to have something to judge."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = ensemble
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    as_one, _ = score_sets(
        dataclasses.replace(task, model=AsOne().eval()), {"one": WeightSet({"weight": torch.zeros(1, 1)})}
    )
    if kind.name == "gaussian-regression":  # one Gaussian has the moments of a mixture, and not its density
        torch.testing.assert_close(as_one["one"].score[-1], scores["generated"].score[-1], rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(as_one["one"].loss[-1], scores["generated"].loss[-1], rtol=1e-4, atol=1e-5)


def test_the_snippet_of_the_documentation_makes_this_task(judged: Judged) -> None:
    snippets = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    marker = "loss=" if judged.problem.kind == "custom" else f'kind="{judged.problem.kind}"'
    [snippet] = [text for text in snippets if marker in text]
    names = {"Task": Task, "torch": torch, "model": judged.task.model, "loader": judged.task.eval_loader}
    exec(snippet, names)
    found = evaluate(names["task"], judged.store, sets=["snapshots"], num_members=NUM_MEMBERS).sets["snapshots"]
    mine = judged.evaluation.sets["snapshots"]
    assert found == {key: value for key, value in mine.items() if "/" not in key}


@pytest.mark.slow
def test_a_model_of_transformers_is_judged_as_it_comes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCABULARY, "n_positions": WINDOW, "n_embd": 16, "n_layer": 1, "n_head": 2}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    problem = Problem(
        lambda: transformers.GPT2LMHeadModel(config), *windows(), next_byte, "language", 100, as_dictionary=True
    )
    model, store = trained(problem, tmp_path / "store")
    task = Task(model, problem.batches(100, len(problem.inputs)), kind="language")
    found = evaluate(task, store, sets="core", num_members=3).sets["snapshots"]

    members = []
    for place in evenly_spaced(len(store), 3).tolist():
        model.load_state_dict(store.state_dict(place), strict=False)
        x, y = problem.held_out
        with torch.no_grad():
            answer = model(x, labels=y)
        members.append(answer.logits.double().softmax(-1))
        assert float(next_byte({"logits": answer.logits}, y)) == pytest.approx(float(answer.loss), rel=1e-5)
    perplexity = next_byte({"logits": torch.stack(members).mean(0).log()}, y).exp()
    assert found["ensemble_perplexity"] == pytest.approx(float(perplexity), rel=1e-6)
