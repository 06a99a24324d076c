"""Refine the generator of one setting by the training loss, beside what else as many gradients can do.

    python examples/refine_runs.py --data ~/data w1 w2 w7              # half an hour on two CPU cores
    python examples/refine_runs.py --smoke w1                         # synthetic images; figures mean nothing

A generator that saw only snapshots knows no more than they do; here it learns on from the data that the network was
trained on. So may the snapshots, and so may the run itself go on. Of each, as many batches of 64 images have their
gradient taken: 2,000. Batches, seconds and figures of an ensemble of 32 are printed, as they are and after temperature
scaling; the workloads are those of workloads.py, and left in the same folders.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workload_data import Split, cifar10, grey, synthetic
from workloads import WORKLOADS, few

from pdiff_plugin import DiffusionConfig, FitConfig, Layout, SnapshotStore, WeightSet, evaluate, fit, refine

NUM_MEMBERS = 32
NUM_STEPS, MEMBERS_PER_STEP, BATCH_SIZE = 250, 8, 64
LR = 1e-3

Batch = Callable[[torch.Generator | None], Split]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=["w1"], help="of workloads.py, w1 unless given")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("pdiff-workloads"), help="folder for stores and fits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="synthetic images, everything but brief")
    options = parser.parse_args()
    if options.data is None and not options.smoke:
        parser.error("--data or --smoke is needed")
    if options.smoke and options.out == parser.get_default("out"):
        options.out = Path(tempfile.mkdtemp(prefix="pdiff-workloads-"))
    train, test = synthetic() if options.smoke else cifar10(options.data)
    for name in options.workloads:
        compare(name, train, test, options.out / f"{name}-seed{options.seed}", options.seed, options.smoke)


def compare(name: str, train: Split, test: Split, folder: Path, seed: int, smoke: bool) -> None:
    task = WORKLOADS[name](train, test, folder / "store", seed, smoke)
    store = SnapshotStore.open(folder / "store")
    own = grey(train) if name in ("w1", "w3") else few(train) if name.startswith("w7") else train
    brief = DiffusionConfig(max_steps=100) if smoke else DiffusionConfig()
    generator = fit(store, FitConfig(seed=seed, diffusion=brief), out=folder / "fit")
    num_steps = 8 if smoke else NUM_STEPS
    num_batches = num_steps * MEMBERS_PER_STEP

    def batch(rng: torch.Generator | None = None) -> Split:
        rows = torch.randint(len(own[0]), (BATCH_SIZE,), generator=rng)
        return own[0][rows], own[1][rows]

    def loss(model: Callable[[Tensor], Tensor], condition: object) -> Tensor:
        x, y = batch()
        return F.cross_entropy(model(x), y)

    rows: dict[str, tuple[WeightSet, int, float]] = {}

    def add(row: str, make: Callable[[], WeightSet], batches: int) -> None:
        started = time.perf_counter()
        rows[row] = make(), batches, time.perf_counter() - started

    settings = {"num_steps": num_steps, "conditions_per_step": MEMBERS_PER_STEP, "lr": LR, "seed": seed}
    rng = torch.Generator().manual_seed(seed)
    add("generated", lambda: generator.sample(NUM_MEMBERS, rng=rng), 0)
    add("refined", lambda: refine(generator, task.model, loss, **settings).sample(NUM_MEMBERS, rng=rng), num_batches)
    values = store.rows()
    evenly = torch.linspace(0, len(store) - 1, NUM_MEMBERS).round().long()
    each = num_batches // NUM_MEMBERS
    runs = [values[store.trajectory_index == number] for number in range(len(store.trajectories))]

    def tuned() -> WeightSet:
        return as_set(store.layout, [trained(store.layout, values[i], task.model, batch, each)[-1] for i in evenly])

    def longer() -> list[Tensor]:
        """Snapshots of the last third of what comes after each run."""
        return [trained(store.layout, run[-1], task.model, batch, num_batches // len(runs)) for run in runs]

    add("snapshots, each trained on", tuned, num_batches)
    started = time.perf_counter()
    ends = longer()
    seconds = time.perf_counter() - started
    count = max(1, NUM_MEMBERS // len(runs))
    rows["run gone on, snapshots"] = (
        as_set(store.layout, torch.cat([end[torch.linspace(0, len(end) - 1, count).long()] for end in ends])),
        num_batches,
        seconds,
    )
    rows["run gone on, averages"] = as_set(store.layout, [end.mean(dim=0) for end in ends]), num_batches, seconds
    base = evaluate(task, store, num_members=NUM_MEMBERS, seed=seed, sets=["snapshots", "last", "swa"])
    print(f"\n== {name}, seed {seed}")
    print(
        f"{'':28} {'acc mean':>8} {'ens acc':>8} {'NLL':>8} {'at T':>8} {'ECE':>7} {'IoU':>6} {'batches':>8} {'s':>5}"
    )
    for row, found in base.sets.items():
        tell(row, found, 0, 0.0)
    for row, (members, batches, seconds) in rows.items():
        judged = evaluate(task, store, weights=members, seed=seed, sets=["generated"])
        tell(row, judged.sets["generated"], batches, seconds)


def trained(layout: Layout, start: Tensor, model: nn.Module, batch: Batch, num_steps: int) -> Tensor:
    """Weights after each step of the last third of a training of the recorded tensors, along a cosine, (steps, D)."""
    tensors = {name: tensor.clone() for name, tensor in layout.unflatten(start).items()}
    learned = [tensor.requires_grad_() for name, tensor in tensors.items() if "running" not in name]
    optimizer = torch.optim.AdamW(learned, lr=LR)
    rng, kept = torch.Generator().manual_seed(0), []
    model.eval()
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = LR * (0.05 + 0.475 * (1 + math.cos(math.pi * step / num_steps)))
        x, y = batch(rng)
        optimizer.zero_grad()
        F.cross_entropy(torch.func.functional_call(model, tensors, (x,)), y).backward()
        optimizer.step()
        is_kept = step % max(1, num_steps // 100) == 0 and step >= num_steps * 2 // 3
        if is_kept or step == num_steps - 1:
            kept.append(layout.flatten({name: tensor.detach() for name, tensor in tensors.items()}).clone())
    return torch.stack(kept)


def as_set(layout: Layout, rows: list[Tensor] | Tensor) -> WeightSet:
    return WeightSet(layout.unflatten(torch.stack(list(rows))))


def tell(row: str, found: dict[str, float], batches: int, seconds: float) -> None:
    iou = found["wrong_iou_mean"]
    print(
        f"{row:28} {100 * found['accuracy_mean']:8.2f} {100 * found['ensemble_accuracy']:8.2f} "
        f"{found['ensemble_nll']:8.4f} {found['scaled_nll']:8.4f} {found['ensemble_ece']:7.4f} "
        f"{'-' if iou is None else format(iou, '.3f'):>6} {batches:8} {seconds:5.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
