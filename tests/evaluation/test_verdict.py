from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from pdiff_plugin.evaluation.baselines import neighbours, runs_in_turn
from pdiff_plugin.evaluation.classification import CLASSIFICATION, nll_without_each
from pdiff_plugin.evaluation.kind import Scores
from pdiff_plugin.evaluation.scores import score_sets
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.evaluation.temperature import TEMPERATURES
from pdiff_plugin.evaluation.verdict import (
    Differences,
    Nearness,
    ScoredSet,
    Verdict,
    compare,
    half_mask,
    jackknife_error,
    judge,
)
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.movement import Movement

N = 2000


def scored(text: str, nll: Tensor, error_rate: float = 0.2, num_members: int = 4) -> ScoredSet:
    """A set of equal members with this ensemble NLL, wrong on the first items."""
    correct = torch.arange(N) >= error_rate * N
    scores = Scores(
        member_score=correct.expand(num_members, N),
        member_loss=nll.expand(num_members, N),
        sizes=(num_members,),
        loss=nll[None],
        score=correct[None],
        half_difference=torch.zeros(1, N, dtype=torch.int8),
        uncertainty=torch.zeros(N),
        more={},
        forward_passes=1.0,
        seconds=0.0,
    )
    return ScoredSet(CLASSIFICATION, text, [scores])


