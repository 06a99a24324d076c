"""Training that ends before its recording window has enough rows: early stopping, a crash, a length that was wrong."""

import copy
import itertools
import json
import logging
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from pdiff_plugin import PDiffRecorder, SnapshotStore
from pdiff_plugin.config import RecorderConfig
from pdiff_plugin.errors import LayoutMismatchError, TrajectoryExistsError
from pdiff_plugin.recording import writer as writer_module
from pdiff_plugin.recording.window import Window
from pdiff_plugin.snapshots.chunks import PlannedWindow


def count(model, store, num_steps, total, first_step=1, state=None, **settings):
    """Record a model all of whose weights are the number of the step; the recorder, closed."""
    recorder = PDiffRecorder(store, **{"layers": "all", **settings})
    if state is not None:
        recorder.load_state_dict(json.loads(json.dumps(state)))
    with recorder.attach(model, total_steps=total):
        go_on(recorder, model, range(first_step, num_steps + 1))
    return recorder


@torch.no_grad()
def go_on(recorder, model, steps):
    for step in steps:
        for parameter in model.parameters():
            parameter.fill_(float(step))
        recorder.step()


@pytest.fixture
def model():
    return nn.Linear(3, 2)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 29, 40, 77, 99, 100, 101, 499, 700])
def test_however_soon_training_ends_the_newer_half_to_three_quarters_of_it_is_there(model, tmp_path, num_steps):
    count(model, tmp_path, num_steps, 1000, last_steps=200)
    store = SnapshotStore.open(tmp_path)
    written = [step for step in range(1, num_steps + 1) if step % 4 == 1]
    kept = store.steps.tolist()
    assert kept == written[-len(kept) :]
    assert len(written) / 2 <= len(kept) <= max(2, 3 / 4 * len(written) + 1)
    assert torch.equal(store.rows(0, 1)[:, 0].long(), store.steps)
    assert store.sparse == {"run-001": PlannedWindow(801, 1000, 32)}


@pytest.mark.parametrize(
    "settings",
    [
        {"last_steps": 90},
        {"last_steps": 5},
        {"last_steps": 70, "every_n_steps": 7},
        {"max_snapshots": 1},
        {"max_snapshots": 40, "freeze_rest": True, "layers": "head"},
        {},
    ],
)
def test_a_run_that_gets_to_its_planned_end_leaves_the_same_files_as_without_sparse_snapshots(tmp_path, settings):
    stores = []
    for keep_sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        store = tmp_path / str(keep_sparse)
        count(model, store, 400, 400, keep_sparse=keep_sparse, **settings)
        stores.append(files(store))
    assert stores[0] == stores[1]


def test_the_oldest_sparse_files_are_deleted_while_training_goes_on(model, tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "CHUNK_ROWS", 4)
    recorder = PDiffRecorder(tmp_path, last_steps=100, layers="all").attach(model, total_steps=1000)
    most = 0
    for first in range(1, 901, 50):
        go_on(recorder, model, range(first, first + 50))
        recorder.state_dict()
        most = max(most, len(SnapshotStore.open(tmp_path)))
        assert SnapshotStore.open(tmp_path).problems == []
    recorder.close()
    assert 50 < most <= 75 + 4


def test_sparse_snapshots_go_once_the_window_has_enough(model, tmp_path):
    recorder = PDiffRecorder(tmp_path, last_steps=100, layers="all").attach(model, total_steps=1000)
    go_on(recorder, model, range(1, 901))
    assert recorder.state_dict()["trajectory"] == "run-001"
    assert len(SnapshotStore.open(tmp_path)) > 50
    go_on(recorder, model, range(901, 932))
    recorder.state_dict()
    store = SnapshotStore.open(tmp_path)
    assert store.steps.tolist()[-31:] == list(range(901, 932))
    assert store.steps[0] == 1 + 64 * 9  # the last doubling of the 100 from before
    go_on(recorder, model, [932])
    recorder.state_dict()
    store = SnapshotStore.open(tmp_path)
    assert store.steps.tolist() == list(range(901, 933))
    assert store.sparse == {}
    assert not list(tmp_path.rglob("sparse-*"))
    recorder.close()


