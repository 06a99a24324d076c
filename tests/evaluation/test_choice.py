"""The choice within a budget: known answers on constructed scores, and files that give back what was judged."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pdiff_plugin.config import DiffusionConfig, FitConfig
from pdiff_plugin.ensemble.ensemble import DiffusionEnsemble
from pdiff_plugin.errors import ConfigError, WeightsNotKeptError
from pdiff_plugin.evaluation.choice import Choice, best, cost_curves, frontier, group_scores, price, without_luck
from pdiff_plugin.evaluation.classification import CLASSIFICATION
from pdiff_plugin.evaluation.evaluate import evaluate
from pdiff_plugin.evaluation.kind import Scores, ensemble_sizes, joining_order
from pdiff_plugin.evaluation.result import Evaluation
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.evaluation.verdict import half_mask
from pdiff_plugin.fitting.fit import fit
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.store import SnapshotStore

NUM_ITEMS = 400
CHOOSES = half_mask(NUM_ITEMS, 0)


def scores_of(
    member_loss: Sequence[float] | Tensor, ensemble_loss: Sequence[float], passes: float | None = None
) -> Scores:
    """Scores whose items all have the same loss, unless rows of losses are given; the score is minus the loss."""
    members = torch.as_tensor(member_loss, dtype=torch.float64)
    members = members if members.ndim == 2 else members[:, None].expand(-1, NUM_ITEMS)
    sizes = ensemble_sizes(len(members))
    ensembles = torch.cat([members[joining_order(len(members), 0)[:1]], rows(*ensemble_loss)])
    assert len(ensembles) == len(sizes)
    nothing = torch.zeros(0, NUM_ITEMS)
    return Scores(members, -members, sizes, ensembles, -ensembles, nothing, nothing, {}, passes, 0.0)


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1).expand(-1, NUM_ITEMS)


def chosen(sets: Mapping[str, Scores]) -> list[Choice]:
    return frontier(CLASSIFICATION, sets, lambda name, members: f"{name} {list(members)}", seed=0)


def test_the_best_is_found_for_every_budget() -> None:
    sets = {
        "snapshots": scores_of([0.9, 0.8, 0.7, 0.8], [0.65, 0.4], passes=2.5),
        "swa": scores_of([0.6], []),
        "average": scores_of([0.7, 0.7, 0.7, 0.7], [0.5, 0.5], passes=4.0),
    }
    choices = chosen(sets)
    assert [(c.set, c.members, c.num_passes, c.loss) for c in choices if c.by == "loss"] == [
        ("swa", (0,), 1.0, pytest.approx(0.6)),
        ("average", tuple(sorted(joining_order(4, 0)[:2].tolist())), 2.0, pytest.approx(0.5)),
        ("snapshots", (0, 1, 2, 3), 2.5, pytest.approx(0.4)),
    ]
    assert [best(choices, budget).set for budget in (1, 1.99, 2, 2.4, 2.5, 8, 1e9)] == [
        *("swa", "swa", "average", "average", "snapshots", "snapshots", "snapshots")
    ]
    assert best(choices, 1).is_single
    assert best(choices, 2.5).text == "snapshots [0, 1, 2, 3]"


def test_a_single_member_of_any_set_may_be_the_best() -> None:
    sets = {"swa": scores_of([0.5], []), "gaussian": scores_of([2.0, 0.3, 2.0, 2.0], [1.9, 1.8], passes=4.0)}
    assert [(c.set, c.members) for c in chosen(sets) if c.by == "loss"] == [("gaussian", (1,))]


def test_the_score_may_choose_another_than_the_loss() -> None:
    calibrated, accurate = scores_of([0.5], []), scores_of([0.6], [])
    accurate = dataclasses.replace(accurate, member_score=rows(0.0), score=rows(0.0))
    choices = chosen({"swa": calibrated, "last": accurate})
    assert best(choices, 1).set == "swa"
    assert best(choices, 1, "score").set == "last"
    assert best(choices, 1, "score").title(1) == "Best for one pass by accuracy"


def test_what_is_best_only_where_it_was_chosen_is_not_flattered() -> None:
    lucky = torch.where(CHOOSES, 0.1, 0.9).double()[None]
    choice = best(chosen({"swa": scores_of([0.5], []), "last": scores_of(lucky, [])}), 1)
    assert choice.set == "last"
    assert choice.loss == pytest.approx(0.9)
    assert choice.num_items == NUM_ITEMS - NUM_ITEMS // 2
    assert choice.beside["last"].loss_difference == 0


def test_luck_among_equal_members_chooses_none_of_them() -> None:
    rng = torch.Generator().manual_seed(0)
    equal = 0.5 + torch.randn(200, NUM_ITEMS, generator=rng, dtype=torch.float64)
    assert equal[:, CHOOSES].mean(dim=1).min() < 0.4
    sets = {"noise": dataclasses.replace(scores_of(equal[:1], []), member_loss=equal), "swa": scores_of([0.45], [])}
    sets["noise"] = dataclasses.replace(sets["noise"], member_score=-equal)
    assert best(chosen(sets), 1).set == "swa"


def test_a_member_that_is_hardly_the_best_gives_way_to_the_set_that_is_better_on_average() -> None:
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(NUM_ITEMS, generator=rng, dtype=torch.float64)
    members = torch.stack(
        [torch.full_like(noise, 0.6), torch.full_like(noise, 0.6), 0.45 + noise - noise[CHOOSES].mean()]
    )
    sets = {"swa": scores_of([0.5], []), "noise": scores_of(members, [0.7, 0.7], passes=3.0)}
    assert best(chosen(sets), 1).set == "swa"
    members[2] = 0.2 + noise - noise[CHOOSES].mean()
    sets["noise"] = scores_of(members, [0.7, 0.7], passes=3.0)
    assert (best(chosen(sets), 1).set, best(chosen(sets), 1).members) == ("noise", (2,))


def test_members_that_truly_differ_keep_their_means() -> None:
    rng = torch.Generator().manual_seed(0)
    common = torch.randn(NUM_ITEMS, generator=rng, dtype=torch.float64)
    own = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None] + 0.01 * torch.randn(8, NUM_ITEMS, generator=rng)
    values = common + own
    assert torch.allclose(without_luck(values), values.mean(dim=1), atol=1e-4)
    assert without_luck(torch.full((3, 5), torch.nan)).tolist() == [torch.inf] * 3


def test_ties_go_to_fewer_passes_fewer_members_and_generated_last() -> None:
    one = scores_of([0.5, 0.5], [0.5], passes=2.0)
    sets = {"generated": one, "snapshots": one, "swa": scores_of([0.5 + 1e-12], [])}
    assert [(c.set, c.members) for c in chosen(sets) if c.by == "loss"] == [("snapshots", (0,))]


@pytest.mark.parametrize(("passes", "expected"), [(9.0, 1 + 3 * 8 / 8), (2.0, 1 + 3 / 8), (None, 4.0), (0.5, 1.0)])
def test_a_smaller_ensemble_costs_its_share_of_the_measured_passes(passes: float | None, expected: float) -> None:
    scores = scores_of([0.5] * 9, [0.5] * 4, passes=passes)
    assert price(scores, 4) == pytest.approx(expected)
    assert price(scores, 1) == 1.0


def test_errors_beside_the_last_snapshots_and_the_generated_are_paired() -> None:
    rng = torch.Generator().manual_seed(0)
    hard = 10 * torch.rand(NUM_ITEMS, generator=rng, dtype=torch.float64)
    noise = 0.1 * torch.randn(NUM_ITEMS, generator=rng, dtype=torch.float64)
    sets = {
        "last": scores_of(torch.stack([hard + 0.5, hard + 0.7]), [9.0], passes=2.0),
        "generated": scores_of((hard + 0.2 + noise)[None], []),
        "swa": scores_of(hard[None], []),
    }
    choice = best(chosen(sets), 1)
    assert choice.set == "swa"
    assert choice.beside["last"].loss_difference == pytest.approx(-0.6)  # the mean over the runs
    assert choice.beside["last"].loss_error == pytest.approx(0.0, abs=1e-9)
    rest = noise[~CHOOSES]
    assert choice.beside["generated"].loss_difference == pytest.approx(-0.2 - float(rest.mean()))
    assert choice.beside["generated"].loss_error == pytest.approx(float(rest.std()) / len(rest) ** 0.5)


def test_curves_of_cost_are_of_the_half_that_chose_nothing() -> None:
    members = torch.where(CHOOSES, 0.1, 0.9).double()[None] + torch.tensor([0.0, 0.2])[:, None]
    scores = scores_of(members, [0.3], passes=1.5)
    curve = cost_curves({"noise": scores}, seed=0)["cost/noise"]
    assert curve.tolist() == [[1, 2], [1, 1.5], pytest.approx([1.0, 0.3]), pytest.approx([-1.0, -0.3])]


def test_scores_by_group_are_of_the_half_that_chose_nothing() -> None:
    lucky = torch.where(CHOOSES, 0.1, 0.9).double()[None]
    sets = {"last": scores_of(lucky, []), "swa": scores_of([0.5], [])}
    groups = torch.arange(NUM_ITEMS) % 3
    arrays = group_scores(groups, sets, chosen(sets), seed=0)
    assert arrays["group_score/best for one pass"].tolist() == pytest.approx([-0.9] * 3)
    assert arrays["group_count"].tolist() == torch.bincount(groups[~CHOOSES]).tolist()
    assert group_scores(torch.arange(NUM_ITEMS), sets, chosen(sets), seed=0) == {}


def test_a_budget_below_one_pass_and_an_unknown_measure_are_refused() -> None:
    choices = chosen({"swa": scores_of([0.5], [])})
    with pytest.raises(ConfigError, match="must be at least 1, the price of a single model"):
        best(choices, 0.5)
    with pytest.raises(ConfigError, match="must be one of loss, score"):
        best(choices, 1, "luck")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="evaluate again"):
        best([], 1)


@pytest.fixture(scope="module")
def judged(three_runs: tuple[Task, SnapshotStore]) -> Evaluation:
    task, store = three_runs
    generator = fit(store.path, FitConfig(diffusion=DiffusionConfig(max_steps=60, width=32)))
    return evaluate(task, store, generator, num_members=6)


def logits_of(task: Task, weights: WeightSet) -> Tensor:
    """Log of the mean probability over all held-out items."""
    with torch.no_grad():
        ensemble = DiffusionEnsemble(task.model.eval(), weights)
        return torch.cat([ensemble(x) for x, _ in task.eval_loader])


def test_a_single_model_is_saved_and_loads_into_the_users_model(
    three_runs: tuple[Task, SnapshotStore], judged: Evaluation, tmp_path: Path
) -> None:
    task, _ = three_runs
    choice = judged.best()
    path = choice.save(tmp_path)
    model = copy.deepcopy(task.model).eval()
    assert choice.loading(path) == f'model.load_state_dict(safetensors.torch.load_file("{path}"), strict=False)'
    assert not model.load_state_dict(load_file(path), strict=False).unexpected_keys

    targets = torch.cat([y for _, y in task.eval_loader])
    with torch.no_grad():
        logits = torch.cat([model(x) for x, _ in task.eval_loader])
    assert torch.equal(logits.log_softmax(1), logits_of(task, choice.weights))
    rest = ~half_mask(len(targets), 0)
    loss = torch.nn.functional.cross_entropy(logits[rest].double(), targets[rest])
    assert float(loss) == pytest.approx(choice.loss, rel=1e-5)
    assert float((logits.argmax(1) == targets)[rest].double().mean()) == choice.score
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert (header["format"], header["format_version"], header["set"]) == ("pdiff-member", "1", choice.set)
    assert header["member"] == str(choice.members[0])


@pytest.mark.parametrize("name", ["gaussian-per-run", "generated", "snapshots"])
def test_an_ensemble_is_saved_and_loads_as_it_was_judged(
    name: str, three_runs: tuple[Task, SnapshotStore], judged: Evaluation, tmp_path: Path
) -> None:
    task, _ = three_runs
    members = tuple(sorted(joining_order(6, 0)[:4].tolist()))
    choice = dataclasses.replace(judged.best(8), set=name, members=members)
    path = choice.save(tmp_path)
    assert choice.loading(path).startswith("ensemble = pdiff_plugin.DiffusionEnsemble.load(")
    ensemble = DiffusionEnsemble.load(path, copy.deepcopy(task.model).eval())
    assert ensemble.num_members == 4
    targets = torch.cat([y for _, y in task.eval_loader])
    log_probs = torch.cat([ensemble(x) for x, _ in task.eval_loader])
    assert torch.equal(log_probs, logits_of(task, choice.weights))
    # Curves are over all items: those of this ensemble are what was judged.
    curve = judged.arrays[f"curve/{name}"]
    loss = torch.nn.functional.nll_loss(log_probs.double(), targets)
    assert float(loss) == pytest.approx(float(curve[1][curve[0] == 4]), rel=1e-5)


def test_recalibrated_members_are_saved_as_they_were_judged(three_runs: tuple[Task, SnapshotStore]) -> None:
    task, store = three_runs
    task = dataclasses.replace(task, train_loader=list(task.eval_loader))
    result = evaluate(task, store, num_members=4, sets=("average-per-run",), recalibrate=True)
    plain = evaluate(task, store, num_members=4, sets=("average-per-run",))
    for judged in (result, plain):
        whole = dataclasses.replace(judged.best(), members=(0, 1, 2, 3)).weights
        targets = torch.cat([y for _, y in task.eval_loader])
        loss = torch.nn.functional.nll_loss(logits_of(task, whole).double(), targets)
        assert float(loss) == pytest.approx(judged.sets["average-per-run"]["ensemble_nll"], rel=1e-5)


def test_a_loaded_evaluation_tells_the_choice_and_which_command_makes_it(judged: Evaluation, tmp_path: Path) -> None:
    loaded = Evaluation.load(judged.save(tmp_path))
    assert loaded.choices == judged.choices
    assert loaded.told_choices(3) == judged.told_choices(3)
    assert loaded.told_choices()[0].startswith(f"Best for one pass: {judged.best().text}, NLL ")
    with pytest.raises(WeightsNotKeptError, match="pdiff evaluate FIT --task MODULE:FUNCTION --save-best DIR"):
        _ = loaded.best(8).weights
    with pytest.raises(WeightsNotKeptError):
        loaded.best().save(tmp_path)


def test_a_result_can_be_sent_to_another_process(judged: Evaluation) -> None:
    assert pickle.loads(pickle.dumps(judged.best())) == judged.best()


def test_a_snapshot_is_named_by_its_run_and_step(one_run: tuple[Task, SnapshotStore]) -> None:
    task, store = one_run
    assert evaluate(task, store, num_members=1, sets=("last",)).best().text == "the snapshot of step 60 of run-001"
    assert evaluate(task, store, sets=("swa",)).best().text == "the average of all snapshots"


def test_a_model_of_one_run_is_named_by_the_run(three_runs: tuple[Task, SnapshotStore]) -> None:
    task, store = three_runs
    choice = evaluate(task, store, sets=("swa",)).best()
    assert choice.text == f"the average of all snapshots of {store.trajectories[choice.members[0]]}"
