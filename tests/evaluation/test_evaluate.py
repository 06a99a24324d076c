from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pdiff_plugin.errors import ConfigError, LayoutMismatchError, UnusableSnapshotsError
from pdiff_plugin.evaluation.baselines import average, rng_for
from pdiff_plugin.evaluation.evaluate import Evaluation, evaluate
from pdiff_plugin.evaluation.rows import SnapshotRows
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.store import SnapshotStore

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
    return average(SnapshotRows(store), 8, rng_for(seed, "pairs"), k=2)


@pytest.fixture(scope="module")
def result(one_run: Run) -> Evaluation:
    task, store = one_run
    return evaluate(task, store, weights=pairs(store), num_members=8, sets="core")


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
    rows = SnapshotRows(store)
    result = evaluate(task, store, weights=rows.members(torch.arange(0, 60, 7)), num_members=8)
    assert result.verdict.outcome == "copies the snapshots"
    assert result.sets["generated"]["nearest_snapshot_distance"] == pytest.approx(0.0, abs=1e-6)
    assert result.verdict.sentence.startswith("Copies the snapshots: generated members lie 0.00")


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
    class Other:
        layout = type(one_run[1].layout)(one_run[1].layout.tensors[:-1])

        def sample(self, num_members: int, *, rng: Any = None) -> WeightSet:
            raise AssertionError("never asked")

    with pytest.raises(LayoutMismatchError, match=r"tensor .3.bias.: .* found nothing"):
        evaluate(*one_run, Other())


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


def test_without_generated_members_only_the_alternatives_are_judged(one_run: Run) -> None:
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
