"""Whole rows from what ranks have written; that ranks write it so is tested with processes in tests/recording."""

from __future__ import annotations

import builtins
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pdiff_plugin.errors import FormatError, LayoutMismatchError, StoreNotFoundError, TrajectoryExistsError
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.shards import write_shapes
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

DATA = Path(__file__).parents[1] / "data"
WHOLE = torch.arange(4.0)


def rank_folder(store: Path, rank: int, num_ranks: int) -> Path:
    return store / "shards" / f"rank-{rank:05d}-of-{num_ranks:05d}"


def write_shards(store: Path, num_ranks: int, steps: list[int], offset: float = 0.0) -> None:
    """What ranks add to a trajectory of one tensor (4,) that is ``WHOLE`` plus step and offset; none writes a base."""
    for rank in range(num_ranks):
        folder = rank_folder(store, rank, num_ranks)
        part = WHOLE.chunk(num_ranks)[rank]
        writer = TrajectoryWriter(
            folder, Layout.from_tensors({"w": part}), trajectory="run-001", resume_step=steps[0] - 1
        )
        write_shapes(folder, {"w": (4,)})
        writer.write_chunk(torch.stack([part + step + offset for step in steps]), steps)


def write_whole(store: Path, steps: list[int], offset: float = 0.0, trajectory: str = "run-001") -> None:
    """What one process adds to the same trajectory."""
    folder = store / "trajectories" / trajectory
    folder.mkdir(parents=True, exist_ok=True)
    writer = TrajectoryWriter(store.with_name("aside"), Layout.from_tensors({"w": WHOLE}))
    path = writer.write_chunk(torch.stack([WHOLE + step + offset for step in steps]), steps)
    path.rename(folder / path.name)
    shutil.copyfile(writer.path / "layout.json", store / "layout.json")


def write_bases(store: Path, num_ranks: int, step: int) -> None:
    for rank in range(num_ranks):
        part = WHOLE.chunk(num_ranks)[rank]
        layout = Layout.from_tensors({"w": part})
        writer = TrajectoryWriter(rank_folder(store, rank, num_ranks), layout, trajectory="run-001", resume_step=step)
        writer.write_base({"w": part + step}, {"step": str(step), "total_steps": "9"})


def files(store: Path) -> dict[Path, int]:
    """Everything below ``store`` and when it changed."""
    return {path: path.stat().st_mtime_ns for path in [store, *store.rglob("*")]}


def test_a_run_resumed_on_another_number_of_ranks_keeps_its_first_part(tmp_path):
    write_shards(tmp_path, 2, [1, 2, 3, 4, 5], offset=0.25)
    assert SnapshotStore.open(tmp_path).steps.tolist() == [1, 2, 3, 4, 5]
    write_shards(tmp_path, 4, [5, 6, 7])  # resumed after step 4, so that step 5 was taken twice
    before = files(tmp_path)

    store = SnapshotStore.open(tmp_path)

    assert store.trajectories == ["run-001"]
    assert store.steps.tolist() == [1, 2, 3, 4, 5, 6, 7]
    offsets = torch.tensor([0.25] * 4 + [0.0] * 3)
    assert torch.equal(store.rows(), WHOLE + (store.steps + offsets)[:, None])
    assert files(tmp_path) == before


def test_a_base_that_the_ranks_write_after_the_store_was_opened_is_joined(tmp_path):
    write_shards(tmp_path, 2, [1, 2])
    assert SnapshotStore.open(tmp_path).base() is None
    write_bases(tmp_path, 2, 2)
    assert torch.equal(SnapshotStore.open(tmp_path).base()["w"], WHOLE + 2)

    write_shards(tmp_path, 4, [3, 4])
    write_bases(tmp_path, 4, 4)
    before = files(tmp_path)
    store = SnapshotStore.open(tmp_path)
    assert torch.equal(store.base()["w"], WHOLE + 4)
    assert store.base_header("run-001")["step"] == "4"
    assert store.base_header("run-001")["total_steps"] == "9"
    assert files(tmp_path) == before


