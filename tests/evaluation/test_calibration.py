"""How often the verdict is wrong, on sets no better and on gains of known size; `pytest -m slow -s` shows it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pdiff_plugin.config import EvaluateConfig
from pdiff_plugin.evaluation.baselines import BASELINES, GENERATED, SNAPSHOTS
from pdiff_plugin.evaluation.classification import CLASSIFICATION
from pdiff_plugin.evaluation.evaluate import _differences, _judge, _reference_distance
from pdiff_plugin.evaluation.kind import Scores
from pdiff_plugin.evaluation.set_run import PlannedSet, SetRun, of_each_run
from pdiff_plugin.evaluation.verdict import Differences, Nearness, ScoredSet, judge

from .test_known_truths import LINE, NOISY, Place

pytestmark = pytest.mark.slow
NUM_MEMBERS = 16
STORES = {"one noisy run": (NOISY, 1, 40), "one run on a line": (LINE, 1, 40), "four noisy runs": (NOISY, 4, 20)}
MOST_FALSE = 0.025


@pytest.mark.parametrize("name", STORES)
def test_cheap_sets_as_generated_are_neither_worth_it_nor_copies(name: str, tmp_path: Path) -> None:
    recipe, num_runs, num_draws = STORES[name]
    place = Place.make(tmp_path / "store", recipe, num_runs, 100 if num_runs == 1 else 60)
    config, rows = EvaluateConfig(num_members=NUM_MEMBERS), place.rows
    run = SetRun(place.task, rows, config)
    sets = {key: one for key, one in BASELINES.items() if num_runs > 1 or not one.needs_runs}
    fixed = {key for key, one in sets.items() if not one.is_random}
    drawn = [
        dataclasses.replace(PlannedSet.of(key, one, rows, config), name=f"{key}/{number}")
        for key, one in sets.items()
        for number in range(1 if key in fixed else num_draws)
    ]
    within = of_each_run(rows, config) if num_runs > 1 else []
    found = run.run([*drawn, *within])
    differences = _differences(run, [found[plan.name] for plan in within] or [found[f"{SNAPSHOTS}/0"]])
    reference_distance = _reference_distance(rows, config)
    total: Counter[str] = Counter()
    for kind in (key for key, one in sets.items() if one.is_cheap_alternative):
        counts: Counter[str] = Counter()
        for number in range(num_draws):
            # The generated set is another draw than the baselines, which are all of one number.
            of = {key: found[f"{key}/{0 if key in fixed else number}"] for key in sets}
            of[GENERATED] = found[f"{kind}/{(number + 1) % num_draws}"]
            counts[_judge(run, of, reference_distance, differences)[0].outcome] += 1
        print(f"\n{name}, {kind} as generated: {dict(counts)}", end="")
        total += counts
    print(f"\n{name}: {dict(total)} of {total.total()}")
    assert total["worth it"] <= MOST_FALSE * total.total()
    assert total["copies the snapshots"] <= MOST_FALSE * total.total()


def _ensemble(member_nll: Tensor, is_random: bool) -> ScoredSet:
    """A set of members of these NLLs, (M, n), that are right throughout and wrong on the first 50 items."""
    m, n = member_nll.shape
    is_right = torch.arange(n) >= 50
    scores = Scores(
        member_loss=member_nll,
        member_score=is_right.expand(m, n),
        sizes=(m,),
        loss=math.log(m) - (-member_nll).logsumexp(dim=0, keepdim=True),
        score=is_right[None],
        half_difference=torch.zeros(1, n, dtype=torch.int8),
        uncertainty=torch.zeros(n),
        more={},
        forward_passes=1.0,
        seconds=0.0,
    )
    return ScoredSet(CLASSIFICATION, "a set", [scores], is_random)


def _nll(margin: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-margin)


@pytest.mark.parametrize("by", ["items", "draws"])
@pytest.mark.parametrize("num_errors", [0.0, 1.0, 2.0, 3.0, 4.0])
def test_a_true_gain_is_found_as_often_as_its_standard_error_promises(by: str, num_errors: float) -> None:
    rng = torch.Generator().manual_seed(int(num_errors))
    m, n, num_trials = 16, 400, 400
    # Errors of the difference that come from the items, or from the members that were drawn.
    of_items, of_members = (1.0, 0.0) if by == "items" else (0.02, 1.0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def pair(*leads: float) -> list[ScoredSet]:
        """A set with each of these advantages over one without, and that one."""
        shared = 0.5 + normal(1, n)
        own, others = (of_items * normal(1, n) + of_members * normal(m, 1) for _ in range(2))
        margins = [*(shared + lead + own for lead in leads), shared + others]
        return [_ensemble(_nll(margin), is_random=by == "draws") for margin in margins]

    def mean_gains(*leads: float) -> Tensor:
        """Of each advantage, in every trial, (number of trials, number of leads)."""
        trials = (pair(*leads) for _ in range(num_trials))
        return torch.stack([torch.stack([(sets[-1].loss - one.loss).mean() for one in sets[:-1]]) for sets in trials])

    none, some = mean_gains(0.0, 0.1).T
    # The gain is next to linear in so small an advantage.
    advantage = num_errors * float(none.std()) / (float((some - none).mean()) / 0.1)
    nearness, apart = Nearness(1.0, 1.0, 1.0, 0.5, 0.5, 0.5), Differences(CLASSIFICATION, 1, 0.1, 0.5, 0.005, 0.5, None)
    outcomes: Counter[str] = Counter()
    for _ in range(num_trials):
        mine, other = pair(advantage)
        outcomes[judge(mine, {"other": other}, nearness, apart)[0].outcome] += 1
    promised = 0.5 * (1 + math.erf((num_errors - 2) / math.sqrt(2)))
    rate = outcomes["worth it"] / num_trials
    print(
        f"\n{by}, a gain of {num_errors:.0f} standard errors: {dict(outcomes)}; "
        f"promised {promised:.1%}, found {rate:.1%}"
    )
    # Three standard errors of the rate, and of the spread over trials (3.5 %) that the advantage was made from.
    density = math.exp(-((num_errors - 2) ** 2) / 2) / math.sqrt(2 * math.pi)
    tolerance = 3 * math.hypot(math.sqrt(promised * (1 - promised) / num_trials), density * 0.035 * num_errors)
    assert rate == pytest.approx(promised, abs=tolerance + 0.01)