def test_what_was_kept_is_told_in_one_line(model, tmp_path, caplog):
    count(model, tmp_path / "before", 500, 1000, last_steps=100)
    count(model, tmp_path / "inside", 903, 1000, last_steps=100)
    count(model, tmp_path / "enough", 950, 1000, last_steps=100)
    hint = "For training that may stop early, keep_newest=True keeps the newest 300 snapshots, wherever it ends."
    assert [record.getMessage() for record in caplog.records] == [
        "training ended at step 500 of the planned 1000, and the recording window begins at step 901: sparse snapshots "
        f"from before it are kept, 40 of steps 145 to 496. {hint}",
        "training ended at step 903 of the planned 1000, and the recording window begins at step 901: sparse snapshots "
        f"from before it are kept, 36 of steps 577 to 892, beside 3 in the window. {hint}",
    ]


@pytest.mark.parametrize("saved_at", [3, 150, 287])
@pytest.mark.parametrize("end", [297, 340, 400])
def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(model, tmp_path, saved_at, end):
    settings = {"last_steps": 80}
    count(model, tmp_path / "whole", end, 400, **settings)
    killed = PDiffRecorder(tmp_path / "parts", layers="all", **settings).attach(model, total_steps=400)
    go_on(killed, model, range(1, saved_at + 1))
    state = killed.state_dict()
    go_on(killed, model, range(saved_at + 1, saved_at + 10))
    killed.close()
    count(model, tmp_path / "parts", end, 400, saved_at + 1, state, **settings)
    whole, parts = SnapshotStore.open(tmp_path / "whole"), SnapshotStore.open(tmp_path / "parts")
    assert parts.steps.tolist() == whole.steps.tolist()
    assert torch.equal(parts.rows(), whole.rows())
    assert parts.sparse == whole.sparse


def test_a_run_resumed_from_before_all_that_is_left_begins_with_its_first_step(model, tmp_path):
    recorder = PDiffRecorder(tmp_path, layers="all", last_steps=80).attach(model, total_steps=400)
    go_on(recorder, model, range(1, 303))
    state = recorder.state_dict()
    go_on(recorder, model, range(303, 371))  # enough of the window: the sparse rows are gone
    recorder.close()
    count(model, tmp_path, 304, 400, 303, state, last_steps=80)
    assert SnapshotStore.open(tmp_path).steps.tolist() == [303]


def test_a_run_whose_steps_begin_in_the_middle_has_its_first_one(model, tmp_path):
    recorder = PDiffRecorder(tmp_path, last_steps=2, layers="all")
    recorder.start(model, total_steps=1000)
    recorder.observe(model, step=700)
    recorder.observe(model, step=701)
    recorder.close()
    assert SnapshotStore.open(tmp_path).steps.tolist() == [700]


def test_frozen_and_unfrozen_rows_are_never_read_together(model, tmp_path):
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    settings = {"layers": "head", "freeze_rest": True, "last_steps": 50}
    recorder = PDiffRecorder(tmp_path, **settings).attach(net, total_steps=200)
    for step in range(1, 154):
        recorder.step()
        if step % 10 == 0 or step > 150:
            recorder.state_dict()
            steps = SnapshotStore.open(tmp_path).steps
            assert bool((steps > 150).all()) or bool((steps <= 150).all())
    recorder.close()
    assert SnapshotStore.open(tmp_path).steps.tolist() == [151, 152, 153]


def test_the_drift_of_the_rest_is_measured_from_the_first_row_that_is_kept(tmp_path):
    for end, first in ((400, 301), (301, 193), (298, 97), (340, 301)):
        net = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 2))
        recorder = PDiffRecorder(tmp_path / str(end), layers="head", last_steps=100).attach(net, total_steps=400)
        go_on(recorder, net, range(1, end + 1))
        recorder.close()
        store = SnapshotStore.open(tmp_path / str(end))
        assert store.steps[0] == first
        assert store.base_header("run-001")["rest_drift_from_step"] == str(first)
        assert recorder.rest_drift == pytest.approx(end / first - 1, rel=1e-4)


def test_a_named_run_that_did_not_get_to_its_window_is_replaced_by_the_next(model, tmp_path, caplog):
    settings = {"trajectory": "a", "last_steps": 10, "condition": {"angle": 1.0}}
    count(model, tmp_path, 64, 100, **settings)
    assert SnapshotStore.open(tmp_path).base() is not None
    caplog.clear()
    count(model, tmp_path, 21, 100, trajectory="a", last_steps=10)
    store = SnapshotStore.open(tmp_path)
    assert store.steps.tolist() == [10, 19]
    assert store.base() is None
    assert store.conditions == {}
    assert "6 snapshots of an unfinished run in" in caplog.text
    assert "are replaced: it got to step 64 of 100, and its window was to begin at step 91" in caplog.text
    count(model, tmp_path, 100, 100, **settings)
    store = SnapshotStore.open(tmp_path)
    assert store.trajectories == ["a"]
    assert store.steps.tolist() == list(range(91, 101))
    assert store.conditions == {"a": {"angle": 1.0}}


