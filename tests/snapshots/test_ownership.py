"""A trajectory has one writer, and what a dead one leaves is cleaned up."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from pdiff_plugin.errors import TrajectoryInUseError
from pdiff_plugin.snapshots import ownership
from pdiff_plugin.snapshots.files import remove_strays, temporary
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.ownership import Ownership, holder
from pdiff_plugin.snapshots.processes import this_process
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

LAYOUT = Layout.from_tensors({"w": torch.zeros(3)})
OWN = """
    import sys, time
    from pathlib import Path
    from pdiff_plugin.snapshots.ownership import Ownership
    from pdiff_plugin.snapshots.files import temporary
    own = Ownership(Path(sys.argv[1]))
    temporary(Path(sys.argv[1]) / "chunk-000001.safetensors").touch()
    print("ready", flush=True)
    time.sleep(60)
"""


def clean(text):
    return "\n".join(line[4:] for line in text.splitlines())


@pytest.fixture
def other(tmp_path):
    """Another process that has the trajectory ``tmp_path``, and a temporary file in it."""
    process = subprocess.Popen([sys.executable, "-c", clean(OWN), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def from_elsewhere(folder, **changes):
    """The file of a writer on another machine."""
    document = {"format": "pdiff-writer", "format_version": 1, "host": "node7", "machine": "0" * 12}
    document |= {"pid": 4, "started": 5, "token": "t", **changes}
    path = folder / ".writer-000001.json"
    path.write_text(json.dumps(document))
    return path


def test_a_second_writer_is_told_who_the_first_is(tmp_path, other):
    with pytest.raises(TrajectoryInUseError, match=rf"{tmp_path} belongs to process {other.pid} on "):
        Ownership(tmp_path)
    assert holder(tmp_path).startswith(f"process {other.pid} on ")


def test_the_trajectory_of_a_killed_writer_is_free_at_once(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    while holder(tmp_path) is not None:  # nobody waits for it: it stays as a zombie
        time.sleep(0.01)
    started = time.monotonic()
    own = Ownership(tmp_path)
    assert time.monotonic() - started < 5
    own.check()
    assert [path.name for path in tmp_path.glob(".writer-*")] == [".writer-000002.json"]


def test_a_stopped_writer_lives(tmp_path, other):
    other.send_signal(signal.SIGSTOP)
    with pytest.raises(TrajectoryInUseError):
        Ownership(tmp_path)


def test_two_writers_in_one_process_are_two(tmp_path):
    writer = TrajectoryWriter(tmp_path, LAYOUT, trajectory="a")
    writer.write_chunk(torch.zeros(2, 3), [1, 2])
    with pytest.raises(TrajectoryInUseError, match=f"process {os.getpid()} on"):
        TrajectoryWriter(tmp_path, LAYOUT, trajectory="a", resume_step=1)
    assert len(SnapshotStore.open(tmp_path)) == 2
    writer.close()
    assert TrajectoryWriter(tmp_path, LAYOUT, trajectory="a", resume_step=1).num_rows == 1


def test_a_writer_that_is_forgotten_or_could_not_begin_leaves_nothing(tmp_path):
    writer = TrajectoryWriter(tmp_path, LAYOUT, trajectory="a")
    writer.write_chunk(torch.zeros(1, 3), [1])
    del writer
    with pytest.raises(FileExistsError):
        TrajectoryWriter(tmp_path, LAYOUT, trajectory="a")
    assert sorted(path.name for path in (tmp_path / "trajectories/a").iterdir()) == ["chunk-000001.safetensors"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks on this system")
def test_a_forked_child_gives_nothing_back(tmp_path):
    own = Ownership(tmp_path)
    child = multiprocessing.get_context("fork").Process(target=own.release)
    child.start()
    child.join()
    own.check()


def test_of_writers_that_come_at_once_one_gets_the_trajectory(tmp_path):
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if attempt % 2:
            from_elsewhere(folder, machine=this_process().machine, pid=2**22 + 1)  # of one that has ended
        got, start = [], threading.Barrier(6)

        def come(folder=folder, got=got, start=start):
            start.wait()
            with suppress(TrajectoryInUseError):
                got.append(Ownership(folder))

        threads = [threading.Thread(target=come) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1
        got[0].check()
        assert not list(folder.glob(".tmp-*"))


@pytest.mark.parametrize("document", [{}, {"pid": "x"}, {"format": "else"}, {"format_version": 9}])
def test_a_writer_on_another_machine_is_gone_when_its_file_was_not_touched_for_long(tmp_path, monkeypatch, document):
    monkeypatch.setattr(ownership, "_POLL_S", 0.01)
    monkeypatch.setattr(ownership, "STALE_S", 0.2)
    from_elsewhere(tmp_path, **document)
    own = Ownership(tmp_path)
    own.check()
    assert [path.name for path in tmp_path.iterdir()] == [".writer-000002.json"]


def test_a_writer_on_another_machine_lives_when_it_touches_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "_POLL_S", 0.01)
    path = from_elsewhere(tmp_path)
    timer = threading.Timer(0.1, os.utime, [path])
    timer.start()
    with pytest.raises(TrajectoryInUseError, match="process 4 on node7"):
        Ownership(tmp_path)
    timer.join()
    assert holder(tmp_path) is None  # not known without waiting


def test_a_writer_says_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "BEAT_S", 0.0)
    own = Ownership(tmp_path)
    path = tmp_path / ".writer-000001.json"
    os.utime(path, (0, 0))
    own.beat()
    assert time.time() - path.stat().st_mtime < 60


def test_a_writer_that_was_taken_over_writes_no_more(tmp_path):
    writer = TrajectoryWriter(tmp_path, LAYOUT, trajectory="a")
    folder = tmp_path / "trajectories/a"
    writer.write_chunk(torch.zeros(1, 3), [1])
    (folder / ".writer-000001.json").unlink()
    from_elsewhere(folder).rename(folder / ".writer-000002.json")
    with pytest.raises(TrajectoryInUseError, match="process 4 on node7"):
        writer.write_chunk(torch.zeros(1, 3), [2])
    with pytest.raises(TrajectoryInUseError):
        writer.write_base({"w": torch.zeros(3)}, {})
    writer.close()
    assert [path.name for path in folder.glob(".writer-*")] == [".writer-000002.json"]
    assert len(SnapshotStore.open(tmp_path)) == 1


def test_temporary_files_of_the_dead_go_and_those_of_the_living_stay(tmp_path, other):
    mine = temporary(tmp_path / "x.json")
    mine.touch()
    theirs = next(tmp_path.glob(f".tmp-*-{other.pid}-*"))
    elsewhere, old = tmp_path / f".tmp-{'0' * 12}-4-5-abc-x.json", tmp_path / ".tmp-99-x.json"
    for path in (elsewhere, old):
        path.touch()
    (tmp_path / ".tmp-folder").mkdir()

    remove_strays(tmp_path)
    assert all(path.exists() for path in (mine, theirs, elsewhere, old))

    other.kill()
    other.wait()
    os.utime(old, (0, 0))
    remove_strays(tmp_path)
    assert (mine.exists(), theirs.exists(), elsewhere.exists(), old.exists()) == (True, False, True, True)
    remove_strays(tmp_path, min_age_s=3600.0)
    assert (mine.exists(), theirs.exists(), elsewhere.exists(), old.exists()) == (True, False, True, False)
    remove_strays(tmp_path, min_age_s=0.0)
    assert (mine.exists(), elsewhere.exists()) == (True, False)
    assert Path(tmp_path / ".tmp-folder").is_dir()


def test_the_next_writer_cleans_a_fit_members_and_an_evaluation(tmp_path, other):
    """One rule for all folders: what a dead process was writing there goes."""
    from pdiff_plugin import DiffusionConfig, FitConfig, fit
    from pdiff_plugin.evaluation.result import Evaluation
    from pdiff_plugin.generator.members import write_members

    other.kill()
    other.wait()
    name = next(tmp_path.glob(f".tmp-*-{other.pid}-*")).name
    store = tmp_path / "store"
    layout = Layout.from_tensors({"w": torch.zeros(30)})
    TrajectoryWriter(store, layout).write_chunk(torch.randn(40, 30), range(1, 41))
    for folder in (store, store / "trajectories/run-001", tmp_path / "fit", tmp_path / "members", tmp_path / "judged"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"half")
    TrajectoryWriter(store, layout, trajectory="run-001", resume_step=40)
    generator = fit(store, FitConfig(diffusion=DiffusionConfig(max_steps=2)), out=tmp_path / "fit")
    write_members(generator, tmp_path / "members", num_members=2)
    Evaluation.load(Path(__file__).parents[1] / "data/evaluation-v1").save(tmp_path / "judged")
    assert list(tmp_path.glob("*/**/.tmp-*")) == []
