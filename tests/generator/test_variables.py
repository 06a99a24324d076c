"""Conditions as features: kinds, ranges, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from pdiff_plugin.errors import ConditionError, ConfigError
from pdiff_plugin.generator.variables import Variables

CONDITIONS = [
    {"angle": 360.0 * i / 8, "rate": 10.0 ** (-i), "style": "ink" if i % 2 else "oil", "user": [float(i), 1.0]}
    for i in range(8)
]


def test_numbers_and_vectors_are_standardised_and_text_becomes_one_feature_a_value() -> None:
    variables = Variables.infer(CONDITIONS)

    features = variables.encode(CONDITIONS)

    assert [v.kind for v in variables.variables] == ["number", "number", "category", "vector"]
    assert features.shape == (8, 1 + 1 + 2 + 2)
    assert torch.allclose(features[:, 0].mean(), torch.zeros(()), atol=1e-6)
    assert torch.allclose(features[:, 0].std(correction=0), torch.ones(()), atol=1e-6)
    assert features[0, 2:4].tolist() == [0.0, 1.0]
    assert features[:, 5].tolist() == [0.0] * 8  # never moved


def test_cyclic_values_come_round_and_logarithms_are_evenly_spaced() -> None:
    variables = Variables.infer(CONDITIONS, {"angle": "cyclic=360", "rate": "log"})

    one, round_again = variables.encode([CONDITIONS[1], {**CONDITIONS[1], "angle": 45.0 + 360.0}])
    rates = variables.encode(CONDITIONS)[:, 2]

    assert torch.allclose(one, round_again, atol=1e-5)
    assert torch.allclose(rates.diff(), rates.diff()[0].expand(7), atol=1e-5)


def test_variables_survive_the_way_through_json() -> None:
    variables = Variables.infer(CONDITIONS, {"angle": "cyclic=360"})
    assert Variables.from_json(json.loads(json.dumps(variables.to_json()))) == variables


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"angel": 1.0}, "unknown name 'angel'"),
        ({"style": "inc"}, "did you mean 'ink'"),
        ({"style": 3.0}, "one of ink, oil"),
        ({"angle": "east"}, "found text under 'angle', expected a number"),
        ({"user": [1.0]}, "expected a list of 2 numbers"),
    ],
)
def test_what_was_not_recorded_is_an_error_that_lists_what_there_is(change: dict[str, object], text: str) -> None:
    variables = Variables.infer(CONDITIONS)
    with pytest.raises(ConditionError) as caught:
        variables.encode([CONDITIONS[0] | change])  # type: ignore[dict-item]
    assert text in str(caught.value)


def test_a_missing_name_lists_the_names() -> None:
    with pytest.raises(ConditionError, match=r"nothing for 'angle'.*values for angle, rate, style, user"):
        Variables.infer(CONDITIONS).check({k: v for k, v in CONDITIONS[0].items() if k != "angle"})


def test_values_outside_the_recorded_range_are_told_in_words() -> None:
    variables = Variables.infer(CONDITIONS, {"rate": "log"})
    inside = CONDITIONS[3]

    assert variables.outside(inside) == []
    assert variables.outside(inside | {"angle": 400.0}) == ["angle = 400 lies outside the recorded 0 to 315"]
    assert variables.outside(inside | {"user": [9.0, 1.0]}) == ["user[0] = 9 lies outside the recorded 0 to 7"]


@pytest.mark.parametrize(
    ("kinds", "text"),
    [
        ({"angle": "cyclic"}, "must give the period"),
        ({"angle": "circle"}, "must be one of number, log, cyclic, category, vector"),
        ({"angle": "log"}, "needs numbers above 0, and 0 was recorded"),
        ({"style": "number"}, "cannot be the kind of text"),
        ({"size": "log"}, "must be one of angle, rate, style, user"),
    ],
)
def test_kinds_that_cannot_be_are_refused(kinds: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Variables.infer(CONDITIONS, kinds)
    assert text in str(caught.value)