def test_a_named_run_with_rows_of_its_window_is_not_replaced(model, tmp_path):
    count(model, tmp_path, 92, 100, trajectory="a", last_steps=10)
    before = files(tmp_path)
    with pytest.raises(TrajectoryExistsError, match="already holds 2 snapshots"):
        count(model, tmp_path, 10, 100, trajectory="a", last_steps=10)
    assert files(tmp_path) == before


def test_sparse_snapshots_are_left_out_where_another_run_has_its_window(model, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for _ in range(2):
        count(model, tmp_path, 61, 100, last_steps=10)
    store = SnapshotStore.open(tmp_path)
    assert store.trajectories == ["run-001", "run-002"]
    assert store.left_out == []
    assert list(store.only(["run-002"]).sparse) == ["run-002"]
    count(model, tmp_path, 100, 100, last_steps=10)
    store = SnapshotStore.open(tmp_path)
    assert store.trajectories == ["run-003"]
    assert store.sparse == {}
    sentence = (
        "run-001 has snapshots up to step 55 of 100, and its window begins at step 91: its 5 sparse snapshots from "
        "before that are left out, since other runs have those of their windows"
    )
    assert store.left_out == [sentence, sentence.replace("run-001", "run-002")]
    assert list(store.stopped_early) == ["run-001", "run-002"]
    assert sentence in caplog.text


@pytest.mark.parametrize(
    ("num_steps", "settings", "planned"),
    [
        (1000, {}, None),
        (999, {}, 1000),
        (850, {"every_n_steps": 7}, 1000),
        (999, {"keep_newest": True, "every_n_steps": 30}, None),  # the next row would have been after the end
        (989, {"keep_newest": True, "every_n_steps": 30}, 990),
    ],
)
def test_a_run_that_ended_early_is_told_from_one_that_got_to_its_end(model, tmp_path, num_steps, settings, planned):
    count(model, tmp_path, num_steps, 1000, **settings)
    store = SnapshotStore.open(tmp_path)
    assert store.stopped_early == ({} if planned is None else {"run-001": planned})
    assert store.only(["run-001"]).stopped_early == store.stopped_early


def test_a_run_whose_length_is_not_known_does_not_end_early(model, tmp_path):
    count(model, tmp_path, 50, None)
    assert SnapshotStore.open(tmp_path).stopped_early == {}


def test_a_finished_run_that_is_prolonged_and_stopped_early_keeps_its_window(model, tmp_path):
    recorder = count(model, tmp_path, 100, 100, last_steps=50)
    count(model, tmp_path, 160, 300, 101, recorder.state_dict(), last_steps=50)
    store = SnapshotStore.open(tmp_path)
    assert store.trajectories == ["run-001"]
    assert store.steps.tolist() == list(range(51, 101))


def test_a_short_epoch_still_gives_enough_to_fit(model, tmp_path):
    recorder = PDiffRecorder(tmp_path, layers="all")
    with recorder.attach(model, total_steps=1000, steps_per_epoch=5):
        go_on(recorder, model, range(1, 201))
    assert len(SnapshotStore.open(tmp_path)) >= 10


@pytest.mark.parametrize(
    "config", [{}, {"last_steps": 7}, {"every_n_steps": 50}, {"max_snapshots": 2}, {"last_epochs": 3}]
)
@pytest.mark.parametrize("total", [1, 2, 10, 301, 302, 1000, 10**6])
def test_no_more_is_written_before_a_window_than_in_it_or_100(config, total):
    window = Window.plan(RecorderConfig(**config), total, 20)
    steps = [step for step in range(1, min(window.first, 10**4)) if window.is_due(step)]
    assert len(steps) <= max(window.num_rows, min(100, RecorderConfig(**config).max_snapshots))
    assert all(later - earlier >= window.every for earlier, later in itertools.pairwise(steps))
    assert not window.is_before(window.first)


def test_a_run_killed_before_its_window_leaves_what_was_written(start, tmp_path):
    script = """
        import sys, time, torch
        from pdiff_plugin import PDiffRecorder
        from pdiff_plugin.recording import writer
        writer.CHUNK_ROWS = 4
        model = torch.nn.Linear(3, 2)
        recorder = PDiffRecorder(sys.argv[1], layers="all", last_steps=100).attach(model, total_steps=1000)
        for step in range(1, 1001):
            with torch.no_grad():
                model.weight.fill_(step)
            recorder.step()
            time.sleep(0.001)
            print(step, flush=True)
    """
    started = start(script, tmp_path)
    started.wait_for("\n400\n")
    started.send(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    last = int(started.output.split("\n")[-2])
    store = SnapshotStore.open(tmp_path)
    assert store.problems == []
    assert store.steps[-1] > last - 2 * 4 * 9 - 9
    assert torch.equal(store.rows(0, 1)[:, 0].long(), store.steps)
    count(nn.Linear(3, 2), tmp_path, 1000, 1000, 301, {"step": 300, "trajectory": "run-001"}, last_steps=100)
    assert SnapshotStore.open(tmp_path).steps.tolist() == list(range(901, 1001))
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith((".tmp-", "sparse-"))]


class Gan:
    """Two networks that are trained in turn."""

    def __init__(self):
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 1))
        self.optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.generator, self.discriminator)]

    def train(self, num_steps):
        for _ in range(num_steps):
            fake = self.generator(torch.randn(8, 2))
            for optimizer, loss in zip(
                self.optimizers,
                (-self.discriminator(fake).mean(), self.discriminator(fake.detach()).mean()),
                strict=True,
            ):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def test_the_two_networks_of_a_gan_get_a_store_each(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        gan = Gan()
        nets = (gan.generator, gan.discriminator)
        with (
            PDiffRecorder().attach(nets[0], gan.optimizers[0], total_steps=5) as first,
            PDiffRecorder().attach(nets[1], gan.optimizers[1], total_steps=5) as second,
        ):
            gan.train(5)
        assert first.error is second.error is None
    for name, net in zip(("pdiff-snapshots", "pdiff-snapshots-2"), nets, strict=True):
        store = SnapshotStore.open(name)
        assert store.trajectories == ["run-001", "run-002"]
        assert store.steps.tolist() == [1, 2, 3, 4, 5] * 2
        assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in store.state_dict(-1).items())
    path = tmp_path / "pdiff-snapshots"
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} is for other tensors: these are recorded in {path}-2"
    ] * 2