def nll(mean: float, noise: float = 0.0, seed: int = 0) -> Tensor:
    """Per-item NLLs that share most of their variation between sets, as those of one model family do."""
    shared = torch.randn(N, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    own = torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean + 0.1 * (shared - shared.mean()) + noise * (own - own.mean())


def differences(*, gain: float = 0.1, likeness: float = 0.8, line_share: float = 0.7, num_runs: int = 1) -> Differences:
    """Between snapshots whose ensemble has an NLL of 0.5."""
    return Differences(CLASSIFICATION, num_runs, gain, 0.5, 0.005, likeness, Movement(2.0, line_share, 0.1))


def verdict(
    generated: ScoredSet,
    *others: ScoredSet,
    distance: float = 1.0,
    cheap_distance: float = math.inf,
    overlap: float = 0.9,
    reference_overlap: float = 0.8,
    cheap_overlap: float = -math.inf,
    snapshots: Differences | None = None,
) -> Verdict:
    found, _ = judge(
        generated,
        {f"other-{i}": other for i, other in enumerate(others)},
        Nearness(distance, 1.0, cheap_distance, overlap, reference_overlap, cheap_overlap),
        snapshots or differences(),
    )
    return found


def test_better_than_every_baseline_is_worth_it() -> None:
    found = verdict(scored("generated", nll(0.50)), scored("averages", nll(0.55)), scored("SWAG", nll(0.52)))
    assert found.outcome == "worth it"
    assert "ensemble NLL 0.5000 against 0.5200 with SWAG (difference -0.0200 ± " in found.sentence
    assert list(found.numbers.values()) == pytest.approx([0.50, 0.52])


def test_one_baseline_as_good_is_enough_to_be_no_better() -> None:
    found = verdict(scored("generated", nll(0.50)), scored("averages", nll(0.55)), scored("SWAG", nll(0.50)))
    assert found.outcome == "no better than averaging"
    assert "with SWAG" in found.sentence


def test_a_sure_but_tiny_gain_does_not_count() -> None:
    found = verdict(scored("generated", nll(0.499)), scored("averages", nll(0.50)))
    assert found.outcome == "no better than averaging"


def test_a_difference_within_its_error_is_too_few_data() -> None:
    found = verdict(scored("generated", nll(0.49, noise=1.0, seed=1)), scored("averages", nll(0.50)))
    assert found.outcome == "too few data to tell"
    assert found.sentence.endswith("a gain of 0.0050 would count. Evaluate on more data.")


def test_members_that_vary_from_draw_to_draw_call_for_more_of_them() -> None:
    drawn = [scored("generated", nll(mean)).draws[0] for mean in (0.40, 0.58)]
    found = verdict(ScoredSet(CLASSIFICATION, "generated", drawn), scored("averages", nll(0.50)))
    assert found.outcome == "too few data to tell"
    assert found.sentence.endswith("Take more members, or several draws.")


def test_a_gain_in_nll_that_costs_accuracy_is_not_worth_it() -> None:
    found = verdict(scored("generated", nll(0.40), error_rate=0.25), scored("averages", nll(0.50)))
    assert found.outcome == "no better than averaging"
    assert "accuracy is -5.00 ± 0.49 points from that with averages" in found.sentence


def test_members_close_to_a_snapshot_are_copies_however_good() -> None:
    found = verdict(scored("generated", nll(0.1)), scored("averages", nll(0.5)), distance=0.49)
    assert found.outcome == "copies the snapshots"
    assert found.numbers == {"nearest_snapshot_distance": 0.49, "snapshots_nearest_distance": 1.0}


def test_members_with_a_snapshots_errors_are_copies() -> None:
    found = verdict(scored("generated", nll(0.1)), scored("averages", nll(0.5)), overlap=0.995)
    assert found.outcome == "copies the snapshots"
    assert "99.5% are the same" in found.sentence


def test_members_are_no_copies_where_all_snapshots_make_the_same_errors() -> None:
    sets = scored("generated", nll(0.1)), scored("averages", nll(0.5))
    found = verdict(*sets, overlap=0.995, reference_overlap=0.992)
    assert found.outcome == "worth it"
    assert found.sentence.endswith(
        "share 99.5% of their errors with the closest snapshot, but the snapshots themselves share 99.2%: "
        "that tells nothing of copies."
    )
    assert "share" not in verdict(*sets, overlap=0.98, reference_overlap=0.97).sentence
    assert verdict(*sets, overlap=1.0, reference_overlap=1.0).outcome == "copies the snapshots"


def test_nobody_copied_where_cheap_sets_lie_as_near_or_err_as_alike() -> None:
    sets = scored("generated", nll(0.5)), scored("averages", nll(0.5))
    assert verdict(*sets, distance=0.1, cheap_distance=0.15).outcome == "no better than averaging"
    assert verdict(*sets, distance=0.1, cheap_distance=0.25).outcome == "copies the snapshots"
    for reference_overlap in (0.8, 0.999):
        found = verdict(*sets, overlap=1.0, reference_overlap=reference_overlap, cheap_overlap=0.9997)
        assert found.outcome == "no better than averaging"
        assert "tells nothing of copies" in found.sentence
    assert verdict(*sets, overlap=0.993, cheap_overlap=0.988).outcome == "no better than averaging"
    assert verdict(*sets, overlap=0.995, cheap_overlap=0.988).outcome == "copies the snapshots"


def test_snapshots_that_hardly_differ_are_the_reason_and_the_sentence_says_what_to_do() -> None:
    alike = differences(gain=0.004, likeness=0.985, line_share=0.997)
    found = verdict(scored("generated", nll(0.5)), scored("averages", nll(0.5)), snapshots=alike)
    assert found.outcome == "snapshots hardly differ"
    assert "their ensemble gains 0.0040 NLL on a single one (from 0.0050 on it would count)" in found.sentence
    assert "99.7% of the movement within a run lies along one line" in found.sentence
    assert "with a higher or a cyclic learning rate, by collect() with a high rate, or in several" in found.sentence
    several = dataclasses.replace(alike, num_runs=4)
    found = verdict(scored("generated", nll(0.5)), scored("averages", nll(0.5)), snapshots=several)
    assert "within each of the 4 runs" in found.sentence
    assert found.sentence.endswith("The runs do differ: the last snapshot of each is an ensemble.")


@pytest.mark.parametrize(
    ("changes", "are_small"),
    [
        ({"gain": 0.0049, "likeness": 0.98}, True),
        ({"gain": 0.0051, "likeness": 0.98}, False),
        ({"gain": 0.0049, "likeness": 0.97}, False),
        ({"gain": 0.0049, "likeness": 0.97, "line_share": 0.98}, True),
        ({"gain": 0.0051, "likeness": 0.99, "line_share": 0.999}, False),
        ({"gain": math.nan, "likeness": 0.99, "line_share": 0.999}, False),
    ],
)
def test_snapshots_hardly_differ_where_their_ensemble_gains_nothing(changes: dict[str, float], are_small: bool) -> None:
    assert differences(**changes).are_small == are_small  # type: ignore[arg-type]


def test_snapshots_that_hardly_differ_hide_no_other_outcome() -> None:
    alike = differences(gain=0.001, likeness=0.99, line_share=0.999)
    averages = scored("averages", nll(0.5))
    assert verdict(scored("generated", nll(0.4)), averages, snapshots=alike).outcome == "worth it"
    assert verdict(scored("generated", nll(0.5)), averages, distance=0.1, snapshots=alike).outcome == (
        "copies the snapshots"
    )
    few = scored("generated", nll(0.5), error_rate=0.004)
    assert verdict(few, averages, snapshots=alike).outcome == "too few data to tell"
    unsure = scored("generated", nll(0.49, noise=1.0, seed=1))
    assert verdict(unsure, averages, snapshots=alike).outcome == "too few data to tell"
    assert verdict(scored("generated", nll(0.6)), averages, snapshots=alike).outcome == "no better than averaging"


def test_too_few_errors_tell_nothing() -> None:
    found = verdict(scored("generated", nll(0.1), error_rate=0.004), scored("averages", nll(0.5)), overlap=1.0)
    assert found.outcome == "too few data to tell"
    assert "8.0 errors on 2000 items" in found.sentence


def test_the_jackknife_knows_the_spread_of_an_ensemble_over_its_draws() -> None:
    rng = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return 1 + torch.randn(16, 1, generator=rng, dtype=torch.float64) * 0.3 + torch.zeros(16, 50)

    def ensemble_nll(member_nll: Tensor) -> Tensor:
        return (math.log(16) - (-member_nll).logsumexp(0)).mean()

    spread = torch.stack([ensemble_nll(draw()) for _ in range(400)]).std()
    estimates = torch.tensor([jackknife_error(nll_without_each(draw())) for _ in range(200)])
    assert float(estimates.mean()) == pytest.approx(float(spread), rel=0.1)


@pytest.mark.parametrize(
    "stratum",
    [torch.zeros(32, dtype=torch.int64)]
    + [runs_in_turn(*counts) for counts in ((32, 2), (32, 8), (32, 16), (16, 8))]
    + [neighbours(32), neighbours(9)],
)
def test_the_jackknife_knows_the_spread_of_members_of_several_kinds(stratum: Tensor) -> None:
    rng = torch.Generator().manual_seed(0)
    num_members = len(stratum)
    centre = 0.5 * torch.randn(int(stratum.max()) + 1, 50, generator=rng, dtype=torch.float64)
    nlls, squares = [], []
    for _ in range(400):
        shift = 0.5 * torch.randn(num_members, 1, generator=rng, dtype=torch.float64)
        member_nll = -(1.5 + centre[stratum] + shift).sigmoid().log()
        nlls.append(float((math.log(num_members) - (-member_nll).logsumexp(0)).mean()))
        squares.append(jackknife_error(nll_without_each(member_nll), stratum) ** 2)
    error = math.sqrt(sum(squares) / len(squares))
    assert error == pytest.approx(float(torch.tensor(nlls).std()), rel=0.15)


def test_as_many_runs_as_members_do_not_make_the_spread_known() -> None:
    member_nll = torch.tensor([[1.0], [2.0], [3.0]] * 4, dtype=torch.float64)
    for num_runs in (12, 7):
        assert jackknife_error(nll_without_each(member_nll), runs_in_turn(12, num_runs)) == pytest.approx(
            jackknife_error(nll_without_each(member_nll))
        )


def test_the_error_of_a_single_random_member_is_unknown() -> None:
    found = verdict(scored("generated", nll(0.1), num_members=1), scored("averages", nll(0.5)))
    assert found.outcome == "too few data to tell"
    assert found.sentence.endswith("Take more members, or several draws.")


def test_two_draws_that_are_alike_by_chance_do_not_make_a_difference_sure() -> None:
    rng = torch.Generator().manual_seed(0)

    def draw() -> Scores:
        shift = 0.3 * torch.randn(8, 1, generator=rng, dtype=torch.float64)
        member_nll = -(1.5 + shift).sigmoid().log().expand(8, 50)
        ensemble = math.log(8) - (-member_nll).logsumexp(0)
        return dataclasses.replace(scored("", ensemble[:1].expand(N)).draws[0], member_loss=member_nll)

    pairs = [[ScoredSet(CLASSIFICATION, "", [draw(), draw()]) for _ in range(2)] for _ in range(400)]
    sure = [abs(c.loss) > 2 * c.loss_error for c in (compare("", *pair) for pair in pairs)]
    assert sum(sure) / len(sure) < 0.07  # 5 % of equal sets differ by more than two standard errors


@pytest.mark.parametrize(
    ("num_members", "common", "own"), [(8, 1.0, 0.0), (8, 0.3, 1.0), (9, 1.0, 1.0), (24, 1.0, 0.3)]
)
def test_the_error_of_accuracy_knows_its_spread_over_draws(num_members: int, common: float, own: float) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(600, 12, generator=rng)
    truth, direction = (torch.randn(10, 12, generator=rng) for _ in range(2))
    y = (x @ truth.T + 2 * torch.randn(600, 10, generator=rng)).argmax(1)

    def members() -> WeightSet:
        shift = common * torch.randn(num_members, 1, 1, generator=rng) * direction
        return WeightSet({"weight": truth + shift + own * torch.randn(num_members, 10, 12, generator=rng)})

    task = Task(nn.Linear(12, 10, bias=False), [(x, y)])
    scores, _ = score_sets(task, {str(draw): members() for draw in range(80)})
    drawn = [ScoredSet(CLASSIFICATION, "", [found]) for found in scores.values()]
    spread = float(torch.stack([c.score.mean() for c in drawn]).std())
    error = math.sqrt(sum(c.score_draw_error**2 for c in drawn) / len(drawn))
    assert 0.75 < error / spread < 1.35
    pairs = [compare("", *pair) for pair in zip(drawn[::2], drawn[1::2], strict=True)]
    in_errors = torch.tensor([c.score / c.score_error for c in pairs])
    # Above one by the few members that the error comes from, below by what the error over items has seen already.
    assert 0.5 < float(in_errors.square().mean().sqrt()) < 1.3


def test_runs_taken_in_turn_do_not_count_as_spread() -> None:
    member_nll = torch.tensor([[1.0], [2.0]] * 4, dtype=torch.float64)  # two runs, equal members within each
    assert jackknife_error(nll_without_each(member_nll), runs_in_turn(8, 2)) == pytest.approx(0.0, abs=1e-12)
    assert jackknife_error(nll_without_each(member_nll)) > 0.1


def test_neighbouring_snapshots_stand_for_draws_from_one() -> None:
    assert neighbours(5).tolist() == [0, 0, 1, 1, 1]
    member_nll = torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=torch.float64)[:, None]
    assert jackknife_error(nll_without_each(member_nll), neighbours(4)) == pytest.approx(0.0, abs=1e-12)


