"""A generator of a whole ResNet-18: all 11.2 million values of it, from 300 snapshots, on a laptop.

A ResNet-18 is trained on CIFAR-10 while its last 300 optimizer steps are recorded whole, the running statistics of its
BatchNorms with it. A generator is fitted, one member is made and loaded into the model, and its accuracy is printed
beside that of recorded snapshots, then the table of an evaluation with few members, which takes 6 GB of memory.

    python examples/whole_resnet.py --data ~/data    # half an hour on two CPU cores; 17 GB of disk for --out
    python examples/whole_resnet.py --smoke          # a narrow network on synthetic images; figures mean nothing

`--data` is a folder for torchvision's CIFAR10 (downloaded into it if need be), or one with train.parquet and
test.parquet (columns `image` and `label`). A store or fit that is in `--out` already is used as it is.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from workload_data import Split, augmented, cifar10, loader, synthetic

from pdiff_plugin import (
    DiffusionConfig,
    FitConfig,
    PDiffRecorder,
    SnapshotStore,
    SubspaceConfig,
    Task,
    WeightGenerator,
    evaluate,
    fit,
    swapped,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("pdiff-whole-resnet"), help="folder for store and fit")
    parser.add_argument("--basis-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--smoke", action="store_true", help="synthetic images, everything but brief")
    options = parser.parse_args()
    if options.data is None and not options.smoke:
        parser.error("--data or --smoke is needed")
    if options.smoke and options.out == parser.get_default("out"):
        options.out = Path(tempfile.mkdtemp(prefix="pdiff-whole-resnet-"))
    train, test = synthetic() if options.smoke else cifar10(options.data)
    whole_resnet(train, test, options.out, basis_dtype=options.basis_dtype, smoke=options.smoke)
    print(f"\nThe store and the generator are in {options.out}")


def whole_resnet(train: Split, test: Split, folder: Path, *, basis_dtype: str = "float32", smoke: bool = False) -> None:
    torch.manual_seed(0)
    # The smoke test's network has the same layers with fewer channels.
    channels = (8, 16, 32, 64) if smoke else (64, 128, 256, 512)
    model = timm.create_model("resnet18", num_classes=10, channels=channels)
    test_batches = loader((test[0][:2000], test[1][:2000]), 500)
    if not (folder / "store").exists():
        with timed("training and recording"):
            record(model, loader(train, 16 if smoke else 64, shuffle=True), folder / "store", smoke)
    store = SnapshotStore.open(folder / "store")
    model.load_state_dict(store.base() or {})  # the end of the training
    print(f"{len(store)} snapshots of {store.layout.num_values:,} values", flush=True)

    config = FitConfig(
        autoencoder=SubspaceConfig(basis_dtype=basis_dtype),
        diffusion=DiffusionConfig(max_steps=100) if smoke else DiffusionConfig(),
    )
    with timed("the fit"):
        fit(store, config, out=folder / f"fit-{basis_dtype}")
    path = folder / f"fit-{basis_dtype}" / "generator.safetensors"
    print(f"generator file: {path.stat().st_size / 1e9:.3f} GB", flush=True)

    with timed("reading the generator, making one member and loading it into the model"):
        generator = WeightGenerator.load(path)
        weights = generator.sample(1, rng=torch.Generator().manual_seed(0))
        with swapped(model, weights.member(0)):
            pass
    print(f"{generator}, fidelity {generator.report['fidelity']:.4f}")

    snapshots = []
    for index in torch.linspace(0, len(store) - 1, 4 if smoke else 12).long().tolist():
        with swapped(model, store.state_dict(index)):
            snapshots.append(accuracy(model, test_batches))
    print(f"accuracy of {len(snapshots)} snapshots: {min(snapshots):.2%} to {max(snapshots):.2%}")
    for number, member in enumerate(generator.sample_members(4, rng=torch.Generator().manual_seed(0), member_chunk=1)):
        with swapped(model, member):
            print(f"accuracy of generated member {number}: {accuracy(model, test_batches):.2%}", flush=True)

    with timed("the evaluation"):
        print(evaluate(Task(model, test_batches), store, generator, num_members=4, sets="core"))


def record(model: nn.Module, batches: DataLoader, store: Path, smoke: bool) -> None:
    """Train for two epochs, and record every tensor at each of the last 300 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    num_epochs, num_snapshots = (1, 18) if smoke else (2, 300)
    recorder = PDiffRecorder(store, layers="all", last_steps=num_snapshots, dtype="float32")
    with recorder.attach(model, optimizer, total_steps=num_epochs * len(batches)):
        for _ in range(num_epochs):
            for x, y in batches:
                optimizer.zero_grad()
                F.cross_entropy(model(augmented(x)), y).backward()
                optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader) -> float:
    model.eval()
    return float(torch.cat([model(x).argmax(dim=1) == y for x, y in batches]).float().mean())


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long ``what`` took, and the most memory of its own that the process held meanwhile (on Linux).

    Mapped files, which the system drops when it needs the memory, are not counted.
    """
    status, peak, done = Path("/proc/self/status"), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while status.exists() and not done.wait(0.02):
            peak = max(peak, int(status.read_text().split("RssAnon:")[1].split()[0]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(
            f"{what}: {wall:.1f} s ({cpu:.1f} s of CPU time), at most {peak * 1024 / 1e9:.2f} GB of memory", flush=True
        )


if __name__ == "__main__":
    main()
