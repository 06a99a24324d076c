import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from pdiff_plugin import DiffusionEnsemble, WeightSet, ensemble_from_diffusion, swapped
from pdiff_plugin.config import SamplingConfig
from pdiff_plugin.errors import ConfigError, FormatError, FormatVersionError, LayoutMismatchError, TrainingModeError
from pdiff_plugin.modules.names import named_tensors
from pdiff_plugin.snapshots.layout import Layout

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


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"strategy": "fast"}, "strategy = 'fast': it must be one of auto, trunk, loop."),
        (
            {"task": "ranking"},
            "task = 'ranking': it must be one of classification, multilabel, regression, gaussian-regression.",
        ),
        ({"member_chunk": 0}, "member_chunk = 0: it must be at least 1."),
    ],
)
def test_options_out_of_range_are_refused(model, weights, options, text):
    with pytest.raises(ConfigError) as error:
        DiffusionEnsemble(model, weights, **options)

    assert str(error.value) == text


def test_regression_gives_mean_and_variance(model, weights, x):
    ensemble = DiffusionEnsemble(model, weights, task="regression")
    outputs = by_swapping(model, weights, x)

    prediction = ensemble.predict(x)

    torch.testing.assert_close(ensemble(x), outputs.mean(0))
    torch.testing.assert_close(prediction.mean, outputs.mean(0))
    torch.testing.assert_close(prediction.variance, ((outputs - outputs.mean(0)) ** 2).mean(0))


def test_several_labels_have_the_logit_of_their_mean_probability(model, weights, x, tmp_path):
    ensemble = DiffusionEnsemble(model, weights, task="multilabel")
    probs = by_swapping(model, weights, x).sigmoid().mean(0)

    prediction = ensemble.predict(x)

    torch.testing.assert_close(ensemble(x).sigmoid(), probs)
    torch.testing.assert_close(prediction.probabilities, probs)
    entropy = torch.special.entr(probs) + torch.special.entr(1 - probs)
    torch.testing.assert_close(prediction.predictive_entropy, entropy)
    ensemble.save(tmp_path / "labels.safetensors")
    again = DiffusionEnsemble.load(tmp_path / "labels.safetensors", model)
    torch.testing.assert_close(again(x), ensemble(x))


def test_gaussians_have_mean_and_variance_of_their_mixture(model, weights, x):
    ensemble = DiffusionEnsemble(
        model, weights, task="gaussian-regression", select=lambda out: (out[:, 0], out[:, 1].exp())
    )
    outputs = by_swapping(model, weights, x)
    means, variances = outputs[..., 0], outputs[..., 1].exp()
    second = (variances + means**2).mean(0)

    mean, variance = ensemble(x)

    torch.testing.assert_close(mean, means.mean(0))
    torch.testing.assert_close(variance, second - mean**2)
    torch.testing.assert_close(ensemble.predict(x).variance, variance)
    with pytest.raises(ConfigError, match=r"must be a pair \(mean, variance\)"):
        DiffusionEnsemble(model, weights, task="gaussian-regression")(x)


def test_a_single_output_is_not_taken_for_a_certain_class(x):
    model = nn.Linear(6, 1).eval()
    ensemble = DiffusionEnsemble(model, perturbed(model, ["bias"]))

    with pytest.raises(ConfigError) as error:
        ensemble(x)

    assert str(error.value) == (
        "class_axis = 1: it must name an axis of at least 2 classes, but outputs have shape (5, 1); "
        'outputs without classes need task="regression".'
    )


@pytest.mark.parametrize(("layers", "axis"), [(nn.Conv2d(3, C, 1), 1), (nn.Linear(4, C), -1), (nn.Linear(4, C), 3)])
def test_dense_outputs_are_predicted_place_by_place(layers, axis):
    dense = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(3))
    model = layers.eval()
    weights = perturbed(model, ["bias"], num_members=6)
    ensemble = DiffusionEnsemble(model, weights, class_axis=axis, member_chunk=2)

    prediction = ensemble.predict(dense)

    members = by_swapping(model, weights, dense).movedim(axis % 4 + 1, -1).softmax(-1)  # (M, ..., C)
    mean = members.mean(0)
    torch.testing.assert_close(prediction.probabilities.movedim(axis, -1), mean)
    torch.testing.assert_close(ensemble(dense).exp(), prediction.probabilities)
    torch.testing.assert_close(prediction.predictive_entropy, -(mean * mean.log()).sum(-1))
    torch.testing.assert_close(prediction.expected_entropy, -(members * members.log()).sum(-1).mean(0))
    difference = prediction.predictive_entropy - prediction.expected_entropy
    torch.testing.assert_close(prediction.mutual_information, difference)
    votes = members.argmax(-1)
    pairs = torch.stack([votes[i] != votes[j] for i in range(6) for j in range(i)])
    torch.testing.assert_close(prediction.disagreement, pairs.float().mean(0))