def test_a_later_run_of_another_network_gets_a_store_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for width in (3, 4, 5, 4):
        with PDiffRecorder(layers="all").attach(nn.Linear(width, 2)) as recorder:
            recorder.step()
    stores = {path.name: len(SnapshotStore.open(path)) for path in tmp_path.iterdir()}
    assert stores == {"pdiff-snapshots": 1, "pdiff-snapshots-2": 2, "pdiff-snapshots-3": 1}


def test_equal_networks_side_by_side_are_runs_of_one_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        PDiffRecorder(layers="all").attach(nn.Linear(3, 2)) as a,
        PDiffRecorder(layers="all").attach(nn.Linear(3, 2)) as b,
    ):
        a.step()
        b.step()
    assert SnapshotStore.open("pdiff-snapshots").trajectories == ["run-001", "run-002"]


def test_a_second_network_in_a_store_that_was_named_is_refused_when_it_is_attached(tmp_path):
    with (
        PDiffRecorder(tmp_path / "s", layers="all").attach(nn.Linear(3, 2)),
        pytest.raises(LayoutMismatchError, match="the store"),
    ):
        PDiffRecorder(tmp_path / "s", layers="all").attach(nn.Linear(4, 2))


def test_a_plain_loop_whose_length_was_counted_in_batches_leaves_a_store(net, batches, tmp_path):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    twin = copy.deepcopy(net)
    with PDiffRecorder(tmp_path).attach(net, optimizer, total_steps=4 * 4 * 25, steps_per_epoch=16):
        for _ in range(25):
            for number, (inputs, targets) in enumerate(batches * 4):
                nn.functional.cross_entropy(net(inputs), targets).backward()
                if number % 4 == 3:
                    optimizer.step()
                    optimizer.zero_grad()
    store = SnapshotStore.open(tmp_path)
    assert len(store) >= 10
    assert not torch.equal(store.state_dict(-1)["bn2.weight"], twin.bn2.weight)
