"""A sweep: one trajectory for each condition, from the same weights; a call that is repeated goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from pdiff_plugin import Cycle, PDiffRecorder, Perturb, Reinit, SnapshotStore, collect
from pdiff_plugin.errors import ConditionError, ConfigError, LayoutMismatchError
from pdiff_plugin.recording import writer
from pdiff_plugin.snapshots.base import read_base_header

LOSS = nn.functional.cross_entropy
ANGLES = [{"angle": 0}, {"angle": 90}, {"angle": 180}]


@pytest.fixture
def data(batches):
    """Batches that are another task at each angle; ``data.angles`` are those that were asked for."""

    def data(angle, style="ink"):
        data.angles.append(angle)
        return [(inputs + angle / 90, targets) for inputs, targets in batches]

    data.angles = []
    return data


@pytest.fixture
def sweep(net, data, tmp_path):
    def sweep(conditions=ANGLES, model=net, **settings):
        settings = {"layers": "last-norms:2", "num_snapshots": 4, "restart": Cycle(), "lr": 0.01, **settings}
        # The dropout draws from the global state: as in a process of its own.
        torch.manual_seed(3)
        return collect(model, loss_fn=LOSS, store=tmp_path / "s", conditions=conditions, data=data, **settings)

    return sweep


def rows_of(store, name):
    return store.only([name]).rows()


def test_each_condition_is_a_trajectory_with_its_condition_and_loader(sweep, data):
    store = sweep()
    assert store.conditions == {"sweep-001": {"angle": 0}, "sweep-002": {"angle": 90}, "sweep-003": {"angle": 180}}
    assert store.steps.tolist() == 3 * [13, 14, 15, 16]
    assert data.angles == [0, 90, 180]
    assert store.problems == []


@pytest.mark.parametrize("restart", [Cycle(), Perturb(warmup_steps=2)], ids=repr)
def test_each_condition_is_recorded_as_if_it_were_the_only_one(sweep, net, data, restart, tmp_path, monkeypatch):
    monkeypatch.setattr(nn.functional, "dropout", lambda x, *_: x)
    store = sweep(restart=restart)
    for name, condition in store.conditions.items():
        alone = collect(
            net,
            data(**condition),
            LOSS,
            store=tmp_path / name,
            layers="last-norms:2",
            num_snapshots=4,
            restart=restart,
            lr=0.01,
        )
        assert torch.equal(alone.rows(), rows_of(store, name)), name


def test_a_cycle_lets_the_rate_fall_anew_for_each_condition(sweep):
    rates, made = [], []

    def make(parameters):
        made.append(torch.optim.SGD(parameters, lr=0.8))
        return made[-1]

    sweep(ANGLES[:2], optimizer=make, on_progress=lambda report: rates.append(made[-1].param_groups[0]["lr"]))
    assert len(made) == 2
    assert rates[0] == rates[16] == 0.8
    assert rates[15] < 0.01
    assert rates[:16] == rates[16:]


def test_the_model_comes_back_as_it_was_and_its_other_norms_stand_still(sweep, net):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.eval().modules()]
    store = sweep()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    # Chosen norms follow their data with statistics that are recorded, the others keep the given ones.
    base = store.base("sweep-003")
    assert torch.equal(base["bn1.running_mean"], before["bn1.running_mean"])
    means = [store.state_dict(index)["bn2.running_mean"] for index in (3, 7, 11)]
    assert not torch.equal(means[0], means[1])
    assert torch.equal(base["bn2.running_mean"], means[2])


def test_progress_says_which_condition(sweep):
    reports = []
    sweep([{"angle": 0, "style": "ink"}, {"angle": 45, "style": "oil"}], on_progress=reports.append)
    assert [report.step for report in reports] == list(range(1, 33))
    assert {report.total_steps for report in reports} == {32}
    assert [reports[0].text, reports[-1].text] == ["angle=0 style=ink (1 of 2)", "angle=45 style=oil (2 of 2)"]


def test_the_users_own_values_reach_the_loader_and_plain_ones_the_store(sweep, data):
    store = sweep([{"angle": torch.tensor(90.0)}])
    assert isinstance(data.angles[0], torch.Tensor)
    assert store.conditions == {"sweep-001": {"angle": 90.0}}


def test_a_call_that_is_repeated_records_what_is_missing_in_whatever_order(sweep, data):
    first = sweep(ANGLES[:2])
    del data.angles[:]
    store = sweep([{"angle": 180}, {"angle": 90.0}, {"angle": 0}, {"angle": 90}])
    assert data.angles == [180, 90]
    assert store.conditions == {
        "sweep-001": {"angle": 0},
        "sweep-002": {"angle": 90},
        "sweep-003": {"angle": 180},
        "sweep-004": {"angle": 90},
    }
    assert torch.equal(rows_of(store, "sweep-001"), rows_of(first, "sweep-001"))
    del data.angles[:]
    assert len(sweep(ANGLES)) == 16
    assert data.angles == []


def test_what_is_recorded_already_is_told(sweep, caplog):
    sweep(ANGLES[:2])
    with caplog.at_level("INFO"):
        reports = []
        sweep(on_progress=reports.append)
    assert "2 of 3 conditions are recorded in" in caplog.text
    assert reports[0].step == 33
    assert reports[0].total_steps == 48


def test_an_interrupted_condition_is_recorded_anew_under_its_name(sweep, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK_ROWS", 1)

    def stop(report):
        if report.step == 31:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(on_progress=stop)
    # Its first three snapshots, and a base of the last of them.
    store = sweep()
    assert store.trajectories == ["sweep-001", "sweep-002", "sweep-003"]
    assert store.steps.tolist() == 3 * [13, 14, 15, 16]
    assert read_base_header(store.path / "trajectories" / "sweep-002")["step"] == "16"


def test_runs_of_a_recorder_at_the_same_condition_are_left_alone(sweep, net, train, tmp_path):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with PDiffRecorder(tmp_path / "s", condition={"angle": 0}).attach(net, optimizer, total_steps=2):
        train(net, optimizer, 2)
    assert sweep(ANGLES[:1]).conditions == {"run-001": {"angle": 0}, "sweep-001": {"angle": 0}}


def test_several_sweeps_of_one_store_have_names_of_their_own(sweep):
    sweep(ANGLES[:1])
    store = sweep(ANGLES[:1], trajectory="slow", restart=Cycle(warmup_steps=1), num_snapshots=2)
    assert store.trajectories == ["slow-001", "sweep-001"]
    assert store.steps.tolist() == [2, 3, 13, 14, 15, 16]


KILLED = """
    import sys, torch
    from torch import nn
    from pdiff_plugin import Cycle, collect
    from pdiff_plugin.recording import writer

    writer.CHUNK_ROWS = 1
    rng = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(16, 5, generator=rng), torch.randint(0, 3, (16,), generator=rng)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))

    def data(angle, style):
        print("data", angle, style, flush=True)
        return [(inputs + angle, targets)]

    def wait(report):
        print(report.step, flush=True)
        if report.step == int(sys.argv[2]):
            sys.stdin.read()

    conditions = [{"angle": angle, "style": style} for angle in (0.0, 0.5, 1.0) for style in ("ink", "oil")]
    collect(model, loss_fn=nn.functional.cross_entropy, store=sys.argv[1], conditions=conditions, data=data,
            num_snapshots=8, restart=Cycle(warmup_steps=4), layers="norms", on_progress=wait)
