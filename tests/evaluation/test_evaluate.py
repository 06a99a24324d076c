from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pdiff_plugin.config import DiffusionConfig, FitConfig
from pdiff_plugin.errors import ConfigError, LayoutMismatchError, UnusableSnapshotsError
from pdiff_plugin.evaluation.baselines import BASELINES, Drawing, average, rng_for
from pdiff_plugin.evaluation.evaluate import evaluate
from pdiff_plugin.evaluation.kind import Scores
from pdiff_plugin.evaluation.result import Evaluation
from pdiff_plugin.evaluation.rows import SnapshotRows
from pdiff_plugin.evaluation.scores import score_sets
from pdiff_plugin.evaluation.sweep import sweep
from pdiff_plugin.evaluation.task import Data, Task
from pdiff_plugin.fitting.fit import fit
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

Run = tuple[Task, SnapshotStore]
KEYS = {
    "members",
    "accuracy_mean",
    "accuracy_best",
    "accuracy_worst",
    "accuracy_std",
    "ensemble_accuracy",
    "ensemble_nll",
    "ensemble_ece",
    "wrong_iou_mean",
    "wrong_iou_max_to_snapshots",
    "nearest_snapshot_distance",
}


def pairs(store: SnapshotStore, seed: int = 0) -> WeightSet:
    """Stand-in for generated members: means of two snapshots."""
    rows = SnapshotRows.measure(store)
    return average(rows, 8, rng_for(seed, "pairs"), k=2).made(rows)


@pytest.fixture(scope="module")
def result(one_run: Run) -> Evaluation:
    task, store = one_run
    return evaluate(task, store, weights=pairs(store), num_members=8, sets="core")


def test_figures_of_every_set_and_the_verdict_are_logged(one_run: Run, result: Evaluation, recorder: Any) -> None:
    task, store = one_run
    evaluate(task, store, weights=pairs(store), num_members=8, sets="core", loggers=[recorder])
    for name, figures in result.sets.items():
        assert recorder.curves[f"evaluate/{name}/ensemble_nll"] == {0: figures["ensemble_nll"]}
    assert recorder.settings["evaluate"]["task"] == "digits"
    assert recorder.settings["verdict"]["sentence"] == result.sentence
    assert not recorder.is_closed


def test_json_has_the_five_sets_with_every_figure(result: Evaluation) -> None:
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(document) >= {"sets", "verdict", "seconds"}
    assert set(document["sets"]) >= {"snapshots", "generated", "average", "gaussian", "noise"}
    for name, figures in document["sets"].items():
        assert set(figures) >= KEYS, name
    assert isinstance(document["verdict"], str)
    assert all(seconds >= 0 for seconds in document["seconds"].values())


def test_figures_of_the_snapshots_are_those_of_the_recorded_models(one_run: Run, result: Evaluation) -> None:
    task, store = one_run
    x, y = (torch.cat(parts) for parts in zip(*task.eval_loader, strict=True))
    probs = []
    for index in [0, 8, 17, 25, 34, 42, 51, 59]:  # 8 of 60, evenly spaced
        task.model.load_state_dict(store.state_dict(index), strict=False)
        with torch.no_grad():
            probs.append(task.model.eval()(x).double().softmax(-1))
    task.model.load_state_dict(store.state_dict(59), strict=False)
    correct = torch.stack([p.argmax(-1) == y for p in probs]).double()
    mean = torch.stack(probs).mean(0)
    figures = result.sets["snapshots"]
    assert figures["accuracy_mean"] == pytest.approx(float(correct.mean()))
    assert figures["accuracy_worst"] == pytest.approx(float(correct.mean(1).min()))
    assert figures["ensemble_accuracy"] == pytest.approx(float((mean.argmax(-1) == y).double().mean()))
    assert figures["ensemble_nll"] == pytest.approx(float(-mean[torch.arange(len(y)), y].log().mean()), rel=1e-5)


