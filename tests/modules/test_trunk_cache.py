import copy
import importlib.util
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pdiff_plugin import DiffusionEnsemble, WeightSet
from pdiff_plugin.errors import ConcurrentUseError
from pdiff_plugin.modules.names import named_tensors

_spec = importlib.util.spec_from_file_location("awkward_models", Path(__file__).with_name("models.py"))
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

M = 5


def inputs(shape):
    rng = torch.Generator().manual_seed(1)
    if shape == models.TOKENS:
        return torch.randint(1, 20, shape, generator=rng)
    return torch.randn(shape, generator=rng)


def build(make):
    torch.manual_seed(0)
    model = make().eval()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        if norms:  # statistics of no data at all would let activations explode
            for norm in norms:
                norm.momentum, norm.training = 1.0, True
            model(torch.randn(8, 3, 64, 64))
        for norm in norms:
            norm.eval()
        for tensor in named_tensors(model).values():  # zero biases and unit scales would hide errors
            if tensor.is_floating_point() and tensor.ndim < 2:
                tensor.add_(torch.rand_like(tensor) * 0.1)
    return model


def perturbed(model, pick, num_members=M, size=0.3):
    rng = torch.Generator().manual_seed(2)
    chosen = {n: t for n, t in named_tensors(model).items() if t.is_floating_point() and pick(n)}
    assert chosen
    return WeightSet(
        {n: t.detach() + size * torch.rand(num_members, *t.shape, generator=rng) for n, t in chosen.items()}
    )


def starts(*prefixes):
    return lambda name: name.startswith(prefixes)


ROW = (4, 6)
VMAP, CACHED, PLAIN = "vmap tail", "cached loop", "plain loop"
CASES = {
    "resnet18 last norms": (lambda: models.timm_model("resnet18"), starts("layer4.1.bn"), models.IMAGES, VMAP),
    "resnet18 head": (lambda: models.timm_model("resnet18"), starts("fc."), models.IMAGES, VMAP),
    "resnet18 in-place shortcut": (
        lambda: models.timm_model("resnet18"),
        starts("layer4.0.downsample.1."),
        models.IMAGES,
        CACHED,
    ),
    "resnet18 last convolution": (
        lambda: models.timm_model("resnet18"),
        starts("layer4.1.conv2."),
        models.IMAGES,
        CACHED,
    ),
    "vit": (models.small_vit, starts("blocks.3.norm2", "norm.", "head."), models.IMAGES, VMAP),
    "vit positions": (models.small_vit, starts("pos_embed"), models.IMAGES, VMAP),
    "convnext": (models.small_convnext, starts("stages.3.blocks.0.norm", "head."), models.IMAGES, VMAP),
    "densenet": (
        lambda: (
            models.timm_model("densenet121", growth_rate=4, block_config=(2, 2, 2), init_features=8)
            if False
            else models.timm_model("densenet121")
        ),
        starts("features.norm5", "features.denseblock4.denselayer16.norm2"),
        models.IMAGES,
        VMAP,
    ),
    "hugging face vit": (
        models.hf_vit,
        lambda n: ("layernorm" in n and "3" in n) or "classifier" in n,
        models.IMAGES,
        VMAP,
    ),
    "hugging face bert": (models.hf_bert, starts("bert.encoder.layer.3.", "classifier."), models.TOKENS, VMAP),
    "hugging face gpt2": (models.hf_gpt2, starts("transformer.ln_f", "score."), models.TOKENS, VMAP),
    "transformer encoder": (models.transformer_encoder, starts("1.layers.2.", "2."), models.TOKENS, VMAP),
    "lstm": (models.Recurrent, starts("lstm."), models.TOKENS, CACHED),
    "lstm head": (models.Recurrent, starts("head."), models.TOKENS, VMAP),
    "tied weights": (models.Tied, starts("embed."), models.TOKENS, VMAP),
    "borrowed weights": (models.Borrower, starts("scale."), ROW, VMAP),
    "smuggled weights": (models.Smuggler, starts("victim."), ROW, VMAP),
    "custom function": (models.Custom, starts("gain"), ROW, CACHED),
    "data-dependent branch": (lambda: models.Branching(in_place=False), starts("gate."), ROW, CACHED),
    "data-dependent write": (models.Branching, starts("gate."), ROW, CACHED),
    "careless writes": (models.Careless, starts("norm.", "head."), ROW, CACHED),
    "careless writes, head only": (models.Careless, starts("head."), ROW, VMAP),
    "read before an in-place write": (models.ReadsThenWrites, starts("head."), ROW, VMAP),
    "opaque output": (models.Opaque, starts("head."), ROW, VMAP),
    "first layer": (models.Borrower, starts("first."), ROW, VMAP),
    "python state": (models.Stateful, starts("head."), ROW, PLAIN),
}