def test_a_base_that_one_rank_has_not_written_yet_does_not_count(tmp_path):
    write_shards(tmp_path, 2, [1, 2])
    write_bases(tmp_path, 2, 2)
    (rank_folder(tmp_path, 1, 2) / "trajectories" / "run-001" / "base.safetensors").unlink()
    store = SnapshotStore.open(tmp_path)
    assert store.base() is None
    assert store.base_header("run-001") == {}
    assert store.problems == []


def test_opening_and_reading_write_nothing(tmp_path, monkeypatch):
    path = tmp_path / "store"
    shutil.copytree(DATA / "store-v1-sharded" / "shards", path / "shards")
    expected = load_file(DATA / "store-v1-sharded" / "expected.safetensors")["rows"]
    before = files(path)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"a write: {args}")

    really_open = builtins.open

    def open_to_read(file: object, mode: str = "r", *args: object, **kwargs: object) -> object:
        return really_open(file, mode, *args, **kwargs) if set(mode) <= set("rbt") else refuse(file, mode)

    for name in ("mkdir", "link", "replace", "rename", "unlink", "remove", "utime", "truncate", "chmod"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(builtins, "open", open_to_read)
    monkeypatch.setattr(Path, "touch", refuse)
    store = SnapshotStore.open(path)
    rows, _, state = store.rows(), store.base(), store.state_dict(0)
    monkeypatch.undo()

    assert torch.equal(rows, expected)
    assert torch.equal(state["w"].flatten(), expected[0, :12])
    assert files(path) == before


def test_columns_and_gathered_values_are_those_of_the_joined_rows():
    store = SnapshotStore.open(DATA / "store-v1-sharded")
    full = load_file(DATA / "store-v1-sharded" / "expected.safetensors")["rows"]
    assert full.shape == (6, 14)
    for lo in range(15):
        for hi in range(lo, 15):
            assert torch.equal(store.rows(lo, hi), full[:, lo:hi])
            assert torch.equal(store.rows(lo, hi, [5, 0, 2]), full[[5, 0, 2], lo:hi])
    for columns in ([], [13], [0, 13, 6, 5, 6], list(range(13, -1, -1))):
        wanted = torch.tensor(columns, dtype=torch.int64)
        assert torch.equal(store.gather(wanted, torch.tensor([4, 4, 1])), full[[4, 4, 1]][:, wanted])


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=4),
    num_ranks=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_rows_are_whole_however_ranks_cut_tensors_and_chunks(tmp_path_factory, sizes, num_ranks, seed):
    """As torch cuts them: the last ranks may have less, or nothing. Each rank closes its chunks where it likes."""
    store = tmp_path_factory.mktemp("store")
    rng = torch.Generator().manual_seed(seed)
    rows = [{f"t{i}": torch.randn(shape, generator=rng) for i, shape in enumerate(sizes)} for _ in range(5)]
    buffers = torch.randn(5, 2, generator=rng)
    for rank in range(num_ranks):
        parts = []
        for row, buffer in zip(rows, buffers, strict=True):
            part = {name: (*t.chunk(num_ranks), *[t[:0]] * num_ranks)[rank] for name, t in row.items()}
            parts.append({"first": buffer[:1], **part, "last": buffer[1:]} if rank == 0 else part)
        layout = Layout.from_tensors(parts[0])
        writer = TrajectoryWriter(rank_folder(store, rank, num_ranks), layout, trajectory="a")
        write_shapes(writer.path, {name: tuple(t.shape) for name, t in rows[0].items()})
        border = int(torch.randint(0, 6, (), generator=rng))
        for steps in (range(border), range(border, 5)):
            if steps:
                writer.write_chunk(torch.stack([layout.flatten(parts[step]) for step in steps]), steps)
    whole = [{"first": b[:1], **row, "last": b[1:]} for row, b in zip(rows, buffers, strict=True)]
    layout = Layout.from_tensors(whole[0])
    full = torch.stack([layout.flatten(row) for row in whole])

    opened = SnapshotStore.open(store)

    assert opened.layout == layout
    assert torch.equal(opened.rows(), full)
    lo, hi = sorted(torch.randint(0, layout.num_values + 1, (2,), generator=rng).tolist())
    assert torch.equal(opened.rows(lo, hi, [3, 1]), full[[3, 1], lo:hi])
    columns = torch.randint(0, layout.num_values, (7,), generator=rng)
    assert torch.equal(opened.gather(columns, torch.tensor([2, 0])), full[[2, 0]][:, columns])


