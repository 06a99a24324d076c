"""Joining what ranks have written; that ranks write it so is tested with processes in tests/recording."""

from pathlib import Path

import torch

from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.shards import write_shapes
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

WHOLE = torch.arange(4.0)


def write_shards(store: Path, num_ranks: int, steps: list[int], offset: float = 0.0) -> None:
    """What ranks add to a trajectory of one tensor (4,) that is ``WHOLE`` plus step and offset; none writes a base."""
    for rank in range(num_ranks):
        folder = store / "shards" / f"rank-{rank:05d}-of-{num_ranks:05d}"
        part = WHOLE.chunk(num_ranks)[rank]
        writer = TrajectoryWriter(
            folder, Layout.from_tensors({"w": part}), trajectory="run-001", resume_step=steps[0] - 1
        )
        write_shapes(folder, {"w": (4,)})
        writer.write_chunk(torch.stack([part + step + offset for step in steps]), steps)


def write_bases(store: Path, num_ranks: int, step: int) -> None:
    for rank in range(num_ranks):
        folder = store / "shards" / f"rank-{rank:05d}-of-{num_ranks:05d}"
        part = WHOLE.chunk(num_ranks)[rank]
        layout = Layout.from_tensors({"w": part})
        writer = TrajectoryWriter(folder, layout, trajectory="run-001", resume_step=step)
        writer.write_base({"w": part + step}, {"step": str(step), "total_steps": "9"})


def written(store: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in store.glob("trajectories/**/*.safetensors")}


def test_a_run_resumed_on_another_number_of_ranks_keeps_its_first_part(tmp_path):
    write_shards(tmp_path, 2, [1, 2, 3, 4, 5], offset=0.25)
    assert SnapshotStore.open(tmp_path).steps.tolist() == [1, 2, 3, 4, 5]
    write_shards(tmp_path, 4, [5, 6, 7])  # resumed after step 4, so that step 5 was taken twice

    store = SnapshotStore.open(tmp_path)

    assert store.trajectories == ["run-001"]
    assert store.steps.tolist() == [1, 2, 3, 4, 5, 6, 7]
    offsets = torch.tensor([0.25] * 4 + [0.0] * 3)
    assert torch.equal(store.rows(), WHOLE + (store.steps + offsets)[:, None])
    before = written(tmp_path)
    SnapshotStore.open(tmp_path)
    assert written(tmp_path) == before


def test_a_base_that_the_ranks_write_after_the_store_was_opened_is_joined(tmp_path):
    write_shards(tmp_path, 2, [1, 2])
    assert SnapshotStore.open(tmp_path).base() is None
    write_bases(tmp_path, 2, 2)
    assert torch.equal(SnapshotStore.open(tmp_path).base()["w"], WHOLE + 2)

    write_shards(tmp_path, 4, [3, 4])
    write_bases(tmp_path, 4, 4)
    store = SnapshotStore.open(tmp_path)
    assert torch.equal(store.base()["w"], WHOLE + 4)
    assert store.base_header("run-001")["step"] == "4"
    assert store.base_header("run-001")["total_steps"] == "9"
    before = written(tmp_path)
    SnapshotStore.open(tmp_path)
    assert written(tmp_path) == before