@pytest.mark.parametrize("case", CASES)
def test_members_equal_those_of_the_plain_loop(case):
    make, pick, shape, execution = CASES[case]
    model = build(make)
    weights = perturbed(model, pick)
    x = inputs(shape)
    kept = x.clone()
    expected = DiffusionEnsemble(model, weights, strategy="loop").members(x)
    before = {name: (tensor._version, tensor.clone()) for name, tensor in named_tensors(model).items()}
    ensemble = DiffusionEnsemble(model, weights)

    for _ in range(2):  # what the first batch teaches must serve the second
        found = ensemble.members(x)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()

    assert ensemble.execution == execution
    assert (expected - expected[0]).abs().max() > 1e-3 * expected.abs().max()
    assert torch.equal(x, kept)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(t._version == before[n][0] and torch.equal(t, before[n][1]) for n, t in named_tensors(model).items())


@pytest.mark.parametrize("num_members", [1, 2, 7])
@pytest.mark.parametrize("chunk", [1, 2, 3, None])
def test_chunks_of_members_come_in_order(num_members, chunk):
    model = build(models.Borrower)
    weights = perturbed(model, starts("scale."), num_members)
    expected = DiffusionEnsemble(model, weights, strategy="loop").members(inputs(ROW))

    found = DiffusionEnsemble(model, weights, member_chunk=chunk).members(inputs(ROW))

    torch.testing.assert_close(found, expected)


def test_a_write_that_only_later_members_make_is_caught():
    model = build(models.Branching)
    gate = torch.full((6, 1), -100.0)
    gate[3] = -100.0 + torch.pi / 40
    ensemble = DiffusionEnsemble(model, {"gate.bias": gate}, vectorize=False)
    expected = DiffusionEnsemble(model, {"gate.bias": gate}, strategy="loop").members(inputs(ROW))

    for _ in range(2):
        torch.testing.assert_close(ensemble.members(inputs(ROW)), expected)

    assert not torch.equal(expected[3], expected[2])
    assert ensemble.execution == CACHED


def test_a_model_that_cannot_be_replayed_is_run_whole(caplog):
    model = build(models.Stateful)

    DiffusionEnsemble(model, perturbed(model, starts("head."))).members(inputs(ROW))

    assert "Stateful is run whole for every member: its members differ when their common part is computed once" in (
        caplog.text
    )


class Dropping(nn.Module):
    """Random numbers between two clean modules, drawn inside a third or by the model itself."""

    def __init__(self, drop):
        super().__init__()
        self.before, self.drop, self.after = nn.Linear(6, 8), drop, nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.after(self.drop(self.before(x))))


class AlwaysDrops(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, training=True)


@pytest.mark.parametrize("drop", [AlwaysDrops(), AlwaysDrops().forward], ids=["module", "function"])
def test_members_draw_their_own_random_numbers_in_the_trunk(drop):
    model = Dropping(drop).eval()
    weights = {"head.weight": model.head.weight.detach().expand(M, 3, 8)}

    members = DiffusionEnsemble(model, weights, strategy="trunk", vectorize=False).members(inputs(ROW))

    assert len(torch.unique(members, dim=0)) == M


def flops(function, *args, **kwargs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args, **kwargs)
    return counter.get_total_flops()


@pytest.mark.parametrize(("pick", "limit"), [(starts("fc."), 1.01), (starts("layer4.1.bn"), 3.0)])
@pytest.mark.parametrize("chunk", [None, 8])
def test_32_members_of_a_resnet18_cost_a_few_forward_passes(pick, limit, chunk):
    model = build(lambda: pytest.importorskip("timm").create_model("resnet18"))
    x = inputs((1, 3, 224, 224))
    ensemble = DiffusionEnsemble(model, perturbed(model, pick, 32), member_chunk=chunk)
    ensemble(x)  # the first batch is checked against the plain loop

    assert flops(ensemble, x) / flops(model, x) <= limit
    assert ensemble.execution == VMAP


