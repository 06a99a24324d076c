"""Time and memory of a fit against the number of values D in a snapshot: 300 snapshots of a walk in 20 directions.

    OMP_NUM_THREADS=1 python tests/benchmarks/fit_scaling.py measure FOLDER    # needs 11 GB in FOLDER at a time
    python tests/benchmarks/fit_scaling.py draw

The first measures and writes figures/scaling.json, the second draws figures/scaling.svg from it. Every fit runs in a
process of its own, on a store that is made just before and deleted after its rounds. `default` is FitConfig() with a
run folder, measured whole. Of `paper` six training steps of each network are measured, and the time of all 500 and 1000
is that of the median step times their number, plus what is not training; the measurements between steps are left out.

Memory is the process's own (RssAnon); mapped files, which the system can drop at any time, are not counted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peak_memory import PeakMemory

from pdiff_plugin import FitConfig, Layout, fit
from pdiff_plugin.fitting.training import Training
from pdiff_plugin.snapshots.layout import TensorSpec
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

FIGURES = Path(__file__).parent / "figures"
SIZES = {"default": [2_048, 65_536, 1_000_000, 2_000_000, 4_000_000, 8_000_000], "paper": [2_048, 8_192, 32_768]}
NUM_SNAPSHOTS = 300
# A training step's time does not depend on how many there are; the first is slower and left out.
PAPER_STEPS = 6


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--rounds", type=int, default=3)
    measuring.add_argument("--out", type=Path, default=FIGURES / "scaling.json")
    for kind, sizes in SIZES.items():
        measuring.add_argument(f"--{kind}", type=int, nargs="*", default=sizes, metavar="D")
    drawing = commands.add_parser("draw")
    drawing.add_argument("--data", type=Path, default=FIGURES / "scaling.json")
    drawing.add_argument("--out", type=Path, default=FIGURES / "scaling.svg")
    one = commands.add_parser("one", help="one fit, in this process; prints its figures as JSON")
    one.add_argument("kind", choices=SIZES)
    one.add_argument("store", type=Path)
    one.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "measure":
        results = json.loads(options.out.read_text()) if options.out.exists() else {"fits": []}
        for kind in SIZES:
            for D in getattr(options, kind):
                found = measure(kind, D, options.folder, options.rounds)
                print(json.dumps(found), flush=True)
                others = [entry for entry in results["fits"] if (entry["kind"], entry["D"]) != (kind, D)]
                results["fits"] = sorted([*others, found], key=lambda entry: (entry["kind"], entry["D"]))
                options.out.write_text(json.dumps(results, indent=2) + "\n")
    elif options.command == "draw":
        draw(json.loads(options.data.read_text())["fits"], options.out)
    else:
        print(json.dumps(measure_here(options.kind, options.store, options.out)))


def measure(kind: str, D: int, folder: Path, rounds: int) -> dict[str, object]:
    """Medians over rounds of what :func:`measure_here` finds in a process of its own."""
    store, out = folder / f"store-{D}", folder / "fit"
    found = []
    try:
        write_store(store, D)
        for _ in range(rounds):
            shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, __file__, "one", kind, str(store), str(out)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    finally:
        shutil.rmtree(store, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    medians = {key: round(statistics.median(each[key] for each in found), 3) for key in found[0]}
    spread = {"cpu_s_all": [each["cpu_s"] for each in found], "num_threads": torch.get_num_threads()}
    return {"kind": kind, "D": D, "rounds": rounds, **medians, **spread}


def write_store(folder: Path, D: int) -> None:
    rng = torch.Generator().manual_seed(0)
    place = torch.randn(NUM_SNAPSHOTS, 20, generator=rng).cumsum(0)
    directions = torch.randn(20, D, generator=rng)
    writer = TrajectoryWriter(folder, Layout((TensorSpec("w", (D,), "float32", "parameter"),)))
    for first in range(0, NUM_SNAPSHOTS, 10):  # a chunk holds up to 64 MiB, or one row
        rows = 1.0 + 0.01 * place[first : first + 10] @ directions
        writer.write_chunk(rows, list(range(first + 1, first + 11)))


def measure_here(kind: str, store: Path, out: Path) -> dict[str, float]:
    """CPU and wall time of one fit, in all and by stage, and the most memory the process held."""
    config = FitConfig()
    if kind == "paper":
        config = FitConfig.paper()
        config = replace(
            config,
            autoencoder=replace(config.autoencoder, max_steps=PAPER_STEPS),
            diffusion=replace(config.diffusion, max_steps=PAPER_STEPS),
        )
    clock = {"cpu_s": time.process_time, "wall_s": time.perf_counter}
    # Times of every report, and of every training step by what is called once in each.
    told: dict[str, list[dict[str, float]]] = {}

    def tell(what: str) -> None:
        told.setdefault(what, []).append({key: read() for key, read in clock.items()})

    advance = Training.advance
    Training.advance = lambda self, loss: (advance(self, loss), tell(f"step of {self.stage}"))[0]
    with PeakMemory() as memory:
        start = {key: read() for key, read in clock.items()}
        fit(store, config, out=out, on_progress=lambda progress: tell(progress.stage))
        found = {key: read() - start[key] for key, read in clock.items()}
    for key in clock:
        # Both passes over the columns: in `default` they alone grow with D. Of a large basis the second comes last.
        second = told["autoencoder"][-1][key] - told["autoencoder"][0][key]
        found[f"passes_{key}"] = told["statistics"][-1][key] - start[key] + second
        if kind == "paper":
            for stage, num_steps in (("autoencoder", 500), ("diffusion", 1000)):
                at = [times[key] for times in told[f"step of {stage}"]]
                steps = [later - earlier for earlier, later in pairwise(at[1:])]
                found[key] += (num_steps - PAPER_STEPS) * statistics.median(steps)
    return {**found, "peak_gb": memory.peak_gb}


def draw(fits: list[dict[str, Any]], out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # the same figures give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    looks = {"default": ("#0b6e99", "o", "default"), "paper": ("#c4541a", "s", "paper (steps extrapolated)")}
    for axes, key, label in zip(panels, ("cpu_s", "peak_gb"), ("CPU time of the fit (s)", "memory (GB)"), strict=True):
        for kind, (colour, marker, name) in looks.items():
            points = sorted((entry["D"], entry[key]) for entry in fits if entry["kind"] == kind)
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name)
        axes.set(xscale="log", yscale="log", xlabel="values per snapshot, D", ylabel=label)
        axes.grid(True, which="both", color="#dddddd", linewidth=0.5)
    panels[0].legend(frameon=False)
    panels[1].set_ylim(0.1, 10)
    figure.savefig(out, facecolor="white", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
