import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pdiff_plugin import DiffusionEnsemble, WeightSet, ensemble_from_diffusion, swapped
from pdiff_plugin.errors import ConfigError, LayoutMismatchError, TrainingModeError
from pdiff_plugin.snapshots.layout import Layout, named_tensors

M, B, C = 4, 5, 3


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, C)).eval()


@pytest.fixture
def x():
    return torch.randn(B, 6, generator=torch.Generator().manual_seed(1))


def perturbed(model, names, num_members=M, seed=2):
    rng = torch.Generator().manual_seed(seed)
    live = named_tensors(model)
    return WeightSet(
        {n: live[n].detach() + 0.3 * torch.rand(num_members, *live[n].shape, generator=rng) for n in names}
    )


@pytest.fixture
def weights(model):
    return perturbed(model, ["1.weight", "1.running_mean", "1.running_var", "3.bias"])


@torch.no_grad()
def by_swapping(model, weights, x):
    outputs = []
    for state in weights.members():
        with swapped(model, state):
            outputs.append(model(x))
    return torch.stack(outputs)


def test_members_are_those_of_swapping_one_after_another(model, weights, x):
    expected = by_swapping(model, weights, x)

    torch.testing.assert_close(DiffusionEnsemble(model, weights).members(x), expected, rtol=1e-5, atol=1e-6)
    assert len(expected.unique(dim=0)) == M


def test_the_output_is_the_log_of_the_mean_probability(model, weights, x):
    ensemble = DiffusionEnsemble(model, weights)

    expected = by_swapping(model, weights, x).softmax(-1).mean(0)

    torch.testing.assert_close(ensemble(x).exp(), expected)
    torch.testing.assert_close(F.cross_entropy(ensemble(x), torch.zeros(B, dtype=int)), -expected[:, 0].log().mean())


def test_copies_of_one_model_predict_as_that_model(model, x):
    weights = WeightSet({name: torch.stack([t.detach()] * M) for name, t in named_tensors(model).items() if t.ndim})
    ensemble = DiffusionEnsemble(model, weights)

    prediction = ensemble.predict(x)

    torch.testing.assert_close(prediction.probabilities, model(x).softmax(-1).detach())
    torch.testing.assert_close(prediction.mutual_information, torch.zeros(B), atol=1e-6, rtol=0)
    assert not prediction.disagreement.any()


class Lookup(nn.Module):
    """Returns its own logits whatever the input, so that predictions have closed forms."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.logits.expand(len(x), 2)


def test_two_certain_members_that_contradict_each_other_differ_by_one_bit():
    ensemble = DiffusionEnsemble(Lookup().eval(), {"logits": torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])})

    prediction = ensemble.predict(torch.zeros(1))

    assert prediction.probabilities.tolist() == [[0.5, 0.5]]
    assert prediction.predictive_entropy.item() == pytest.approx(math.log(2))
    assert prediction.expected_entropy.item() == 0.0
    assert prediction.mutual_information.item() == pytest.approx(math.log(2))
    assert prediction.disagreement.item() == 1.0


def test_disagreement_is_the_share_of_pairs_with_different_classes():
    ensemble = DiffusionEnsemble(Lookup().eval(), {"logits": torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])})

    assert ensemble.predict(torch.zeros(1)).disagreement.item() == pytest.approx(3 / 6)


def test_a_single_member_disagrees_with_nobody(model, x):
    ensemble = DiffusionEnsemble(model, perturbed(model, ["3.bias"], num_members=1))

    assert ensemble.predict(x).disagreement.tolist() == [0.0] * B


def test_the_model_and_the_weights_are_left_untouched(model, weights, x):
    before = {name: t.detach().clone() for name, t in named_tensors(model).items()}
    ensemble = DiffusionEnsemble(model, weights)
    expected = ensemble(x)

    weights["3.bias"].zero_()

    assert torch.equal(ensemble(x), expected)
    assert all(torch.equal(t, before[name]) for name, t in named_tensors(model).items())


def test_weights_follow_the_model_to_another_dtype(model, weights, x):
    ensemble = DiffusionEnsemble(model, weights)
    expected = ensemble(x)

    torch.testing.assert_close(ensemble.double()(x.double()), expected.double(), rtol=1e-5, atol=1e-5)


def test_weights_are_cast_to_the_models_own_dtypes(model, weights, x):
    ensemble = DiffusionEnsemble(model.bfloat16(), weights)

    assert {t.dtype for t in ensemble.weights.values()} == {torch.bfloat16}
    assert ensemble.members(x.bfloat16()).dtype == torch.bfloat16
    assert ensemble(x.bfloat16()).dtype == torch.float32


def test_wrappers_are_seen_through(model, weights, x):
    expected = DiffusionEnsemble(model, weights).members(x)
    model[3] = torch.compile(model[3], backend="eager")

    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))

    torch.testing.assert_close(DiffusionEnsemble(wrapped, weights).members(x), expected)


def test_a_model_in_train_mode_is_refused(model, weights):
    model[1].train()

    with pytest.raises(TrainingModeError) as error:
        DiffusionEnsemble(model, weights)

    assert str(error.value) == (
        "BatchNorm1d '1' is in train mode, in which members would share dropout and overwrite BatchNorm statistics. "
        "Call .eval() on the model (or the ensemble) first."
    )


def test_an_ensemble_put_into_train_mode_refuses_to_run(model, weights, x):
    ensemble = DiffusionEnsemble(model, weights).train()

    with pytest.raises(TrainingModeError, match="Sequential is in train mode"):
        ensemble(x)

    assert ensemble.eval()(x).shape == (B, C)


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        (
            {"1.weight": torch.zeros(2, 8), "4.bias": torch.zeros(2, 3)},
            "'4.bias': the weight set recorded (3,), found no",
        ),
        ({"1.weight": torch.zeros(2, 9)}, "tensor '1.weight': the weight set recorded (9,), found (8,)."),
        (
            {"1.weight": torch.zeros(2, 8), "3.bias": torch.zeros(3, 3)},
            "'3.bias': the set recorded 2 members on axis 0",
        ),
    ],
)
def test_weights_of_another_model_are_refused_by_name(model, weights, text):
    with pytest.raises(LayoutMismatchError) as error:
        DiffusionEnsemble(model, weights)

    assert text in str(error.value)


def test_an_ensemble_of_nobody_is_refused(model):
    with pytest.raises(ConfigError, match="must hold at least one member"):
        DiffusionEnsemble(model, {})


class FakeGenerator:
    """Draws as a generator does, and remembers how it was asked."""

    def __init__(self, model, names):
        self.layout = Layout.from_tensors({n: t for n, t in named_tensors(model).items() if n in names})
        self.model, self.asked = model, None

    def sample(self, num_members, **options):
        self.asked = options
        return perturbed(self.model, self.layout.names, num_members)


def test_a_generator_gives_the_members(model, x):
    generator = FakeGenerator(model, ["1.weight", "3.bias"])
    rng = torch.Generator()

    ensemble = ensemble_from_diffusion(model, generator, num_members=7, temperature=0.5, rng=rng, sampler="ddim")

    assert ensemble.members(x).shape == (7, B, C)
    assert generator.asked == {"num_sampling_steps": None, "temperature": 0.5, "rng": rng, "sampler": "ddim"}


def test_a_generator_of_another_model_is_refused_before_it_draws(model):
    generator = FakeGenerator(model, ["1.weight"])

    with pytest.raises(LayoutMismatchError, match=r"tensor '1\.weight': the generator recorded"):
        ensemble_from_diffusion(nn.Sequential(nn.Linear(2, 2)).eval(), generator)

    assert generator.asked is None
