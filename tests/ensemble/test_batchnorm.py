import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from pdiff_plugin import DiffusionEnsemble, WeightSet, recalibrate_batchnorm, swapped
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.modules.names import named_tensors


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6, momentum=0.3),
        nn.Dropout(0.5),
        nn.Linear(6, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 3),
        nn.BatchNorm1d(3, track_running_stats=False),
    )
    return model.eval()


@pytest.fixture
def batches():
    rng = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 4, generator=rng) + 2.0, torch.zeros(8)) for _ in range(3)]


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}


def test_statistics_equal_those_of_torch_without_dropout(model, batches):
    names = recalibrate_batchnorm(model, batches)
    found = state_of(model)

    model[2] = nn.Identity()
    update_bn(batches, model)

    assert names == ["1", "4"]
    for name in ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var"):
        torch.testing.assert_close(found[name], state_of(model)[name])


def test_nothing_but_the_statistics_changes(model, batches):
    model[0].train()  # a mode that no rule would guess
    before = state_of(model)
    modes = [module.training for module in model.modules()]

    recalibrate_batchnorm(model, batches)

    changed = {name for name, tensor in state_of(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "4.running_mean", "4.running_var"}
    assert [module.training for module in model.modules()] == modes
    assert (model[1].momentum, model[4].momentum) == (0.3, 0.1)


def test_after_an_exception_everything_is_as_before(model, batches):
    before = state_of(model)
    modes = [module.training for module in model.modules()]

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        recalibrate_batchnorm(model, [*batches, (torch.zeros(8, 9), None)])

    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())
    assert [module.training for module in model.modules()] == modes
    assert (model[1].momentum, model[4].momentum) == (0.3, 0.1)


def test_layers_before_the_first_swapped_tensor_are_left_alone(model, batches):
    before = state_of(model)

    assert recalibrate_batchnorm(model, batches, since=["3.bias"]) == ["4"]

    assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert not torch.equal(model[4].running_mean, before["4.running_mean"])


def test_every_member_gets_the_statistics_of_its_own_weights(model, batches):
    weights = WeightSet({"3.weight": torch.stack([model[3].weight.detach() * factor for factor in (0.5, 1.0, 3.0)])})
    ensemble = DiffusionEnsemble(model, weights)
    before = state_of(model)
    expected = []
    for state in weights.members():
        with swapped(model, {**state, "4.running_mean": torch.zeros(5), "4.running_var": torch.ones(5)}):
            recalibrate_batchnorm(model, batches, since=["3.weight"])
            expected.append(state_of(model))

    assert recalibrate_batchnorm(ensemble, batches) == ["4"]

    assert sorted(ensemble.names) == ["3.weight", "4.running_mean", "4.running_var"]
    for name in ensemble.names:
        torch.testing.assert_close(ensemble.weights[name], torch.stack([state[name] for state in expected]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())


def test_recorded_statistics_of_an_ensemble_are_replaced(model, batches):
    weights = {"4.weight": torch.ones(2, 5), "4.running_mean": torch.full((2, 5), 99.0)}
    ensemble = DiffusionEnsemble(model, weights)

    recalibrate_batchnorm(ensemble, batches)

    assert ensemble.weights["4.running_mean"].abs().max() < 10
    assert ensemble(batches[0][0]).shape == (8, 3)


def test_a_pass_may_be_cut_short_and_reports_its_batches(model, batches):
    reports = []

    recalibrate_batchnorm(model, iter(batches), num_batches=2, on_progress=reports.append)

    assert [(report.step, report.total_steps) for report in reports] == [(1, 2), (2, 2)]


def test_a_model_without_batchnorm_is_left_alone(batches):
    assert recalibrate_batchnorm(nn.Linear(4, 2), batches) == []


def test_an_empty_loader_is_refused(model):
    with pytest.raises(ConfigError) as error:
        recalibrate_batchnorm(model, [])

    assert str(error.value) == "loader = 'no batches': it must give at least one batch."