class Wordy(nn.Module):
    """Returns its logits second, beside a feature map."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, C)

    def forward(self, x):
        return {"features": x, "scores": self.head(x)}


def test_logits_hidden_in_an_output_are_selected_or_asked_for(x):
    model = Wordy().eval()
    weights = perturbed(model, ["head.bias"])

    assert DiffusionEnsemble(model, weights, select=lambda output: output["scores"])(x).shape == (B, C)
    with pytest.raises(ConfigError, match="output of the model = 'dict': it must be logits or hold them as `logits`"):
        DiffusionEnsemble(model, weights)(x)


@pytest.mark.parametrize(
    "as_batch",
    [lambda x: (x, torch.zeros(len(x))), lambda x: [x], lambda x: x, lambda x: {"input": x, "labels": None}],
)
def test_a_loader_is_predicted_batch_by_batch(model, weights, as_batch):
    data = torch.randn(7, 6, generator=torch.Generator().manual_seed(3))
    ensemble = DiffusionEnsemble(model, weights)
    reports = []

    found = ensemble.predict_loader([as_batch(data[:4]), as_batch(data[4:])], on_progress=reports.append)

    expected = ensemble.predict(data)
    torch.testing.assert_close(found.probabilities, expected.probabilities)
    torch.testing.assert_close(found.mutual_information, expected.mutual_information)
    assert [(r.stage, r.step, r.total_steps) for r in reports] == [("predict", 1, 2), ("predict", 2, 2)]


def test_a_loader_of_other_batches_needs_to_be_told_the_inputs(model, weights, x):
    ensemble = DiffusionEnsemble(model, weights)
    loader = [("id", x, None)]

    with pytest.raises(ConfigError, match=r"loader = 'batches of tuple': it must give \(inputs, targets\)"):
        ensemble.predict_loader(loader)
    assert ensemble.predict_loader(iter(loader), inputs=lambda batch: batch[1]).probabilities.shape == (B, C)
    with pytest.raises(ConfigError, match="must give at least one batch"):
        ensemble.predict_loader([])


def test_each_member_leaves_as_a_state_dict(model, weights, x):
    ensemble = DiffusionEnsemble(model, weights)
    expected = ensemble.members(x)

    states = ensemble.members_state_dicts()

    assert len(states) == M
    model.load_state_dict(states[2], strict=False)
    torch.testing.assert_close(model(x).detach(), expected[2], rtol=1e-5, atol=1e-6)


def test_a_soup_is_a_model_of_its_own_with_the_mean_weights(model, weights, x):
    before = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}

    soup = DiffusionEnsemble(model, weights).to_soup()

    torch.testing.assert_close(soup[3].bias.detach(), weights["3.bias"].mean(0))
    assert soup(x).shape == (B, C)
    assert all(torch.equal(t, before[name]) for name, t in named_tensors(model).items())


def test_a_saved_ensemble_predicts_the_same_on_a_fresh_model(model, weights, x, tmp_path):
    ensemble = DiffusionEnsemble(model, weights, strategy="trunk", class_axis=-1, member_chunk=3)
    ensemble.save(tmp_path / "ensemble.safetensors")
    fresh = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, C)).eval()

    loaded = DiffusionEnsemble.load(tmp_path / "ensemble.safetensors", fresh, member_chunk=2)

    torch.testing.assert_close(loaded(x), ensemble(x))
    assert (loaded.strategy, loaded.class_axis, loaded.member_chunk) == ("trunk", -1, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["ensemble.safetensors"]


def test_without_a_copy_the_members_are_the_tensors_given(model, weights, x):
    shared, copied = DiffusionEnsemble(model, weights, copy=False), DiffusionEnsemble(model, weights)

    assert all(shared.weights[name].data_ptr() == weights[name].data_ptr() for name in weights)
    assert all(copied.weights[name].data_ptr() != weights[name].data_ptr() for name in weights)
    assert torch.equal(shared(x), copied(x))


def test_a_file_of_format_version_1_is_read():
    model = nn.Linear(2, 2).eval()

    ensemble = DiffusionEnsemble.load(Path(__file__).parents[1] / "data" / "ensemble-v1.safetensors", model)

    assert model.weight.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert ensemble.weights["bias"].tolist() == [[0.0, 0.5], [-1.0, 2.0]]
    assert ensemble.members(torch.tensor([[1.0, 1.0]])).tolist() == [[[3.0, 7.5]], [[2.0, 9.0]]]


def test_a_saved_ensemble_of_another_model_is_refused_and_changes_nothing(model, weights, tmp_path):
    DiffusionEnsemble(model, weights).save(tmp_path / "e.safetensors")
    other = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, C)).eval()
    before = {name: tensor.detach().clone() for name, tensor in named_tensors(other).items()}

    with pytest.raises(LayoutMismatchError, match=r"tensor '0\.weight'"):
        DiffusionEnsemble.load(tmp_path / "e.safetensors", other)

    assert all(torch.equal(t, before[name]) for name, t in named_tensors(other).items())


def test_a_saved_ensemble_of_a_smaller_model_is_refused_and_changes_nothing(model, weights, tmp_path):
    DiffusionEnsemble(model, weights).save(tmp_path / "e.safetensors")
    larger = nn.Sequential(*model, nn.Linear(C, 2)).eval()
    nn.init.zeros_(larger[0].weight)

    with pytest.raises(LayoutMismatchError) as caught:
        DiffusionEnsemble.load(tmp_path / "e.safetensors", larger)

    assert f"tensor '4.weight': {tmp_path / 'e.safetensors'} recorded no such tensor, found (2, {C})" in str(
        caught.value
    )
    assert not larger[0].weight.any()


def test_files_of_other_kinds_and_of_newer_releases_are_refused(model, weights, tmp_path):
    path = tmp_path / "e.safetensors"
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(FormatError, match="an unreadable file"):
        DiffusionEnsemble.load(path, model)

    save_file({"a": torch.zeros(1)}, path, {"format": "pdiff-generator", "format_version": "1"})
    with pytest.raises(FormatError, match="found format 'pdiff-generator', expected format 'pdiff-ensemble'"):
        DiffusionEnsemble.load(path, model)

    save_file({"a": torch.zeros(1)}, path, {"format": "pdiff-ensemble", "format_version": "7"})
    with pytest.raises(FormatVersionError, match="has format version 7; this release reads versions up to 1"):
        DiffusionEnsemble.load(path, model)


class FakeGenerator:
    """Draws as a generator does, and remembers how it was asked."""

    def __init__(self, model, names):
        self.layout = Layout.from_tensors({n: t for n, t in named_tensors(model).items() if n in names})
        self.model, self.asked = model, None

    def sample(self, num_members, sampling, **options):
        self.asked = {**vars(sampling), **options}
        return perturbed(self.model, self.layout.names, num_members)


def test_a_generator_gives_the_members(model, x):
    generator = FakeGenerator(model, ["1.weight", "3.bias"])
    rng = torch.Generator()

    ensemble = ensemble_from_diffusion(
        model, generator, num_members=7, condition={"angle": 5}, temperature=0.5, rng=rng, sampler="ddim"
    )

    assert ensemble.members(x).shape == (7, B, C)
    asked = {"temperature": 0.5, "rng": rng, "sampler": "ddim", "condition": {"angle": 5}}
    assert generator.asked == vars(SamplingConfig()) | asked


def test_settings_of_sampling_may_come_as_one_object_with_single_changes(model):
    generator = FakeGenerator(model, ["3.bias"])

    ensemble_from_diffusion(model, generator, sampling=SamplingConfig(diversity=0.5, temperature=0.7), temperature=0.9)

    assert (generator.asked["diversity"], generator.asked["temperature"]) == (0.5, 0.9)
    with pytest.raises(TypeError, match="unexpected argument 'steps'; SamplingConfig has sampler"):
        ensemble_from_diffusion(model, generator, steps=3)


def test_the_former_name_of_the_execution_warns(model, weights):
    ensemble = DiffusionEnsemble(model, weights)

    with pytest.warns(DeprecationWarning, match="is now called execution"):
        assert ensemble.evaluation == ensemble.execution == "vmap tail"


def test_a_generator_of_another_model_is_refused_before_it_draws(model):
    generator = FakeGenerator(model, ["1.weight"])

    with pytest.raises(LayoutMismatchError, match=r"tensor '1\.weight': the generator recorded"):
        ensemble_from_diffusion(nn.Sequential(nn.Linear(2, 2)).eval(), generator)

    assert generator.asked is None


@pytest.mark.parametrize(
    ("settings", "tensors", "error", "text"),
    [
        ("[]", {}, FormatError, "found settings of type list, expected a JSON object of settings"),
        ('{"class_axis": 1.5}', {}, FormatError, "found class_axis 1.5, expected a value of type int"),
        ('{"strategy": null}', {}, FormatError, "found strategy None, expected a value of type str"),
        ("{}", {"members/1.weight": torch.tensor(3.0)}, FormatError, "found no members, or some of no number"),
        ("{}", {"members/1.weight": torch.zeros(2, 5, dtype=torch.int64)}, LayoutMismatchError, "torch.int64"),
    ],
)
def test_a_file_of_other_settings_or_members_is_refused(tmp_path, settings, tensors, error, text):
    net = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)).eval()
    stored = {f"model/{name}": tensor for name, tensor in net.state_dict().items() if name != "1.weight"}
    header = {"format": "pdiff-ensemble", "format_version": "1", "settings": settings}
    save_file({**stored, "members/1.weight": torch.zeros(2, 5), **tensors}, tmp_path / "e.safetensors", header)
    with pytest.raises(error) as caught:
        DiffusionEnsemble.load(tmp_path / "e.safetensors", net)
    assert text in str(caught.value)


def test_settings_that_a_newer_release_has_added_are_left_out(tmp_path):
    net = nn.Sequential(nn.Linear(3, 5)).eval()
    header = {"format": "pdiff-ensemble", "format_version": "1", "settings": '{"mood": "good", "task": "regression"}'}
    members = {f"members/{name}": torch.stack([tensor] * 2) for name, tensor in net.state_dict().items()}
    save_file(members, tmp_path / "e.safetensors", header)
    assert DiffusionEnsemble.load(tmp_path / "e.safetensors", net).task == "regression"


@pytest.fixture
def files(tmp_path, weights):
    for number, member in enumerate(weights.members()):
        save_file(
            {name: tensor.contiguous() for name, tensor in member.items()}, tmp_path / f"member-{number}.safetensors"
        )
    return WeightSet.from_files(tmp_path)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_members_in_files_predict_as_those_in_memory(model, weights, files, x, task):
    expected = DiffusionEnsemble(model, weights, strategy="loop", task=task)

    ensemble = DiffusionEnsemble(model, files, task=task)

    assert ensemble.execution == "plain loop"
    assert torch.equal(ensemble(x), expected(x))
    assert torch.equal(ensemble.members(x), expected.members(x))
    found, wanted = (vars(one.predict_loader([(x, x)])) for one in (ensemble, expected))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for found, member in zip(ensemble.members_state_dicts(), expected.members_state_dicts(), strict=True):
        assert all(torch.equal(found[name], member[name]) for name in member)


def test_members_in_files_take_the_dtype_of_the_model(model, weights, files, x):
    model.double()

    found = DiffusionEnsemble(model, files)(x.double())

    assert torch.equal(found, DiffusionEnsemble(model, weights, strategy="loop")(x.double()))


def test_an_ensemble_of_files_is_saved_and_averaged_like_any(model, weights, files, x, tmp_path):
    expected, ensemble = DiffusionEnsemble(model, weights), DiffusionEnsemble(model, files)

    ensemble.save(tmp_path / "ensemble.safetensors")

    assert torch.equal(DiffusionEnsemble.load(tmp_path / "ensemble.safetensors", model)(x), expected(x))
    assert torch.equal(ensemble.to_soup()(x), expected.to_soup()(x))
    ensemble.set_weights(weights)
    assert torch.equal(ensemble(x), expected(x))


def test_members_in_files_are_refused_where_they_cannot_share_their_trunk(model, files):
    with pytest.raises(ConfigError, match=r"strategy = 'trunk'.*stay in their files"):
        DiffusionEnsemble(model, files, strategy="trunk")
