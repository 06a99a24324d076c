import copy
import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pdiff_plugin import CollectConfig, Cycle, Perturb, Reinit, SnapshotStore, collect
from pdiff_plugin.errors import ConfigError, TrajectoryExistsError

_spec = importlib.util.spec_from_file_location("awkward_models", Path(__file__).parent.parent / "modules" / "models.py")
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

IMAGES, TOKENS, ROW = (4, 3, 32, 32), (4, 7), (4, 6)


def data(shape, num_classes=4, num_batches=2):
    rng = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(num_batches):
        x = torch.randint(1, 20, shape, generator=rng) if shape == TOKENS else torch.randn(shape, generator=rng)
        batches.append((x, torch.randint(0, num_classes, shape[:1], generator=rng)))
    return batches


def logits_loss(outputs, targets):
    return F.cross_entropy(getattr(outputs, "logits", outputs), targets)


class Starts:
    """Makes optimizers, and keeps a copy of the model as it is when one is made: a branch's start."""

    def __init__(self, model, lr=0.1):
        self.model, self.lr, self.models, self.made = model, lr, [], []

    def __call__(self, parameters):
        self.models.append(copy.deepcopy(self.model))
        self.made.append(torch.optim.SGD(parameters, lr=self.lr, momentum=0.9))
        return self.made[-1]


def rows_of(store, trajectory):
    return store.rows()[store.trajectory_index == store.trajectories.index(trajectory)]


def convnet():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4),
        nn.BatchNorm2d(4, momentum=None),  # its average needs the number of batches of its own branch
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6, momentum=None),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


class Counting(nn.Module):
    """A module of the trunk whose buffer moves in train mode, and whose output depends on it."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.counter = Counter()

    def forward(self, x):
        return self.head(self.counter(self.stem(x)))


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        self.seen += 1
        return self.linear(x) * self.seen


class Replacing(Counter):
    def forward(self, x):
        self.seen = self.seen + 1
        return self.linear(x)


class Late(nn.Module):
    """The tail reads a buffer that a module of the trunk replaces."""

    def __init__(self):
        super().__init__()
        self.counter, self.head = Replacing(), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.counter(x)) * self.counter.seen


def with_gradients_in_the_trunk():
    """As transformers' ``enable_input_require_grads`` leaves a model."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    model[0].register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


class Shifting(nn.Module):
    """Writes into its input, and has no trunk when its first layer is chosen."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.last(self.first(x.sub_(0.5)))


class OpaqueNorm(nn.Module):
    """The first batch is tried twice, since the trunk's output cannot be kept; the statistics must move once."""

    def __init__(self):
        super().__init__()
        self.trunk, self.norm, self.head = models.OpaqueTrunk(), nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.norm(self.trunk(x).value))


CASES = {
    "norms": (convnet, ["norms", "8"], IMAGES),
    "last norm": (convnet, ["last-norms:1", "8"], IMAGES),
    "first layer": (convnet, "0", IMAGES),
    "resnet18 last norms": (lambda: models.timm_model("resnet18"), ["last-norms:2", "head"], IMAGES),
    "resnet18 head": (lambda: models.timm_model("resnet18"), "head", IMAGES),
    "vit": (models.small_vit, ["last-norms:1", "head"], IMAGES),
    "lstm": (models.Recurrent, "lstm", TOKENS),
    "lstm head": (models.Recurrent, "head", TOKENS),
    "tied weights": (models.Tied, "embed", TOKENS),
    "borrowed weights": (models.Borrower, ["second", "scale"], ROW),
    "careless writes": (models.Careless, "head", ROW),
    "read before an in-place write": (models.ReadsThenWrites, "head", ROW),
    "data-dependent write": (models.Branching, ["gate", "head"], ROW),
    "opaque output": (models.Opaque, "head", ROW),
    "opaque output, norm": (OpaqueNorm, ["norm", "head"], ROW),
    "gradients in the trunk": (with_gradients_in_the_trunk, "head", ROW),
    "written input": (Shifting, "first", ROW),
    "python state": (models.Stateful, "head", ROW),
    "moving buffer in the trunk": (Counting, "head", ROW),
    "replaced buffer in the trunk": (Late, "head", ROW),
}