def test_several_draws_give_their_own_error() -> None:
    draws = [scored("generated", nll(mean)).draws[0] for mean in (0.4, 0.5, 0.6)]
    assert ScoredSet(CLASSIFICATION, "generated", draws).draw_error == pytest.approx(0.1 / 3**0.5)
    assert ScoredSet(CLASSIFICATION, "generated", draws, is_random=False).draw_error == 0.0


def test_half_mask_is_half_and_seeded() -> None:
    assert int(half_mask(101, 0).sum()) == 50
    assert torch.equal(half_mask(101, 0), half_mask(101, 0))
    assert not torch.equal(half_mask(101, 0), half_mask(101, 1))


def with_temperatures(found: ScoredSet, *, plain: Tensor, scaled: Tensor) -> ScoredSet:
    """The same with these losses (n,) at all temperatures but the third, and those at the third."""
    losses = plain.expand(len(TEMPERATURES), N).clone()
    losses[3] = scaled
    draws = [dataclasses.replace(scores, more={"loss_at": losses}) for scores in found.draws]
    return dataclasses.replace(found, draws=draws, first_half=half_mask(N, 0))


def test_a_gain_that_a_temperature_gives_as_well_is_no_gain() -> None:
    """Overconfident snapshots: generated members are better as they are, and no better once all are scaled."""
    generated = with_temperatures(scored("generated", nll(0.5)), plain=nll(0.5), scaled=nll(0.45))
    average = with_temperatures(scored("the average", nll(0.6)), plain=nll(0.6), scaled=nll(0.45))
    found = verdict(generated, average)
    assert found.outcome == "no better than averaging"
    assert found.sentence == (
        "No better than averaging once all are temperature-scaled: ensemble NLL 0.4500 against 0.4500 with the average "
        "(difference +0.0000 ± 0.0000). Without scaling: ensemble NLL 0.5000 against 0.6000 with the average "
        "(difference -0.1000 ± 0.0000)."
    )


def test_a_gain_that_outlasts_a_temperature_is_told_as_such() -> None:
    generated = with_temperatures(scored("generated", nll(0.5)), plain=nll(0.5), scaled=nll(0.45))
    average = with_temperatures(scored("the average", nll(0.6)), plain=nll(0.6), scaled=nll(0.55))
    found = verdict(generated, average)
    assert found.outcome == "worth it"
    assert found.sentence.endswith("So it is once all are temperature-scaled.")
