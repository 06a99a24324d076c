"""Which snapshots are used and held out, and that everything reads the same ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from pdiff_plugin.snapshots.split import Split, heldout_blocks
from pdiff_plugin.snapshots.statistics import NonFiniteRowsError, without_nonfinite
from pdiff_plugin.snapshots.store import SnapshotStore

MakeStore = Callable[..., SnapshotStore]


@pytest.mark.parametrize("num_snapshots", [10, 37, 300])
def test_heldout_snapshots_are_few_contiguous_blocks_away_from_the_ends(num_snapshots: int) -> None:
    held = heldout_blocks(num_snapshots, 0.1)

    assert int(held.sum()) == round(0.1 * num_snapshots)
    assert not held[0]
    assert not held[-1]
    starts = int((held[1:] & ~held[:-1]).sum())
    assert starts == (3 if num_snapshots == 300 else 1)


def test_no_fraction_holds_out_nothing() -> None:
    assert not heldout_blocks(50, 0.0).any()


def test_every_trajectory_has_its_own_heldout_blocks_among_the_snapshots_in_use(make_store: MakeStore) -> None:
    store = make_store(trajectories=2)
    rows = torch.cat([torch.arange(0, 40), torch.arange(60, 80)])

    split = Split.choose(store, rows, 0.1)

    assert torch.equal(split.trajectory, torch.tensor([0] * 40 + [1] * 20))
    assert torch.equal(split.heldout[:40], heldout_blocks(40, 0.1))
    assert torch.equal(split.heldout[40:], heldout_blocks(20, 0.1))
    assert torch.equal(split.train_rows, (~split.heldout).nonzero().squeeze(1))
    assert torch.equal(split.judged_rows, split.heldout.nonzero().squeeze(1))


def test_without_heldout_snapshots_the_training_ones_are_judged(make_store: MakeStore) -> None:
    split = Split.choose(make_store(), torch.arange(40), 0.0)
    assert torch.equal(split.judged_rows, torch.arange(40))


def test_places_are_those_among_the_snapshots_in_use(make_store: MakeStore) -> None:
    store = make_store()
    split = Split.choose(store, torch.tensor([3, 7, 11]), 0.0)

    assert torch.equal(split.read(2, 9), store.rows(2, 9, [3, 7, 11]))
    assert torch.equal(split.read(2, 9, torch.tensor([2, 0])), store.rows(2, 9, [11, 3]))


def test_an_aligned_split_reads_by_its_own_reader(make_store: MakeStore) -> None:
    store = make_store()
    split = replace(Split.choose(store, torch.tensor([3, 7]), 0.0), reader=lambda lo, hi, rows: rows[:, None] + 0.5)

    assert split.read(0, 1).tolist() == [[3.5], [7.5]]


def test_a_block_holds_fewer_columns_of_more_snapshots_and_of_less_memory(make_store: MakeStore) -> None:
    few, many = (Split.choose(make_store(name=str(n), num_snapshots=n), torch.arange(n), 0.0) for n in (10, 1000))

    assert (few.block_values(0.5), many.block_values(0.5)) == (16384, 2097)
    assert many.block_values(0.001) == 35


def test_rows_that_are_not_finite_are_left_out_one_attempt_after_the_other() -> None:
    bad, told = [{2, 5}, {7}, set()], []

    def attempt(rows: torch.Tensor) -> list[int]:
        if found := bad.pop(0):
            raise NonFiniteRowsError([rows.tolist().index(row) for row in found])
        return rows.tolist()

    rows = without_nonfinite(9, attempt, lambda left, lost: told.append((left.tolist(), sorted(lost.tolist()))))

    assert rows == [0, 1, 3, 4, 6, 8]
    assert told == [([0, 1, 3, 4, 6, 7, 8], [2, 5]), ([0, 1, 3, 4, 6, 8], [7])]


def test_a_refusal_of_what_is_left_ends_the_attempts() -> None:
    def attempt(rows: torch.Tensor) -> None:
        raise NonFiniteRowsError([0])

    def refuse(left: torch.Tensor, lost: torch.Tensor) -> None:
        if len(left) < 3:
            raise ValueError(f"{len(left)} left")

    with pytest.raises(ValueError, match="2 left"):
        without_nonfinite(5, attempt, refuse)