"""


def sweep_in_a_process(store, *, stop_at=0):
    """What it prints; killed at that step, if there is one."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(store), str(stop_at)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if stop_at and lines[-1] == str(stop_at):
            process.send_signal(signal.SIGKILL)
    assert process.wait() == (-signal.SIGKILL if stop_at else 0)
    process.stdin.close()
    process.stdout.close()
    return lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The sweep of a process that nobody killed."""
    store = tmp_path_factory.mktemp("whole")
    sweep_in_a_process(store)
    return SnapshotStore.open(store)


@pytest.mark.parametrize(("moment", "nums_done"), [(2, [0]), (3 * 12 + 2, [3]), (3 * 12 + 9, [3]), (4 * 12, [3, 4])])
def test_a_sweep_that_is_killed_and_repeated_has_every_condition_once(tmp_path, whole, moment, nums_done):
    sweep_in_a_process(tmp_path, stop_at=moment)
    lines = sweep_in_a_process(tmp_path)

    parts = SnapshotStore.open(tmp_path)
    assert len(whole.conditions) == 6
    assert parts.conditions == whole.conditions
    assert parts.trajectories == whole.trajectories
    assert parts.steps.tolist() == whole.steps.tolist()
    assert torch.equal(parts.rows(), whole.rows())
    assert parts.problems == []
    # Those that were finished are not trained again.
    assert 6 - sum(line.startswith("data") for line in lines) in nums_done


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"conditions": []}, r"conditions = \[\]: it must hold at least one condition"),
        ({"num_trajectories": 2}, "num_trajectories = 2: it must be 1 with conditions: name a condition several times"),
        ({"restart": Reinit()}, r"restart = Reinit.*must be Perturb\(\) or Cycle\(\) with conditions: each starts at"),
        (
            {"conditions": [{"tilt": 1}]},
            r"data = .*must be a function that takes tilt and returns the loader .*: 'angle'",
        ),
        ({"train_loader": []}, r"train_loader = \[\]: it must be left out with conditions: data\(\) gives the loaders"),
        ({"optimizer": "shared"}, "optimizer = .*must make a new optimizer each time it is called"),
    ],
)
def test_settings_that_cannot_work_with_conditions_are_refused(sweep, net, settings, text):
    shared = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=text):
        sweep(**{**settings, **({"optimizer": lambda parameters: shared} if "optimizer" in settings else {})})


def test_conditions_without_data_and_data_without_conditions_are_refused(net, batches, data, tmp_path):
    with pytest.raises(ConfigError, match="data = None: it must be a function that takes angle and returns the loader"):
        collect(net, loss_fn=LOSS, store=tmp_path / "s", conditions=ANGLES)
    with pytest.raises(ConfigError, match="train_loader = None: it must be given, or conditions and data without it"):
        collect(net, loss_fn=LOSS, store=tmp_path / "s", data=data)
    with pytest.raises(ConfigError, match="loss_fn = None: it must be a function of the model's outputs"):
        collect(net, batches, store=tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("loader", "text"),
    [
        (None, r"data\(angle=0\) = None: it must be a loader that yields"),
        ([], r"data\(angle=0\) = \[\]: it must yield"),
    ],
)
def test_a_loader_that_is_none_or_empty_is_named_by_its_condition(net, tmp_path, loader, text):
    with pytest.raises(ConfigError, match=text):
        collect(net, loss_fn=LOSS, store=tmp_path, conditions=ANGLES, data=lambda angle: loader)


def test_conditions_that_do_not_fit_are_named_before_a_step_is_taken(sweep, data, tmp_path):
    with pytest.raises(
        ConditionError, match=r"conditions\[1\]: found text under 'angle', expected a number, as in con"
    ):
        sweep([{"angle": 1}, {"angle": "east"}])
    with pytest.raises(ConditionError, match=r"conditions\[1\]: found a int, expected a mapping of one or more names"):
        sweep([{"angle": 1}, 2])
    assert not (tmp_path / "s").exists()
    sweep(ANGLES[:1])
    with pytest.raises(ConditionError, match=r"conditions\[0\]: found text under 'angle', .* as in sweep-001"):
        sweep([{"angle": "east"}])
    assert data.angles == [0]


def test_a_finished_run_of_other_steps_is_refused_and_kept(sweep, tmp_path):
    rows = sweep(ANGLES[:1], num_snapshots=3, restart=Perturb()).rows()
    text = (
        "num_snapshots = 4: it would record steps 1 to 4, but sweep-001 .angle=0. holds 3 snapshots of steps 1 to 3: "
        "give the settings that it was recorded with, or choose another `trajectory` or store"
    )
    with pytest.raises(ConfigError, match=text):
        sweep(ANGLES[:1], num_snapshots=4, restart=Perturb())
    with pytest.raises(ConfigError, match="would record steps 13 to 16"):
        sweep(ANGLES[:1])
    assert torch.equal(SnapshotStore.open(tmp_path / "s").rows(), rows)


def test_a_sweep_goes_on_from_its_own_network_only(sweep, net):
    sweep(ANGLES[:1])
    with torch.no_grad():
        net.conv1.weight.add_(1)
    with pytest.raises(
        ConfigError, match=r"model = 'Net': it must be the network that sweep-001 in .* 'conv1.weight' has other values"
    ):
        sweep()


def test_a_sweep_goes_on_with_its_own_layers_only(sweep):
    sweep(ANGLES[:1])
    with pytest.raises(LayoutMismatchError):
        sweep(layers="head")