HEAVY = {
    # name: (model, generated, shape, modules whose arithmetic is the tail)
    "vit": (models.small_vit, starts("blocks.3.norm2", "head."), models.IMAGES, ["blocks.3.mlp", "head"]),
    "convnext": (
        models.small_convnext,
        starts("stages.3.blocks.0.norm", "head."),
        models.IMAGES,
        ["stages.3.blocks.0.mlp", "head"],
    ),
    "hugging face vit": (
        models.hf_vit,
        lambda n: n.startswith("vit.layernorm") or n.startswith("classifier"),
        models.IMAGES,
        ["classifier"],
    ),
    "hugging face bert": (
        models.hf_bert,
        starts("bert.encoder.layer.3.output.LayerNorm", "classifier."),
        models.TOKENS,
        ["bert.pooler", "classifier"],
    ),
}


@pytest.mark.parametrize("case", HEAVY)
def test_transformers_and_convnext_cost_trunk_plus_tails(case):
    make, pick, shape, tail = HEAVY[case]
    model = build(make)
    x = inputs(shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    by_module = counter.get_flop_counts()
    whole = sum(by_module["Global"].values())
    tail_flops = sum(sum(by_module[f"{type(model).__name__}.{name}"].values()) for name in tail)
    ensemble = DiffusionEnsemble(model, perturbed(model, pick, 32))
    ensemble(x)

    found = flops(ensemble, x)

    assert found == pytest.approx(whole - tail_flops + 32 * tail_flops, rel=0.01)
    assert found < 20 * whole
    assert ensemble.execution == VMAP


def test_an_opaque_trunk_is_still_computed_once():
    model = build(models.Opaque)
    ensemble = DiffusionEnsemble(model, perturbed(model, starts("head."), 32))
    x = inputs(ROW)
    ensemble(x)

    assert flops(ensemble, x) < 3 * flops(model, x)


def test_a_stack_with_keyword_inputs_and_a_dictionary_output():
    model = build(models.Blocks)
    weights = perturbed(model, starts("blocks.5.", "head."))
    x = inputs(ROW)
    expected = DiffusionEnsemble(model, weights, strategy="loop").members(x=x, scale=0.5)
    ensemble = DiffusionEnsemble(model, weights)

    torch.testing.assert_close(ensemble.members(x=x, scale=0.5), expected)
    assert flops(ensemble, x=x) == flops(lambda: model(x=x)) + (M - 1) * (4 * 6 * 6 * 2 + 4 * 6 * 4 * 2)


class Flaky(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        self.fails = False

    def forward(self, x):
        if self.fails:
            raise ValueError("a user's own error")
        return self.head(self.body(x))


def test_after_an_exception_the_model_and_the_ensemble_work_as_before():
    model = build(Flaky)
    model.body.forward = model.body.forward  # as accelerate's hooks leave it
    own = model.body.__dict__["forward"]
    ensemble = DiffusionEnsemble(model, perturbed(model, starts("head.")))
    expected = ensemble.members(inputs(ROW))
    model.fails = True

    with pytest.raises(ValueError, match="a user's own error"):
        ensemble.members(inputs(ROW))

    model.fails = False
    assert model.body.__dict__["forward"] is own
    assert "forward" not in model.head.__dict__
    assert torch.equal(ensemble.members(inputs(ROW)), expected)


def test_a_users_error_in_the_tail_is_not_taken_for_a_refusal_of_vmap():
    model = build(models.Borrower)
    ensemble = DiffusionEnsemble(model, perturbed(model, starts("scale.")))

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ensemble(torch.zeros(4, 5))

    assert ensemble.execution == VMAP


@pytest.mark.parametrize("strategy", ["auto", "loop"])
def test_inference_mode_is_left_and_entered_again(strategy):
    model = build(lambda: models.timm_model("resnet18"))
    ensemble = DiffusionEnsemble(model, perturbed(model, starts("layer4.0.downsample.1.")), strategy=strategy)
    expected = ensemble(inputs(models.IMAGES))

    with torch.inference_mode():
        found = ensemble(inputs(models.IMAGES))
        assert torch.is_inference_mode_enabled()

    torch.testing.assert_close(found, expected)


def test_no_gradient_is_recorded_and_gradient_mode_comes_back():
    model = build(models.Borrower)
    ensemble = DiffusionEnsemble(model, perturbed(model, starts("scale.")))

    assert not ensemble(inputs(ROW).requires_grad_()).requires_grad
    assert torch.is_grad_enabled()


def test_autocast_gives_what_the_plain_loop_gives_under_it():
    model = build(lambda: models.timm_model("resnet18"))
    weights = perturbed(model, starts("layer4.1.bn"))
    x = inputs(models.IMAGES)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = DiffusionEnsemble(model, weights, strategy="loop").members(x)
        found = DiffusionEnsemble(model, weights, strategy="trunk").members(x)
        log_probabilities = DiffusionEnsemble(model, weights)(x)

    assert found.dtype == torch.bfloat16
    assert log_probabilities.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_a_second_thread_is_refused():
    model = build(models.Borrower)
    ensemble = DiffusionEnsemble(model, perturbed(model, starts("scale.")))
    inside, go_on, errors = threading.Event(), threading.Event(), []

    def wait(module, args):
        inside.set()
        assert go_on.wait(20)

    handle = model.first.register_forward_pre_hook(wait)
    thread = threading.Thread(target=ensemble, args=(inputs(ROW),))
    thread.start()
    try:
        assert inside.wait(20)
        handle.remove()
        for intruder in (ensemble, model):
            with pytest.raises(ConcurrentUseError) as error:
                intruder(inputs(ROW))
            errors.append(str(error.value))
    finally:
        go_on.set()
        thread.join()

    assert (
        errors
        == [
            "an ensemble over this Borrower is already running, and its members take turns inside the live model. "
            "Give each thread its own copy.deepcopy of the model or the ensemble."
        ]
        * 2
    )
    assert ensemble(inputs(ROW)).shape == (4, 6)


def test_a_copied_ensemble_routes_its_own_model():
    model = build(models.Borrower)
    ensemble = DiffusionEnsemble(model, perturbed(model, starts("scale.")))
    expected = ensemble(inputs(ROW))

    twin = copy.deepcopy(ensemble)
    model.first.weight.data.zero_()

    torch.testing.assert_close(twin(inputs(ROW)), expected)
    assert flops(twin, inputs(ROW)) < M * flops(model, inputs(ROW))


def test_compiled_parts_are_run_by_the_plain_loop():
    model = build(models.Borrower)
    weights = perturbed(model, starts("scale."))
    expected = DiffusionEnsemble(model, weights).members(inputs(ROW))
    model.second = torch.compile(model.second, backend="eager")

    ensemble = DiffusionEnsemble(model, weights)

    torch.testing.assert_close(ensemble.members(inputs(ROW)), expected)
    assert ensemble.execution == PLAIN


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 cannot export what runs under vmap")
@pytest.mark.parametrize(
    ("make", "pick", "shape"),
    [
        (lambda: models.timm_model("resnet18"), starts("layer4.1.bn"), models.IMAGES),
        (lambda: models.timm_model("resnet18"), starts("fc."), models.IMAGES),
        (models.small_vit, starts("norm.", "head."), models.IMAGES),
    ],
)
def test_the_ensemble_exports_with_its_trunk_once(make, pick, shape):
    model = build(make)
    ensemble = DiffusionEnsemble(model, perturbed(model, pick))
    x = inputs(shape)

    program = torch.export.export(ensemble, (x,), strict=False)

    torch.testing.assert_close(program.module()(x), ensemble(x), rtol=1e-4, atol=1e-5)
    convolutions = [n for n in program.graph.nodes if "conv2d" in str(n.target)]
    assert len(convolutions) == sum(isinstance(m, nn.Conv2d) for m in model.modules())


def test_a_compiled_ensemble_gives_the_same():
    model = build(models.Borrower)
    ensemble = DiffusionEnsemble(model, perturbed(model, starts("scale.")))

    found = torch.compile(ensemble, backend="eager")(inputs(ROW))

    torch.testing.assert_close(found, ensemble(inputs(ROW)))
    assert not found.requires_grad


def test_the_loss_of_the_ensemble_is_that_of_its_mean_probability():
    model = build(models.Borrower)
    ensemble = DiffusionEnsemble(model, perturbed(model, starts("scale.")))
    targets = torch.tensor([0, 1, 2, 3])

    mean = ensemble.members(inputs(ROW)).softmax(-1).mean(0)

    torch.testing.assert_close(F.cross_entropy(ensemble(inputs(ROW)), targets), F.nll_loss(mean.log(), targets))


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["resnet18 last norms", "resnet18 in-place shortcut", "vit", "lstm"])
def test_members_on_a_gpu_equal_those_of_the_plain_loop(case):
    make, pick, shape, _ = CASES[case]
    model = build(make)
    weights = perturbed(model, pick)
    ensemble = DiffusionEnsemble(model, weights).to("cuda")
    x = inputs(shape).cuda()

    for context in (torch.autocast("cuda", enabled=False), torch.autocast("cuda", dtype=torch.bfloat16)):
        with context:
            expected = DiffusionEnsemble(model, weights, strategy="loop").members(x)
            found = ensemble.members(x)
        tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
