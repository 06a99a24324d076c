import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pdiff_plugin import PDiffRecorder
from pdiff_plugin.errors import (
    FormatError,
    FormatVersionError,
    LayoutMismatchError,
    StoreNotFoundError,
    TrajectoryExistsError,
)
from pdiff_plugin.snapshots.chunks import PlannedWindow, save_chunk
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

LAYOUT = Layout.from_tensors({"a": torch.zeros(2, 2), "b": torch.zeros(3)})
DATA = Path(__file__).parents[1] / "data"


def rows(num, start=0):
    return torch.arange(start * 7, (start + num) * 7, dtype=torch.float32).reshape(num, 7)


def write(path, trajectory=None, chunks=((1, 2, 3), (4, 5)), layout=LAYOUT, **kwargs):
    writer = TrajectoryWriter(path, layout, trajectory=trajectory, **kwargs)
    for steps in chunks:
        writer.write_chunk(rows(len(steps), steps[0]), steps)
    return writer


def chunk(path, number, trajectory="run-001"):
    return path / "trajectories" / trajectory / f"chunk-{number:06d}.safetensors"


def test_a_store_gives_back_what_was_written(tmp_path):
    writer = TrajectoryWriter(tmp_path, LAYOUT)
    writer.write_chunk(rows(2), [5, 9], [0.5, None], [{"loss": 1.5}, {}])
    store = SnapshotStore.open(tmp_path)
    assert len(store) == 2
    assert store.layout == LAYOUT
    assert store.steps.tolist() == [5, 9]
    assert store.epochs == [0.5, None]
    assert store.metrics == [{"loss": 1.5}, {}]
    assert torch.equal(store.rows(), rows(2))
    state = store.state_dict(-1)
    assert torch.equal(state["a"], rows(2)[1, :4].reshape(2, 2))
    assert torch.equal(state["b"], rows(2)[1, 4:])
    with pytest.raises(IndexError, match="snapshot 2 of a store that holds 2"):
        store.state_dict(2)


def test_columns_and_picked_rows_equal_those_of_the_full_rows(tmp_path):
    write(tmp_path)
    write(tmp_path, chunks=((1,), (2, 3)))
    store = SnapshotStore.open(tmp_path)
    full = store.rows()
    assert full.shape == (8, 7)
    for lo, hi in ((0, 7), (0, 1), (2, 5), (6, 7), (3, 3)):
        assert torch.equal(store.rows(lo, hi), full[:, lo:hi])
        for indices in ([0], [7, 0, 3], [4, 3, 2, 1], [2, 2], list(range(8)), [1, 0, 2], []):
            assert torch.equal(store.rows(lo, hi, indices), full[indices, lo:hi])


def test_negative_indices_and_masks_pick_rows_as_they_do_in_a_tensor(tmp_path):
    write(tmp_path)
    store = SnapshotStore.open(tmp_path)
    full = store.rows()
    mask = torch.tensor([False, True, False, False, True])
    assert torch.equal(store.rows(1, 4, [-1, 0, -5]), full[[-1, 0, -5], 1:4])
    for picked in (mask, mask.tolist(), mask.numpy()):
        assert torch.equal(store.rows(indices=picked), full[mask])
    columns = torch.tensor([6, 2])
    assert torch.equal(store.gather(columns, torch.tensor([-1, 0])), full[[-1, 0]][:, columns])
    assert torch.equal(store.gather(columns, mask), full[mask][:, columns])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"indices": [0, 5]}, "snapshot 5 of a store that holds 5"),
        ({"indices": [-6]}, "snapshot -6 of a store that holds 5"),
        ({"indices": torch.ones(4, dtype=torch.bool)}, "a mask of shape (4,) for a store that holds 5"),
        ({"lo": 6, "hi": 8}, "columns 6 to 8 of a store whose rows have 7"),
        ({"lo": -1}, "columns -1 to 7 of a store whose rows have 7"),
        ({"lo": 3, "hi": 2}, "columns 3 to 2 of a store whose rows have 7"),
    ],
)
def test_snapshots_and_columns_that_the_store_does_not_have_are_refused(tmp_path, given, text):
    write(tmp_path)
    store = SnapshotStore.open(tmp_path)
    with pytest.raises(IndexError) as caught:
        store.rows(**given)
    assert str(caught.value) == text
    if "indices" in given:
        with pytest.raises(IndexError, match=r"store that holds 5"):
            store.gather(torch.tensor([0]), torch.as_tensor(given["indices"]))


