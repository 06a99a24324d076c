"""Time to merge many small stores on one disk, and to find out that all of them are there.

    python tests/benchmarks/merge_time.py FOLDER                    # 200 stores of 10 snapshots of 10,000 values

The stores are made in FOLDER and deleted afterwards. Medians are of merges into new stores.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path

import torch

from pdiff_plugin import Layout, merge_stores
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stores", type=int, default=200)
    parser.add_argument("--snapshots", type=int, default=10)
    parser.add_argument("--values", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    runs, layout = options.folder / "runs", Layout.from_tensors({"w": torch.zeros(options.values)})
    rng = torch.Generator().manual_seed(0)
    merged = [options.folder / f"merged-{number}" for number in range(options.rounds)]
    try:
        for number in range(options.stores):
            writer = TrajectoryWriter(runs / f"seed-{number}", layout)
            rows = torch.randn(options.snapshots, options.values, generator=rng)
            writer.write_chunk(rows, range(1, options.snapshots + 1))
            writer.close()
        for what in ("merge", "again"):
            seconds = []
            for out in merged:
                started = time.perf_counter()
                merge_stores([runs / "*"], out)
                seconds.append(time.perf_counter() - started)
            print(f"{what}: {statistics.median(seconds):.2f} s (of {min(seconds):.2f} to {max(seconds):.2f})")
    finally:
        for folder in (runs, *merged):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
