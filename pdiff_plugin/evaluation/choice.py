"""The best that the sets of an evaluation give for a number of forward passes, without a further pass over the data.

Candidates are every single member of every set, and every ensemble that was scored: 2, 4, 8, ... and all of a set's
members, in the order in which they joined. One half of the items chooses, by the lowest mean loss (or, where that is
wanted, by the highest mean score); the other half, which chose nothing, tells what the choice is worth.

The lowest of hundreds of losses is in part luck, and few items would choose the luckiest member. So the loss of a
member that is one of several is first drawn towards the mean of its set, by the share of the members' spread that the
number of items alone explains. Then all that are within two standard errors of the lowest, paired over the choosing
items, are in question, and of these the lowest is taken, each single member counting as the mean of its set: a member
wins by itself only where it clearly is better than what its set, and every other set, gives on average.

A single member costs one pass. Where a set of M members was measured to cost P passes, k of them cost
1 + (k - 1) (P - 1) / (M - 1): what members have in common is computed once, and each adds the same to it. Where nothing
could be counted, k members cost k passes.

Values within a billionth of the lowest are ties. The first of them is taken by: fewer passes; fewer members; the set's
place in the table, generated members last, since they need a fit; the member's number.

Shapes: M members of a set, S ensemble sizes, n items, G groups of items.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pdiff_plugin.ensemble.ensemble import DiffusionEnsemble
from pdiff_plugin.errors import ConfigError, WeightsNotKeptError
from pdiff_plugin.evaluation.baselines import GENERATED
from pdiff_plugin.evaluation.kind import Scores, TaskKind, joining_order
from pdiff_plugin.evaluation.kinds import KINDS
from pdiff_plugin.evaluation.metrics import standard_error
from pdiff_plugin.evaluation.task import Task, evaluating
from pdiff_plugin.evaluation.verdict import NUM_ERRORS_OF_MEAN, half_mask
from pdiff_plugin.generator.weights import MEMBER_FORMAT, MEMBER_FORMAT_VERSION, WeightSet
from pdiff_plugin.snapshots.files import is_number, number_in
from pdiff_plugin.snapshots.tensor_files import save_tensors

FILE_NAME = "best.safetensors"
SHOWN_BUDGETS = (1.0, 8.0)
"""Forward passes for which every table names the choice."""

LAST = "last"
_TIE = 1e-9
# Of a price in passes, which is a quotient of counted operations.
_ROUNDING = 1e-6
_MAX_GROUPS = 40

By = Literal["loss", "score"]
# (set, members) -> what names them in a sentence.
Naming = Callable[[str, Sequence[int]], str]


@dataclass(frozen=True)
class Material:
    """What makes the weights of a choice again.

    Attributes:
        task: whose model they belong to.
        seed: of the draws.
        draw: set and members -> their weights, (k, *shape) each.
    """

    task: Task
    seed: int
    draw: Callable[[str, Sequence[int]], WeightSet]


@dataclass(frozen=True)
class Beside:
    """Another model on the items that a choice was scored on.

    Attributes:
        loss: its mean loss.
        score: its mean score.
        loss_difference: of the choice minus the other, item by item; negative favours the choice.
        loss_error: standard error of that over items.
        score_difference: the same of the scores; positive favours the choice.
        score_error: standard error of that.
    """

    loss: float
    score: float
    loss_difference: float
    loss_error: float
    score_difference: float
    score_error: float


@dataclass(frozen=True)
class Choice:
    """One model or one ensemble, chosen on one half of the data and scored on the other.

    Attributes:
        set: its name in the table.
        members: their numbers in the set, from 0; a single one is a single model.
        text: its name in a sentence.
        num_passes: its price in forward passes of the model.
        loss: mean over the half of the items that chose nothing.
        score: the same of the score.
        num_items: size of that half.
        kind: of the task.
        budget: number of passes from which on it is the choice, at least its price.
        by: what it is the best in, on the half that chose: the lowest mean loss or the highest mean score.
        beside: the last snapshot (mean over the runs) and the ensemble of all generated members on the same half, by
            the name of their set, as far as they were judged.
    """

    set: str
    members: tuple[int, ...]
    text: str
    num_passes: float
    loss: float
    score: float
    num_items: int
    kind: str
    budget: float = field(default=1.0, compare=False)
    by: By = "loss"
    beside: dict[str, Beside] = field(default_factory=dict)
    _material: Material | None = field(default=None, repr=False, compare=False)

    @property
    def is_single(self) -> bool:
        """Whether it is one model, whose weights are a state dict, and no ensemble."""
        return len(self.members) == 1

    @property
    def weights(self) -> WeightSet:
        """Its members, drawn again: names and shapes as recorded, stacked; one member for a single model.

        Raises:
            WeightsNotKeptError: the evaluation was read from a file.
        """
        return self._made_by.draw(self.set, self.members)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``best.safetensors`` into ``folder`` and return its path: a member file or an ensemble file.

        A single model is a state dict of the recorded tensors; an ensemble holds the rest of the model, too. The header
        tells what made it.

        Raises:
            WeightsNotKeptError: the evaluation was read from a file.
            ConfigError: an ensemble of a task that combines members in its own way.
        """
        made, weights = self._made_by, self.weights
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"set": self.set, "seed": str(made.seed), "choice": json.dumps(self.to_json())}
        if self.is_single:
            header |= {"member": str(self.members[0])}
            tensors = {name: tensor.contiguous() for name, tensor in weights.member(0).items()}
            save_tensors(path, tensors, MEMBER_FORMAT, MEMBER_FORMAT_VERSION, header)
            return path
        options = made.task.task_kind.ensemble_options
        if options is None:
            expected = (
                "must be left out for an ensemble in a file, which cannot hold it; best(num_passes=1) is one model"
            )
            raise ConfigError("combine", made.task.combine, expected)
        with evaluating(made.task) as model:
            DiffusionEnsemble(model, weights, **options).save(path, header)
        return path

    def loading(self, path: Path) -> str:
        """The line of Python that loads what :meth:`save` wrote."""
        if self.is_single:
            return f'model.load_state_dict(safetensors.torch.load_file("{path}"), strict=False)'
        return f'ensemble = pdiff_plugin.DiffusionEnsemble.load("{path}", model.eval())'

    def sentence(self, budget: float) -> str:
        """What it is and what it is worth, as the best for so many passes."""
        kind = KINDS[self.kind]
        compared = [
            f"{text} {kind.loss.value(other.loss)} ({kind.loss.difference(other.loss_difference, other.loss_error)}), "
            f"{kind.score.value(other.score)} ({kind.score.difference(other.score_difference, other.score_error)})"
            for text, other in self.compared
        ]
        price = "" if self.num_passes <= 1 or self.num_passes == budget else f" at {self.num_passes:.3g} passes"
        values = f"{kind.loss.text} {kind.loss.value(self.loss)}, {kind.score.text} {kind.score.value(self.score)}"
        told = f"{self.title(budget)}: {self.text}{price}, {values} on data that chose nothing"
        return "; ".join([told, *compared]) + "."

    def title(self, budget: float) -> str:
        """What it is the best in, for so many passes."""
        kind = KINDS[self.kind]
        return f"Best for {passes_text(budget)}" + (f" by {kind.score.text}" if self.by == "score" else "")

    @property
    def compared(self) -> list[tuple[str, Beside]]:
        """What it is shown beside, with its name in a sentence."""
        others = {LAST: "the last snapshot", GENERATED: "the generated ensemble"}
        return [(text, self.beside[name]) for name, text in others.items() if name in self.beside]

    def to_json(self) -> dict[str, Any]:
        """Everything but the weights."""
        document = {name: value for name, value in vars(self).items() if name != "_material"}
        beside = {name: asdict(other) for name, other in self.beside.items()}
        return document | {"members": list(self.members), "beside": beside}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Choice:
        """Read what :meth:`to_json` gave.

        Raises:
            ValueError: a figure or a name that is none.
        """
        beside = {name: _beside(other) for name, other in document["beside"].items()}
        known = {field.name: document[field.name] for field in fields(cls) if field.name in document}
        for name, value in known.items():
            if name in ("set", "text", "kind", "by") and not isinstance(value, str):
                raise ValueError(f"{name} of a choice that is no text")
            if name in ("num_passes", "num_items", "budget") and not is_number(value):
                raise ValueError(f"{name} of a choice that is no number")
        known |= {name: number_in(document[name]) for name in ("loss", "score")}
        if known["kind"] not in KINDS or known.get("by", "loss") not in get_args(By):
            raise ValueError(f"a choice of kind {known['kind']!r} by {known.get('by')!r}")
        members = tuple(document["members"])
        if not members or not all(type(member) is int and member >= 0 for member in members):
            raise ValueError("a choice of other members than numbers from 0")
        return cls(**{**known, "members": members, "beside": beside})

    def __getstate__(self) -> dict[str, Any]:
        # Material holds open files and a user's loaders: a copy in another process tells what was chosen.
        return vars(self) | {"_material": None}

    @property
    def _made_by(self) -> Material:
        if self._material is None:
            raise WeightsNotKeptError(f"{self.budget:g}")
        return self._material