def test_steps_that_some_rank_lacks_are_left_out_and_what_it_could_not_read_is_told(tmp_path):
    write_shards(tmp_path, 2, [1, 2])
    write_shards(tmp_path, 2, [3, 4])
    chunk = rank_folder(tmp_path, 1, 2) / "trajectories" / "run-001" / "chunk-000001.safetensors"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    store = SnapshotStore.open(tmp_path)
    assert store.steps.tolist() == [3, 4]
    assert torch.equal(store.rows(), WHOLE + store.steps[:, None])
    assert len(store.problems) == 1
    assert store.problems[0].startswith(f"{chunk}: found an unreadable file")


def test_the_ranks_files_count_where_an_earlier_release_joined_them():
    store = SnapshotStore.open(DATA / "store-v1-joined")
    expected = SnapshotStore.open(DATA / "store-v1-sharded")
    assert store.trajectories == expected.trajectories
    assert store.steps.tolist() == expected.steps.tolist()
    assert torch.equal(store.rows(), expected.rows())
    assert store.layout == expected.layout


@pytest.mark.parametrize("copied", [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6]])
def test_a_copy_of_the_ranks_rows_that_is_out_of_date_does_not_count(tmp_path, copied):
    write_shards(tmp_path / "store", 2, [1, 2, 3, 4])
    write_whole(tmp_path / "store", copied, offset=0.5)
    store = SnapshotStore.open(tmp_path / "store")
    assert store.steps.tolist() == [1, 2, 3, 4]
    assert torch.equal(store.rows(), WHOLE + store.steps[:, None])


def test_what_one_process_recorded_before_the_model_was_sharded_is_kept(tmp_path):
    write_whole(tmp_path / "store", [1, 2, 3], offset=0.5)
    write_whole(tmp_path / "store", [1], trajectory="run-000")
    write_shards(tmp_path / "store", 2, [3, 4])
    store = SnapshotStore.open(tmp_path / "store")
    assert store.trajectories == ["run-000", "run-001"]
    assert store.steps.tolist() == [1, 1, 2, 3, 4]
    offsets = torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0])
    assert torch.equal(store.rows(), WHOLE + (store.steps + offsets)[:, None])


def test_one_process_does_not_record_under_a_name_that_ranks_have_used(tmp_path):
    write_shards(tmp_path, 2, [1, 2])
    layout = Layout.from_tensors({"w": WHOLE})
    assert TrajectoryWriter(tmp_path, layout).trajectory == "run-002"
    with pytest.raises(TrajectoryExistsError, match=r"rank-0000\d-of-00002/trajectories/run-001 already holds"):
        TrajectoryWriter(tmp_path, layout, trajectory="run-001", resume_step=1)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("rank-00000-of-00002/shard.json", '{"format": "pdiff-shard", "format_version": 1}', "found shapes None"),
        (
            "rank-00000-of-00002/shard.json",
            '{"format": "pdiff-shard", "format_version": 1, "shapes": {"w": [5]}}',
            r"found w of shape \(5,\), expected the 4 rows of all its parts",
        ),
        (
            "rank-00000-of-00002/shard.json",
            '{"format": "pdiff-shard", "format_version": 1, "shapes": {"w": [4, 2]}}',
            r"found w: \(2,\), expected buffer float32 \(4, 2\)",
        ),
        (
            "rank-00001-of-00002/layout.json",
            '{"format": "pdiff-snapshots", "format_version": 1, '
            '"row_dtype": "float32", "num_values": 0, "tensors": []}',
            "found w: no such tensor",
        ),
    ],
)
def test_ranks_whose_parts_are_no_whole_are_refused(tmp_path, name, text, found):
    write_shards(tmp_path, 2, [1])
    (tmp_path / "shards" / name).write_text(text)
    with pytest.raises(FormatError, match=found):
        SnapshotStore.open(tmp_path)