def test_several_trajectories_are_told_apart(tmp_path):
    write(tmp_path, "b", chunks=((1, 2),))
    write(tmp_path, "a", chunks=((1,), (2, 3)))
    store = SnapshotStore.open(tmp_path)
    assert store.trajectories == ["a", "b"]
    assert store.trajectory_index.tolist() == [0, 0, 0, 1, 1]
    assert store.steps.tolist() == [1, 2, 3, 1, 2]


def test_writers_at_the_same_time_get_trajectories_of_their_own(tmp_path):
    writers = [TrajectoryWriter(tmp_path, LAYOUT) for _ in range(3)]
    for index, writer in enumerate(writers):
        writer.write_chunk(rows(1, index), [1])
    store = SnapshotStore.open(tmp_path)
    assert store.trajectories == ["run-001", "run-002", "run-003"]
    assert torch.equal(store.rows(), rows(3))


def test_rows_may_be_bfloat16_and_the_store_decides(tmp_path):
    write(tmp_path, row_dtype=torch.bfloat16)
    second = write(tmp_path, row_dtype=torch.float32)
    assert second.row_dtype == torch.bfloat16
    with safe_open(chunk(tmp_path, 1, "run-002"), framework="pt") as file:
        assert file.get_tensor("rows").dtype == torch.bfloat16
    assert SnapshotStore.open(tmp_path).rows().dtype == torch.float32


def test_another_layout_is_refused_by_the_name_of_the_first_difference(tmp_path):
    write(tmp_path)
    other = Layout.from_tensors({"a": torch.zeros(2, 2), "b": torch.zeros(4)})
    with pytest.raises(LayoutMismatchError) as caught:
        TrajectoryWriter(tmp_path, other)
    assert str(caught.value) == (
        f"tensor 'b': the store {tmp_path} recorded buffer float32 (3,), found buffer float32 (4,). "
        "Build the model as in the recorded run, or record into a new store."
    )


def test_a_newer_format_is_refused_by_both_numbers(tmp_path):
    write(tmp_path)
    document = json.loads((tmp_path / "layout.json").read_text())
    (tmp_path / "layout.json").write_text(json.dumps(document | {"format_version": 7}))
    for opened in (SnapshotStore.open, lambda path: TrajectoryWriter(path, LAYOUT)):
        with pytest.raises(FormatVersionError, match="has format version 7; this release reads versions up to 1"):
            opened(tmp_path)


def test_a_chunk_of_a_newer_format_is_refused(tmp_path):
    write(tmp_path)
    save_file({"rows": rows(1)}, chunk(tmp_path, 2), {"format": "pdiff-snapshots", "format_version": "2"})
    with pytest.raises(FormatVersionError, match="has format version 2; this release reads versions up to 1"):
        SnapshotStore.open(tmp_path)


def test_a_truncated_chunk_is_reported_and_the_rest_is_read(tmp_path, caplog):
    write(tmp_path)
    whole = chunk(tmp_path, 2).read_bytes()
    for size in (0, 5, len(whole) - 1):
        chunk(tmp_path, 2).write_bytes(whole[:size])
        caplog.clear()
        store = SnapshotStore.open(tmp_path)
        assert store.steps.tolist() == [1, 2, 3]
        assert len(store.problems) == 1
        assert store.problems[0].startswith(f"{chunk(tmp_path, 2)}: found an unreadable file")
        assert store.problems[0].endswith(
            "expected a complete pdiff-snapshots file. Check the path; if it is right, copy the file again or write it "
            "anew. Its snapshots are left out."
        )
        assert store.problems[0] in caplog.text


