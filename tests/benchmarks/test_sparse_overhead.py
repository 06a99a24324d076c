"""What sparse snapshots from before the window cost a training that gets to its planned end.

Plain ``pytest`` runs each measurement once, quickly, as a test. To measure, on an idle machine:

    pytest tests/benchmarks/test_sparse_overhead.py --benchmark-enable --benchmark-columns=median -s
"""

import statistics
import time

import pytest
import torch
from torch import nn

from pdiff_plugin import PDiffRecorder, SnapshotStore
from pdiff_plugin.snapshots import trajectory


def small():
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10)), torch.randn(32, 64)


def large():
    return nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)), torch.randn(32, 1024)


# Of each: what is recorded, steps of a run and of its window, runs with and without.
CASES = {
    "small network, last-norms:2": (small, "last-norms:2", 3000, 300, 15),
    "small network, all of it": (small, "all", 3000, 300, 15),
    "a million values, all of it": (large, "all", 1000, 100, 7),
}


@pytest.mark.parametrize("name", CASES)
def test_sparse_snapshots(benchmark, tmp_path, monkeypatch, name):
    make, layers, total, window, num_runs = CASES[name]
    if not benchmark.enabled:
        total, window, num_runs = 20, 4, 2
    written = 0
    save_chunk = trajectory.save_chunk

    def counted(path, *args):
        nonlocal written
        save_chunk(path, *args)
        written += path.stat().st_size

    monkeypatch.setattr(trajectory, "save_chunk", counted)
    model, inputs = make()
    targets = torch.randint(0, 10, (len(inputs),))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seconds, sizes = ({True: [], False: []} for _ in range(2))

    def run(folder, keep_sparse):
        nonlocal written
        written = 0
        recorder = PDiffRecorder(folder, layers=layers, last_steps=window, save_base=False, keep_sparse=keep_sparse)
        start = time.perf_counter()
        with recorder.attach(model, optimizer, total_steps=total):
            for _ in range(total):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
        seconds[keep_sparse].append((time.perf_counter() - start) / total)
        sizes[keep_sparse].append(written)
        assert SnapshotStore.open(folder).steps.tolist() == list(range(total - window + 1, total + 1))

    for number in range(num_runs):
        for keep_sparse in (True, False) if number % 2 else (False, True):
            run(tmp_path / f"{number}-{keep_sparse}", keep_sparse)
    benchmark.pedantic(lambda: None, rounds=1)  # the numbers are those of the runs above
    assert max(sizes[True]) <= 2.2 * min(sizes[False])
    for keep_sparse in (False, True):
        low, middle, high = (value * 1e6 for value in statistics.quantiles(seconds[keep_sparse], n=4))
        size = statistics.median(sizes[keep_sparse]) / 2**20
        print(
            f"\n{name}, {'with' if keep_sparse else 'without'} sparse snapshots: median {middle:.5g} us a step, "
            f"quartiles {low:.5g} to {high:.5g}, n={num_runs}; {size:.4g} MiB written"
        )
    ratios = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    print(f"{name}, with / without, neighbouring runs: median {statistics.median(ratios):.4g}")