@pytest.mark.parametrize("restart", [Perturb(noise=0.5, warmup_steps=1), Reinit(warmup_steps=1)], ids=repr)
@pytest.mark.parametrize("case", CASES)
def test_each_branch_ends_as_if_it_were_trained_alone(case, restart, tmp_path):
    make, layers, shape = CASES[case]
    torch.manual_seed(0)
    model = make()
    starts = Starts(model)

    together = collect(
        model,
        data(shape, num_batches=5),
        logits_loss,
        store=tmp_path / "together",
        layers=layers,
        num_snapshots=4,
        num_trajectories=3,
        restart=restart,
        optimizer=starts,
    )

    for number, start in enumerate(starts.models, start=1):
        alone = collect(
            start,
            data(shape, num_batches=5),
            logits_loss,
            store=tmp_path / f"alone-{number}",
            layers=layers,
            num_snapshots=5,
            optimizer=Starts(start),
        )
        assert torch.equal(rows_of(together, f"run-{number:03d}"), alone.rows()[1:])
        base, expected = together.base(f"run-{number:03d}"), alone.base()
        assert all(torch.equal(base[name], tensor) for name, tensor in expected.items())
    assert len(torch.unique(together.rows(), dim=0)) > 4


def test_branches_of_a_head_cost_one_trunk_and_their_tails(tmp_path):
    model, R = models.timm_model("resnet18"), 5

    def flops(num_batches):
        with FlopCounterMode(display=False) as counter:
            collect(
                model,
                data(IMAGES),
                logits_loss,
                store=tmp_path / str(num_batches),
                layers="head",
                num_snapshots=num_batches,
                num_trajectories=R,
            )
        return counter.get_total_flops()

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(data(IMAGES)[0][0])
    forward = counter.get_total_flops()
    head = 2 * IMAGES[0] * model.fc.weight.numel()
    # Forward and the gradient of the weights; no gradient goes on into the trunk.
    assert flops(3) - flops(2) == forward - head + R * 2 * head
    # The first batch has one member computed whole as a check.
    assert flops(1) <= 2 * forward + R * 2 * head


def test_branches_of_the_last_norms_share_what_comes_before(tmp_path):
    model, R = models.timm_model("resnet18"), 5
    for parameter in model.parameters():  # as after training
        nn.init.normal_(parameter, 1.0, 0.1)

    def flops(num_batches, num_trajectories):
        with FlopCounterMode(display=False) as counter:
            collect(
                model,
                data(IMAGES),
                logits_loss,
                store=tmp_path / f"{num_batches}-{num_trajectories}",
                num_snapshots=num_batches,
                num_trajectories=num_trajectories,
            )
        return counter.get_total_flops()

    one, several = (flops(3, count) - flops(2, count) for count in (1, R))
    assert one < several < 0.5 * R * one


class Seen(nn.Module):
    def __init__(self):
        super().__init__()
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        return x * 1.0


@pytest.mark.parametrize("num_trajectories", [1, 3])
def test_every_branch_draws_its_own_dropout_mask_in_the_trunk(num_trajectories, tmp_path, caplog):
    caplog.set_level("INFO", "pdiff_plugin")
    before, after = Seen(), Seen()
    model = nn.Sequential(before, nn.Linear(6, 8), nn.Dropout(0.5), after, nn.Linear(8, 4))
    batches = data(ROW, num_batches=1)

    collect(
        model,
        batches,
        logits_loss,
        store=tmp_path,
        layers="head",
        num_snapshots=2,
        num_trajectories=num_trajectories,
    )

    rehearsal = num_trajectories > 1  # of the first batch's second branch, with the mask that it then draws again
    assert len(after.inputs) == 2 * num_trajectories + rehearsal
    assert len(torch.unique(torch.stack(after.inputs), dim=0)) == 2 * num_trajectories
    assert len(before.inputs) == 2 + rehearsal
    assert ("share only what comes before: random numbers are drawn" in caplog.text) == (num_trajectories > 1)