def test_a_chunk_of_another_width_is_reported(tmp_path):
    write(tmp_path)
    write(tmp_path / "other", layout=Layout.from_tensors({"a": torch.zeros(7 * 2)}), chunks=())
    other = TrajectoryWriter(tmp_path / "other", Layout.from_tensors({"a": torch.zeros(7 * 2)}), trajectory="x")
    other.write_chunk(torch.zeros(1, 14), [4]).replace(chunk(tmp_path, 2))
    store = SnapshotStore.open(tmp_path)
    assert len(store) == 3
    assert "found rows of torch.float32 (1, 14), expected torch.float32 (1, 7)" in store.problems[0]


def test_strays_are_ignored_and_cleaned_by_the_next_writer_of_the_trajectory(tmp_path):
    write(tmp_path)
    folder = chunk(tmp_path, 1).parent
    for name in (".tmp-99-chunk-000003.safetensors", "notes.txt", "chunk-3.safetensors"):
        (folder / name).write_bytes(b"half")
    store = SnapshotStore.open(tmp_path)
    assert len(store) == 5
    assert store.problems == []
    TrajectoryWriter(tmp_path, LAYOUT, trajectory="run-001", resume_step=5)
    assert not list(folder.glob(".tmp-*"))
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda path: None,
            "is not a snapshot store: there is no such folder. Give the folder that PDiffRecorder wrote",
        ),
        (lambda path: path.write_text(""), "is not a snapshot store: it is a file"),
        (lambda path: path.mkdir(), "is not a snapshot store: it has no layout.json"),
    ],
)
def test_a_path_that_is_not_a_store_is_named(tmp_path, make, text):
    make(tmp_path / "x")
    with pytest.raises(StoreNotFoundError) as caught:
        SnapshotStore.open(tmp_path / "x")
    assert str(tmp_path / "x") in str(caught.value)
    assert text in str(caught.value)


@pytest.mark.parametrize("text", ["{", '{"format": "something"}', "[]"])
def test_a_layout_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "layout.json").write_text(text)
    with pytest.raises(FormatError, match=r"layout\.json: found"):
        SnapshotStore.open(tmp_path)


def test_a_trajectory_with_snapshots_is_not_written_over(tmp_path):
    write(tmp_path, "a")
    with pytest.raises(TrajectoryExistsError) as caught:
        TrajectoryWriter(tmp_path, LAYOUT, trajectory="a")
    assert "already holds 5 snapshots. Choose another trajectory name" in str(caught.value)


@pytest.mark.parametrize("name", ["../up", ".hidden", "a/b", "a b", ""])
def test_a_trajectory_name_that_is_no_folder_name_is_refused(tmp_path, name):
    with pytest.raises(FormatError, match="expected letters, digits"):
        TrajectoryWriter(tmp_path, LAYOUT, trajectory=name)


def test_rows_past_the_restored_step_are_dropped(tmp_path, caplog):
    write(tmp_path, "a")
    writer = TrajectoryWriter(tmp_path, LAYOUT, trajectory="a", resume_step=2)
    assert writer.num_rows == writer.last_step == 2
    assert f"dropped 3 snapshots past step 2 from {writer.folder}" in caplog.text
    writer.write_chunk(rows(2, 50), [3, 4])
    store = SnapshotStore.open(tmp_path)
    assert store.steps.tolist() == [1, 2, 3, 4]
    assert torch.equal(store.rows(), torch.cat([rows(2, 1), rows(2, 50)]))


def test_the_oldest_chunks_are_dropped_and_the_last_of_them_cut(tmp_path):
    writer = write(tmp_path, chunks=((1, 2, 3), (4, 5, 6), (7, 8)))
    writer.drop_oldest(4)
    assert SnapshotStore.open(tmp_path).steps.tolist() == [4, 5, 6, 7, 8]
    writer.drop_oldest(4, exactly=True)
    store = SnapshotStore.open(tmp_path)
    assert store.steps.tolist() == [5, 6, 7, 8]
    assert torch.equal(store.rows(), torch.cat([rows(3, 4)[1:], rows(2, 7)]))
    assert writer.write_chunk(rows(1), [9]) == chunk(tmp_path, 4)


