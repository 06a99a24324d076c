"""Time and memory of a fit on conditions, of refining it, and time to sample at a new condition.

    python tests/benchmarks/condition_scaling.py FOLDER                                   # 200 x 20 x 11,000
    python tests/benchmarks/condition_scaling.py FOLDER --snapshots 10 --values 1000000   # needs 9 GB in FOLDER
    python tests/benchmarks/condition_scaling.py FOLDER --conditions 48 --refine 500      # steps of eight conditions

There is a cloud of snapshots for each condition. The model that a refinement goes through is one product, so that what
is seen is the refinement's own cost, to which a real model adds that of its forward and backward passes.

Weights follow two numbers smoothly in 12 directions. The store is made in FOLDER and deleted afterwards; each fit runs
in a process of its own. Memory is the process's own (RssAnon); mapped files, which the system can drop, do not count.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from pdiff_plugin import FitConfig, Layout, WeightGenerator, fit, refine
from pdiff_plugin.snapshots.conditions import set_conditions
from pdiff_plugin.snapshots.layout import TensorSpec
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

NUM_DIRECTIONS = 12
NUM_SAMPLINGS = 20


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--conditions", type=int, default=200)
    parser.add_argument("--snapshots", type=int, default=20)
    parser.add_argument("--values", type=int, default=11_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--refine", type=int, default=0, metavar="STEPS")
    parser.add_argument("--one", action="store_true", help="one fit, in this process, of the store that is there")
    options = parser.parse_args(arguments)
    store, out = options.folder / "store", options.folder / "fit"
    if options.one:
        print(json.dumps(measure(store, out, options.refine)))
        return
    try:
        write_store(store, options.conditions, options.snapshots, options.values)
        found = []
        for _ in range(options.rounds):
            shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, __file__, str(options.folder), "--one", "--refine", str(options.refine)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    finally:
        shutil.rmtree(store, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    size = f"{options.conditions} conditions x {options.snapshots} snapshots x {options.values:,} values"
    print(f"{size}, {torch.get_num_threads()} threads, median of {options.rounds}:")
    for key in found[0]:
        print(f"  {key:16s} {statistics.median(each[key] for each in found):.3f}")


def write_store(folder: Path, num_conditions: int, num_snapshots: int, D: int) -> None:
    points = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(num_conditions)
    directions = torch.randn(NUM_DIRECTIONS, D, generator=torch.Generator().manual_seed(0))
    layout = Layout((TensorSpec("w", (D,), "float32", "parameter"),))
    conditions = {}
    for number, (x, y) in enumerate(points.tolist()):
        rng = torch.Generator().manual_seed(number)
        waves = torch.tensor([math.sin((k + 1) * (x + 0.5 * y)) / (k + 1) for k in range(NUM_DIRECTIONS)])
        writer = TrajectoryWriter(folder, layout, trajectory=f"run-{number:04d}")
        for step in range(1, num_snapshots + 1):
            around = waves + 0.01 * torch.randn(NUM_DIRECTIONS, generator=rng)
            writer.write_chunk((1.0 + 0.1 * around @ directions)[None], [step])
        conditions[writer.trajectory] = {"x": x, "y": y}
    set_conditions(folder, conditions)


class Product(nn.Module):
    """One product with all values."""

    def __init__(self, num_values: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(num_values))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.view(x.shape[1], -1)


def loss(model: Product, condition: dict[str, float]) -> Tensor:
    """A batch of 64 whose answers are to be as large as the condition."""
    return (model(torch.randn(64, 10)).square().mean() - condition["x"]).square()


def measure(store: Path, out: Path, num_steps: int) -> dict[str, float]:
    """Seconds of a fit and of 16 members at a new condition (the first, and the median of later ones), and memory."""
    from peak_memory import PeakMemory

    with PeakMemory() as memory:
        start, cpu = time.perf_counter(), time.process_time()
        generator = fit(store, FitConfig(), out=out)
        found = {"fit_s": time.perf_counter() - start, "fit_cpu_s": time.process_time() - cpu}
    seconds = sample_seconds(generator)
    if num_steps:
        with PeakMemory() as refining:
            start, cpu = time.perf_counter(), time.process_time()
            refine(generator, Product(generator.layout.num_values), loss, num_steps=num_steps)
            found |= {"refine_s": time.perf_counter() - start, "refine_cpu_s": time.process_time() - cpu}
        found["refine_peak_gb"] = refining.peak_gb
    return {
        **found,
        "peak_gb": memory.peak_gb,
        "first_sample_s": seconds[0],
        "sample_s": statistics.median(seconds[1:]),
    }


def sample_seconds(generator: WeightGenerator) -> list[float]:
    seconds = []
    for number in range(NUM_SAMPLINGS):
        start = time.perf_counter()
        generator.sample(16, condition={"x": 0.3 + 0.01 * number, "y": 0.6})
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
