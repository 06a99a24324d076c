import pytest
import torch
from torch import nn

from pdiff_plugin import SnapshotStore, collect
from pdiff_plugin.errors import ConfigError, SelectionError


def fingerprint(model):
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identity": [id(tensor) for tensor in [*model.parameters(), *model.buffers()]],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
    }


def assert_same(before, after):
    for key in ("identity", "flags", "modes"):
        assert before[key] == after[key], key
    assert all(torch.equal(before["weights"][name], tensor) for name, tensor in after["weights"].items())
    for old, new in zip(before["grads"], after["grads"], strict=True):
        assert (old is None) == (new is None)
        assert old is None or torch.equal(old, new)


@pytest.fixture
def finished(net, batches):
    net.conv1.requires_grad_(False)
    nn.functional.cross_entropy(net(batches[0][0]), batches[0][1]).backward()
    net.eval()
    net.bn1.train()
    return net


def test_collect_records_every_step_of_the_chosen_layers_only(finished, batches, tmp_path):
    reports = []
    store = collect(
        finished,
        batches,
        nn.functional.cross_entropy,
        store=tmp_path,
        num_snapshots=10,
        on_progress=reports.append,
    )
    assert store.steps.tolist() == list(range(1, 11))
    rows = store.rows()
    assert len(torch.unique(rows, dim=0)) == 10
    base = store.base()
    for name, tensor in finished.state_dict().items():
        recorded = name in store.layout.names or name in ("bn2.num_batches_tracked", "bn3.num_batches_tracked")
        assert torch.equal(base[name], tensor) != recorded, name
    assert torch.equal(base["bn3.weight"], store.state_dict(-1)["bn3.weight"])
    assert [report.step for report in reports] == list(range(1, 11))
    assert {report.total_steps for report in reports} == {10}
    assert reports[0].metrics["loss"] > 0
    assert store.base_header("run-001")["rest_drift"] == "0.0"


def test_the_model_comes_back_as_it_was_given(finished, batches, tmp_path):
    before = fingerprint(finished)
    collect(finished, batches, nn.functional.cross_entropy, store=tmp_path, layers="norms", num_snapshots=5)
    assert_same(before, fingerprint(finished))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interruption_gives_the_model_back_and_keeps_the_rows(finished, batches, tmp_path, error):
    before = fingerprint(finished)

    def loss_fn(outputs, targets):
        calls.append(1)
        if len(calls) == 4:
            raise error
        return nn.functional.cross_entropy(outputs, targets)

    calls = []
    with pytest.raises(error):
        collect(finished, batches, loss_fn, store=tmp_path, num_snapshots=9)
    assert_same(before, fingerprint(finished))
    assert SnapshotStore.open(tmp_path).steps.tolist() == [1, 2, 3]


def test_another_optimizer_and_a_second_trajectory(net, batches, tmp_path):
    made = []

    def factory(parameters):
        made.append(torch.optim.SGD(parameters, lr=0.5))
        return made[-1]

    for _ in range(2):
        store = collect(
            net, batches, nn.functional.cross_entropy, store=tmp_path, layers="head", num_snapshots=3, optimizer=factory
        )
    assert store.trajectories == ["run-001", "run-002"]
    assert [len(optimizer.param_groups[0]["params"]) for optimizer in made] == [2, 2]


def test_nested_batches_are_moved_to_the_device(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, inputs):
            return self.fc(inputs["x"][0])

    batches = [({"x": [torch.ones(3, 2)]}, torch.tensor([0, 1, 0]))]
    store = collect(
        Named(), batches, nn.functional.cross_entropy, store=tmp_path, layers="head", num_snapshots=2, device="cpu"
    )
    assert len(store) == 2


def test_an_empty_loader_is_refused(net, tmp_path):
    with pytest.raises(ConfigError, match="must yield at least one batch"):
        collect(net, [], nn.functional.cross_entropy, store=tmp_path)


def test_layers_that_are_not_there_are_refused_before_anything_is_touched(net, batches, tmp_path):
    before = fingerprint(net)
    with pytest.raises(SelectionError, match="matches no module"):
        collect(net, batches, nn.functional.cross_entropy, store=tmp_path, layers="bn9")
    assert_same(before, fingerprint(net))