def test_the_base_keeps_tied_tensors_once_and_integer_buffers(tmp_path):
    tied = torch.randn(4, 4)
    writer = write(tmp_path)
    writer.write_base({"in": tied, "out": tied, "t": tied.t(), "n": torch.tensor(3)}, {"rest_drift": "0.5"})
    store = SnapshotStore.open(tmp_path)
    base = store.base()
    assert sorted(base) == ["in", "n", "out", "t"]
    assert torch.equal(base["out"], tied)
    assert torch.equal(base["t"], tied.t())
    assert base["n"].item() == 3
    assert base["in"].data_ptr() == base["out"].data_ptr()
    assert store.base_header("run-001")["rest_drift"] == "0.5"
    assert store.base("run-009") is None
    assert store.base_header("run-009") == {}


def test_a_base_may_hold_every_dtype_that_safetensors_knows(tmp_path):
    writer = write(tmp_path)
    state = {
        str(dtype): torch.tensor([[0, 1], [1, 0]]).to(dtype)
        for dtype in (torch.bool, torch.int8, torch.int32, torch.uint16, torch.complex64, torch.float8_e4m3fn)
    }
    writer.write_base(state, {})
    found = SnapshotStore.open(tmp_path).base()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (None, "found an unreadable file"),
        ({"format": "pt"}, "found format 'pt', expected format 'pdiff-snapshots'"),
        ({"format": "pdiff-snapshots"}, "found format_version None, expected a whole number"),
        ({"format": "pdiff-snapshots", "format_version": "9"}, "has format version 9"),
        ({"format": "pdiff-snapshots", "format_version": "1", "step": "last"}, "found step 'last', expected a number"),
    ],
)
def test_a_base_that_cannot_be_read_is_reported_and_the_snapshots_are_read(tmp_path, header, text):
    path = write(tmp_path).folder / "base.safetensors"
    path.write_bytes(b"half a fi") if header is None else save_file({"a": torch.zeros(1)}, path, header)

    store = SnapshotStore.open(tmp_path)

    assert len(store) == 5
    assert len(store.problems) == 1
    assert str(path) in store.problems[0]
    assert text in store.problems[0]
    assert store.problems[0].endswith("The whole model of run-001 is left out.")
    assert store.base_header("run-001") == {}
    with pytest.raises((FormatError, FormatVersionError), match=re.escape(text)):
        store.base()


