"""What a fit will cost on machines that one does not have: a model of its bytes, memory and time, and how it holds.

    OMP_NUM_THREADS=1 python tests/benchmarks/cost_model.py measure FOLDER   # minutes; needs 3 GB in FOLDER at a time
    python tests/benchmarks/cost_model.py plan                               # the table of docs/guides/planning.md

`measure` fits stores of known size, each in a process of its own, and writes CPU seconds of the stages to
figures/cost.json. `plan` finds the constants of the model below from these points, prints what it says of points that
it was not fitted to, and then the plans. CPU seconds are those of one core; a worker is taken for one such core with a
disk and a network of the speeds given as flags.

The model, with N snapshots of D values of s bytes, K directions of b bytes, R runs with conditions and W workers, each
with its share of the columns:

    bytes read           2 N D s: one pass for the Gram matrix, one for the directions; over the network once where a
                         worker's share fits its cache, else twice
    statistics           D (a1 N + a2 N^2) / W
    directions           D (b1 N + b2 N K + b3 K) / W, and on every worker an eigenproblem of N x N (of many conditions
                         for its leading vectors alone); then (1 - 1/W) K D b bytes go to the first worker, which
                         writes them
    the rest             c0 + c1 N + c2 N^2 + c3 K D, with conditions c0' and terms of R^2 and R^3, on every worker
    memory of a worker   m0 + m1 N^2, a process and a few matrices of N x N float64; blocks are bounded by --memory-gb
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls

from pdiff_plugin import FitConfig, Layout, fit
from pdiff_plugin.progress import Progress
from pdiff_plugin.snapshots.conditions import set_conditions
from pdiff_plugin.snapshots.layout import TensorSpec
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

FIGURES = Path(__file__).parent / "figures" / "cost.json"
STAGES = ("statistics", "directions", "rest")
MEASURED = (*STAGES, "peak_gb")
# Of more snapshots of many conditions only the leading eigenvectors are computed.
_WHOLE_PROBLEM = 2048


@dataclass(frozen=True)
class Size:
    """R runs of n snapshots of D values that move along some directions; with conditions if there are several runs."""

    num_runs: int
    num_snapshots: int
    num_values: int
    num_directions: int

    @property
    def N(self) -> int:  # noqa: N802 (as in the formulas)
        return self.num_runs * self.num_snapshots


FITTED = [
    Size(1, 50, 2_000_000, 8),
    Size(1, 100, 1_000_000, 20),
    Size(1, 300, 500_000, 20),
    Size(1, 300, 500_000, 60),
    Size(1, 600, 250_000, 20),
    Size(1, 1000, 100_000, 20),
    Size(1, 200, 3_000_000, 40),
    Size(50, 5, 100_000, 12),
    Size(100, 5, 100_000, 12),
    Size(200, 5, 100_000, 12),
    Size(400, 5, 100_000, 12),
    Size(800, 5, 20_000, 12),
]
UNSEEN = [Size(1, 150, 6_000_000, 30), Size(600, 5, 100_000, 12)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--rounds", type=int, default=3)
    measuring.add_argument("--figures", type=Path, default=FIGURES)
    planning = commands.add_parser("plan")
    planning.add_argument("--figures", type=Path, default=FIGURES)
    planning.add_argument("--disk-gb-s", type=float, default=1.0, help="read by a worker from its disk")
    planning.add_argument("--network-gb-s", type=float, default=1.0, help="read by a worker from a bucket, or another")
    one = commands.add_parser("one", help="one fit, in this process; prints its figures as JSON")
    one.add_argument("store", type=Path)
    one.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "measure":
        found = json.loads(options.figures.read_text()) if options.figures.exists() else []
        for size in [*FITTED, *UNSEEN]:
            point = {**asdict(size), **measure(size, options.folder, options.rounds)}
            print(json.dumps(point), flush=True)
            found = [other for other in found if size_of(other) != size] + [point]
            options.figures.write_text(json.dumps(found, indent=1) + "\n")
    elif options.command == "plan":
        plan(json.loads(options.figures.read_text()), options.disk_gb_s, options.network_gb_s)
    else:
        print(json.dumps(measure_here(options.store, options.out)))


def size_of(point: dict[str, Any]) -> Size:
    return Size(**{name: point[name] for name in Size.__dataclass_fields__})


def measure(size: Size, folder: Path, rounds: int) -> dict[str, float]:
    """Medians over rounds of what :func:`measure_here` finds in a process of its own."""
    store, out = folder / "store", folder / "fit"
    found = []
    try:
        write_store(store, size)
        for _ in range(rounds):
            shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, __file__, "one", str(store), str(out)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    finally:
        shutil.rmtree(store, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    return {key: round(statistics.median(each[key] for each in found), 3) for key in found[0]}


def write_store(folder: Path, size: Size) -> None:
    """Runs around centres that follow their number, each a walk along all directions."""
    rng = torch.Generator().manual_seed(0)
    directions = torch.randn(size.num_directions, size.num_values, generator=rng)
    layout = Layout((TensorSpec("w", (size.num_values,), "float32", "parameter"),))
    conditions = {}
    for run in range(size.num_runs):
        x = run / max(1, size.num_runs - 1)
        centre = torch.tensor([math.sin((k + 1) * x) / (k + 1) for k in range(size.num_directions)])
        place = centre + 0.01 * torch.randn(size.num_snapshots, size.num_directions, generator=rng).cumsum(0)
        writer = TrajectoryWriter(folder, layout, trajectory=f"run-{run:05d}")
        for first in range(0, size.num_snapshots, 10):
            rows = 1.0 + 0.1 * place[first : first + 10] @ directions
            writer.write_chunk(rows, range(first + 1, first + 1 + len(rows)))
        writer.close()
        conditions[writer.trajectory] = {"x": x}
    if size.num_runs > 1:
        set_conditions(folder, conditions)


def measure_here(store: Path, out: Path) -> dict[str, float]:
    """CPU seconds of the two passes and of all the rest, memory (RssAnon), and the directions that the fit kept."""
    from peak_memory import PeakMemory

    spent: dict[str, float] = {}
    last = start = time.process_time()

    def tell(progress: Progress) -> None:
        nonlocal last
        now = time.process_time()
        spent[progress.stage], last = spent.get(progress.stage, 0.0) + now - last, now

    with PeakMemory() as memory:
        generator = fit(store, FitConfig(), out=out, on_progress=tell)
        in_all = time.process_time() - start
    return {
        "statistics": spent["statistics"],
        "directions": spent["autoencoder"],  # a large basis is made as the generator's file is written
        "rest": in_all - spent["statistics"] - spent["autoencoder"],
        "peak_gb": memory.peak_gb,
        "K": generator.autoencoder.latent_dim,
    }


def terms(stage: str, size: Size, K: float) -> list[float]:
    """What the constants of a stage are multiplied by."""
    N, D, R = float(size.N), float(size.num_values), float(size.num_runs)
    if stage == "statistics":
        return [1, D * N, D * N**2]
    if stage == "directions":
        is_whole = R == 1 or N <= _WHOLE_PROBLEM
        return [1, D * N, D * N * K, D * K, N**3 * is_whole, N**2 * (not is_whole)]
    if stage == "rest":
        return [R == 1, R > 1, N, N**2, R**2, R**3, D * K]
    return [1, N**2]


def constants(stage: str, points: Sequence[dict[str, Any]]) -> np.ndarray[Any, Any]:
    """Constants of a stage, none negative, by least squares of the relative error."""
    rows = np.array([terms(stage, size_of(point), point["K"]) for point in points], dtype=float)
    times = np.array([point[stage] for point in points])
    scale = np.maximum(rows.max(axis=0), 1e-300)
    found, _ = nnls(rows / scale / times[:, None], np.ones(len(points)))
    return found / scale


def predicted(found: dict[str, Any], size: Size, K: float, num_workers: int = 1) -> dict[str, float]:
    """What a worker spends: what grows with D is shared out, the rest is done by each of them."""
    alone, bare = {}, replace(size, num_values=0)
    for stage in MEASURED:
        in_all, own = (float(np.dot(found[stage], terms(stage, each, K))) for each in (size, bare))
        alone[stage] = own + (in_all - own) / num_workers
    return alone


@dataclass(frozen=True)
class Plan:
    """A fit that is asked about: its size, bytes of a value in the store and in the basis, and directions kept."""

    name: str
    size: Size
    value_bytes: int
    basis_bytes: int
    K: int

    def matrix_gb(self) -> float:
        """Of N x N float64."""
        return 8 * self.size.N**2 / 1e9

    def basis_gb(self) -> float:
        return self.K * self.size.num_values * self.basis_bytes / 1e9

    def read_gb(self) -> float:
        return 2 * self.size.N * self.size.num_values * self.value_bytes / 1e9


PLANS = [
    Plan("7 B x 100", Size(1, 100, 7_000_000_000, 64), 2, 2, 64),
    Plan("10,000 runs x 10 x 1 M", Size(10_000, 10, 1_000_000, 256), 4, 4, 256),
    Plan("10,000 runs x 1 x 1 M", Size(10_000, 1, 1_000_000, 256), 4, 4, 256),
]
HOUR = 3600.0


def plan(points: Sequence[dict[str, Any]], disk_gb_s: float, network_gb_s: float) -> None:
    """Print the constants, what they say of unseen points, and the plans."""
    console = Console(width=160)
    fitted = [point for point in points if size_of(point) in FITTED]
    found = {stage: constants(stage, fitted) for stage in MEASURED}
    for stage in MEASURED:
        console.print(f"{stage}: {', '.join(f'{value:.3g}' for value in found[stage])}")
    table = Table(
        "runs", "snapshots", "values", "K", "", *(f"{stage}, s" for stage in STAGES), "all, s", "error", "memory, GB"
    )
    for point in points:
        said = predicted(found, size_of(point), point["K"])
        measured = sum(point[stage] for stage in STAGES)
        table.add_row(
            *(f"{point[name]:,}" for name in ("num_runs", "num_snapshots", "num_values", "K")),
            "fitted" if size_of(point) in FITTED else "unseen",
            *(f"{said[stage]:.1f} / {point[stage]:.1f}" for stage in STAGES),
            f"{(seconds := sum(said[stage] for stage in STAGES)):.1f} / {measured:.1f}",
            f"{seconds / measured - 1:+.0%}",
            f"{said['peak_gb']:.2f} / {point['peak_gb']:.2f}",
        )
    console.print(table)
    names = ("reading", "passes", "joining", "writing", "rest", "in all")
    table = Table(
        *("fit", "workers", "read, TB", "network, TB", "memory, GB", "disk, TB"), *(f"{name}, h" for name in names)
    )
    for one in PLANS:
        for W in (1, 8, 64):
            said = predicted(found, one.size, one.K, W)
            reading = one.read_gb() / W / min(disk_gb_s, network_gb_s)
            passes = said["statistics"] + said["directions"]
            joining = ((1 - 1 / W) * one.basis_gb() + 2 * (W > 1) * one.matrix_gb()) / network_gb_s
            writing = one.basis_gb() / disk_gb_s
            in_all = max(reading, passes) + joining + writing + said["rest"]
            sent = one.read_gb() + (W - 1) * (one.basis_gb() / W + 2 * one.matrix_gb())
            figures = (one.read_gb() / 1e3, sent / 1e3, said["peak_gb"], one.basis_gb() / 1e3)
            hours = (seconds / HOUR for seconds in (reading, passes, joining, writing, said["rest"], in_all))
            table.add_row(one.name, str(W), *(f"{figure:.3g}" for figure in (*figures, *hours)))
    console.print(table)


if __name__ == "__main__":
    main()
