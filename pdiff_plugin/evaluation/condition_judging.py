"""Judge one condition after the other, here or, as each stands alone, anywhere.

Shapes: C judged conditions, M members.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pdiff_plugin.errors import ConfigError
from pdiff_plugin.evaluation.condition_findings import JudgedCondition, RowFigures
from pdiff_plugin.evaluation.condition_places import Place
from pdiff_plugin.evaluation.condition_rows import GENERATED, TRAINED, Made, RowMaker
from pdiff_plugin.evaluation.condition_task import MakeTask, task_at
from pdiff_plugin.evaluation.kind import Measured, Scores, ensemble_loss, ensemble_score
from pdiff_plugin.evaluation.scores import score_sets
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.modules.names import named_tensors
from pdiff_plugin.snapshots.conditions import describe_condition


@dataclass(frozen=True)
class Done:
    """A condition that was judged.

    Attributes:
        judged: what was found there.
        train_seconds: spent in the user's training function.
        train_steps: that these took.
    """

    judged: JudgedCondition
    train_seconds: float
    train_steps: int


@dataclass(frozen=True)
class Judging:
    """All that it takes to judge any of the conditions; may be pickled.

    Attributes:
        make_task: the user's function of the condition.
        maker: of the rows.
        kind_name: of the tasks, the same at all conditions.
    """

    make_task: MakeTask
    maker: RowMaker
    kind_name: str

    def __len__(self) -> int:
        return len(self.maker.places)

    def __call__(self, number: int, task: Task | None = None) -> Done:
        """Judge condition ``number``, whose ``task`` is made unless given.

        Raises:
            ConfigError: a task of another kind; a generator that answers with NaN or Inf.
        """
        maker, place = self.maker, self.maker.places[number]
        task = task or task_at(self.make_task, place.condition)
        if task.task_kind.name != self.kind_name:
            raise ConfigError("task", task.kind, f"must be of one kind at all conditions, and was {self.kind_name}")
        trainer = maker.trainer
        before = (trainer.seconds, trainer.steps) if trainer else (0.0, 0)
        judged = _judged(place, task, maker.rows(number, task), maker.config.seed)
        after = (trainer.seconds, trainer.steps) if trainer else (0.0, 0)
        return Done(judged, after[0] - before[0], after[1] - before[1])


# Told how many conditions are done, and which was the last.
OnDone = Callable[[int, str], None]


class JudgeAll(Protocol):
    """:func:`judge_here`, or something that does its work elsewhere."""

    def __call__(self, judging: Judging, first: Task, on_done: OnDone) -> list[Done]: ...


def judge_here(judging: Judging, first: Task, on_done: OnDone) -> list[Done]:
    """Judge all conditions in their order, in this process; ``first`` is the task at the first of them."""
    done = []
    for number, place in enumerate(judging.maker.places):
        done.append(judging(number, first if number == 0 else None))
        on_done(len(done), describe_condition(place.condition))
    return done


def _judged(place: Place, task: Task, rows: Iterable[tuple[str, Made]], seed: int) -> JudgedCondition:
    """Make and score all rows at one condition."""
    made: dict[tuple[str, int], float] = {}
    sets: dict[str, WeightSet] = {}
    scored: dict[str, Scores] = {}
    for name, one in rows:
        made[name, one.run] = one.seconds
        if one.weights is not None:
            sets[f"{name}/{one.run}"] = one.weights
        else:  # at once: a model for each row of a condition would not fit in memory together
            assert one.task is not None
            scored[f"{name}/{one.run}"] = _as_it_is(one.task, seed)
    scored |= score_sets(task, sets, seed=seed)[0]
    silent = scored[f"{GENERATED}/0"].is_silent
    if bool(silent.any()):
        found_at = f"{int(silent.sum())} of {len(silent)} members at {describe_condition(place.condition)}"
        raise ConfigError(
            "generator", found_at, "answers with NaN or Inf there: fit again, or judge at other conditions"
        )
    found: dict[str, list[RowFigures]] = {}
    for (name, run), seconds in made.items():
        found.setdefault(name, []).append(_figures(scored[f"{name}/{run}"], seconds))
    several = found[TRAINED]
    spread = None
    if len(several) > 1:
        spread = (statistics.stdev(one.loss for one in several), statistics.stdev(one.score for one in several))
    return JudgedCondition(
        place.condition, place.runs, place.outside, {name: _mean(own) for name, own in found.items()}, spread
    )


def _as_it_is(task: Task, seed: int) -> Scores:
    """Scores of a task's own model: an ensemble of one member that changes nothing."""
    tensors = {name: tensor for name, tensor in named_tensors(task.model).items() if tensor.is_floating_point()}
    if not tensors:
        raise ConfigError("extra", type(task.model).__name__, "must be a model with a parameter or a buffer")
    name, tensor = next(iter(tensors.items()))
    scored, _ = score_sets(task, {"own": WeightSet({name: tensor.detach().cpu()[None]})}, seed=seed)
    return scored["own"]


def _figures(scores: Scores, seconds: float) -> RowFigures:
    measured = Measured(scores)
    return RowFigures(
        loss=ensemble_loss(measured),
        score=ensemble_score(measured),
        member_loss=float(scores.member_loss.mean()),
        member_score=float(measured.member_scores.mean()),
        members=len(scores.member_loss),
        seconds=seconds,
    )


def _mean(rows: Sequence[RowFigures]) -> RowFigures:
    if len(rows) == 1:
        return rows[0]
    means = {
        key: statistics.fmean(getattr(row, key) for row in rows)
        for key in ("loss", "score", "member_loss", "member_score", "seconds")
    }
    return RowFigures(**means, members=rows[0].members)