def test_the_same_seed_gives_the_same_figures(one_run: Run, result: Evaluation) -> None:
    task, store = one_run
    again = evaluate(task, store.path, weights=pairs(store), num_members=8, sets="core")
    assert again.sets == result.sets
    assert again.verdict == result.verdict
    other = evaluate(task, store, weights=pairs(store), num_members=8, seed=1, sets="core")
    assert other.sets["gaussian"] != result.sets["gaussian"]


def test_the_model_keeps_modes_flags_and_weights(one_run: Run) -> None:
    task, store = one_run
    model = task.model
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(task, store, sets=["snapshots"], num_members=2)
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert not model[0].weight.requires_grad
    assert model[3].weight.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model[0].weight.requires_grad_(True)


def test_copies_are_called_copies(one_run: Run) -> None:
    task, store = one_run
    rows = SnapshotRows.measure(store)
    result = evaluate(task, store, weights=rows.members(torch.arange(0, 60, 7)), num_members=8)
    assert result.verdict.outcome == "copies the snapshots"
    assert result.sets["generated"]["nearest_snapshot_distance"] == pytest.approx(0.0, abs=1e-6)
    assert result.verdict.sentence.startswith("Copies the snapshots: generated members lie 0.00")


def repeated(store: SnapshotStore, tiny: float) -> dict[str, Tensor]:
    """Forty times the last snapshot, plus tiny noise."""
    row = store.rows(indices=[len(store) - 1])
    noise = torch.randn(40, row.shape[1], generator=torch.Generator().manual_seed(0))
    return store.layout.unflatten(row * (1 + tiny * noise))


def test_one_repeated_snapshot_plus_tiny_noise_leaves_nothing_to_copy(one_run: Run, store_of: Any) -> None:
    task, store = one_run
    same = store_of(repeated(store, tiny=1e-5))
    generator = fit(same.path, FitConfig(diffusion=DiffusionConfig(max_steps=200, width=32)))
    result = evaluate(task, same, generator, num_members=8)
    # Averages and Gaussians err on the same items too: nobody copied.
    assert result.verdict.outcome == "snapshots hardly differ"
    assert "higher or a cyclic learning rate" in result.verdict.sentence


def test_honest_members_of_weights_that_hardly_move_are_no_copies(one_run: Run, store_of: Any) -> None:
    task, store = one_run
    row = store.rows(indices=[len(store) - 1])
    drawn = row + 0.003 * row * torch.randn(60, row.shape[1], generator=torch.Generator().manual_seed(0))
    weights = WeightSet.from_flat(drawn[20:], store.layout)
    result = evaluate(task, store_of(store.layout.unflatten(drawn[:20])), weights=weights, sets="core")
    for name in ("snapshots", "generated"):
        assert 0.99 <= result.sets[name]["wrong_iou_max_to_snapshots"] < 1
    assert result.verdict.outcome != "copies the snapshots"
    assert "the snapshots themselves share 99." in result.verdict.sentence


def test_on_three_runs_pooled_averages_and_gaussians_collapse_and_generated_do_not(three_runs: Run) -> None:
    task, store = three_runs
    generator = fit(store.path, FitConfig(diffusion=DiffusionConfig(max_steps=800, width=64)))
    sets = evaluate(task, store, generator, num_members=12).sets
    snapshots = sets["snapshots"]["accuracy_mean"]
    assert sets["gaussian"]["accuracy_mean"] < snapshots - 0.3
    assert sets["average"]["accuracy_mean"] < snapshots - 0.03
    assert sets["swag"]["accuracy_mean"] < snapshots - 0.1
    assert sets["generated"]["accuracy_mean"] > snapshots - 0.02
    assert sets["gaussian-per-run"]["accuracy_mean"] > snapshots - 0.02
    assert sets["average-per-run"]["accuracy_mean"] > snapshots - 0.01
    assert sets["swa"]["members"] == sets["last"]["members"] == 3