def _beside(document: Mapping[str, Any]) -> Beside:
    return Beside(**{field.name: number_in(document[field.name]) for field in fields(Beside)})


def passes_text(budget: float) -> str:
    """A number of passes in words."""
    words = {1.0: "one pass", 8.0: "eight passes"}
    return words.get(budget, f"{budget:g} passes")


def price(scores: Scores, size: int) -> float:
    """Forward passes that ``size`` members of a set cost; see the top of this module."""
    num_members = len(scores.member_loss)
    if size == 1 or num_members == 1:
        return 1.0
    measured = num_members if scores.forward_passes is None else max(scores.forward_passes, 1.0)
    return 1 + (size - 1) * (measured - 1) / (num_members - 1)


def frontier(
    kind: TaskKind,
    sets: Mapping[str, Scores],
    name: Naming,
    seed: int,
    material: Material | None = None,
) -> list[Choice]:
    """The choice for every budget, by rising budget.

    First those by loss, then those by score.

    Args:
        kind: of the task.
        sets: name -> scores of its first draw, in the order of the table.
        name: what a set's members are called in a sentence.
        seed: of the evaluation; it decides which half chooses and which members the smaller ensembles have.
        material: makes the weights again.
    """
    num_items = next(iter(sets.values())).num_items if sets else 0
    if num_items < 4:  # two to choose, and two to tell an error
        return []
    chooses = half_mask(num_items, seed)
    others, found = _others(sets), []
    for by in get_args(By):
        candidates = sorted(_candidates(sets, chooses, seed, by), key=lambda candidate: candidate.order)
        for budget, candidate in _chosen(candidates):
            choice = _scored(candidate, sets, ~chooses, others)
            text = name(candidate.set, candidate.members)
            found.append(replace(choice, text=text, kind=kind.name, budget=budget, by=by, _material=material))
    return found