def test_a_run_whose_base_cannot_be_read_is_resumed_all_the_same(tmp_path, caplog):
    def train(recorder, model, num_steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with recorder.attach(model, optimizer, total_steps=4):
            for _ in range(num_steps):
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
            return recorder.state_dict()

    model = nn.Linear(2, 1)
    state = train(PDiffRecorder(tmp_path, layers="all"), model, 2)
    folder = tmp_path / "trajectories" / "run-001"
    (folder / "base.safetensors").write_bytes(b"half a fi")
    recorder = PDiffRecorder(tmp_path, layers="all")
    recorder.load_state_dict(state)

    train(recorder, model, 2)

    assert recorder.error is None
    assert "base.safetensors: found an unreadable file" in caplog.text
    store = SnapshotStore.open(tmp_path)
    assert store.trajectories == ["run-001"]
    assert store.problems == []  # the base is that of the finished run now


@pytest.mark.parametrize("aliases", ["{", "[]", '{"b": "nothing"}', '{"b": 1}'])
def test_a_base_with_other_aliases_is_refused(tmp_path, aliases):
    path = write(tmp_path).folder / "base.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"format": "pdiff-snapshots", "format_version": "1", "aliases": aliases})
    with pytest.raises(FormatError, match="aliases"):
        SnapshotStore.open(tmp_path).base()


ROWS, STEPS = rows(2), torch.tensor([6, 7])


@pytest.mark.parametrize(
    ("tensors", "header", "text"),
    [
        ({"steps": STEPS}, {}, "found the tensors steps, expected rows and steps"),
        ({"rows": ROWS}, {}, "found the tensors rows, expected rows and steps"),
        ({"rows": ROWS.bfloat16(), "steps": STEPS}, {}, "rows of torch.bfloat16 (2, 7), expected torch.float32 (2, 7)"),
        ({"rows": ROWS[:1], "steps": STEPS}, {}, "found rows of torch.float32 (1, 7), expected torch.float32 (2, 7)"),
        ({"rows": ROWS, "steps": STEPS.int()}, {}, "found steps of torch.int32 (2,), expected torch.int64 (n,)"),
        ({"rows": ROWS, "steps": STEPS[None]}, {}, "found steps of torch.int64 (1, 2), expected torch.int64 (n,)"),
        ({"rows": ROWS, "steps": STEPS}, {"epochs": None}, "found None as epochs, expected a header with JSON as epoc"),
        ({"rows": ROWS, "steps": STEPS}, {"epochs": "[1"}, "found '[1' as epochs"),
        ({"rows": ROWS, "steps": STEPS}, {"epochs": "[1]"}, "found other epochs, expected 2 numbers or nulls"),
        ({"rows": ROWS, "steps": STEPS}, {"epochs": '[1, "x"]'}, "found other epochs"),
        ({"rows": ROWS, "steps": STEPS}, {"epochs": '{"0": 1, "1": 2}'}, "found other epochs"),
        ({"rows": ROWS, "steps": STEPS}, {"metrics": "[{}]"}, "found other metrics, expected 2 objects of name -> nu"),
        ({"rows": ROWS, "steps": STEPS}, {"metrics": '[{}, {"loss": "low"}]'}, "found other metrics"),
        ({"rows": ROWS, "steps": STEPS}, {"metrics": "[{}, [1]]"}, "found other metrics"),
        (
            {"rows": ROWS, "steps": torch.tensor([7, 6])},
            {},
            "found steps that do not rise, expected whole numbers from",
        ),
        ({"rows": ROWS, "steps": torch.tensor([7, 7])}, {}, "found steps that do not rise"),
        (
            {"rows": ROWS, "steps": torch.tensor([-2, -1])},
            {},
            "found steps that do not rise, expected whole numbers fr",
        ),
        (
            {"rows": ROWS, "steps": torch.tensor([5, 6])},
            {},
            "found step 5 first, expected steps above 5, the last of t",
        ),
        ({"rows": ROWS, "steps": STEPS}, {"epochs": f"[1, {2**64}]"}, "found other epochs"),
        ({"rows": ROWS, "steps": STEPS}, {"metrics": f'[{{}}, {{"loss": {"9" * 400}}}]'}, "}]' as metrics"),
        ({"rows": ROWS, "steps": STEPS}, {"format_version": "one"}, "found format_version one, expected a whole numbe"),
    ],
)
def test_a_chunk_that_is_none_is_reported(tmp_path, tensors, header, text):
    write(tmp_path)
    whole = {"format": "pdiff-snapshots", "format_version": "1", "epochs": "[null, null]", "metrics": "[{}, {}]"}
    whole = {key: value for key, value in (whole | header).items() if value is not None}
    save_file(tensors, chunk(tmp_path, 3), whole)

    store = SnapshotStore.open(tmp_path)

    assert store.steps.tolist() == [1, 2, 3, 4, 5]
    assert len(store.problems) == 1
    assert text in store.problems[0]


def test_a_fifo_in_place_of_a_chunk_is_reported_and_the_rest_is_read(tmp_path):
    write(tmp_path)
    os.mkfifo(chunk(tmp_path, 3))
    store = SnapshotStore.open(tmp_path)
    assert store.steps.tolist() == [1, 2, 3, 4, 5]
    assert len(store.problems) == 1
    assert "found a FIFO, expected a file" in store.problems[0]


def test_a_run_whose_chunk_is_out_of_order_goes_on(tmp_path, caplog):
    writer = write(tmp_path, "a")
    writer.write_chunk(rows(2), [3, 4])
    writer.close()
    writer = TrajectoryWriter(tmp_path, LAYOUT, trajectory="a", resume_step=5)
    writer.write_chunk(rows(1, 50), [6])
    assert "found step 3 first" in caplog.text
    assert SnapshotStore.open(tmp_path).steps.tolist() == [1, 2, 3, 4, 5, 6]


def test_a_run_with_a_name_that_cannot_be_printed_is_none(tmp_path):
    write(tmp_path)
    (tmp_path / "trajectories" / "run-001").rename(tmp_path / "trajectories" / "run\x1b[2J")
    assert SnapshotStore.open(tmp_path).trajectories == []


@given(st.data())
def test_no_bytes_in_place_of_a_chunk_end_in_another_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("store")
    write(path)
    content = bytearray(chunk(path, 2).read_bytes())
    # The header is where a flipped byte means something.
    for place in data.draw(st.lists(st.integers(0, 400), min_size=1, max_size=3)):
        content[min(place, len(content) - 1)] = data.draw(st.integers(0, 255))
    chunk(path, 2).write_bytes(bytes(content[: data.draw(st.integers(0, 2000))]))
    try:
        store = SnapshotStore.open(path)
    except FormatVersionError:
        return
    assert store.steps.tolist()[:3] == [1, 2, 3]
    assert len(store.problems) == (len(store) == 3)
    assert store.rows().shape == (len(store), 7)


def test_opening_reads_no_row(tmp_path):
    """Rows stay on disk: what the file says of them after it was opened is what is read."""
    write(tmp_path, chunks=((1, 2, 3),))
    store = SnapshotStore.open(tmp_path)
    with open(chunk(tmp_path, 1), "rb+") as file:
        content = file.read()
        place = content.index(rows(3, 1).numpy().tobytes())
        file.seek(place)
        file.write(rows(3, 100).numpy().tobytes())
    assert torch.equal(store.rows(), rows(3, 100))


def test_the_store_of_format_version_1_is_read():
    store = SnapshotStore.open(DATA / "store-v1")
    assert store.problems == []
    assert store.trajectories == ["run-001", "run-002"]
    assert store.steps.tolist() == [2, 3, 4, 1]
    assert store.epochs == [0.5, 0.75, 1.0, None]
    assert store.metrics == [{"loss": 2.0}, {"loss": 1.5}, {}, {}]
    assert [str(spec) for spec in store.layout] == ["parameter float32 (2,)", "buffer bfloat16 (2,)"]
    assert store.rows().tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [-1, -2, -3, -4]]
    assert store.state_dict(0)["bn.running_mean"].dtype == torch.bfloat16
    assert store.base("run-001")["bn.num_batches_tracked"].item() == 4
    assert store.base_header("run-001")["rest_drift"] == "0.125"


