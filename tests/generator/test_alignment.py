"""Weight matching: which networks are taken, that units are put back, and that rows are read in that order."""

from itertools import permutations

import pytest
import torch
from torch import nn

from pdiff_plugin.errors import ConfigError
from pdiff_plugin.generator.alignment import Alignment, align, match, reader, recognise
from pdiff_plugin.modules.names import named_tensors
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

MLP = nn.Sequential(
    nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)
)
CNN = nn.Sequential(
    *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
    *(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    *(nn.Linear(12 * 4, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 4)),
)
POOLED = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3))


class Named(nn.Module):
    """A module that only has names: nothing here is run."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def floats(model):
    return {name: tensor.detach() for name, tensor in named_tensors(model).items() if tensor.is_floating_point()}


def randomised(model, seed=0):
    """The model's tensors as a trained network has them: no two units alike, and variances positive."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, t in floats(model).items():
        noise = torch.randn(t.shape, generator=rng) / max(1, t[0].numel()) ** 0.5
        tensors[name] = noise.exp() if name.endswith("running_var") else noise
    return tensors


def random_alignment(layout, seed=1):
    rng = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(width, generator=rng) for _, width in recognise(layout).layers])
    return Alignment(layout, {"run-002": order})


def outputs(model, flat, layout, x):
    with torch.no_grad():
        return torch.func.functional_call(model.eval(), layout.unflatten(flat), (x,))


@pytest.fixture
def write(tmp_path):
    def make(layout, *runs, base=None):
        for rows in runs:
            writer = TrajectoryWriter(tmp_path / "store", layout)
            writer.write_chunk(rows, list(range(1, len(rows) + 1)))
            if base is not None:
                writer.write_base(base, {})
        return SnapshotStore.open(tmp_path / "store")

    return make


@pytest.mark.parametrize(
    ("model", "shape"),
    [(MLP, (7, 6)), (CNN, (7, 3, 8, 8)), (POOLED, (7, 2, 9))],
    ids=["mlp with layernorm", "cnn with batchnorm", "cnn that is pooled"],
)
def test_units_in_random_order_compute_the_same_and_are_put_back_exactly(model, shape):
    tensors = randomised(model)
    layout = Layout.from_tensors(tensors)
    flat, x = layout.flatten(tensors), torch.randn(shape)
    shuffle = random_alignment(layout).columns("run-002", 0, layout.num_values)
    shuffled = flat[shuffle]

    order = match(layout, recognise(layout), flat, shuffled, torch.Generator().manual_seed(0))

    back = Alignment(layout, {"run-002": order}).columns("run-002", 0, layout.num_values)
    assert not torch.equal(shuffled, flat)
    torch.testing.assert_close(outputs(model, shuffled, layout, x), outputs(model, flat, layout, x), rtol=0, atol=1e-5)
    assert torch.equal(shuffled[back], flat)


def test_every_column_is_read_exactly_once():
    layout = Layout.from_tensors(floats(CNN))

    columns = random_alignment(layout).columns("run-002", 0, layout.num_values)

    assert torch.equal(columns.sort().values, torch.arange(layout.num_values))


def test_the_order_of_a_single_layer_is_the_best_of_all():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    layout = Layout.from_tensors(floats(model))
    mine, theirs = (layout.flatten(randomised(model, seed)) for seed in (0, 1))

    found = match(layout, recognise(layout), mine, theirs, torch.Generator())

    def agreement(order):
        return float(mine @ theirs[Alignment(layout, {"a": torch.tensor(order)}).columns("a", 0, layout.num_values)])

    assert tuple(found.tolist()) == max(permutations(range(5)), key=agreement)


def test_running_statistics_take_no_part_in_the_match_but_move_along():
    tensors = randomised(CNN)
    layout = Layout.from_tensors(tensors)
    flat = layout.flatten(tensors)
    disturbed = flat[random_alignment(layout).columns("run-002", 0, layout.num_values)].clone()
    place = layout.slices["1.running_var"]
    disturbed[place] *= torch.tensor([1e6, 1, 1e6, 1, 1, 1e6, 1, 1])

    order = match(layout, recognise(layout), flat, disturbed, torch.Generator())

    back = disturbed[Alignment(layout, {"a": order}).columns("a", 0, layout.num_values)]
    assert torch.equal(back[layout.slices["0.weight"]], flat[layout.slices["0.weight"]])
    assert not torch.equal(back[place], flat[place])
    assert torch.equal(back[place].sort().values, disturbed[place].sort().values)