def best(choices: Sequence[Choice], num_passes: float, by: By = "loss") -> Choice:
    """The choice for a budget, from the :func:`frontier`.

    Raises:
        ConfigError: less than one pass, or nothing to choose from.
    """
    if not num_passes >= 1:
        raise ConfigError("num_passes", num_passes, "must be at least 1, the price of a single model")
    if not choices:
        raise ConfigError("choices", "none", "must be told by the evaluation; evaluate again, on four items or more")
    if by not in get_args(By):
        raise ConfigError("by", by, f"must be one of {', '.join(get_args(By))}")
    found = [c for c in choices if c.by == by and c.budget <= num_passes * (1 + _ROUNDING)]
    if not found:
        raise ConfigError("choices", f"none by {by}", "must be told by the evaluation; evaluate again")
    return found[-1]


def without_luck(values: Tensor) -> Tensor:
    """Mean of each member, (M,), drawn towards that of the set as far as its spread is by chance; from (M, n).

    The variance of the means, over members, is the true one plus that of a mean of n items, which the paired deviations
    from the set's mean tell. Two members are too few to tell.
    """
    means = values.mean(dim=1)
    if len(means) < 3 or not means.isfinite().all():
        return means.nan_to_num(nan=torch.inf)
    by_chance = (values - values.mean(dim=0)).var(dim=1).mean() / values.shape[1]
    spread = means.var()
    true_share = (1 - by_chance / spread).clamp_min(0) if spread > 0 else spread
    return means.mean() + true_share * (means - means.mean())