def test_a_store_that_has_changed_since_the_fit_is_told(
    one_run: Run, store_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    task, store = one_run
    earlier = store_of(store.layout.unflatten(store.rows()[:59]))
    generator = fit(earlier.path, FitConfig(diffusion=DiffusionConfig(max_steps=20, width=32)))
    same = evaluate(task, earlier, generator, num_members=2, sets="core")
    assert same.details["changed_since_fit"] is None
    assert not caplog.records
    writer = TrajectoryWriter(earlier.path, earlier.layout, trajectory=earlier.trajectories[0], resume_step=59)
    writer.write_chunk(store.rows()[59:], [60])
    grown = evaluate(task, earlier.path, generator, num_members=2, sets="core")
    assert grown.details["changed_since_fit"] in caplog.text
    assert "fitted on 59 snapshots, the store holds 60; fit again" in caplog.text
    caplog.clear()
    generator.trajectories = ["another"]
    sweep(task, earlier, generator, diversities=(1.0,), settings={}, num_members=2)
    assert f"fitted on the runs another, the store holds {earlier.trajectories[0]}; fit again" in caplog.text


def test_a_store_exchanged_for_one_of_the_same_names_and_number_is_told(
    one_run: Run, store_of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task, store = one_run
    generator = fit(store, FitConfig(diffusion=DiffusionConfig(max_steps=20, width=32)))
    rows = store.rows()
    rows[:, -1] += 1.0
    TrajectoryWriter(tmp_path / "exchanged", store.layout).write_chunk(rows, store.steps.tolist())
    found = evaluate(task, tmp_path / "exchanged", generator, num_members=2, sets="core")
    assert found.details["changed_since_fit"] in caplog.text
    assert "the generator was fitted on other snapshots of the same names and number; fit again" in caplog.text
    del generator.provenance["fingerprint"]  # as before there was one
    found = evaluate(task, tmp_path / "exchanged", generator, num_members=2, sets="core")
    assert found.details["changed_since_fit"] is None


def test_duplicates_among_the_snapshots_are_counted(one_run: Run, store_of: Any) -> None:
    task, store = one_run
    tensors = store.layout.unflatten(store.rows())
    for tensor in tensors.values():
        tensor[[9, 17, 25]] = tensor[[3, 3, 4]]
    result = evaluate(task, store_of(tensors), num_members=4, sets=["snapshots"])
    assert result.details["num_duplicate_snapshots"] == 3


def test_shifted_and_out_of_distribution_data_have_figures_of_their_own(one_run: Run) -> None:
    task, store = one_run
    rng = torch.Generator().manual_seed(0)
    noisy = [(x + 0.3 * torch.randn(x.shape, generator=rng), y) for x, y in task.eval_loader]
    blank = [0.3 * torch.rand(200, 64, generator=rng)]
    many = Task(task.model, task.eval_loader, shifted={"noisy": noisy}, out_of_distribution={"blank": blank})
    result = evaluate(many, store, weights=pairs(store), num_members=8, sets="core")
    plain = evaluate(task, store, weights=pairs(store), num_members=8, sets="core")
    for name, figures in result.sets.items():
        assert figures["shifted/noisy"]["ensemble_accuracy"] < figures["ensemble_accuracy"]
        assert figures["ood_auroc/blank"] > 0.6
        assert figures["ensemble_nll"] == plain.sets[name]["ensemble_nll"]
    headers, rows = result.table()
    assert headers[-3:] == ["noisy: acc", "noisy: NLL", "blank: AUROC"]
    assert all(len(row) == len(headers) for row in rows)


def test_several_draws_average_the_random_sets_and_tell_their_spread(one_run: Run) -> None:
    task, store = one_run
    once = evaluate(task, store, num_members=6, sets=["snapshots", "gaussian"])
    often = evaluate(task, store, num_members=6, sets=["snapshots", "gaussian"], num_draws=3)
    assert often.sets["snapshots"] == once.sets["snapshots"]
    assert often.sets["gaussian"]["draws"] == 3
    assert often.sets["gaussian"]["ensemble_nll_std"] > 0
    assert often.sets["gaussian"]["ensemble_nll"] != once.sets["gaussian"]["ensemble_nll"]


def test_a_deep_ensemble_comes_from_the_users_own_training(one_run: Run) -> None:
    task, store = one_run
    seen: list[int] = []

    def retrain(seed: int) -> nn.Module:
        seen.append(seed)
        model = copy.deepcopy(task.model)
        model.load_state_dict(store.state_dict(10 * seed), strict=False)
        return model

    result = evaluate(task, store, sets=["snapshots"], num_members=4, retrain=retrain, num_retrained=3)
    assert seen == [0, 1, 2]
    figures = result.sets["deep-ensemble"]
    assert figures["members"] == 3
    assert figures["nearest_snapshot_distance"] == pytest.approx(0.0, abs=1e-6)
    assert result.cost["deep-ensemble"]["forward_passes"] == pytest.approx(3.0)


def test_recalibration_gives_members_the_statistics_of_their_own_weights(three_runs: Run, store_of: Any) -> None:
    task, store = three_runs
    # Statistics that belong to other weights: the recorded ones, shifted.
    tensors = store.layout.unflatten(store.rows())
    tensors["1.running_mean"] += 3
    broken = store_of(tensors)
    x, y = (torch.cat(parts) for parts in zip(*task.eval_loader, strict=True))
    trained = Task(task.model, task.eval_loader, train_loader=[(x[:400], y[:400])])
    plain = evaluate(trained, broken, num_members=3, sets=["snapshots"])
    fixed = evaluate(trained, broken, num_members=3, sets=["snapshots"], recalibrate=True)
    assert fixed.sets["snapshots"]["accuracy_mean"] > plain.sets["snapshots"]["accuracy_mean"] + 0.2
    assert fixed.details["recalibrated"]


def test_recalibration_needs_training_data(one_run: Run) -> None:
    with pytest.raises(ConfigError, match="recalibrate = True: it needs a Task with train_loader"):
        evaluate(*one_run, recalibrate=True)


def test_batches_may_be_dictionaries_with_labels(one_run: Run) -> None:
    task, store = one_run

    class Named(nn.Sequential):
        def forward(self, pixels: Tensor) -> Tensor:
            return super().forward(pixels)

    loader = [{"pixels": x, "labels": y} for x, y in task.eval_loader]
    named = evaluate(Task(Named(*task.model), loader), store, num_members=2, sets=["snapshots"])
    assert named.sets == evaluate(task, store, num_members=2, sets=["snapshots"]).sets


def test_a_batch_without_targets_is_refused(one_run: Run) -> None:
    task, store = one_run
    with pytest.raises(ConfigError, match=r"eval_loader = 'Tensor': it must yield pairs \(inputs, targets\)"):
        evaluate(Task(task.model, [torch.zeros(2, 64)]), store)


def test_the_cost_of_a_head_is_little_more_than_one_forward_pass(one_run: Run, store_of: Any) -> None:
    task, store = one_run
    head = {name: t for name, t in store.layout.unflatten(store.rows()).items() if name.startswith("3.")}
    result = evaluate(task, store_of(head), num_members=8, sets=["noise", "swa"])
    # 64 x 16 multiplications in the trunk, 16 x 10 in each member's head.
    assert result.cost["noise"]["forward_passes"] == pytest.approx((64 + 8 * 10) / 74)
    assert result.cost["swa"]["forward_passes"] == pytest.approx(1.0)
    assert result.cost["noise"]["seconds"] > 0


def test_sets_that_do_not_fit_in_memory_together_take_several_passes(
    one_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, store = one_run
    together = evaluate(task, store, num_members=4, sets="core")
    monkeypatch.setattr("pdiff_plugin.evaluation.set_run._PASS_BYTES", 1)
    apart = evaluate(task, store, num_members=4, sets="core")
    assert apart.sets == together.sets


def test_no_pass_holds_more_members_than_memory_is_meant_for(one_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    task, store = one_run
    held: list[int] = []

    def score(
        task: Task, sets: Mapping[str, WeightSet], data: Data | None = None, **options: Any
    ) -> tuple[dict[str, Scores], Tensor]:
        held.append(sum(weights.num_members for weights in sets.values()))
        return score_sets(task, sets, data, **options)

    together = evaluate(task, store, weights=pairs(store), num_members=8, sets="core", score=score)
    assert held == [60 + 4 * 8]  # the snapshots of the set are among the references
    held.clear()
    monkeypatch.setattr("pdiff_plugin.evaluation.set_run._PASS_BYTES", 20 * 4 * store.layout.num_values)
    apart = evaluate(task, store, weights=pairs(store), num_members=8, sets="core", score=score)
    assert held == [20, 20, 20, 16, 16]
    assert apart.sets == together.sets
    assert apart.verdict == together.verdict
    assert all(torch.equal(apart.arrays[name], array) for name, array in together.arrays.items())


def test_a_shuffled_loader_is_refused_when_it_takes_several_passes(
    one_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, store = one_run
    assert isinstance(task.eval_loader, DataLoader)
    shuffled = DataLoader(task.eval_loader.dataset, 400, shuffle=True, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("pdiff_plugin.evaluation.set_run._PASS_BYTES", 1)
    with pytest.raises(ConfigError, match="must not shuffle"):
        evaluate(Task(task.model, shuffled), store, num_members=4, sets="core")


def test_targets_beyond_the_models_classes_are_refused(one_run: Run) -> None:
    task, store = one_run
    loader = [(torch.zeros(2, 64), torch.tensor([3, 10]))]
    with pytest.raises(ConfigError, match="targets of eval_loader = 'from 3 to 10': it must be from 0 to 9"):
        evaluate(Task(task.model, loader), store, num_members=2)


def test_a_model_with_another_tensor_is_refused_by_its_name(one_run: Run) -> None:
    task, store = one_run
    wider = nn.Sequential(nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10))
    with pytest.raises(LayoutMismatchError) as caught:
        evaluate(Task(wider, task.eval_loader), store)
    assert "tensor '0.weight'" in str(caught.value)
    assert "(16, 64), found (20, 64)" in str(caught.value)


def test_weights_with_another_tensor_are_refused_by_its_name(one_run: Run) -> None:
    task, store = one_run
    weights = pairs(store)
    with pytest.raises(LayoutMismatchError, match=r"tensor '1.bias': .* found no such tensor"):
        evaluate(task, store, weights=WeightSet({k: v for k, v in weights.items() if k != "1.bias"}))


def test_a_generator_of_another_layout_is_refused_by_the_tensor(one_run: Run) -> None:
    task, store = one_run
    other = fit(store.path, FitConfig(diffusion=DiffusionConfig(max_steps=1, width=16)))
    other.layout = type(store.layout)(store.layout.tensors[:-1])

    with pytest.raises(LayoutMismatchError, match=r"tensor .3.bias.: .* found nothing"):
        evaluate(task, store, other)


def test_an_unknown_set_is_refused_with_the_known_names(one_run: Run) -> None:
    with pytest.raises(ConfigError, match="sets = 'swarm': it must be all, core, or among snapshots, generated, last"):
        evaluate(*one_run, sets=["swarm"])


def test_snapshots_that_are_all_equal_are_refused(one_run: Run, store_of: Any) -> None:
    task, store = one_run
    one = store.state_dict(0)
    constant = store_of({name: one[name].expand(12, *one[name].shape) for name in store.layout.names})
    with pytest.raises(UnusableSnapshotsError, match="12 snapshots that are all equal"):
        evaluate(task, constant)


def test_snapshots_with_nan_are_skipped_and_counted(one_run: Run, store_of: Any) -> None:
    task, store = one_run
    tensors = store.layout.unflatten(store.rows())
    tensors["0.bias"][5, 2] = float("nan")
    result = evaluate(task, store_of(tensors), num_members=4, sets=["snapshots", "gaussian"])
    assert result.details["num_skipped_snapshots"] == 1
    assert result.details["num_snapshots"] == 59
    assert result.sets["gaussian"]["accuracy_mean"] > 0.5


def test_members_with_nan_are_left_out_and_named(one_run: Run, caplog: pytest.LogCaptureFixture) -> None:
    task, store = one_run
    rows = SnapshotRows.measure(store)
    members = average(rows, 24, rng_for(0, "pairs"), k=2).made(rows)
    sound = members.select(torch.tensor([i for i in range(24) if i not in (3, 11)]))
    members["0.weight"][3, 2, 1] = float("nan")
    members["3.bias"][11] = float("inf")
    result = evaluate(task, store, weights=members, num_members=8, sets="core")
    assert result.details["num_left_out"] == {"generated": 2}
    assert result.verdict.sentence.endswith("left out: 2 of 24 of the generated members.")
    assert "2 of 24 members of the generated members hold NaN or Inf" in caplog.text
    alone = evaluate(task, store, weights=sound, num_members=8, sets="core")
    assert result.sets["generated"] == alone.sets["generated"]


def test_members_that_answer_nan_are_left_out(one_run: Run) -> None:
    task, store = one_run
    rows = SnapshotRows.measure(store)
    members = average(rows, 24, rng_for(0, "pairs"), k=2).made(rows)
    members["3.weight"][5] = 3e38  # finite, and infinite once summed
    result = evaluate(task, store, weights=members, num_members=8, sets=["snapshots", "generated"])
    assert result.details["num_left_out"] == {"generated": 1}
    assert result.sets["generated"]["members"] == 23


def test_more_than_a_tenth_of_broken_members_are_refused(one_run: Run) -> None:
    task, store = one_run
    members = pairs(store)
    members["3.bias"][1, 0] = float("nan")
    with pytest.raises(ConfigError, match="the generated members = '1 of 8 with NaN or Inf'"):
        evaluate(task, store, weights=members, num_members=8)


def test_a_baseline_with_broken_members_is_judged_by_the_others(one_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    task, store = one_run
    whole = BASELINES["noise"]

    def draw(rows: SnapshotRows, num_members: int, rng: torch.Generator) -> Drawing:
        members = whole.draw(rows, num_members, rng).made(rows)
        members["3.bias"][:3] = float("nan")
        return Drawing(num_members=num_members, whole=lambda empty: members)

    monkeypatch.setitem(BASELINES, "noise", dataclasses.replace(whole, draw=draw))
    result = evaluate(task, store, weights=pairs(store), num_members=8, sets="core")
    assert result.details["num_left_out"] == {"noise": 3}
    assert result.sets["noise"]["members"] == 5
    assert "3 of 8 of snapshots with 5 % noise" in result.verdict.sentence


def test_without_generated_members_only_the_baselines_are_judged(one_run: Run) -> None:
    result = evaluate(*one_run, num_members=4, sets="core")
    assert "generated" not in result.sets
    assert result.verdict.outcome == "nothing generated"


def test_targets_of_another_kind_are_refused(one_run: Run) -> None:
    task, store = one_run
    loader: list[tuple[Tensor, Tensor]] = [(torch.zeros(2, 64), torch.zeros(2, 10))]
    with pytest.raises(ConfigError, match="class indices"):
        evaluate(Task(task.model, loader), store)


def test_an_empty_loader_is_refused(one_run: Run) -> None:
    task, store = one_run
    with pytest.raises(ConfigError, match="eval_loader = 'no batch'"):
        evaluate(Task(task.model, []), store)


def test_inputs_may_be_dictionaries_and_outputs_hold_logits(one_run: Run) -> None:
    task, store = one_run

    class Wrapped(nn.Sequential):
        def forward(self, pixels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"logits": super().forward(pixels)}

    loader = [({"pixels": x}, y) for x, y in task.eval_loader]
    plain = evaluate(task, store, num_members=4, sets=["noise"])
    named = evaluate(Task(Wrapped(*task.model), loader), store, num_members=4, sets=["noise"])
    assert named.sets == plain.sets


def test_the_table_is_readable_as_plain_text(result: Evaluation) -> None:
    headers, rows = result.table()
    assert [row[0] for row in rows] == ["snapshots", "generated", "average", "gaussian", "noise"]
    assert all(len(row) == len(headers) for row in rows)
    text = str(result)
    assert result.verdict.sentence in text
    assert max(len(line) for line in text.splitlines()[:7]) <= 120


def test_progress_is_reported_batch_by_batch(one_run: Run) -> None:
    task, store = one_run
    seen = []
    evaluate(task, store, sets=["snapshots"], num_members=2, on_progress=seen.append)
    assert isinstance(task.eval_loader, DataLoader)
    assert [(p.step, p.total_steps) for p in seen] == [(i, 4) for i in range(1, 5)]
