import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pdiff_plugin import PDiffRecorder, import_checkpoints
from pdiff_plugin.errors import FormatError, LayoutMismatchError, UnsupportedTensorError
from pdiff_plugin.modules.names import named_modules, named_tensors, unwrap, wrapped_names
from pdiff_plugin.snapshots.layout import DTYPES, Layout, TensorSpec, parse_layout
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
tensor_sets = st.lists(st.tuples(shapes, st.sampled_from(sorted(DTYPES))), min_size=1, max_size=5)


def make(specs, seed, lead=()):
    rng = torch.Generator().manual_seed(seed)
    return {
        f"t{i}": (torch.randn((*lead, *shape), generator=rng, dtype=torch.float64) * 100).to(DTYPES[dtype])
        for i, (shape, dtype) in enumerate(specs)
    }


def assert_identical(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@given(tensor_sets, st.integers(0, 2**31))
def test_flatten_and_unflatten_are_exact_for_every_shape_and_dtype(specs, seed):
    tensors = make(specs, seed)
    layout = Layout.from_tensors(tensors)
    flat = layout.flatten(tensors)
    assert flat.shape == (layout.num_values,)
    assert_identical(layout.unflatten(flat), tensors)


@given(tensor_sets, st.integers(0, 2**31), st.integers(1, 3))
def test_a_batch_flattens_like_each_of_its_members(specs, seed, num):
    tensors = make(specs, seed, lead=(num,))
    layout = Layout.from_tensors({name: tensor[0] for name, tensor in tensors.items()})
    flat = layout.flatten(tensors)
    assert flat.shape == (num, layout.num_values)
    assert_identical(layout.unflatten(flat), tensors)
    for index in range(num):
        assert torch.equal(layout.flatten({name: tensor[index] for name, tensor in tensors.items()}), flat[index])


@given(tensor_sets)
def test_a_layout_survives_json(specs):
    layout = Layout.from_tensors(make(specs, 0))
    again = Layout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    assert again.digest == layout.digest


def test_unflattened_tensors_own_their_memory_and_channels_last_keeps_logical_order():
    tensors = {"w": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)}
    layout = Layout.from_tensors(tensors)
    flat = layout.flatten(tensors)
    assert torch.equal(flat, tensors["w"].reshape(-1))
    found = layout.unflatten(flat)["w"]
    flat.zero_()
    assert torch.equal(found, tensors["w"])


def test_parameters_and_buffers_are_named_apart():
    bn = nn.BatchNorm1d(2)
    layout = Layout.from_tensors({"weight": bn.weight, "running_mean": bn.running_mean})
    assert [spec.kind for spec in layout] == ["parameter", "buffer"]
    assert layout.slices == {"weight": slice(0, 2), "running_mean": slice(2, 4)}


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ({"a": torch.zeros(2)}, "tensor 'b': the layout recorded parameter float32 (3,), found no such tensor."),
        ({"a": torch.zeros(2), "b": torch.zeros(4)}, "tensor 'b': the layout recorded (3,), found (4,)."),
        ({"a": torch.zeros(5, 2), "b": torch.zeros(4, 3)}, "tensor 'b': the layout recorded (3,), found (4, 3)."),
    ],
)
def test_flatten_names_the_first_tensor_that_does_not_fit(found, text):
    layout = Layout.from_tensors({"a": torch.zeros(2), "b": torch.zeros(3)}, {"a": "parameter", "b": "parameter"})
    with pytest.raises(LayoutMismatchError) as caught:
        layout.flatten(found)
    assert text in str(caught.value)


def test_a_flat_vector_of_another_length_is_refused():
    with pytest.raises(LayoutMismatchError, match="recorded 2 values, found 3"):
        Layout.from_tensors({"a": torch.zeros(2)}).unflatten(torch.zeros(3))