@pytest.mark.parametrize(
    ("make", "layers", "reason"),
    [
        (lambda: nn.DataParallel(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))), "1", "it is compiled or wrapped"),
        (models.Stateful, "head", "their losses differ when their common part is computed once"),
        (models.Borrower, "first", "no module runs before the chosen layers"),
        (
            lambda: nn.Sequential(nn.Dropout(), nn.Linear(6, 6), nn.Linear(6, 4)),
            "2",
            "random numbers are drawn (dropout in train mode?) before the chosen layers",
        ),
    ],
)
def test_the_log_says_why_nothing_is_shared(make, layers, reason, tmp_path, caplog):
    caplog.set_level("INFO", "pdiff_plugin")
    store = collect(make(), data(ROW), logits_loss, store=tmp_path, layers=layers, num_snapshots=2, num_trajectories=2)
    assert len(store) == 4
    assert caplog.text.count("is computed whole") == 1
    assert f"is computed whole: {reason}" in caplog.text


def test_the_first_branch_is_the_run_without_branches(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    options = {"layers": "head", "num_snapshots": 3}
    alone = collect(model, data(ROW), logits_loss, store=tmp_path / "alone", **options)
    three = collect(model, data(ROW), logits_loss, store=tmp_path / "three", num_trajectories=3, **options)
    assert alone.trajectories == ["run-001"]
    assert three.trajectories == ["run-001", "run-002", "run-003"]
    assert torch.equal(rows_of(three, "run-001"), alone.rows())
    assert not torch.equal(rows_of(three, "run-002"), alone.rows())


def test_perturbed_branches_start_at_the_given_weights_and_around_them(tmp_path):
    model = nn.Sequential(nn.Linear(6, 100), nn.LayerNorm(100), nn.Linear(100, 100))
    given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    starts = Starts(model)

    collect(
        model,
        data(ROW),
        logits_loss,
        store=tmp_path,
        layers=["1", "2"],
        num_snapshots=1,
        num_trajectories=3,
        restart=Perturb(noise=0.2),
        optimizer=starts,
    )

    first, *others = [start.state_dict() for start in starts.models]
    assert all(torch.equal(first[name], tensor) for name, tensor in given.items())
    for other in others:
        noise = other["2.weight"] - given["2.weight"]
        assert float(noise.std() / given["2.weight"].std()) == pytest.approx(0.2, rel=0.03)
        assert torch.equal(other["0.weight"], given["0.weight"])
        assert torch.equal(other["1.weight"], given["1.weight"])  # constant, so there is no scale for its noise
    assert not torch.equal(others[0]["2.weight"], others[1]["2.weight"])


@pytest.mark.parametrize("restart", [Perturb(), Reinit()], ids=repr)
def test_branches_that_would_all_start_at_the_same_values_are_refused(restart, net, batches, tmp_path):
    with pytest.raises(ConfigError, match=f"restart = {re.escape(repr(restart))}: .*choose other layers"):
        collect(net, batches, F.cross_entropy, store=tmp_path / "a", num_trajectories=2, restart=restart)
    assert not (tmp_path / "a").exists()


def test_reinitialised_branches_are_fresh_and_repeatable(net, batches, tmp_path):
    states = []
    with torch.no_grad():
        net.bn3.weight.fill_(5.0)
        net.bn3.running_mean.fill_(5.0)
        net.fc.weight.fill_(9.0)
    for seed, count in [(0, 2), (0, 3), (1, 2)]:
        starts = Starts(net)
        collect(
            net,
            batches,
            F.cross_entropy,
            store=tmp_path / str(len(states)),
            layers=["bn3", "fc.weight"],
            num_snapshots=1,
            num_trajectories=count,
            restart=Reinit(warmup_steps=0),
            seed=seed,
            optimizer=starts,
        )
        states.append([start.state_dict() for start in starts.models])
    (first, second), (again, again_second, third), (other, _) = states
    weights = [state["fc.weight"] for state in (first, second, third, other)]
    assert len(torch.unique(torch.stack(weights), dim=0)) == 4
    assert torch.equal(first["fc.weight"], again["fc.weight"])
    assert torch.equal(second["fc.weight"], again_second["fc.weight"])
    for state in (first, second, third):
        assert torch.equal(state["bn3.weight"], torch.ones(6))
        assert torch.equal(state["bn3.running_mean"], torch.zeros(6))
        assert torch.equal(state["fc.bias"], net.fc.bias)  # not chosen
        assert state["fc.weight"].abs().max() <= 6**-0.5
    assert torch.equal(net.fc.weight, torch.full((3, 6), 9.0))


def test_initialisation_leaves_the_global_random_state_alone(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    before = torch.get_rng_state()
    for restart in (Perturb(), Reinit(), Cycle()):
        collect(
            model,
            data(ROW),
            logits_loss,
            store=tmp_path,
            layers="head",
            num_snapshots=1,
            num_trajectories=2,
            restart=restart,
        )
    assert torch.equal(torch.get_rng_state(), before)


def test_a_module_that_cannot_be_initialised_is_named_before_anything_is_recorded(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.randn(6))

        def forward(self, x):
            return x * self.gain

    model = nn.Sequential(nn.Linear(6, 6), Scaled(), nn.Linear(6, 4))
    with pytest.raises(ConfigError) as caught:
        collect(
            model,
            data(ROW),
            logits_loss,
            store=tmp_path / "a",
            layers=["1", "2"],
            num_trajectories=2,
            restart=Reinit(),
        )
    assert str(caught.value) == (
        "restart = Reinit(warmup_steps=None): it calls reset_parameters(), which Scaled '1' (it owns 'gain') lacks; "
        "choose other layers, or Perturb()."
    )
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("restart", "num_warmup"),
    [
        (Perturb(), 0),
        (Reinit(), 3),
        (Cycle(), 9),
        (Perturb(warmup_steps=2), 2),
        (Reinit(warmup_steps=2), 2),
        (Cycle(warmup_steps=2), 2),
    ],
    ids=repr,
)
def test_only_the_steps_after_the_warmup_are_recorded(restart, num_warmup, tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    reports = []
    store = collect(
        model,
        data(ROW),
        logits_loss,
        store=tmp_path,
        layers="head",
        num_snapshots=3,
        num_trajectories=2,
        trajectory="mlp",
        restart=restart,
        on_progress=reports.append,
    )
    assert store.trajectories == ["mlp-1", "mlp-2"]
    assert store.steps.tolist() == 2 * [num_warmup + 1, num_warmup + 2, num_warmup + 3]
    num_steps = 2 * (num_warmup + 3)
    assert [report.step for report in reports] == list(range(1, num_steps + 1))
    assert {report.total_steps for report in reports} == {num_steps}
    for name in store.trajectories:
        assert torch.equal(store.base(name)["1.weight"].flatten(), rows_of(store, name)[-1][:24])


def test_a_cycle_is_one_run_under_a_cosine_rate(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    reference = copy.deepcopy(model)
    batches = data(ROW, num_batches=3)

    store = collect(
        model,
        batches,
        logits_loss,
        store=tmp_path,
        layers="last-norms:1",
        num_snapshots=2,
        num_trajectories=3,
        restart=Cycle(),
        optimizer=lambda parameters: torch.optim.SGD(
            [{"params": parameters[:1], "lr": 0.5}, {"params": parameters[1:], "lr": 1.0}], momentum=0.9
        ),
    )

    norm = reference.train()[1]
    made = torch.optim.SGD([{"params": [norm.weight]}, {"params": [norm.bias]}], lr=1.0, momentum=0.9)
    rows = []
    for step in range(3 * 8):
        factor = 0.5 * (1 + math.cos(math.pi * (step % 8) / 8))
        made.param_groups[0]["lr"], made.param_groups[1]["lr"] = 0.5 * factor, factor
        inputs, targets = batches[step % 3]
        reference.zero_grad()
        logits_loss(reference(inputs), targets).backward()
        made.step()
        if step % 8 >= 6:
            rows.append(torch.cat([norm.weight, norm.bias, norm.running_mean, norm.running_var]).detach())
    assert store.trajectories == ["run-001", "run-002", "run-003"]
    torch.testing.assert_close(store.rows(), torch.stack(rows), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("restart", [Perturb(), Cycle(warmup_steps=0)], ids=repr)
def test_the_default_optimizer_starts_at_lr(restart, tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    given = model[1].weight.detach().clone()
    store = collect(
        model,
        data(ROW),
        logits_loss,
        store=tmp_path,
        layers="1.weight",
        num_snapshots=1,
        num_trajectories=2,
        restart=restart,
        lr=0.25,
    )
    moved = (store.rows()[0].view(4, 6) - given).abs()
    torch.testing.assert_close(moved, torch.full((4, 6), 0.25), rtol=1e-3, atol=0.0)  # Adam's first step is the rate


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("restart", [Perturb(), Cycle(warmup_steps=0)], ids=repr)
def test_an_interruption_keeps_the_rows_and_the_base_of_every_branch(error, restart, net, batches, tmp_path):
    net.conv1.requires_grad_(False)
    F.cross_entropy(net(batches[0][0]), batches[0][1]).backward()
    net.eval().bn1.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    flags = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in net.parameters()]
    modes = [module.training for module in net.modules()]
    calls = []

    def loss_fn(outputs, targets):
        calls.append(1)
        if len(calls) == 9:
            raise error
        return F.cross_entropy(outputs, targets)

    with pytest.raises(error):
        collect(
            net,
            batches,
            loss_fn,
            store=tmp_path,
            layers=["bn3", "fc"],
            num_snapshots=5,
            num_trajectories=3,
            restart=restart,
        )

    store = SnapshotStore.open(tmp_path)
    if isinstance(restart, Perturb):  # the first batch was also used for the check
        assert store.steps.tolist() == [1, 2, 3, 1, 2, 1, 2]
    else:
        assert store.steps.tolist() == [1, 2, 3, 4, 5, 1, 2, 3]
    # In the last cycle the statistics have moved on since the last snapshot.
    for name in store.trajectories if isinstance(restart, Perturb) else store.trajectories[:1]:
        assert torch.equal(store.base(name)["bn3.weight"], rows_of(store, name)[-1][: net.bn3.weight.numel()])
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert modes == [module.training for module in net.modules()]
    assert not any("forward" in module.__dict__ for module in net.modules())
    for parameter, (requires_grad, grad) in zip(net.parameters(), flags, strict=True):
        assert parameter.requires_grad == requires_grad
        assert parameter.grad is grad is None or torch.equal(parameter.grad, grad)


def test_an_error_of_the_progress_callback_leaves_the_model_as_it_was(net, batches, tmp_path):
    def on_progress(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(
            net,
            batches,
            F.cross_entropy,
            store=tmp_path,
            layers="head",
            num_trajectories=2,
            on_progress=on_progress,
        )
    assert not any("forward" in module.__dict__ for module in net.modules())


@pytest.mark.parametrize("restart", [Perturb(), Cycle()], ids=repr)
def test_a_name_in_use_is_refused_before_a_step_is_taken(restart, net, batches, tmp_path):
    options = {"store": tmp_path, "layers": "head", "num_snapshots": 2}
    collect(net, batches, F.cross_entropy, trajectory="a-3", **options)
    with pytest.raises(TrajectoryExistsError, match="a-3 already holds 2 snapshots"):
        collect(net, batches, F.cross_entropy, trajectory="a", num_trajectories=3, restart=restart, **options)
    assert SnapshotStore.open(tmp_path).trajectories == ["a-3"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CollectConfig(restart="again"), r"restart = 'again': it must be Perturb\(\), Reinit\(\) or Cycle\(\)"),
        (lambda: CollectConfig(num_trajectories=0), "num_trajectories = 0: it must be at least 1"),
        (lambda: CollectConfig(num_snapshots=0), "num_snapshots = 0: it must be at least 1"),
        (lambda: CollectConfig(dtype="int8"), "dtype = 'int8': it must be one of float64"),
        (lambda: Perturb(noise=0.0), "noise = 0.0: it must be positive"),
        (lambda: Perturb(warmup_steps=-1), "warmup_steps = -1: it must be at least 0"),
        (lambda: Reinit(warmup_steps=-1), "warmup_steps = -1: it must be at least 0"),
        (lambda: Cycle(warmup_steps=-1), "warmup_steps = -1: it must be at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("old", "restart"),
    [
        ({"restart": "perturb"}, Perturb()),
        ({"noise": 0.2, "warmup_steps": 2}, Perturb(noise=0.2, warmup_steps=2)),
        ({"restart": "reinit", "warmup_steps": 1, "noise": 0.2}, Reinit(warmup_steps=1)),
        ({"restart": "reinit", "warmup_steps": None}, Reinit()),
        ({"restart": "cycle", "warmup_steps": 1}, Cycle(warmup_steps=1)),
    ],
)
def test_the_old_spelling_of_a_restart_is_the_new_one_and_warns(old, restart, tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    options = {"layers": "head", "num_snapshots": 2, "num_trajectories": 2}
    with pytest.warns(DeprecationWarning, match="pass restart=Perturb") as caught:
        before = collect(model, data(ROW), logits_loss, store=tmp_path / "old", **options, **old)
    after = collect(model, data(ROW), logits_loss, store=tmp_path / "new", **options, restart=restart)
    assert caught[0].filename == __file__
    assert torch.equal(before.rows(), after.rows())
    assert before.steps.tolist() == after.steps.tolist()


def test_an_old_restart_of_an_unknown_name_is_refused(net, batches, tmp_path):
    with (
        pytest.warns(DeprecationWarning, match="restart='again'"),
        pytest.raises(ConfigError, match="restart = 'again': it must be one of perturb, reinit, cycle"),
    ):
        collect(net, batches, F.cross_entropy, store=tmp_path, restart="again")


def test_one_object_says_the_same_as_its_fields_and_fields_change_it(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    config = CollectConfig(layers="head", num_snapshots=3, lr=0.1)
    fields = {"layers": "head", "num_snapshots": 3, "lr": 0.1}
    whole = collect(model, data(ROW), logits_loss, config, store=tmp_path / "object")
    split = collect(model, data(ROW), logits_loss, store=tmp_path / "fields", **fields)
    changed = collect(model, data(ROW), logits_loss, config, store=tmp_path / "both", num_snapshots=2)
    assert torch.equal(whole.rows(), split.rows())
    assert torch.equal(changed.rows(), whole.rows()[:2])
    with pytest.raises(TypeError, match="unexpected argument 'noise'; CollectConfig has layers, num_snapshots"):
        collect(model, data(ROW), logits_loss, config, store=tmp_path / "none", noise=0.1)


def test_an_optimizer_that_branches_would_share_is_refused(net, batches, tmp_path):
    shared = torch.optim.SGD(net.fc.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="must make a new optimizer each time"):
        collect(
            net,
            batches,
            F.cross_entropy,
            store=tmp_path,
            layers="head",
            num_trajectories=2,
            optimizer=lambda _: shared,
        )
