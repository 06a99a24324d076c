import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pdiff_plugin import swap_, swapped
from pdiff_plugin.errors import LayoutMismatchError
from pdiff_plugin.modules.names import named_tensors

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class Bag(nn.Module):
    """Tensors of any shape, dtype and kind."""

    def __init__(self, tensors):
        super().__init__()
        for index, (tensor, is_parameter) in enumerate(tensors):
            if is_parameter:
                self.register_parameter(f"t{index}", nn.Parameter(tensor))
            else:
                self.register_buffer(f"t{index}", tensor)


def bits(tensor):
    return tensor.detach().clone().contiguous().flatten().view(torch.uint8).tolist()


def random_bits(shape, dtype, rng):
    """Any bit pattern, NaNs and infinities among them."""
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=rng)
    return raw.view(dtype).reshape(shape)


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
specs = st.lists(st.tuples(shapes, st.sampled_from(DTYPES), st.booleans(), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(specs=specs, seed=st.integers(0, 2**31), source=st.sampled_from(DTYPES))
def test_swap_and_restore_leave_every_tensor_bit_identical(specs, seed, source):
    rng = torch.Generator().manual_seed(seed)
    tensors = []
    for shape, dtype, is_parameter, transposed in specs:
        tensor = random_bits(shape[::-1] if transposed else shape, dtype, rng)
        tensors.append((tensor.permute(tuple(reversed(range(tensor.ndim)))) if transposed else tensor, is_parameter))
    model = Bag(tensors)
    before = {name: (id(t), t.dtype, t.stride(), bits(t)) for name, t in named_tensors(model).items()}
    state = {name: torch.randn(t.shape, generator=rng).to(source) for name, t in named_tensors(model).items()}

    with swapped(model, state):
        for name, tensor in named_tensors(model).items():
            assert bits(tensor) == bits(state[name].to(tensor.dtype))

    assert {name: (id(t), t.dtype, t.stride(), bits(t)) for name, t in named_tensors(model).items()} == before


def test_a_swap_for_good_changes_only_what_is_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    expected = copy.deepcopy(model.state_dict()) | {"1.running_mean": torch.arange(4.0)}

    swap_(model, {"1.running_mean": torch.arange(4, dtype=torch.float64)})

    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def test_the_originals_come_back_after_an_exception():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()

    with pytest.raises(KeyError), swapped(model, {"weight": torch.zeros(2, 2)}):
        {}["a user's mistake"]

    assert torch.equal(model.weight, before)


def test_nested_blocks_come_back_one_by_one():
    model = nn.Linear(1, 1, bias=False)
    seen = []

    with swapped(model, {"weight": torch.tensor([[1.0]])}):
        with swapped(model, {"weight": torch.tensor([[2.0]])}):
            seen.append(model.weight.item())
        seen.append(model.weight.item())

    assert seen == [2.0, 1.0]


def test_tied_tensors_are_swapped_under_their_first_name():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    before = model["embed"].weight.detach().clone()

    with swapped(model, {"embed.weight": torch.ones(5, 3)}):
        assert torch.equal(model["head"].weight, torch.ones(5, 3))

    assert model["head"].weight is model["embed"].weight
    assert torch.equal(model["head"].weight, before)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_names_are_those_without_wrappers(wrap):
    inner = nn.Linear(2, 1, bias=False)

    swap_(wrap(nn.Sequential(wrap(inner))), {"0.weight": torch.tensor([[3.0, 4.0]])})

    assert inner.weight.tolist() == [[3.0, 4.0]]


def test_a_buffer_replaced_inside_the_block_is_restored_too():
    model = nn.BatchNorm1d(2)

    with swapped(model, {"running_mean": torch.ones(2)}):
        model.double()  # replaces the buffers

    assert model.running_mean.tolist() == [0.0, 0.0]


def test_gradients_and_training_are_left_alone():
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()

    with swapped(model, {"weight": torch.zeros(1, 2)}):
        pass

    assert model.weight.requires_grad
    assert model.weight.grad.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (
            {"bias": torch.zeros(1), "wieght": torch.zeros(2, 1)},
            "tensor 'wieght': the new state recorded (2, 1), found no such tensor in this model. "
            "Build the model as in the recorded run, or record into a new store.",
        ),
        (
            {"bias": torch.zeros(1), "weight": torch.zeros(2, 1)},
            "tensor 'weight': the new state recorded (2, 1), found (1, 2). "
            "Build the model as in the recorded run, or record into a new store.",
        ),
    ],
)
def test_a_state_of_another_model_is_refused_and_nothing_is_copied(state, text):
    model = nn.Linear(2, 1)
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(LayoutMismatchError) as error:
        swap_(model, state)

    assert str(error.value) == text
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
