"""Paired differences over conditions, the fair best of several rows, recovery, and which conditions are judged."""

from __future__ import annotations

import math

import pytest
import torch

from pdiff_plugin.errors import ConditionError, ConfigError
from pdiff_plugin.evaluation.classification import CLASSIFICATION
from pdiff_plugin.evaluation.condition_places import HELD_OUT, Place, places_of, runs_to_judge, spread_over_range
from pdiff_plugin.evaluation.condition_rows import partners, spec_of
from pdiff_plugin.evaluation.condition_statistics import (
    Series,
    best_by_others,
    difference,
    num_errors,
    recovered,
    sign_test,
)
from pdiff_plugin.evaluation.condition_verdict import judge_conditions
from pdiff_plugin.generator.variables import Variables


def series(*loss: float, score: float = 0.5) -> Series:
    return Series(torch.tensor(loss, dtype=torch.float64), torch.full((len(loss),), score, dtype=torch.float64))


def test_differences_are_paired_over_conditions() -> None:
    found = difference(CLASSIFICATION, "b", series(1.0, 2.0, 3.0), series(1.1, 2.3, 3.2))
    assert found.loss == pytest.approx(-0.2)
    assert found.loss_error == pytest.approx(0.1 / math.sqrt(3))
    assert (found.num_better, found.num_conditions) == (3, 3)
    assert found.needed == pytest.approx(0.022)  # 1 % of 2.2


def test_conditions_without_a_row_are_left_out_of_its_differences() -> None:
    found = difference(CLASSIFICATION, "b", series(1.0, 2.0, 3.0), series(2.0, math.nan, 4.0))
    assert found.num_conditions == 2
    assert found.loss == pytest.approx(-1.0)


def test_few_conditions_need_more_standard_errors() -> None:
    assert num_errors(1) == math.inf
    assert num_errors(3) == pytest.approx(4.30)
    assert num_errors(16) == pytest.approx(2.13, abs=0.01)
    assert num_errors(1000) == 2.0


def test_the_sign_test_is_two_sided() -> None:
    assert sign_test(8, 0) == pytest.approx(2 / 2**8)
    assert sign_test(4, 4) == 1.0
    assert sign_test(0, 0) == 1.0


def test_the_best_row_of_a_condition_is_chosen_by_the_others() -> None:
    # b is best at the first condition alone; on it, a is chosen.
    fair, chosen = best_by_others({"a": series(1.0, 1.0, 1.0), "b": series(0.0, 1.4, 1.4)})
    assert chosen == ["a", "b", "b"]
    assert fair.loss.tolist() == [1.0, 1.4, 1.4]


def test_recovery_is_a_ratio_of_means() -> None:
    found = recovered(series(1.5, 2.5), average=series(2.0, 3.0), trained=series(1.0, 2.0))
    assert found.loss == pytest.approx(0.5)
    assert found.loss_error == pytest.approx(0.0)


def rows_of(**given: list[float]) -> dict[str, Series]:
    names = {"average": "average of all", "ceiling": "span ceiling"}
    return {names.get(name, name): series(*loss) for name, loss in given.items()}


def test_what_cannot_be_told_apart_says_so_with_difference_and_error() -> None:
    wobble = [0.3, -0.3, 0.2, -0.2, 0.25, -0.3]
    found = judge_conditions(
        CLASSIFICATION,
        rows_of(
            trained=[1.0] * 6,
            generated=[1.0 + w for w in wobble],
            average=[2.0] * 6,
            ridge=[1.02] * 6,
            ceiling=[1.0] * 6,
            shuffled=[3.0] * 6,
        ),
    )
    assert found.outcome == "not told apart"
    assert found.sentence.startswith("Not told apart from ridge regression: generated minus it, NLL -0.0283 ± 0.1")
    assert found.best_cheap == "ridge"


@pytest.mark.parametrize(("generated", "outcome"), [(1.2, "worth it"), (1.49, "train there"), (1.6, "nothing to gain")])
def test_a_projection_that_is_no_better_than_a_cheap_row_is_no_bound_for_members_that_are(
    generated: float, outcome: str
) -> None:
    wobble = torch.tensor([0.001, -0.001] * 4)
    rows = rows_of(
        trained=[1.0] * 8,
        generated=(generated + wobble).tolist(),
        average=[2.0] * 8,
        ridge=[1.5] * 8,
        ceiling=[1.6] * 8,
        shuffled=[3.0] * 8,
    )
    assert judge_conditions(CLASSIFICATION, rows).outcome == outcome


