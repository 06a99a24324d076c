import pytest
import torch
from torch import nn

from pdiff_plugin import WeightSet, best_member, greedy_soup, uniform_soup
from pdiff_plugin.ensemble.soup import keep_above
from pdiff_plugin.errors import ConfigError, LayoutMismatchError


@pytest.fixture
def model():
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 7.0)
    return model


def at(*values):
    """Members whose only weight has these values."""
    return WeightSet({"weight": torch.tensor(values).reshape(-1, 1, 1)})


def near(target):
    """A score that is best when the weight is ``target``."""
    return lambda model: -abs(model.weight.item() - target)


def test_a_uniform_soup_is_the_mean_in_the_members_own_dtype():
    soup = uniform_soup({"a": torch.tensor([[60000.0], [60000.0]], dtype=torch.float16), "b": torch.tensor([1.0, 2.0])})

    assert soup["a"].dtype == torch.float16
    assert soup["a"].tolist() == [60000.0]  # the sum of two overflows float16
    assert soup["b"].item() == 1.5


def test_a_greedy_soup_takes_what_does_not_make_it_worse(model):
    # 0.9 is nearest to 1; with 1.2 the mean is 1.05; with 3.0 it would be 1.7; 0.7 brings it to 0.933, worse than 1.05.
    soup = greedy_soup(model, at(3.0, 1.2, 0.9, 0.7), near(1.0))

    assert soup.ingredients == (2, 1)
    assert soup.state["weight"].item() == pytest.approx(1.05)
    assert soup.score == pytest.approx(-0.05)
    assert soup.member_scores == pytest.approx((-2.0, -0.2, -0.1, -0.3))
    assert model.weight.item() == 7.0


def test_members_that_change_nothing_join_a_greedy_soup(model):
    soup = greedy_soup(model, at(1.0, 2.0, 3.0), lambda model: 0.5)

    assert soup.ingredients == (0, 1, 2)


def test_a_greedy_soup_of_members_far_apart_is_the_best_member(model):
    soup = greedy_soup(model, at(-50.0, 1.0, 90.0), near(0.0))

    assert soup.ingredients == (1,)
    assert soup.score == -1.0


def test_the_best_member_is_the_first_of_equals_and_owns_its_tensors(model):
    weights = at(3.0, 1.5, 0.5)

    best = best_member(model, weights, near(1.0))
    weights["weight"].zero_()

    assert (best.index, best.score, best.member_scores) == (1, -0.5, (-2.0, -0.5, -0.5))
    assert best.state["weight"].item() == 1.5
    assert model.weight.item() == 7.0


def test_a_gate_drops_members_below_the_threshold_and_those_without_a_score(model):
    def score(model):
        return float("nan") if model.weight.item() < 0 else model.weight.item()

    kept = keep_above(model, at(0.5, 0.1, -1.0, 0.9), score, 0.5)

    assert kept.indices == (0, 3)
    assert kept.num_dropped == 2
    assert kept.weights["weight"].flatten().tolist() == pytest.approx([0.5, 0.9])


def test_a_gate_that_nobody_passes_names_the_best_score(model):
    with pytest.raises(ConfigError) as error:
        keep_above(model, at(0.25, 0.5), lambda model: model.weight.item(), 0.75)

    assert str(error.value) == "threshold = 0.75: it must be reached by a member; the best of 2 scored 0.5."


def test_the_model_comes_back_when_the_score_fails(model):
    def score(model):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        greedy_soup(model, at(1.0, 2.0), score)

    assert model.weight.item() == 7.0


def test_members_of_another_model_are_refused(model):
    with pytest.raises(LayoutMismatchError, match="tensor 'scale'"):
        best_member(model, {"scale": torch.zeros(2, 1)}, near(0.0))


def test_no_members_are_refused(model):
    with pytest.raises(ConfigError, match="at least one member"):
        best_member(model, {}, near(0.0))