def test_ranks_that_have_not_said_what_the_whole_is_are_refused(tmp_path):
    write_shards(tmp_path, 2, [1])
    (rank_folder(tmp_path, 0, 2) / "shard.json").unlink()
    with pytest.raises(FormatError, match=r"shard\.json: found no such file"):
        SnapshotStore.open(tmp_path)


def test_ranks_that_recorded_other_tensors_than_the_store_are_refused(tmp_path):
    write_shards(tmp_path, 2, [1])
    TrajectoryWriter(tmp_path, Layout.from_tensors({"v": WHOLE}))
    with pytest.raises(LayoutMismatchError, match=r"'w': the store .* recorded 'v' in its place"):
        SnapshotStore.open(tmp_path)


@pytest.mark.parametrize("lost", ["rank-00001-of-00002", "rank-00000-of-00002/shard.json"])
def test_ranks_that_cannot_be_read_cost_their_own_rows_alone(tmp_path, lost):
    write_shards(tmp_path, 2, [5, 6])
    write_shards(tmp_path, 4, [7, 8])
    write_whole(tmp_path, [1, 2])
    path = tmp_path / "shards" / lost
    path.unlink() if path.is_file() else shutil.rmtree(path)

    store = SnapshotStore.open(tmp_path)

    assert store.steps.tolist() == [1, 2, 7, 8]
    assert len(store.problems) == 1
    assert store.problems[0].endswith("What was recorded there is left out.")


def test_a_layout_that_cannot_be_read_leaves_what_ranks_recorded(tmp_path):
    write_shards(tmp_path, 2, [5, 6])
    (tmp_path / "layout.json").write_text("{}")
    store = SnapshotStore.open(tmp_path)
    assert store.steps.tolist() == [5, 6]
    assert "layout.json: found format None" in store.problems[0]


def test_a_number_of_ranks_in_a_name_is_not_believed(tmp_path):
    write_shards(tmp_path, 2, [5, 6])
    rank_folder(tmp_path, 0, 2).rename(tmp_path / "shards" / f"rank-00000-of-{10**15}")
    shutil.rmtree(rank_folder(tmp_path, 1, 2))
    with pytest.raises(FormatError, match="no snapshots of rank 1, expected one folder for each of 1000000000000000"):
        SnapshotStore.open(tmp_path)


@pytest.mark.parametrize("part", [torch.zeros(()), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32)])
def test_parts_of_a_base_that_cannot_be_joined_are_refused(tmp_path, part):
    write_shards(tmp_path, 2, [1])
    write_bases(tmp_path, 2, 1)
    layout = Layout.from_tensors({"w": WHOLE[2:]})
    writer = TrajectoryWriter(rank_folder(tmp_path, 1, 2), layout, trajectory="run-001", resume_step=1)
    writer.write_base({"w": part}, {"step": "1"})
    with pytest.raises(FormatError, match="for w, expected a part as rank 0 has it"):
        SnapshotStore.open(tmp_path).base()


def test_a_folder_of_shards_without_any_is_no_store(tmp_path):
    (tmp_path / "shards").mkdir()
    with pytest.raises(StoreNotFoundError, match=r"it has no layout\.json"):
        SnapshotStore.open(tmp_path)