WINDOW = PlannedWindow(90, 100, 3)


def write_sparse(path, steps, trajectory="a", **kwargs):
    writer = TrajectoryWriter(path, LAYOUT, trajectory=trajectory, **kwargs)
    writer.write_chunk(torch.rand(len(steps), 7), steps, window=WINDOW)
    return writer


def test_sparse_rows_stand_before_those_of_a_window_until_there_are_enough(tmp_path):
    writer = write_sparse(tmp_path, [1, 31, 61])
    for step, expected in ((90, [1, 31, 61, 90]), (91, [1, 31, 61, 90, 91]), (92, [90, 91, 92])):
        writer.write_chunk(torch.rand(1, 7), [step])
        store = SnapshotStore.open(tmp_path)
        assert store.steps.tolist() == expected
        assert store.sparse == ({} if step == 92 else {"a": WINDOW})


def test_the_planned_last_step_stays_when_rows_are_dropped_and_must_be_a_number(tmp_path):
    writer = TrajectoryWriter(tmp_path, LAYOUT, trajectory="a")
    writer.write_chunk(torch.rand(3, 7), [4, 5, 6], planned_last_step=9)
    writer.close()
    TrajectoryWriter(tmp_path, LAYOUT, trajectory="a", resume_step=5).close()
    store = SnapshotStore.open(tmp_path)
    assert store.steps.tolist() == [4, 5]
    assert store.stopped_early == {"a": 9}
    for planned in (0, "soon"):
        save_chunk(
            tmp_path / "trajectories/a/chunk-000001.safetensors", torch.rand(1, 7), [4], planned_last_step=planned
        )
        store = SnapshotStore.open(tmp_path)
        assert (len(store), store.stopped_early) == (0, {})
        assert f"found planned_last_step '{planned}', expected a whole number from 1" in store.problems[0]