def cost_curves(sets: Mapping[str, Scores], seed: int) -> dict[str, Tensor]:
    """What every set gives at which price on the half that chose nothing, as arrays of the page.

    Returns:
        ``cost/SET`` (4, S): ensemble sizes, passes, loss and score, for one member the mean over all members; nothing
        for very few items.
    """
    found = {}
    for name, scores in sets.items():
        if scores.num_items < 4:
            return {}
        rest = ~half_mask(scores.num_items, seed)
        loss, score = scores.loss[:, rest].mean(dim=1), scores.score[:, rest].double().mean(dim=1)
        loss[0], score[0] = scores.member_loss[:, rest].mean(), scores.member_score[:, rest].double().mean()
        passes = torch.tensor([price(scores, size) for size in scores.sizes], dtype=torch.float64)
        found[f"cost/{name}"] = torch.stack([torch.tensor(scores.sizes).double(), passes, loss, score])
    return found


def group_scores(groups: Tensor, sets: Mapping[str, Scores], choices: Sequence[Choice], seed: int) -> dict[str, Tensor]:
    """Mean scores by group of items, on the half that chose nothing, as arrays of the page.

    Args:
        groups: number of each item's group, from 0, (n,) int64.
        sets: scores of the sets.
        choices: the :func:`frontier`.
        seed: of the evaluation.

    Returns:
        ``group_count`` (G,), and ``group_score/NAME`` (G,) for the last snapshot, the ensembles of all snapshots and
        of all generated members, and for the choices, named ``best for one pass``; nothing for very many groups.
    """
    if not choices or int(groups.max()) >= _MAX_GROUPS:
        return {}
    rest = ~half_mask(len(groups), seed)
    rows = {name: score for name, (_, score) in _others(sets).items()}
    if "snapshots" in sets:
        rows["snapshots"] = sets["snapshots"].score[-1]
    for budget in SHOWN_BUDGETS:
        choice = best(choices, budget)
        scores = sets[choice.set]
        place = choice.members[0] if choice.is_single else scores.sizes.index(len(choice.members))
        rows[f"best for {passes_text(budget)}"] = (scores.member_score if choice.is_single else scores.score)[place]
    count = torch.bincount(groups[rest], minlength=int(groups.max()) + 1).double()
    sums = {name: torch.zeros_like(count).index_add_(0, groups[rest], row.double()[rest]) for name, row in rows.items()}
    return {"group_count": count} | {f"group_score/{name}": values / count for name, values in sums.items()}


