"""Time and memory of the whole path for one large model: record, fit, generate, swap, each in a process of its own.

    OMP_NUM_THREADS=2 python tests/benchmarks/billion.py --values 1e9 --snapshots 20 --latent-dim 5 --folder FOLDER

prints one line of JSON for each step and a table at the end. FOLDER needs room for the snapshots and the base (2 bytes
a value each) and the generator (4 + 2 latent_dim bytes a value): 56 GB as above. `--steps` runs some of the
steps on what the others left there; `--keep` leaves the snapshots, which else go as soon as they are fitted.

The model is a stack of 16 square matrices in bfloat16 that move along four directions of rank one each; what is rounded
away in bfloat16 is their noise. Memory is the process's own (RssAnon); mapped files, which the system can drop at any
time, are not counted. `beside` is the most of it beyond the model, where there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peak_memory import PeakMemory
from safetensors.torch import load_file
from torch import nn

from pdiff_plugin import (
    DiffusionEnsemble,
    FitConfig,
    PDiffRecorder,
    SubspaceConfig,
    WeightGenerator,
    WeightSet,
    fit,
    swap_,
)
from pdiff_plugin.generator.members import write_members

NUM_MATRICES = 16
NUM_DIRECTIONS = 4
STEPS = ("record", "fit", "generate", "swap", "sample_into", "ensemble")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=lambda text: int(float(text)), default=10**9)
    parser.add_argument("--snapshots", type=int, default=20)
    parser.add_argument("--latent-dim", type=int, default=5)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=STEPS)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--here", action="store_true", help="the one step of --steps, in this process")
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(run_here(options.steps[0], options)))
        return
    found = []
    for step in options.steps:
        same = ["--values", str(options.values), "--snapshots", str(options.snapshots)]
        same += ["--latent-dim", str(options.latent_dim), "--folder", str(options.folder), "--steps", step]
        done = subprocess.run(
            [sys.executable, __file__, *same, "--here"], stdout=subprocess.PIPE, text=True, check=True
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(found[-1]), flush=True)
        if step == "fit" and not options.keep:
            shutil.rmtree(options.folder / "store")
    print_table(found)


def print_table(found: list[dict[str, Any]]) -> None:
    print("\n| step | seconds | CPU seconds | most memory (GB) | beside the model (GB) | written (GB) | load |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for one in found:
        figures = (f"{one[key]:.2f}" for key in ("peak_gb", "beside_gb", "written_gb"))
        print(
            f"| {one['step']} | {one['wall_s']:.0f} | {one['cpu_s']:.0f} | {' | '.join(figures)} | {one['load']:.1f} |"
        )


def run_here(step: str, options: argparse.Namespace) -> dict[str, Any]:
    """What one step costs, in this process."""
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"step": step}
    steps = {"record": record, "fit": fit_store, "generate": generate, "swap": swap, "sample_into": sample_into}
    steps["ensemble"] = ensemble
    steps[step](folder, options, figures)
    return figures


@contextmanager
def measured(figures: dict[str, Any], *written: Path) -> Iterator[None]:
    """Add time, memory, the size of what was written, and how busy the machine is to ``figures``."""
    with PeakMemory() as memory:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        figures |= {"wall_s": round(time.perf_counter() - wall, 1), "cpu_s": round(time.process_time() - cpu, 1)}
    figures |= {"peak_gb": round(memory.peak_gb, 3), "beside_gb": round(memory.peak_gb - memory.start_gb, 3)}
    files = [file for path in written for file in ([path] if path.is_file() else path.rglob("*"))]
    figures["written_gb"] = round(sum(file.stat().st_size for file in files if file.is_file()) / 1e9, 3)
    figures["load"] = os.getloadavg()[0]


def new_model(num_values: int, *, filled: bool = True) -> nn.Module:
    side = math.isqrt(num_values // NUM_MATRICES)
    layers = []
    for number in range(NUM_MATRICES):
        layer = nn.Linear(side, side, bias=False, device="meta").to_empty(device="cpu").bfloat16()
        if filled:
            block = torch.randn(64, side, generator=torch.Generator().manual_seed(number)) / math.sqrt(side)
            layer.weight.data.copy_(block.repeat(-(-side // 64), 1)[:side])
        layers.append(layer)
    return nn.Sequential(*layers).eval()


@torch.no_grad()
def record(folder: Path, options: argparse.Namespace, figures: dict[str, Any]) -> None:
    shutil.rmtree(folder / "store", ignore_errors=True)
    model = new_model(options.values)
    rng = torch.Generator().manual_seed(1)
    sides = [
        (layer.weight.shape[0], torch.randn(2, layer.weight.shape[0], NUM_DIRECTIONS, generator=rng)) for layer in model
    ]
    recorder = PDiffRecorder(folder / "store", layers="all", last_steps=options.snapshots, dtype="bfloat16")
    recorder.attach(model, total_steps=options.snapshots)
    recorder_s = 0.0
    with measured(figures, folder / "store"):
        for _ in range(options.snapshots):
            place = 0.1 * torch.randn(NUM_DIRECTIONS, generator=rng)
            for layer, (side, (left, right)) in zip(model, sides, strict=True):
                move = ((left * place).bfloat16(), right.T.bfloat16())
                for start in range(0, side, 256):
                    layer.weight[start : start + 256].addmm_(move[0][start : start + 256], move[1], alpha=side**-0.5)
            before = time.perf_counter()
            recorder.step()
            recorder_s += time.perf_counter() - before
        before = time.perf_counter()
        recorder.close()
        figures |= {"in_steps_s": round(recorder_s, 1), "close_s": round(time.perf_counter() - before, 1)}
    assert recorder.error is None, recorder.error


def fit_store(folder: Path, options: argparse.Namespace, figures: dict[str, Any]) -> None:
    shutil.rmtree(folder / "fit", ignore_errors=True)
    config = FitConfig(autoencoder=SubspaceConfig(latent_dim=options.latent_dim))
    with measured(figures, folder / "fit"):
        generator = fit(folder / "store", config, out=folder / "fit")
    seconds = json.loads((folder / "fit" / "fit.json").read_text())["seconds"]
    figures |= {"seconds": seconds, "latent_dim": generator.autoencoder.latent_dim}
    figures |= {"fidelity": generator.report["fidelity"], "num_values": generator.layout.num_values}


def generate(folder: Path, options: argparse.Namespace, figures: dict[str, Any]) -> None:
    with measured(figures, folder / "members"):
        write_members(WeightGenerator.load(folder / "fit"), folder / "members", num_members=2, overwrite=True)


def swap(folder: Path, options: argparse.Namespace, figures: dict[str, Any]) -> None:
    model = new_model(options.values)
    with measured(figures):
        swap_(model, load_file(folder / "members" / "member-0000.safetensors"))


def sample_into(folder: Path, options: argparse.Namespace, figures: dict[str, Any]) -> None:
    model = new_model(options.values)
    with measured(figures):
        generator = WeightGenerator.load(folder / "fit")
        generator.sample_into(model, rng=torch.Generator().manual_seed(0))


def ensemble(folder: Path, options: argparse.Namespace, figures: dict[str, Any]) -> None:
    model = new_model(options.values)
    with measured(figures):
        members = DiffusionEnsemble(model, WeightSet.from_files(folder / "members"), task="regression")
        members(torch.ones(4, model[0].in_features, dtype=torch.bfloat16))


if __name__ == "__main__":
    main()