def test_a_few_steps_of_training_that_do_as_well_are_told() -> None:
    rows = rows_of(
        trained=[1.0, 1.1, 1.0, 1.1],
        generated=[1.01, 1.1, 1.0, 1.11],
        average=[2.0, 2.2, 2.1, 2.1],
        ceiling=[1.0, 1.1, 1.0, 1.1],
        shuffled=[3.0, 3.1, 3.0, 3.1],
    )
    rows["average + 10 steps"] = series(0.9, 1.0, 0.9, 1.0)
    found = judge_conditions(CLASSIFICATION, rows)
    assert found.outcome == "worth it"
    told = "With labels there, 10 steps of training from the average of all conditions is better (generated minus it"
    assert told in found.sentence


def conditions_of(num: int) -> dict[str, dict[str, float]]:
    return {f"run-{number:02d}": {"c": float(number)} for number in range(num)}


def test_a_quarter_spread_over_the_range_is_judged_where_nothing_was_held_out() -> None:
    conditions = conditions_of(24)
    variables = Variables.infer(list(conditions.values()))
    runs, is_refit = runs_to_judge(conditions, list(conditions), [HELD_OUT], variables, seed=0)
    assert is_refit
    assert len(runs) == 6
    gaps = torch.tensor([conditions[run]["c"] for run in runs]).diff()
    assert gaps.max() <= 6
    assert runs == spread_over_range(conditions, variables, 0)
    assert runs != spread_over_range(conditions, variables, 1)


def test_no_category_loses_all_of_its_runs() -> None:
    conditions = {f"run-{number}": {"style": "abcdefgh"[number // 2], "c": number} for number in range(16)}
    variables = Variables.infer(list(conditions.values()))
    for seed in range(20):
        chosen = spread_over_range(conditions, variables, seed)
        assert {conditions[run]["style"] for run in conditions if run not in chosen} == set("abcdefgh")


def test_what_was_held_out_is_judged_without_another_fit() -> None:
    conditions = conditions_of(8)
    variables = Variables.infer(list(conditions.values()))
    fitted = list(conditions)[:5]
    assert runs_to_judge(conditions, fitted, [HELD_OUT], variables, 0) == (list(conditions)[5:], False)
    assert runs_to_judge(conditions, fitted, ["c=6"], variables, 0) == (["run-06"], False)
    assert runs_to_judge(conditions, fitted, ["c=1", "run-06"], variables, 0) == (["run-01", "run-06"], True)


def test_runs_of_a_judged_condition_are_all_held_out() -> None:
    conditions = {**conditions_of(8), "twin": {"c": 2.0}}
    variables = Variables.infer(list(conditions.values()))
    assert runs_to_judge(conditions, list(conditions), ["run-02"], variables, 0) == (["run-02", "twin"], True)


def test_too_few_conditions_to_hold_some_out_are_refused() -> None:
    conditions = conditions_of(6)
    variables = Variables.infer(list(conditions.values()))
    with pytest.raises(ConditionError, match="6 different conditions, expected at least 7 to judge at"):
        runs_to_judge(conditions, list(conditions), [HELD_OUT], variables, 0)


def test_conditions_that_cannot_be_judged_are_left_out_and_told() -> None:
    conditions = {f"run-{style}{number}": {"style": style, "c": number} for style in "ab" for number in range(3)}
    fitted = ["run-a0", "run-a2"]
    variables = Variables.infer([conditions[run] for run in fitted])
    twins = {**conditions, "twin": conditions["run-a0"]}
    places, notes = places_of(twins, ["run-a1", "run-b0", "twin"], fitted, variables)
    assert [place.runs for place in places] == [("run-a1",)]
    assert notes == [
        "run-b0: left out, the generator cannot be asked for style = 'b'.",
        "twin: left out, other runs of the same condition were fitted.",
    ]
    with pytest.raises(ConfigError, match=r"must be some that can be judged\. twin: left out"):
        places_of(twins, ["twin"], fitted, variables)


def test_every_place_gets_another_ones_condition_inside_and_outside_apart() -> None:
    places = [Place({"c": number}, (f"run-{number}",), ("beyond",) if number > 4 else ()) for number in range(9)]
    found = partners(places, 0)
    assert sorted(found[:5]) == [0, 1, 2, 3, 4]  # type: ignore[type-var]
    assert sorted(found[5:]) == [5, 6, 7, 8]  # type: ignore[type-var]
    assert all(number != partner for number, partner in enumerate(found))
    assert partners(places[:1], 0) == [None]


def test_rows_of_a_user_may_have_any_name() -> None:
    assert spec_of("mine + yours").text == "mine + yours"
    assert spec_of("nearest + 10 steps").role == "tuned"
    assert spec_of("nearest + 10 steps back").role == "other"
