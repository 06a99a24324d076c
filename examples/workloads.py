"""Fit generators to three standard workloads on CIFAR-10 and compare them with the cheap alternatives.

    w1   a whole network: an MLP of 66,970 parameters on grey images, one snapshot per step of its last epoch
    w2   the paper's procedure: the last two BatchNorms of a small ResNet, trained on at a high rate for 300 steps
    w3   w1 five times from different seeds, 100 snapshots each, in one store

For each the evaluation table is printed, and the curve on which the `diversity` setting moves.

    python examples/workloads.py --data ~/data w1 w2 w3    # about 20 minutes on two CPU cores
    python examples/workloads.py --smoke w1 w2 w3          # synthetic images, a minute; figures mean nothing

`--data` is a folder for torchvision's CIFAR10 (downloaded into it if need be), or one with train.parquet and
test.parquet (columns `image` and `label`).
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pdiff_plugin import DiffusionConfig, FitConfig, PDiffRecorder, SnapshotStore, Task, collect, evaluate, fit

DIVERSITIES = (0.5, 0.75, 1.0, 1.25, 1.5)
Split = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=["w1", "w2", "w3"], help="w1, w2, w3; all unless given")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("pdiff-workloads"), help="folder for stores, fits, tables")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="synthetic images, everything but brief")
    options = parser.parse_args()
    makers = {"w1": whole_mlp, "w2": last_norms, "w3": five_runs}
    if unknown := set(options.workloads) - set(makers):
        parser.error(f"no workload {', '.join(sorted(unknown))}; there are {', '.join(makers)}")
    if options.data is None and not options.smoke:
        parser.error("--data or --smoke is needed")
    if options.smoke and options.out == parser.get_default("out"):
        options.out = Path(tempfile.mkdtemp(prefix="pdiff-workloads-"))
    train, test = synthetic() if options.smoke else cifar10(options.data)
    for name in options.workloads:
        folder = options.out / f"{name}-seed{options.seed}"
        started = time.perf_counter()
        task = makers[name](train, test, folder / "store", options.seed, options.smoke)
        print(f"\n== {name}: snapshots recorded in {time.perf_counter() - started:.0f} s", flush=True)
        judge(task, folder, options.seed, options.smoke)


def whole_mlp(train: Split, test: Split, store: Path, seed: int, smoke: bool) -> Task:
    """W1: 300 snapshots, one per step of the last epoch."""
    data = grey(train), grey(test)
    model = train_mlp(data[0], store, seed, num_epochs=2 if smoke else 10, num_snapshots=300)
    return Task(model, loader(data[1], 1000))


def five_runs(train: Split, test: Split, store: Path, seed: int, smoke: bool) -> Task:
    """W3: five independent runs of W1, 100 snapshots each."""
    data = grey(train), grey(test)
    for run in range(2 if smoke else 5):
        model = train_mlp(data[0], store, 100 * seed + run, num_epochs=2 if smoke else 8, num_snapshots=100)
    return Task(model, loader(data[1], 1000))


def last_norms(train: Split, test: Split, store: Path, seed: int, smoke: bool) -> Task:
    """W2: train a small ResNet, then only its last two BatchNorms (2,048 weights and biases) at a high rate."""
    torch.manual_seed(seed)
    model, num_epochs = SmallResNet(), 1 if smoke else 3
    batches = loader(train, 16 if smoke else 128, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=5e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num_epochs * len(batches))
    for _ in range(num_epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(augmented(x)), y).backward()
            optimizer.step()
            schedule.step()
    count = 40 if smoke else 300
    if not store.exists():
        collect(model, batches, F.cross_entropy, store=store, layers="last-norms:2", num_snapshots=count, lr=3e-2)
    return Task(model.eval(), loader(test, 500))


def train_mlp(train: Split, store: Path, seed: int, *, num_epochs: int, num_snapshots: int) -> nn.Module:
    """Train the paper's MLP, recording the last epoch under the seed's name; an existing recording is kept."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(1024, 64), nn.LayerNorm(64), nn.ReLU(),
        nn.Linear(64, 16), nn.LayerNorm(16), nn.ReLU(),
        nn.Linear(16, 10),
    )  # fmt: skip
    x, y = train
    batch_size = -(-len(x) // 300)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recorder = PDiffRecorder(store, layers="all", max_snapshots=num_snapshots, trajectory=f"seed-{seed}")
    if (store / "trajectories" / f"seed-{seed}").exists():
        return model
    for epoch in range(num_epochs):
        if epoch == num_epochs - 1:
            recorder.attach(model, optimizer, total_steps=-(-len(x) // batch_size))
        for rows in torch.randperm(len(x)).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    recorder.close()
    return model


def judge(task: Task, folder: Path, seed: int, smoke: bool) -> None:
    """Fit, print the table and the diversity curve, and leave both in the folder."""
    brief = DiffusionConfig(max_steps=100) if smoke else DiffusionConfig()
    started = time.perf_counter()
    generator = fit(folder / "store", FitConfig(seed=seed, diffusion=brief), out=folder / "fit")
    print(f"fitted in {time.perf_counter() - started:.1f} s", flush=True)
    report = generator.report
    keys = ("latent_dim", "fidelity", "spread_ratio", "novelty", "copy_ratio", "trajectory_coverage", "diffusion_steps")
    print({key: report[key] for key in keys if key in report}, flush=True)

    num_members, sets = (8, "core") if smoke else (60, "all")
    result = evaluate(task, folder / "store", generator, num_members=num_members, seed=seed, sets=sets)
    print(result, flush=True)
    curve = []
    for diversity in DIVERSITIES[:: 2 if smoke else 1]:
        rng = torch.Generator().manual_seed(seed)
        weights = generator.sample(num_members, diversity=diversity, rng=rng)
        figures = evaluate(task, folder / "store", weights=weights, sets=["snapshots", "generated"], seed=seed)
        curve.append({"diversity": diversity, **figures.to_json()["sets"]["generated"]})
    print(f"{'diversity':>9} {'accuracy':>9} {'ens. NLL':>9} {'own IoU':>8} {'max IoU to snapshots':>21}")
    for point in curve:
        print(
            f"{point['diversity']:9.2f} {point['accuracy_mean']:9.4f} {point['ensemble_nll']:9.4f} "
            f"{point['wrong_iou_mean']:8.4f} {point['wrong_iou_max_to_snapshots']:21.4f}",
            flush=True,
        )
    document = {"report": report, "evaluation": result.to_json(), "diversity": curve}
    (folder / "result.json").write_text(json.dumps(document, indent=2) + "\n")
    print(f"{len(SnapshotStore.open(folder / 'store'))} snapshots, fit and figures are in {folder}", flush=True)


class SmallResNet(nn.Module):
    """Four residual stages; the last block's two BatchNorms have 512 channels: 2,048 weights and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.stages = nn.Sequential(Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2), Block(128, 512, 2))
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(self.stem(x)).mean(dim=(2, 3)))
        return logits


class Block(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm around a shortcut without a norm of its own."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False) if inside != outside else nn.Identity()
        self.norm1, self.norm2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def loader(split: Split, batch_size: int, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*split), batch_size, shuffle=shuffle, drop_last=shuffle)


def augmented(x: Tensor) -> Tensor:
    """Mirror half of the batches, and shift each batch by up to two pixels."""
    shift = torch.randint(-2, 3, (2,)).tolist()
    return (x.flip(3) if torch.rand(()) < 0.5 else x).roll(shift, dims=(2, 3))


def grey(split: Split) -> Split:
    """Flat grey images, (N, 1024)."""
    weights = torch.tensor([0.299, 0.587, 0.114])
    return (split[0] * weights[:, None, None]).sum(dim=1).flatten(1), split[1]


def normalised(images: Tensor) -> Tensor:
    """Bytes (N, 32, 32, 3) as float32 (N, 3, 32, 32) of about unit variance."""
    return ((images.float() / 255 - 0.47) / 0.25).permute(0, 3, 1, 2).contiguous()


def cifar10(folder: Path) -> tuple[Split, Split]:
    splits = []
    for name in ("train", "test"):
        if (folder / f"{name}.parquet").is_file():
            images, labels = read_parquet(folder / f"{name}.parquet")
        else:
            from torchvision.datasets import CIFAR10

            data = CIFAR10(str(folder), train=name == "train", download=True)
            images, labels = torch.from_numpy(data.data), torch.tensor(data.targets)
        splits.append((normalised(images), labels))
    return splits[0], splits[1]


def read_parquet(path: Path) -> Split:
    import numpy as np
    import pyarrow.parquet
    from PIL import Image

    table = pyarrow.parquet.read_table(path)
    images = []
    for cell in table["image"].to_pylist():
        data = cell["bytes"] if isinstance(cell, dict) else cell
        images.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    return torch.from_numpy(np.stack(images)), torch.tensor(table["label"].to_pylist())


def synthetic() -> tuple[Split, Split]:
    """Ten blurred patterns under noise, 300 images to train on and 200 to test."""
    rng = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(10, 3, 4, 4, generator=rng), size=32, mode="bilinear")
    labels = torch.randint(10, (500,), generator=rng)
    images = patterns[labels] + 3.0 * torch.randn(500, 3, 32, 32, generator=rng)
    return (images[:300], labels[:300]), (images[300:], labels[300:])


if __name__ == "__main__":
    main()
