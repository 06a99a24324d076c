"""Trajectories of many stores in one: names, links, duplicates, refusals, and what a kill leaves."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from pdiff_plugin import SnapshotStore, merge_stores, set_conditions
from pdiff_plugin.errors import (
    ConditionError,
    ConfigError,
    FolderInUseError,
    StorageError,
    StoreNotFoundError,
    StoresDifferError,
    UnmergeableStoreError,
)
from pdiff_plugin.snapshots import merge, ownership
from pdiff_plugin.snapshots.base import write_base
from pdiff_plugin.snapshots.chunks import PlannedWindow
from pdiff_plugin.snapshots.fingerprint import watched_columns
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.ownership import Ownership
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

LAYOUT = Layout.from_tensors({"w": torch.zeros(6)})


def write(
    path: Path, seed: int = 0, steps: range = range(1, 5), *, trajectory: str = "run-001", **kind: object
) -> Path:
    """A store of one trajectory of random rows; those of one seed and step are the same."""
    writer = TrajectoryWriter(path, kind.pop("layout", LAYOUT), trajectory=trajectory, **kind)
    for step in steps:
        rng = torch.Generator().manual_seed(1000 * seed + step)
        writer.write_chunk(torch.randn(1, writer.layout.num_values, generator=rng), [step])
    writer.close()
    return path


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file of a folder and when it was changed."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def rows_by_name(path: Path) -> dict[str, torch.Tensor]:
    store = SnapshotStore.open(path)
    assert store.problems == []
    return {name: store.rows(indices=store.trajectory_index == i) for i, name in enumerate(store.trajectories)}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for number in range(3):
        write(tmp_path / "runs" / f"lr-{number}" / "pdiff-snapshots", number)
    return tmp_path / "runs"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged"


def test_trajectories_keep_their_names_where_they_can_and_else_are_called_by_their_folders(
    runs: Path, out: Path
) -> None:
    write(runs / "lr-2" / "pdiff-snapshots", 9, trajectory="warm")

    report = merge_stores([runs / "*" / "pdiff-snapshots"], out)

    assert list(report.added) == ["run-001", "lr-1-run-001", "lr-2-run-001", "warm"]
    assert report.added["lr-2-run-001"] == f"{runs}/lr-2/pdiff-snapshots/trajectories/run-001"
    assert (report.num_stores, report.num_snapshots) == (3, 16)
    merged = rows_by_name(out)
    for name, where in report.added.items():
        folder = Path(where)
        assert torch.equal(merged[name], rows_by_name(folder.parents[1])[folder.name])


def test_names_of_strangers_become_names_that_a_trajectory_may_have(tmp_path: Path, out: Path) -> None:
    for name in ("my runs!", ".hidden", "seed-1/a b", "seed-2/a b"):
        write(tmp_path / name, len(name), trajectory="same")
    os.rename(tmp_path / ".hidden" / "trajectories" / "same", tmp_path / ".hidden" / "trajectories" / ".a (copy)")

    report = merge_stores([tmp_path / "my runs!", tmp_path / ".hidden", tmp_path / "*" / "a b"], out)

    assert list(report.added) == ["same", "a-copy-", "seed-1-same"]
    assert list(report.duplicates.values()) == ["seed-1-same"]


def test_two_folders_of_one_name_and_one_parents_name_are_told_apart_by_more_of_their_paths(
    tmp_path: Path, out: Path
) -> None:
    for number, name in enumerate(("x/a/s1", "x/a/s2", "x/b/s1", "x/b/s2")):
        write(tmp_path / name, number)
    assert list(merge_stores(tmp_path / "x" / "*" / "*", out).added) == [
        "run-001",
        "a-s2-run-001",
        "b-s1-run-001",
        "b-s2-run-001",
    ]


def test_on_one_disk_nothing_is_copied_and_sources_are_not_touched(runs: Path, out: Path) -> None:
    before = state(runs)
    report = merge_stores(str(runs / "*" / "*"), out)
    assert state(runs) == before
    assert (report.copied_bytes, report.linked_bytes) == (0, sum(p.stat().st_size for p in runs.rglob("*.safetensors")))
    assert (out / "trajectories/run-001/chunk-000001.safetensors").samefile(
        runs / "lr-0/pdiff-snapshots/trajectories/run-001/chunk-000001.safetensors"
    )


def test_what_a_run_does_to_its_files_afterwards_does_not_reach_the_merged_store(runs: Path, out: Path) -> None:
    source = runs / "lr-0" / "pdiff-snapshots"
    write_base(source / "trajectories" / "run-001", {"w": torch.ones(3)}, {})
    set_conditions(source, {"run-001": {"lr": 0.1}})
    merge_stores([source], out)
    before = rows_by_name(out)

    writer = TrajectoryWriter(source, LAYOUT, trajectory="run-001", resume_step=3)  # the last row is dropped
    writer.write_chunk(torch.zeros(2, 6), [4, 5])
    writer.drop_oldest(1, exactly=True)  # a chunk is cut
    writer.write_base({"w": torch.zeros(3)}, {})
    set_conditions(source, {"run-001": {"lr": 0.2}})

    after = rows_by_name(out)
    assert torch.equal(after["run-001"], before["run-001"])
    store = SnapshotStore.open(out)
    assert store.conditions == {"run-001": {"lr": 0.1}}
    assert torch.equal(store.base("run-001")["w"], torch.ones(3))


def test_where_files_cannot_be_linked_they_are_copied(runs: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", no_links)
    report = merge_stores([runs / "*" / "*"], out)
    assert (report.linked_bytes, report.copied_bytes) == (0, sum(p.stat().st_size for p in runs.rglob("*.safetensors")))
    assert len(SnapshotStore.open(out)) == 12


def test_a_symbolic_link_to_a_chunk_is_followed(runs: Path, out: Path) -> None:
    source = runs / "lr-0" / "pdiff-snapshots"
    chunk = source / "trajectories/run-001/chunk-000001.safetensors"
    shutil.move(chunk, runs / "elsewhere")
    chunk.symlink_to(runs / "elsewhere")
    merge_stores([source], out)
    assert not (out / "trajectories/run-001/chunk-000001.safetensors").is_symlink()


def test_conditions_whole_models_and_sparse_rows_come_along(runs: Path, out: Path) -> None:
    source = runs / "lr-1" / "pdiff-snapshots"
    writer = TrajectoryWriter(source, LAYOUT, trajectory="died")
    writer.write_chunk(torch.ones(2, 6), [10, 20], window=PlannedWindow(50, 100, 8))
    writer.close()
    write_base(source / "trajectories" / "run-001", {"w": torch.ones(3)}, {"step": "4"})
    set_conditions(source, {"run-001": {"lr": 0.1}, "died": {"lr": 0.3}})

    merge_stores([source], out)
    merge_stores([runs / "lr-0" / "pdiff-snapshots"], out)

    store = SnapshotStore.open(out)
    assert store.trajectories == ["lr-0-run-001", "run-001"]
    assert store.conditions == {"run-001": {"lr": 0.1}}
    assert store.base_header("run-001")["step"] == "4"
    assert store.left_out == SnapshotStore.open(source).left_out
    assert (out / "trajectories/died/sparse-000001.safetensors").is_file()
    assert json.loads((out / "trajectories/died/condition.json").read_text())["condition"] == {"lr": 0.3}


def test_what_is_there_already_is_known_by_its_rows(runs: Path, out: Path, tmp_path: Path) -> None:
    first = merge_stores([runs / "*" / "*"], out)
    shutil.copytree(runs / "lr-1" / "pdiff-snapshots", tmp_path / "copy")  # other files
    os.rename(tmp_path / "copy/trajectories/run-001", tmp_path / "copy/trajectories/renamed")
    before = state(out)

    again = merge_stores([runs / "*" / "*", tmp_path / "copy"], out)

    assert again.added == {}
    assert list(again.duplicates.values()) == [*first.added, "lr-1-run-001"]
    assert again.duplicates[f"{tmp_path}/copy/trajectories/renamed"] == "lr-1-run-001"
    assert again.left_out == []
    assert state(out) == before


def test_copies_of_one_run_among_the_sources_are_added_once(runs: Path, out: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "lr-1", tmp_path / "runs" / "lr-9")
    report = merge_stores([runs / "*" / "*", runs / "lr-0" / "pdiff-snapshots"], out)
    assert report.num_stores == 4
    assert report.duplicates == {f"{runs}/lr-9/pdiff-snapshots/trajectories/run-001": "lr-1-run-001"}


def test_runs_that_agree_in_all_values_that_are_looked_at_first_are_compared_as_a_whole(
    tmp_path: Path, out: Path
) -> None:
    layout = Layout.from_tensors({"w": torch.zeros(5000)})
    for number in range(2):
        row = torch.zeros(1, 5000)
        row[0, 17] = number
        assert 17 not in watched_columns(layout)
        writer = TrajectoryWriter(tmp_path / f"s{number}", layout)
        writer.write_chunk(row, [1])
        writer.close()
    assert list(merge_stores([tmp_path / "s*"], out).added) == ["run-001", "s1-run-001"]


def test_rows_that_are_not_numbers_are_the_same_all_the_same(tmp_path: Path, out: Path) -> None:
    for name in ("a", "b"):
        writer = TrajectoryWriter(tmp_path / name, LAYOUT, torch.bfloat16)
        writer.write_chunk(torch.full((1, 6), float("nan")), [1])
        writer.close()
    assert merge_stores([tmp_path / "a", tmp_path / "b"], out).duplicates.keys() == {
        f"{tmp_path}/b/trajectories/run-001"
    }


def test_of_a_run_that_went_on_since_the_whole_replaces_the_part(tmp_path: Path, out: Path) -> None:
    merge_stores([write(tmp_path / "a")], out)
    os.rename(out / "trajectories/run-001", out / "trajectories/warm")
    set_conditions(out, {"warm": {"lr": 0.1}})
    writer = TrajectoryWriter(tmp_path / "a", LAYOUT, trajectory="run-001", resume_step=4)
    writer.write_chunk(torch.zeros(1, 6), [5])
    writer.write_base({"w": torch.ones(3)}, {})
    writer.close()
    set_conditions(tmp_path / "a", {"run-001": {"lr": 0.2}})

    for _ in range(2):
        report = merge_stores([tmp_path / "a"], out)
        store = SnapshotStore.open(out)
        assert (store.trajectories, store.steps.tolist()) == (["warm"], [1, 2, 3, 4, 5])
        assert store.conditions == {"warm": {"lr": 0.1}}
        assert store.base("warm") is not None
        assert report.left_out[0].startswith(
            f"{tmp_path}/a/trajectories/run-001 is there as warm, at another condition"
        )
        assert sorted(path.name for path in out.iterdir()) == ["layout.json", "trajectories"]
    assert report.duplicates.keys() == {f"{tmp_path}/a/trajectories/run-001"}


def test_it_does_not_matter_whether_the_part_or_the_whole_comes_first(tmp_path: Path, out: Path) -> None:
    part, whole = write(tmp_path / "part"), write(tmp_path / "whole", steps=range(1, 9))
    first = merge_stores([part, whole], out)
    assert (list(first.added), first.extended) == (["run-001"], {"run-001": f"{whole}/trajectories/run-001"})
    assert len(SnapshotStore.open(out)) == 8
    merge_stores([whole, part], tmp_path / "other")
    assert torch.equal(rows_by_name(out)["run-001"], rows_by_name(tmp_path / "other")["run-001"])


def test_a_part_is_not_replaced_while_somebody_records_into_it_or_where_the_whole_cannot_be_moved(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_stores([write(tmp_path / "a")], out)
    whole = write(tmp_path / "whole", steps=range(1, 9))
    own = Ownership(out / "trajectories/run-001")
    assert "goes on after run-001, into which process" in merge_stores([whole], out).left_out[0]
    own.release()

    rename, calls = os.rename, []

    def fails_at_the_second(old: str, new: str) -> None:
        calls.append(new)
        if len(calls) == 2:
            raise PermissionError(new)
        rename(old, new)

    monkeypatch.setattr(os, "rename", fails_at_the_second)
    with pytest.raises(PermissionError):
        merge_stores([whole], out)
    assert len(SnapshotStore.open(out)) == 4


def test_a_merge_that_is_killed_while_it_replaces_a_part_is_finished_by_the_next(tmp_path: Path, out: Path) -> None:
    merge_stores([write(tmp_path / "a")], out)
    whole = write(tmp_path / "whole", steps=range(1, 9))
    left = out / ".tmp-000000000000-1-1-abc-merge"
    left.mkdir()
    os.rename(out / "trajectories/run-001", left / "run-001")  # as between the two renames
    assert len(SnapshotStore.open(out)) == 0
    merge_stores([whole], out)
    assert len(SnapshotStore.open(out)) == 8
    assert not left.exists()


def test_an_older_copy_of_a_run_that_went_on_is_a_duplicate(tmp_path: Path, out: Path) -> None:
    merge_stores([write(tmp_path / "a", steps=range(1, 9))], out)
    report = merge_stores([write(tmp_path / "old", steps=range(1, 5))], out)
    assert list(report.duplicates.values()) == ["run-001"]


def test_runs_that_begin_at_the_same_weights_are_different_runs(tmp_path: Path, out: Path) -> None:
    for number in range(2):
        writer = TrajectoryWriter(tmp_path / f"s{number}", LAYOUT)
        writer.write_chunk(torch.tensor([[1.0] * 6, [2.0 + number] * 6]), [0, 1])
        writer.close()
    assert len(merge_stores([tmp_path / "s*"], out).added) == 2


def test_a_duplicate_at_another_condition_is_told(runs: Path, out: Path) -> None:
    merge_stores([runs / "*" / "*"], out)
    set_conditions(runs / "lr-1" / "pdiff-snapshots", {"run-001": {"lr": 0.1}})
    report = merge_stores([runs / "*" / "*"], out)
    assert len(report.duplicates) == 3
    assert report.left_out == [
        f"{runs}/lr-1/pdiff-snapshots/trajectories/run-001 is there as lr-1-run-001, at another condition, which "
        f"stays: `pdiff condition {out} --set lr-1-run-001 NAME=VALUE ...` changes it"
    ]


def test_stores_of_other_tensors_are_refused_before_anything_is_written(runs: Path, out: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", layout=Layout.from_tensors({"w": torch.zeros(7)}))
    with pytest.raises(StoresDifferError) as told:
        merge_stores([runs / "*" / "*", tmp_path / "other"], out)
    assert str(told.value).startswith(
        f"tensor 'w': {runs}/lr-0/pdiff-snapshots has buffer float32 (6,), {tmp_path}/other has buffer float32 (7,)."
    )
    assert not out.exists()

    merge_stores([tmp_path / "other"], out)
    with pytest.raises(StoresDifferError, match=f"{out} has .*, {runs}/lr-0/pdiff-snapshots has "):
        merge_stores([runs / "*" / "*"], out)
    assert SnapshotStore.open(out).trajectories == ["run-001"]


def test_rows_of_another_dtype_are_refused(runs: Path, out: Path, tmp_path: Path) -> None:
    write(tmp_path / "half", row_dtype=torch.bfloat16)
    with pytest.raises(
        UnmergeableStoreError, match=r"half cannot be merged: its rows are torch.bfloat16, and those of"
    ):
        merge_stores([runs / "*" / "*", tmp_path / "half"], out)
    assert not out.exists()


def test_conditions_of_other_names_are_refused(runs: Path, out: Path) -> None:
    for number, name in enumerate(("lr", "angle")):
        set_conditions(runs / f"lr-{number}" / "pdiff-snapshots", {"run-001": {name: 0.1}})
    with pytest.raises(ConditionError, match=r"lr-1/pdiff-snapshots/trajectories/run-001: found 'angle' in .* alone"):
        merge_stores([runs / "*" / "*"], out)
    assert not out.exists()


def test_shards_are_refused(runs: Path, out: Path) -> None:
    write(runs / "lr-0" / "pdiff-snapshots" / "shards" / "rank-00000-of-00001")
    with pytest.raises(UnmergeableStoreError, match=r"ranks of a sharded model wrote it.* Fit it on its own"):
        merge_stores([runs / "*" / "*"], out)


def test_a_folder_that_holds_stores_suggests_the_pattern(runs: Path, out: Path) -> None:
    with pytest.raises(StoreNotFoundError, match=rf"it holds 3 further down, which '{runs}/\*/pdiff-snapshots' names"):
        merge_stores([runs], out)
    with pytest.raises(StoreNotFoundError, match="the pattern matches no store"):
        merge_stores([runs / "ls-*"], out)
    with pytest.raises(StoreNotFoundError, match="there is no such folder"):
        merge_stores([runs / "ls"], out)
    assert not out.exists()


def test_a_pattern_leaves_out_the_merged_store_and_what_is_no_store(runs: Path) -> None:
    (runs / "notes.txt").write_text("lr-2 looks good")
    for _ in range(2):
        report = merge_stores([runs / "**"], runs / "all")
        assert report.num_stores == 3
    with pytest.raises(ConfigError, match="must name a store other than the one"):
        merge_stores([runs / "all"], runs / "all")


def test_damaged_files_are_left_out_and_told(runs: Path, out: Path) -> None:
    folder = runs / "lr-0/pdiff-snapshots/trajectories/run-001"
    damaged = [folder / name for name in ("chunk-000002.safetensors", "condition.json", "base.safetensors")]
    damaged[0].write_bytes(damaged[0].read_bytes()[:-3])
    damaged[1].write_text("{")
    damaged[2].write_text("{")
    report = merge_stores([runs / "*" / "*"], out)
    assert [sentence.partition(":")[0] for sentence in report.left_out] == list(map(str, damaged))
    assert report.num_snapshots == 11
    assert SnapshotStore.open(out).problems == []


def test_a_merge_that_another_took_over_ends(runs: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = merge.create_layout

    def taken_over(*arguments: object) -> object:
        (out / ".writer-000001.json").write_text("another's")
        return create(*arguments)

    monkeypatch.setattr(merge, "create_layout", taken_over)
    with pytest.raises(FolderInUseError, match=f"{out} is in use: another process writes to it"):
        merge_stores([runs / "*" / "*"], out)
    assert len(SnapshotStore.open(out)) == 0


def test_a_run_that_is_being_recorded_waits_for_the_next_time(runs: Path, out: Path) -> None:
    own = Ownership(runs / "lr-1/pdiff-snapshots/trajectories/run-001")
    report = merge_stores([runs / "*" / "*"], out)
    assert len(report.added) == 2
    assert report.left_out == [
        f"{runs}/lr-1/pdiff-snapshots/trajectories/run-001 is being recorded by process {os.getpid()} on "
        f"{ownership.this_process().host}: run the same command again when that has ended"
    ]
    own.release()
    assert list(merge_stores([runs / "*" / "*"], out).added) == ["lr-1-run-001"]


def test_a_run_on_another_machine_is_being_recorded_while_its_file_is_touched(runs: Path, out: Path) -> None:
    elsewhere = {"host": "node7", "machine": "0" * 12, "pid": 4, "started": 5, "token": "t"}
    path = runs / "lr-1/pdiff-snapshots/trajectories/run-001/.writer-000001.json"
    path.write_text(json.dumps({"format": "pdiff-writer", "format_version": 1, **elsewhere}))
    assert "is being recorded by process 4 on node7" in merge_stores([runs / "*" / "*"], out).left_out[0]
    os.utime(path, (time.time() - 100, time.time() - 100))
    assert list(merge_stores([runs / "*" / "*"], out).added) == ["lr-1-run-001"]
    assert path.is_file()


def test_a_second_merge_into_one_store_is_told(runs: Path, out: Path) -> None:
    merge_stores([runs / "*" / "*"], out)
    own = Ownership(out)
    with pytest.raises(FolderInUseError, match=f"{out} is in use: process {os.getpid()} on"):
        merge_stores([runs / "*" / "*"], out)
    own.release()


def test_a_training_may_record_into_the_merged_store(runs: Path, out: Path) -> None:
    writer = TrajectoryWriter(out, LAYOUT)
    report = merge_stores([runs / "*" / "*"], out)
    writer.write_chunk(torch.zeros(1, 6), [1])
    writer.close()
    assert list(report.added) == ["lr-0-run-001", "lr-1-run-001", "lr-2-run-001"]
    assert len(SnapshotStore.open(out)) == 13


def test_a_training_that_takes_the_name_meanwhile_keeps_it(
    runs: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def late(old: str, new: str) -> None:
        if Path(new).name == "run-001":
            writers.append(TrajectoryWriter(out, LAYOUT, trajectory="run-001"))
        rename(old, new)

    writers: list[TrajectoryWriter] = []
    monkeypatch.setattr(os, "rename", late)
    assert list(merge_stores([runs / "lr-0" / "*"], out).added) == ["lr-0-run-001"]


def test_a_full_disk_says_so_and_leaves_no_half_trajectory(
    runs: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(StorageError, match="the disk is full"):
            merge_stores([runs / "*" / "*"], out)
    assert sorted(path.name for path in out.iterdir()) == ["layout.json"]
    assert len(merge_stores([runs / "*" / "*"], out).added) == 3


def test_files_that_go_while_they_are_merged_are_told(runs: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = merge.create_layout

    def late(*arguments: object) -> object:
        (runs / "lr-0/pdiff-snapshots/trajectories/run-001/chunk-000001.safetensors").unlink(missing_ok=True)
        return create(*arguments)

    monkeypatch.setattr(merge, "create_layout", late)
    report = merge_stores([runs / "*" / "*"], out)
    assert len(report.added) == 2
    assert report.left_out[0].endswith("run-001 has changed meanwhile: run the same command again")


def test_progress_is_told_per_store(runs: Path, out: Path) -> None:
    told: list[tuple[str, int, int]] = []
    merge_stores([runs / "*" / "*"], out, on_progress=lambda p: told.append((p.stage, p.step, p.total_steps)))
    assert told == [(stage, step, 3) for stage in ("read stores", "merge stores") for step in (1, 2, 3)]


@pytest.fixture
def bucket(runs: Path) -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    fs.put(str(runs), "memory://bucket/runs", recursive=True)
    yield "memory://bucket/runs"
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_stores_in_a_bucket_are_merged_with_local_ones(bucket: str, runs: Path, out: Path, tmp_path: Path) -> None:
    local = write(tmp_path / "local", 7)
    report = merge_stores([local, f"{bucket}/*/pdiff-snapshots"], out)
    assert list(report.added) == ["run-001", "lr-0-run-001", "lr-1-run-001", "lr-2-run-001"]
    assert report.copied_bytes == sum(p.stat().st_size for p in runs.rglob("*.safetensors"))
    assert torch.equal(rows_by_name(out)["lr-2-run-001"], rows_by_name(runs / "lr-2/pdiff-snapshots")["run-001"])
    assert sorted(path.name for path in out.iterdir()) == ["layout.json", "trajectories"]
    assert len(merge_stores([runs / "*" / "*"], out).duplicates) == 3


def test_a_pattern_that_matches_nothing_in_a_bucket_is_told(bucket: str, out: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="the pattern matches no store"):
        merge_stores([f"{bucket}/ls-*"], out)
    with pytest.raises(StoreNotFoundError, match=r"it has no layout\.json"):
        merge_stores([bucket], out)


MERGE = """
import sys, time
from pdiff_plugin.snapshots import merge
print("ready", flush=True)
merge.merge_stores([sys.argv[1]], sys.argv[2])
print("done", flush=True)
"""


def start(pattern: str, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MERGE, pattern, str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_a_merge_of_200_stores_that_is_killed_again_and_again_has_whole_trajectories_alone(
    tmp_path: Path, out: Path
) -> None:
    pattern = str(tmp_path / "runs" / "*" / "pdiff-snapshots")
    for number in range(200):
        folder = write(tmp_path / "runs" / f"lr-{number}" / "pdiff-snapshots", number, range(1, 11))
        write_base(folder / "trajectories" / "run-001", {"w": torch.full((3,), float(number))}, {})
        set_conditions(folder, {"run-001": {"lr": float(number)}})
    before = state(tmp_path / "runs")
    started = time.monotonic()
    alone = merge_stores([pattern], tmp_path / "alone")
    seconds = time.monotonic() - started
    print(f"200 stores of 10 rows: {seconds:.2f} s")

    counts = []
    for _ in range(20):
        process = start(pattern, out)
        num_there = len(list(out.glob("trajectories/*")))
        while len(list(out.glob("trajectories/*"))) < num_there + 5 and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        store = SnapshotStore.open(out)
        counts.append(len(store.trajectories))
        assert store.problems == []
        assert len(store) == 10 * len(store.trajectories)
        assert len(store.conditions) == len(store.trajectories) == len(list(out.glob("trajectories/*")))
        assert all(store.base(name) is not None for name in store.trajectories)
    assert counts[-1] < 200, "it was never killed in the middle"
    assert counts == sorted(set(counts))

    process = start(pattern, out)
    assert process.wait(60) == 0
    process.stdout.close()
    merged, expected = rows_by_name(out), rows_by_name(tmp_path / "alone")
    assert list(merged) == sorted(alone.added)
    assert all(torch.equal(merged[name], rows) for name, rows in expected.items())
    assert sorted(path.name for path in out.iterdir()) == ["layout.json", "trajectories"]
    assert state(tmp_path / "runs") == before
    assert seconds < 30