def test_an_integer_tensor_cannot_be_part_of_a_layout():
    with pytest.raises(UnsupportedTensorError) as caught:
        Layout.from_tensors({"n": torch.zeros(2, dtype=torch.int64)})
    assert str(caught.value) == ("tensor 'n' is of torch.int64; a snapshot holds float64, float32, float16, bfloat16.")


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"a": (2,), "c": (3,)}, "tensor 'c': the store recorded 'b' in its place"),
        ({"a": (2,), "b": (4,)}, "tensor 'b': the store recorded buffer float32 (3,), found buffer float32 (4,)"),
        ({"a": (2,)}, "tensor 'b': the store recorded buffer float32 (3,), found nothing"),
        ({"a": (2,), "b": (3,), "c": (1,)}, "tensor 'c': the store recorded nothing, found buffer float32 (1,)"),
    ],
)
def test_the_first_difference_of_two_layouts_is_named(other, text):
    layout = Layout.from_tensors({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(LayoutMismatchError) as caught:
        layout.check_same(Layout.from_tensors({name: torch.zeros(shape) for name, shape in other.items()}))
    assert text in str(caught.value)


def test_a_model_is_checked_by_name_and_shape_but_not_dtype():
    layout = Layout.from_tensors(dict(nn.Linear(2, 3).named_parameters()))
    layout.check_model(nn.Linear(2, 3).half())
    with pytest.raises(LayoutMismatchError, match=r"tensor 'weight': the generator recorded \(3, 2\), found \(3, 4\)"):
        layout.check_model(nn.Linear(4, 3))
    with pytest.raises(LayoutMismatchError, match="found no such tensor in this model"):
        layout.check_model(nn.Sequential(nn.Linear(2, 3)))


def test_the_steps_of_wrappers_are_left_out_of_names_and_those_of_a_user_are_not():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    inner = nn.Sequential(torch.compile(Own(), backend="eager"), nn.BatchNorm1d(2))
    model = nn.DataParallel(torch.compile(inner, backend="eager"))
    expected = ["0.module.weight", "0.module.bias", "1.weight", "1.bias"]
    expected += ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert list(named_tensors(model)) == expected
    assert unwrap(model) is inner
    assert wrapped_names(model)["0.module.weight"] == "0._orig_mod.module.weight"
    assert [name for name, _ in named_modules(model)] == ["", "0", "0.module", "1"]


def test_tied_tensors_and_shared_modules_come_once():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, shared, nn.Linear(2, 2))
    model[2].weight = shared.weight
    assert list(named_tensors(model)) == ["0.weight", "0.bias", "2.bias"]


SPEC = {"name": "a", "shape": [2], "dtype": "float32", "kind": "parameter"}
DOCUMENT = {"row_dtype": "bfloat16", "num_values": 2, "tensors": [SPEC]}


def test_a_document_is_a_layout_and_a_dtype_of_rows():
    layout, row_dtype = parse_layout(DOCUMENT, "here")
    assert layout == Layout((TensorSpec("a", (2,), "float32", "parameter"),))
    assert row_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("document", "text"),
    [
        (None, "here: found a NoneType, expected a JSON object"),
        ([DOCUMENT], "here: found a list, expected a JSON object"),
        ({}, "here: found tensors of type NoneType, expected a list of tensors"),
        (DOCUMENT | {"tensors": {"a": SPEC}}, "here: found tensors of type dict, expected a list of tensors"),
        (DOCUMENT | {"tensors": ["a"]}, "here: found the tensor 'a', expected name, shape (sizes from 0), dtype (one"),
        (DOCUMENT | {"tensors": [{**SPEC, "name": 1}]}, "found the tensor {'dtype': 'float32', "),
        (DOCUMENT | {"tensors": [{**SPEC, "shape": 2}]}, "found the tensor"),
        (DOCUMENT | {"tensors": [{**SPEC, "shape": [-2]}]}, "found the tensor"),
        (DOCUMENT | {"tensors": [{**SPEC, "shape": [2.0]}]}, "found the tensor"),
        (DOCUMENT | {"tensors": [{**SPEC, "shape": [True]}]}, "found the tensor"),
        (DOCUMENT | {"tensors": [{**SPEC, "shape": [2**63]}]}, "found the tensor"),
        (DOCUMENT | {"tensors": [{**SPEC, "dtype": "int8"}]}, "(one of float64, float32, float16, bfloat16) and kind"),
        (DOCUMENT | {"tensors": [{**SPEC, "kind": "other"}]}, "found the tensor"),
        (DOCUMENT | {"tensors": [SPEC, SPEC]}, "here: found 2 tensors of the name 'a', expected each name once"),
        (
            DOCUMENT | {"tensors": [{**SPEC, "shape": [2**40, 2**40]}]},
            f"here: found {2**80} values in a row, expected at most",
        ),
        (
            DOCUMENT | {"tensors": [{**SPEC, "shape": [2**62, 0]}]},
            f"here: found 'a' of shape ({2**62}, 0), expected at",
        ),
        (DOCUMENT | {"tensors": [{**SPEC, "shape": [1] * 65}]}, "expected at most 60 sizes and"),
        (
            DOCUMENT | {"row_dtype": "int8"},
            "here: found row_dtype 'int8', expected one of float64, float32, float16, b",
        ),
        (DOCUMENT | {"row_dtype": ["float32"]}, "here: found row_dtype ['float32']"),
        ({key: value for key, value in DOCUMENT.items() if key != "row_dtype"}, "here: found row_dtype None"),
        (DOCUMENT | {"num_values": 3}, "here: found num_values 3, expected 2, the sum of its tensors"),
        (DOCUMENT | {"num_values": "2"}, "here: found num_values '2', expected 2"),
    ],
)
def test_a_document_that_is_no_layout_is_refused_by_what_is_wrong(document, text):
    with pytest.raises(FormatError) as caught:
        parse_layout(document, "here")
    assert text in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(["row_dtype", "num_values", "tensors", "name", "shape", "dtype", "kind"]), json_values)
def test_no_value_of_a_document_ends_in_another_error(key, value):
    document = {**DOCUMENT, "tensors": [{**SPEC, key: value}]} if key in SPEC else {**DOCUMENT, key: value}
    try:
        layout, _ = parse_layout(document, "here")
    except FormatError:
        return
    assert layout.num_values == 2


@pytest.mark.parametrize("key", ["row_dtype", "num_values", "tensors"])
def test_whoever_reads_a_layout_refuses_a_wrong_one(tmp_path, key):
    """A store, a writer, a recorder and an import of checkpoints."""
    net = nn.Linear(2, 1)
    layout = Layout.from_tensors(dict(net.named_parameters()))
    TrajectoryWriter(tmp_path / "store", layout)
    path = tmp_path / "store" / "layout.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "wrong"}))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    for read in (
        SnapshotStore.open,
        lambda store: TrajectoryWriter(store, layout),
        lambda store: PDiffRecorder(store, layers="all").attach(net),
        lambda store: import_checkpoints(tmp_path / "net.pt", store=store, layers="all", model=net),
    ):
        with pytest.raises(FormatError, match=r"layout\.json: found"):
            read(tmp_path / "store")
