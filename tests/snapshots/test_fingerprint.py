"""That another store is told from the one that was read, and the same one is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pdiff_plugin.snapshots.fingerprint import fingerprint, fingerprint_of_first_columns, watched_columns
from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.store import SnapshotStore

DATA = Path(__file__).parents[1] / "data"
MakeStore = Callable[..., SnapshotStore]
LAYOUT = Layout(
    (
        TensorSpec("trunk.weight", (70, 10), "float32", "parameter"),
        TensorSpec("trunk.bias", (3,), "float32", "parameter"),
        TensorSpec("head.weight", (40, 10), "float32", "parameter"),
    )
)


@pytest.mark.parametrize("columns", [slice(0, 5), slice(300, 340), slice(700, 703), slice(1100, 1103)])
def test_other_values_anywhere_in_the_row_are_noticed(make_store: MakeStore, columns: slice) -> None:
    store = make_store(layout=LAYOUT)
    rows = store.rows()
    rows[3, columns] += 1.0

    changed = make_store(rows, layout=LAYOUT, name="changed")

    assert fingerprint(changed) != fingerprint(store)
    assert fingerprint(make_store(store.rows(), layout=LAYOUT, name="copy")) == fingerprint(store)


def test_other_steps_are_noticed(make_store: MakeStore) -> None:
    rows = make_store().rows()
    one, other = make_store(rows[:20], name="one"), make_store(rows[:21], name="other")
    assert fingerprint(one) != fingerprint(other)


def test_processes_that_hold_parts_of_the_columns_find_what_one_finds(make_store: MakeStore) -> None:
    rows = make_store(layout=LAYOUT).rows()
    rows[0, 0], rows[1, 0], rows[2, 0] = -0.0, float("nan"), float("inf")
    store, parts = make_store(rows, layout=LAYOUT, name="odd"), []

    def collect(part: torch.Tensor) -> torch.Tensor:
        parts.append(part)
        return sum(parts, torch.zeros_like(part))

    borders = [0, 17, 700, LAYOUT.num_values]
    for lo, hi in pairwise(borders):
        together = fingerprint(store, slice(lo, hi), collect)

    assert together == fingerprint(store)


def test_few_columns_of_a_long_row_are_read_and_all_of_a_short_one() -> None:
    long = Layout(tuple(TensorSpec(str(n), (999 + n,), "float32", "parameter") for n in range(200)))
    short = Layout((TensorSpec("w", (20,), "float32", "parameter"),))

    assert len(watched_columns(long)) <= 64
    assert watched_columns(long)[[0, -1]].tolist() == [0, long.num_values - 1]
    assert watched_columns(short).tolist() == list(range(20))


def test_the_digest_in_the_fits_of_older_releases_is_still_found() -> None:
    found = fingerprint_of_first_columns(SnapshotStore.open(DATA / "store-v1-fitted"))
    assert found == json.loads((DATA / "fit-v1" / "fit.json").read_text())["snapshots"]