def test_rows_are_read_in_the_order_of_the_first_run_in_whatever_pieces(write):
    layout = Layout.from_tensors(floats(CNN))
    first = torch.stack([layout.flatten(randomised(CNN, seed)) for seed in range(5)])
    alignment = random_alignment(layout)
    columns = alignment.columns("run-002", 0, layout.num_values)
    recorded = torch.empty_like(first)
    recorded[:, columns] = first
    store = write(layout, first, recorded)
    read = reader(store, alignment)

    assert torch.equal(read(), torch.cat([first, first]))
    assert torch.equal(read(100, 1000, torch.tensor([9, 0, 5])), first[[4, 0, 0], 100:1000])
    assert read(7, 7).shape == (10, 0)


def test_matching_brings_a_shuffled_copy_back_and_reports_how_close(write):
    layout = Layout.from_tensors(floats(MLP))
    centre = layout.flatten(randomised(MLP))
    first = centre + 0.01 * torch.randn(20, layout.num_values)
    second = centre + 0.01 * torch.randn(20, layout.num_values)
    shuffle = random_alignment(layout).columns("run-002", 0, layout.num_values)
    store = write(layout, first, second[:, shuffle])

    found = align(store, torch.arange(40), torch.ones(40, dtype=torch.bool), block_values=50)

    assert torch.equal(reader(store, found)(), torch.cat([first, second]))
    assert found.report["separation_before"] > 10
    assert found.report["separation_after"] < 1
    assert found.report["units_moved"].keys() == {"0.weight", "3.weight"}


REFUSED = {
    "only norms": (nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)), "0.weight", "comes first"),
    "only a head": (Named(head=nn.Linear(4, 3)), "head.weight", "only layer"),
    "widths that do not chain": (nn.Sequential(nn.Linear(4, 8), nn.Linear(9, 3)), "1.weight", "takes 9 inputs"),
    "attention": (
        Named(fc=nn.Linear(8, 8), attention=nn.MultiheadAttention(8, 2)), "attention.in_proj_weight", "no linear layer",
    ),
    "a recurrence": (nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 2)), "0.weight_ih_l0", "no linear layer"),
    "an embedding": (nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 3)), "1.weight", "takes 8 inputs"),
    "a grouped convolution": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=4)), "1.weight", "takes 2 inputs",
    ),
    "group normalization": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Conv2d(8, 3, 1)), "1.weight", "GroupNorm",
    ),
    "a slope per channel": (
        nn.Sequential(nn.Conv1d(2, 6, 3), nn.PReLU(6), nn.Conv1d(6, 3, 1)), "1.weight", "without running statistics",
    ),
    "a norm of another width": (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(4)), "1.weight", "should have shape (8,)"),
    "a convolution after a linear layer": (
        nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (8, 1)), nn.Conv1d(8, 8, 1)), "2.weight", "does not follow",
    ),
    "a named shortcut": (
        Named(a=nn.Linear(4, 4), shortcut=nn.Linear(4, 4), b=nn.Linear(4, 4)), "shortcut.weight", "repeated block",
    ),
    "residual blocks of one width": (
        Named(stem=nn.Linear(4, 4), blocks=nn.Sequential(Named(fc1=nn.Linear(4, 4), fc2=nn.Linear(4, 4)))),
        "blocks.0.fc1.weight", "repeated block",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_stack_is_refused_by_the_first_tensor_that_does_not_fit(case):
    model, name, reason = REFUSED[case]

    with pytest.raises(ConfigError) as caught:
        recognise(Layout.from_tensors(floats(model)))

    assert f"Tensor {name!r}" in str(caught.value)
    assert reason in str(caught.value)
    assert "takes a whole plain stack" in str(caught.value)


def test_a_network_that_was_not_recorded_whole_is_refused(write):
    model = Named(first=nn.Linear(4, 6), between=nn.Linear(6, 6), last=nn.Linear(6, 3))
    tensors = floats(model)
    recorded = {name: tensor for name, tensor in tensors.items() if not name.startswith("between")}
    layout = Layout.from_tensors(recorded)
    store = write(layout, torch.randn(12, layout.num_values), base=tensors)

    with pytest.raises(ConfigError, match=r"lacks tensor 'between\.bias'"):
        align(store, torch.arange(12), torch.ones(12, dtype=torch.bool), block_values=100)
