"""Stores in a bucket, here fsspec's own in memory: what is read of them, how often, and what it takes on disk."""

from __future__ import annotations

import pickle
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from pdiff_plugin import PDiffRecorder
from pdiff_plugin.errors import StoreNotFoundError
from pdiff_plugin.snapshots import bucket_store
from pdiff_plugin.snapshots.bucket_store import BucketStore, opened_in_bucket
from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

DATA = Path(__file__).parents[1] / "data"
URL = "memory://bucket/store"


@pytest.fixture(autouse=True)
def bucket() -> Iterator[Any]:
    """The bucket's file system, empty."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


@pytest.fixture
def long_store(tmp_path: Path) -> Path:
    """12 snapshots of 10,000 values, five in a file."""
    layout = Layout((TensorSpec("w", (90, 100), "float32", "parameter"), TensorSpec("b", (1000,), "float32", "buffer")))
    writer = TrajectoryWriter(tmp_path / "store", layout)
    rows = torch.randn(12, layout.num_values)
    for first in (0, 5, 10):
        writer.write_chunk(rows[first : first + 5], range(first + 1, first + len(rows[first : first + 5]) + 1))
    return tmp_path / "store"


def opened(cache_bytes: int = 10**9, share: slice | None = None) -> AbstractContextManager[BucketStore]:
    return opened_in_bucket(URL, lambda D: share or slice(0, D), cache_bytes=cache_bytes, memory_bytes=10**6)


def values_read(store: BucketStore) -> int:
    return store.take_num_bytes() // 4


@pytest.mark.parametrize("cache_bytes", [10**9, 100_000, 2000])
def test_a_store_in_a_bucket_is_the_store(bucket: Any, long_store: Path, cache_bytes: int) -> None:
    bucket.put(str(long_store), URL, recursive=True)
    original = SnapshotStore.open(long_store)

    with opened(cache_bytes, slice(3000, 8000)) as store:
        assert store.layout == original.layout
        assert torch.equal(store.steps, original.steps)
        for lo, hi in ((3000, 3700), (3700, 4000), (0, 64), (2990, 3010), (7900, 9100), (0, 10_000), (5, 5)):
            assert torch.equal(store.rows(lo, hi), original.rows(lo, hi)), (lo, hi)
            assert torch.equal(store.rows(lo, hi, [11, 2]), original.rows(lo, hi, [11, 2])), (lo, hi)
        columns = torch.tensor([9000, 4000, 4002, 4001, 4003, 0])
        assert torch.equal(store.gather(columns, torch.tensor([7, 3])), original.gather(columns, torch.tensor([7, 3])))


@pytest.mark.parametrize("name", ["store-v1-sharded", "store-v1-joined"])
@pytest.mark.parametrize("cache_bytes", [10**9, 100, 1])
def test_a_store_that_ranks_wrote_is_read_as_one(bucket: Any, name: str, cache_bytes: int) -> None:
    bucket.put(str(DATA / name), URL, recursive=True)
    original = SnapshotStore.open(DATA / name)

    with opened(cache_bytes, slice(3, 9)) as store:
        assert torch.equal(store.rows(), original.rows())
        assert torch.equal(store.rows(2, 11, [1, 0]), original.rows(2, 11, [1, 0]))
        columns = torch.tensor([8, 1, 13])
        assert torch.equal(store.gather(columns, torch.arange(3)), original.gather(columns, torch.arange(3)))


def test_half_precision_comes_back_as_it_was_recorded(bucket: Any, tmp_path: Path) -> None:
    layout = Layout((TensorSpec("w", (7, 3), "bfloat16", "parameter"),))
    TrajectoryWriter(tmp_path / "store", layout, row_dtype=torch.bfloat16).write_chunk(torch.randn(12, 21), range(12))
    bucket.put(str(tmp_path / "store"), URL, recursive=True)

    with opened(50) as store:
        assert store.row_dtype == torch.bfloat16
        assert torch.equal(store.rows(), SnapshotStore.open(tmp_path / "store").rows())


def test_what_fits_in_the_cache_is_fetched_once_whatever_reads_it(bucket: Any, long_store: Path) -> None:
    bucket.put(str(long_store), URL, recursive=True)
    with opened(share=slice(0, 5000)) as store:
        store.take_num_bytes()
        for _ in range(2):
            for lo in range(0, 5000, 700):
                store.rows(lo, min(lo + 700, 5000))
        store.rows(100, 200, [3])
        store.gather(torch.tensor([4999, 7]), torch.arange(12))
        assert values_read(store) == 12 * 5000


def test_what_does_not_fit_is_fetched_by_every_pass_and_the_first_columns_stay(
    bucket: Any, long_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put(str(long_store), URL, recursive=True)
    sizes: dict[int, int] = {}
    largest: list[int] = []
    make = bucket_store.mapped

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        block = make(*args, **kwargs)
        sizes[id(block)] = block.numel() * 4
        weakref.finalize(block.untyped_storage(), sizes.pop, id(block))
        largest.append(sum(sizes.values()))
        return block

    monkeypatch.setattr(bucket_store, "mapped", watched)
    bound = 12 * 4 * 10_000 // 2  # half the store
    with opened(bound) as store:
        store.take_num_bytes()
        once = []
        for _ in range(2):
            for lo in range(0, 10_000, 700):
                store.rows(lo, min(lo + 700, 10_000))
            once.append(values_read(store))
    assert once[0] == 12 * 10_000
    # A quarter of the cache is one block: two stay, and two pass.
    assert once[1] == 12 * 10_000 * 3 // 4
    assert max(largest) <= bound


def test_a_few_snapshots_are_read_by_themselves_where_the_cache_is_small(bucket: Any, long_store: Path) -> None:
    bucket.put(str(long_store), URL, recursive=True)
    with opened(12 * 4 * 1000) as store:
        store.take_num_bytes()
        store.rows(2000, 4000, [3, 7])
        assert values_read(store) == 2 * 2000
        store.gather(torch.tensor([9999, 5000, 17]), torch.arange(12))
        assert values_read(store) == 12 * 3


def test_snapshots_that_are_left_out_are_not_fetched(bucket: Any, tmp_path: Path) -> None:
    layout = Layout((TensorSpec("w", (100,), "float32", "parameter"),))
    for name in ("a", "b"):
        TrajectoryWriter(tmp_path / "store", layout, trajectory=name).write_chunk(torch.randn(10, 100), range(10))
    bucket.put(str(tmp_path / "store"), URL, recursive=True)

    with opened() as store:
        store.take_num_bytes()
        part = store.only(["b"])
        assert torch.equal(part.rows(), SnapshotStore.open(tmp_path / "store").only(["b"]).rows())
        assert values_read(part) == 1000


def test_whole_rows_of_small_models_are_one_request_a_file(
    bucket: Any, long_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put(str(long_store), URL, recursive=True)
    asked: list[int] = []
    cat_ranges = type(bucket).cat_ranges

    def counted(self: object, paths: list[str], *args: Any, **kwargs: Any) -> Any:
        asked.append(len(paths))
        return cat_ranges(self, paths, *args, **kwargs)

    with opened() as store:
        monkeypatch.setattr(type(bucket), "cat_ranges", counted)
        store.rows(0, 700)
    assert asked == [3]


def test_the_next_columns_are_fetched_while_the_last_ones_are_worked_on(
    bucket: Any, long_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put(str(long_store), URL, recursive=True)
    monkeypatch.setattr(bucket_store, "_RANGE_BYTES", 4000)  # ten blocks
    asked: list[int] = []  # first byte of a row that is read of a block
    more = threading.Semaphore(0)
    cat_ranges = type(bucket).cat_ranges

    def told(self: object, paths: list[str], starts: list[int], *args: Any, **kwargs: Any) -> Any:
        asked.append(starts[0] // 4000)
        more.release()
        return cat_ranges(self, paths, starts, *args, **kwargs)

    with opened(12 * 4 * 5000) as store:
        monkeypatch.setattr(type(bucket), "cat_ranges", told)
        for number in range(1, 10):
            store.rows(1000 * number - 1000, 1000 * number - 10)
            assert more.acquire(timeout=10)  # in the first round its own, and then always the next one
            if number == 1:
                assert more.acquire(timeout=10)
            assert asked == list(range(number + 1))


def test_a_full_disk_costs_a_second_fetch_and_not_the_fit(
    bucket: Any, long_store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bucket.put(str(long_store), URL, recursive=True)
    monkeypatch.setattr(bucket_store, "_RANGE_BYTES", 4000)  # ten blocks

    class Usage:
        free = 150_000

    monkeypatch.setattr(bucket_store.shutil, "disk_usage", lambda _: Usage)
    with opened() as store:
        store.take_num_bytes()
        for _ in range(2):
            assert torch.equal(store.rows(), SnapshotStore.open(long_store).rows())
        assert values_read(store) == 2 * 12 * 10_000
    assert caplog.text.count("later columns are fetched again") == 1


def test_a_damaged_chunk_in_the_bucket_is_reported_as_on_a_disk(bucket: Any, walk_store: Path) -> None:
    chunk = walk_store / "trajectories/run-001/chunk-000001.safetensors"
    content = chunk.read_bytes()
    endless = b'{"steps": {"data_offsets": [0, Infinity]}, "rows": {"data_offsets": [0, 8]}}'
    endless = len(endless).to_bytes(8, "little") + endless
    damages = (b"half a file", b"", content[:-100], content[:50], b"\xff" * 5000, endless)
    for number, damage in enumerate(damages, start=2):
        chunk.with_name(f"chunk-{number:06d}.safetensors").write_bytes(damage)
    bucket.put(str(walk_store), URL, recursive=True)

    with opened() as store:
        here = SnapshotStore.open(walk_store)
        assert torch.equal(store.rows(), here.rows())
        assert [text.partition(": found")[2] for text in store.problems] == [
            text.partition(": found")[2] for text in here.problems
        ]
    assert len(here.problems) == 6


def test_a_run_that_ended_before_its_window_is_read_with_its_sparse_snapshots(bucket: Any, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    with PDiffRecorder(tmp_path / "store", layers="all", last_steps=20).attach(model, total_steps=100) as recorder:
        for _ in range(61):
            recorder.step()
    bucket.put(str(tmp_path / "store"), URL, recursive=True)
    with opened() as store:
        assert store.problems == []
        assert store.steps.tolist() == list(range(17, 62, 4))
        assert store.sparse == SnapshotStore.open(tmp_path / "store").sparse


def test_no_store_in_the_bucket_is_said() -> None:
    with pytest.raises(StoreNotFoundError, match="memory://bucket/store is not a snapshot store"), opened():
        pytest.fail("there is none")


def test_another_process_is_told_to_open_it_itself(bucket: Any, walk_store: Path) -> None:
    bucket.put(str(walk_store), URL, recursive=True)
    with opened() as store, pytest.raises(TypeError, match="every process opens a store in a bucket by itself"):
        pickle.dumps(store)