@dataclass(frozen=True)
class _Candidate:
    """A single member, or an ensemble of some.

    Attributes:
        place: row in the scores of the members, or of the ensembles.
        values: of each item of the half that chooses, lower is better.
        value: their mean, without luck.
        expected: the same, of a single member the mean over its set.
        rank: the set's place in order of simplicity.
    """

    set: str
    members: tuple[int, ...]
    place: int
    price: float
    values: Tensor
    value: float
    expected: float
    rank: int

    @property
    def order(self) -> tuple[float, int, int, int]:
        return self.price, len(self.members), self.rank, self.members[0]

    def rows(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Loss and score of each item, (n,) both."""
        if len(self.members) == 1:
            return scores.member_loss[self.place], scores.member_score[self.place].double()
        return scores.loss[self.place], scores.score[self.place].double()


def _chosen(candidates: Sequence[_Candidate]) -> Iterator[tuple[float, _Candidate]]:
    """The best for every budget, with the smallest budget for which it is, from candidates in their order."""
    found: _Candidate | None = None
    lowest: _Candidate | None = None
    in_question: list[bool] = []
    for budget in sorted({candidate.price for candidate in candidates}):
        in_reach = [candidate for candidate in candidates if candidate.price <= budget]
        now = min(in_reach, key=lambda candidate: candidate.value)
        if now is not lowest:
            lowest, in_question = now, [_is_in_question(candidate, now) for candidate in candidates]
        near = [c for c, is_near in zip(candidates, in_question, strict=True) if is_near and c.price <= budget]
        best_value = min(candidate.expected for candidate in near)
        choice = next(c for c in near if c.expected <= best_value + _TIE * abs(best_value))
        if choice is not found:
            yield budget, choice
        found = choice


def _is_in_question(candidate: _Candidate, lowest: _Candidate) -> bool:
    """Whether the items leave it open that a candidate is as good as the lowest."""
    if not math.isfinite(candidate.value):
        return candidate is lowest
    error = standard_error(candidate.values - lowest.values)
    return candidate.value <= lowest.value + NUM_ERRORS_OF_MEAN * error + _TIE * abs(lowest.value)


def _candidates(sets: Mapping[str, Scores], chooses: Tensor, seed: int, by: By) -> Iterator[_Candidate]:
    """The best single member of every set, and its ensembles."""
    simple_first = sorted(sets, key=lambda name: name == GENERATED)
    for rank, name in enumerate(simple_first):
        scores = sets[name]
        make = partial(_Candidate, name, rank=rank)
        members = (scores.member_loss if by == "loss" else -scores.member_score.double())[:, chooses]
        values = without_luck(members)
        lowest = float(values.min())
        member = int((values <= lowest + _TIE * abs(lowest)).long().argmax())
        expected = float(members.mean().nan_to_num(nan=torch.inf))
        yield make((member,), member, price(scores, 1), members[member], lowest, expected)
        order = joining_order(len(members), seed)
        ensembles = (scores.loss if by == "loss" else -scores.score.double())[:, chooses]
        means = ensembles.mean(dim=1).nan_to_num(nan=torch.inf).tolist()
        for place, size in enumerate(scores.sizes):
            if size > 1:
                chosen = tuple(sorted(order[:size].tolist()))
                yield make(chosen, place, price(scores, size), ensembles[place], means[place], means[place])


def _others(sets: Mapping[str, Scores]) -> dict[str, tuple[Tensor, Tensor]]:
    """Loss and score of each item, (n,), of what a choice is shown beside."""
    found = {}
    if LAST in sets:
        found[LAST] = sets[LAST].member_loss.mean(dim=0), sets[LAST].member_score.double().mean(dim=0)
    if GENERATED in sets:
        found[GENERATED] = sets[GENERATED].loss[-1], sets[GENERATED].score[-1].double()
    return found


def _scored(
    candidate: _Candidate, sets: Mapping[str, Scores], rest: Tensor, others: Mapping[str, tuple[Tensor, Tensor]]
) -> Choice:
    """A choice with its figures, not yet named."""
    loss, score = (row[rest] for row in candidate.rows(sets[candidate.set]))
    beside = {}
    for other, rows in others.items():
        other_loss, other_score = (row[rest] for row in rows)
        beside[other] = Beside(
            float(other_loss.mean()),
            float(other_score.mean()),
            float((loss - other_loss).mean()),
            standard_error(loss - other_loss),
            float((score - other_score).mean()),
            standard_error(score - other_score),
        )
    return Choice(
        candidate.set,
        candidate.members,
        text="",
        num_passes=candidate.price,
        loss=float(loss.mean()),
        score=float(score.mean()),
        num_items=int(rest.sum()),
        kind="",
        beside=beside,
    )
