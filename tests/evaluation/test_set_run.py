"""What is made and run for the sets of an evaluation, and in how much memory."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pdiff_plugin.config import EvaluateConfig
from pdiff_plugin.evaluation.baselines import BASELINES, rng_for
from pdiff_plugin.evaluation.evaluate import evaluate
from pdiff_plugin.evaluation.kind import Scores
from pdiff_plugin.evaluation.rows import SnapshotRows, evenly_spaced
from pdiff_plugin.evaluation.scores import View, score_sets
from pdiff_plugin.evaluation.scratch import in_memory, on_disk
from pdiff_plugin.evaluation.set_run import PlannedSet, SetRun
from pdiff_plugin.evaluation.task import Data, Task
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.progress import Progress
from pdiff_plugin.snapshots.store import SnapshotStore

Run = tuple[Task, SnapshotStore]


class CountingScorer:
    """:func:`score_sets`, remembering how many members of which pools were run."""

    def __init__(self) -> None:
        self.held: list[dict[str, int]] = []

    def __call__(
        self, task: Task, sets: Mapping[str, WeightSet], data: Data | None = None, **options: Any
    ) -> tuple[dict[str, Scores], Tensor]:
        self.held.append({name: weights.num_members for name, weights in sets.items()})
        return score_sets(task, sets, data, **options)


def test_every_recorded_snapshot_is_run_once(one_run: Run) -> None:
    task, store = one_run
    score = CountingScorer()
    evaluate(task, store, sets=["snapshots", "last"], num_members=8, score=score)
    assert score.held == [{"recorded snapshots 1": 60}]


def test_members_that_are_the_same_mean_are_run_once(one_run: Run, store_of: Any) -> None:
    task, store = one_run
    few = store_of(store.layout.unflatten(store.rows()[:12]))
    score = CountingScorer()
    result = evaluate(task, few, sets=["swa", "average-4", "average", "average-64"], num_members=6, score=score)
    assert score.held == [{"recorded snapshots 1": 12, "swa": 1, "average-4": 6}]
    figures = result.sets["average"]
    assert figures["members"] == 6
    assert figures == result.sets["average-64"]
    assert figures["ensemble_nll"] == pytest.approx(result.sets["swa"]["ensemble_nll"])
    assert figures["wrong_iou_mean"] == 1.0
    assert result.cost["average"]["forward_passes"] == pytest.approx(6.0)  # of an ensemble, which runs all


def test_views_have_the_scores_of_sets_of_their_own(one_run: Run) -> None:
    task, store = one_run
    rows = SnapshotRows.measure(store)
    pool = rows.members(torch.arange(0, 60, 6))
    places = torch.tensor([7, 2, 2, 5])
    shared, _ = score_sets(
        task, {"pool": pool}, views={"some": View("pool", places), "all": View("pool", torch.arange(10))}
    )
    alone, _ = score_sets(task, {"some": pool.select(places), "all": pool})
    for name, scores in alone.items():
        torch.testing.assert_close(shared[name].member_loss, scores.member_loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(shared[name].loss, scores.loss, rtol=1e-5, atol=1e-6)
        assert shared[name].sizes == scores.sizes
    assert shared["all"].forward_passes == pytest.approx(10.0, rel=0.05)
    assert shared["some"].forward_passes == pytest.approx(4.0, rel=0.05)


def test_snapshots_of_each_run_are_run_with_all_others(three_runs: Run) -> None:
    task, store = three_runs
    score = CountingScorer()
    evaluate(task, store, sets=["average"], num_members=12, score=score)
    # Four of each run to tell how much they differ, some of which are references as well.
    (held,) = score.held
    rows = SnapshotRows.measure(store)
    own = {int(place) for run in rows.runs for place in run[evenly_spaced(60, 4)]}
    assert held == {
        "recorded snapshots 1": 64,
        "recorded snapshots 2": len(own | set(evenly_spaced(180, 100).tolist())) - 64,
        "average": 12,
    }


def test_each_view_tells_which_of_its_members_answer_nan(one_run: Run) -> None:
    task, store = one_run
    pool = SnapshotRows.measure(store).members(torch.arange(4))
    pool["3.bias"][2, 1] = torch.nan
    places = torch.tensor([2, 0, 2])
    shared, _ = score_sets(
        task, {"pool": pool}, views={"all": View("pool", torch.arange(4)), "some": View("pool", places)}
    )
    assert shared["all"].is_silent.tolist() == [False, False, True, False]
    assert shared["some"].is_silent.tolist() == [True, False, True]


@pytest.mark.parametrize("recalibrate", [False, True])
def test_members_drawn_again_are_those_that_were_scored(one_run: Run, store_of: Any, recalibrate: bool) -> None:
    task, store = one_run
    task = dataclasses.replace(task, train_loader=task.eval_loader)
    # So few that all averages of 16 are the one mean of all, which is made for another set.
    rows = SnapshotRows.measure(store_of(store.layout.unflatten(store.rows()[:12])))
    config = EvaluateConfig(num_members=6, num_draws=2, recalibrate=recalibrate)
    scored: dict[str, WeightSet] = {}

    def score(task: Task, sets: Mapping[str, WeightSet], data: Data | None = None, **options: Any) -> Any:
        views = options["views"]
        scored.update({key: sets[view.pool].select(view.places) for key, view in views.items()})
        return score_sets(task, sets, data, **options)

    run = SetRun(task, rows, config, score=score)
    plans = [PlannedSet.of(name, one, rows, config) for name, one in BASELINES.items() if not one.needs_runs]
    run.run(plans)
    for plan in plans:
        for key in {plan.key(0), plan.key(plan.num_draws - 1)}:
            places = list(range(scored[key].num_members))[::-2]
            again = run.drawn_again(key, places)
            assert all(torch.equal(again[name], scored[key][name][places]) for name in again), key


def test_a_lost_member_of_a_pool_moves_no_other(one_run: Run) -> None:
    task, store = one_run
    rows = SnapshotRows.measure(store)
    weights = BASELINES["average"].draw(rows, 12, rng_for(0, "some")).made(rows)
    clean = weights.select([0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11])
    weights["0.bias"][3, 0] = torch.inf
    result = evaluate(task, store, weights, sets=["generated", "snapshots"], num_members=12)
    assert result.details["num_left_out"] == {"generated": 1}
    expected = evaluate(task, store, clean, sets=["generated", "snapshots"], num_members=12)
    for key, value in expected.sets["generated"].items():
        assert result.sets["generated"][key] == pytest.approx(value, abs=1e-12), key
    assert result.sets["snapshots"] == expected.sets["snapshots"]


def test_members_that_answer_nan_are_left_out_of_every_draw_that_has_them(one_run: Run) -> None:
    task, store = one_run
    rows = SnapshotRows.measure(store)
    weights = BASELINES["average"].draw(rows, 12, rng_for(0, "some")).made(rows)
    clean = weights.select([0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11])
    weights["3.weight"][3] = 3e38  # finite, but the answer is not
    shifted = dataclasses.replace(task, shifted={"same": task.eval_loader})
    score = CountingScorer()
    result = evaluate(shifted, store, weights, sets=["generated"], num_members=12, score=score)
    assert result.details["num_left_out"] == {"generated": 1}
    expected = evaluate(shifted, store, clean, sets=["generated"], num_members=12)
    assert score.held[1] == {"generated": 11}
    nll = expected.sets["generated"]["ensemble_nll"]
    assert result.sets["generated"]["ensemble_nll"] == pytest.approx(nll, abs=1e-9)
    assert result.sets["generated"]["shifted/same"]["ensemble_nll"] == pytest.approx(nll, abs=1e-9)


def test_members_in_files_are_those_in_memory(one_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdiff_plugin.evaluation.scratch._MAPPED_BYTES", 1)
    _, store = one_run
    rows = SnapshotRows.measure(store)
    for name, baseline in BASELINES.items():
        held, mapped = (baseline.draw(rows, 5, rng_for(0, name)).made(rows, empty) for empty in (in_memory, on_disk))
        assert all(torch.equal(held[key], mapped[key]) for key in held), name


def test_noise_is_the_same_however_few_members_it_is_drawn_for(one_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _, store = one_run
    rows = SnapshotRows.measure(store)
    whole = BASELINES["noise"].draw(rows, 6, rng_for(0, "noise")).made(rows)
    monkeypatch.setattr("pdiff_plugin.evaluation.baselines._NOISE_VALUES", 1)
    parts = BASELINES["noise"].draw(rows, 6, rng_for(0, "noise")).made(rows)
    # Normal values are drawn in groups of 16.
    assert torch.equal(whole["0.weight"], parts["0.weight"])


def test_an_evaluation_of_little_memory_has_the_same_figures(one_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    task, store = one_run
    roomy = evaluate(task, store, num_members=4)
    monkeypatch.setattr("pdiff_plugin.evaluation.set_run._MEMBERS_SHARE", 0.0)
    monkeypatch.setattr("pdiff_plugin.evaluation.scratch._MAPPED_BYTES", 1)
    monkeypatch.setattr("pdiff_plugin.evaluation.rows._KEEP_BYTES", 0)
    assert evaluate(task, store, num_members=4).sets == roomy.sets


def test_a_full_disk_is_told_and_members_stay_in_memory(
    one_run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pdiff_plugin.evaluation.scratch._MAPPED_BYTES", 1)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    assert set(on_disk(one_run[1].layout, 3)) == set(one_run[1].layout.names)
    assert "No space left on device): kept in memory" in caplog.text


def test_progress_names_what_is_scored_and_ends_at_its_total(one_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    task, store = one_run
    monkeypatch.setattr("pdiff_plugin.evaluation.set_run._PASS_BYTES", 30 * 4 * store.layout.num_values)
    seen: list[Progress] = []
    evaluate(task, store, num_members=8, sets=["snapshots", "average", "gaussian"], on_progress=seen.append)
    # 30 and 30 snapshots, then two sets, in 4 batches each.
    assert [p.step for p in seen] == list(range(1, 17))
    assert {p.total_steps for p in seen} == {16}
    assert seen[0].text.startswith("recorded snapshots 1 1/4, about ")
    assert seen[-1].text == "gaussian 4/4, about 0 s left"


def test_quick_takes_fewer_members_and_says_so(one_run: Run) -> None:
    task, store = one_run
    score = CountingScorer()
    quick = evaluate(task, store, quick=True, score=score)
    assert list(quick.sets) == ["snapshots", "average", "gaussian", "noise"]
    assert score.held == [{"recorded snapshots 1": 15, "average": 8, "gaussian": 8, "noise": 8}]
    assert quick.details["num_reference_snapshots"] == 15
    assert quick.title == "digits: 1597 items, quick: few members, wider errors"
    assert str(quick).startswith(quick.title)
    chosen = evaluate(task, store, quick=True, num_members=4, sets=["swa"])
    assert list(chosen.sets) == ["swa"]
    assert chosen.details["num_reference_snapshots"] == 7


_LARGE = """
    import sys, threading
    from pathlib import Path
    import torch
    from torch import nn
    from pdiff_plugin import Layout, SnapshotStore, Task, evaluate
    from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

    model = nn.Sequential(nn.Linear(1024, 2048, bias=False), nn.ReLU(), nn.Linear(2048, 2, bias=False))
    layout = Layout.from_tensors({name: t.detach() for name, t in model.named_parameters()})
    rng = torch.Generator().manual_seed(0)
    writer = TrajectoryWriter(Path(sys.argv[1]), layout)
    for first in range(1, 81, 8):
        writer.write_chunk(torch.randn(8, layout.num_values, generator=rng), range(first, first + 8))
    task = Task(model, [(torch.randn(16, 1024, generator=rng), torch.arange(16) % 2)])

    def held():
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1e6

    peak, done = 0.0, threading.Event()
    def watch():
        global peak
        while not done.wait(0.01):
            peak = max(peak, held())

    torch.zeros(300, 300) @ torch.zeros(300, 300)
    before = held()
    watcher = threading.Thread(target=watch)
    watcher.start()
    evaluate(task, SnapshotStore.open(sys.argv[1]), num_members=64, sets=["snapshots", "average", "gaussian", "noise"],
             memory_gb=0.4)
    done.set()
    watcher.join()
    print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells of a process's own memory")
def test_64_members_of_two_million_values_are_judged_in_less_memory_than_one_set_takes(tmp_path: Path) -> None:
    code = textwrap.dedent(_LARGE)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store")], stdout=subprocess.PIPE, text=True, check=True
    )
    # Each of the four sets takes 0.54 GB, and the snapshots 0.67 GB.
    assert float(done.stdout.split()[-1]) < 0.5