def test_sparse_rows_are_cut_and_dropped(tmp_path):
    writer = write_sparse(tmp_path, [1, 31, 61])
    writer.write_chunk(torch.rand(1, 7), [90])
    writer.drop_sparse(32)
    assert SnapshotStore.open(tmp_path).steps.tolist() == [1, 31, 61, 90]
    writer.drop_sparse(32, exactly=True)
    store = SnapshotStore.open(tmp_path)
    assert store.steps.tolist() == [61, 90]
    assert store.sparse == {"a": WINDOW}
    writer.drop_sparse()
    assert writer.sparse_steps == []
    assert SnapshotStore.open(tmp_path).steps.tolist() == [90]


def test_a_resumed_writer_drops_sparse_rows_past_its_step_and_goes_on_numbering(tmp_path):
    write_sparse(tmp_path, [1, 31, 61]).close()
    writer = write_sparse(tmp_path, [50], resume_step=40)
    assert writer.sparse_steps == [1, 31, 50]
    assert SnapshotStore.open(tmp_path).steps.tolist() == [1, 31, 50]
    assert sorted(path.name for path in writer.folder.glob("sparse-*")) == [
        "sparse-000001.safetensors",
        "sparse-000002.safetensors",
    ]


@pytest.mark.parametrize("window", ["", "[1]", '{"first_step": 1, "total_steps": 2}', '{"first_step": 0}'])
def test_sparse_rows_without_a_window_are_reported_and_left_out(tmp_path, window):
    writer = write_sparse(tmp_path, [1, 2])
    (path,) = writer.folder.glob("sparse-*")
    tensors = {"rows": torch.rand(2, 7), "steps": torch.tensor([1, 2])}
    header = {"format": "pdiff-snapshots", "format_version": "1", "epochs": "[null, null]", "metrics": "[{}, {}]"}
    save_file(tensors, path, {**header, "window": window})
    store = SnapshotStore.open(tmp_path)
    assert len(store) == 0
    assert len(store.problems) == 1
    assert "window" in store.problems[0]


def test_a_pickle_of_a_store_holds_its_place_and_no_snapshot(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    store = SnapshotStore.open(".").only(["b"])
    pickled = pickle.dumps(store)
    monkeypatch.chdir("/")

    again = pickle.loads(pickled)

    assert again.trajectories == ["b"]
    assert torch.equal(again.rows(), store.rows())
    assert len(pickled) < 1000


def test_a_pickle_of_a_store_is_that_store_without_later_runs_and_refused_where_its_own_have_grown(tmp_path):
    writer = write(tmp_path, "a")
    pickled = pickle.dumps(SnapshotStore.open(tmp_path))
    write(tmp_path, "b")
    assert pickle.loads(pickled).trajectories == ["a"]

    writer.write_chunk(rows(1, 6), [6])

    with pytest.raises(
        FormatError, match=r"found 6 snapshots of 1 trajectories, expected 5 of 1, as when it was opened"
    ):
        pickle.loads(pickled)


def test_a_part_of_a_store_is_not_opened_again(walk_store: Path, caplog: pytest.LogCaptureFixture) -> None:
    (walk_store / "trajectories" / "run-001" / "chunk-000009.safetensors").write_bytes(b"half a file")
    store = SnapshotStore.open(walk_store)
    part = store.only(["run-001"])
    assert torch.equal(part.rows(), store.rows())
    assert caplog.text.count("chunk-000009.safetensors") == 1
