"""Fit generators to standard workloads on CIFAR-10 and compare them with the cheap baselines.

    w1   a whole network: an MLP of 66,970 parameters on grey images, one snapshot per step of its last epoch
    w2   the paper's procedure: the last two BatchNorms of a small ResNet, trained on at a high rate for 300 steps
    w3   w1 five times from different seeds, 100 snapshots each, in one store
    w5   the LoRA matrices of a tiny vision transformer from transformers
    w6   w2's network with its last block and head trained anew eight times from one trunk
    w7   that block and head of a network that has learned 5,000 images by heart, trained on at a constant rate
    w7-cycles, w7-branches    the same in eight cycles of the rate, and trained anew eight times

For each the evaluation table is printed, then the best model for one forward pass and the best that eight passes can
give, then the accuracy-novelty curve of the `diversity` setting beside those of the baselines. Store, fit, table
(result.json), the best (best-for-1, best-for-8) and picture (curve.png) are left in a folder. A whole ResNet-18 is in
whole_resnet.py.

    python examples/workloads.py --data ~/data w1 w2 w3    # eleven minutes on two CPU cores
    python examples/workloads.py --smoke w1 w2 w3          # synthetic images, a minute; figures mean nothing

`--data` is a folder for torchvision's CIFAR10 (downloaded into it if need be), or one with train.parquet and
test.parquet (columns `image` and `label`). A run that was interrupted goes on from what is in the folder.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from workload_data import Split, augmented, cifar10, grey, loader, synthetic

from pdiff_plugin import (
    Cycle,
    DiffusionConfig,
    Evaluation,
    FitConfig,
    PDiffRecorder,
    Perturb,
    Reinit,
    SnapshotStore,
    Task,
    collect,
    evaluate,
    fit,
    sweep,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=["w1", "w2", "w3"], help="w1, w2, w3 unless given")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("pdiff-workloads"), help="folder for stores, fits, tables")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="synthetic images, everything but brief")
    options = parser.parse_args()
    if unknown := set(options.workloads) - set(WORKLOADS):
        parser.error(f"no workload {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    if options.data is None and not options.smoke:
        parser.error("--data or --smoke is needed")
    if options.smoke and options.out == parser.get_default("out"):
        options.out = Path(tempfile.mkdtemp(prefix="pdiff-workloads-"))
    train, test = synthetic() if options.smoke else cifar10(options.data)
    for name in options.workloads:
        folder = options.out / f"{name}-seed{options.seed}"
        started = time.perf_counter()
        task = WORKLOADS[name](train, test, folder / "store", options.seed, options.smoke)
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
    model, batches = SmallResNet(), loader(train, 16 if smoke else 128, shuffle=True)
    if not restored(model, store):
        train_all(model, batches, num_epochs=1 if smoke else 3)
        count = 40 if smoke else 300
        collect(model, batches, F.cross_entropy, store=store, layers="last-norms:2", num_snapshots=count, lr=3e-2)
    return Task(model.eval(), loader(test, 500))


def lora(train: Split, test: Split, store: Path, seed: int, smoke: bool) -> Task:
    """W5: train a vision transformer of 0.2 M parameters, then only LoRA matrices on its queries and values."""
    from peft import LoraConfig, get_peft_model
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        image_size=32, patch_size=4, num_labels=10,
    )  # fmt: skip
    model, batches = ViTForImageClassification(config), loader(train, 16 if smoke else 128, shuffle=True)

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets)

    is_recorded = store.exists()
    if not is_recorded:
        train_all(model, batches, num_epochs=1 if smoke else 3, logits=lambda outputs: outputs.logits)
    queries_and_values = r".*\.(q_proj|v_proj|query|value)"  # the latter two before transformers 5
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=queries_and_values))
    if not is_recorded:
        # LoRA starts at zero: the first steps only leave it.
        steps = 10 if smoke else 100
        count = 40 if smoke else 300
        restart = Perturb(warmup_steps=steps)
        collect(model, batches, loss, store=store, layers="lora", num_snapshots=count, restart=restart, lr=5e-3)
    restored(model, store)
    # Each member computes the whole network: a tenth of the images will do.
    return Task(model.eval(), loader((test[0][:1000], test[1][:1000]), 500))


def eight_branches(train: Split, test: Split, store: Path, seed: int, smoke: bool) -> Task:
    """W6: the last block and the head of W2's network, trained anew eight times on one trunk, 40 snapshots each."""
    torch.manual_seed(seed)
    model, batches = SmallResNet(), loader(train, 16 if smoke else 128, shuffle=True)
    if not restored(model, store):
        train_all(model, batches, num_epochs=1 if smoke else 3)
        collect(
            model,
            batches,
            F.cross_entropy,
            store=store,
            layers=["stages.3", "head"],
            num_trajectories=2 if smoke else 8,
            restart=Reinit(warmup_steps=10 if smoke else 200),
            num_snapshots=20 if smoke else 40,
            lr=1e-3,
        )
        restored(model, store)
    # Each member computes a whole block: a quarter of the images will do.
    return Task(model.eval(), loader((test[0][:2500], test[1][:2500]), 500))


def overfitted(
    restart: Perturb | Cycle | Reinit, train: Split, test: Split, store: Path, seed: int, smoke: bool
) -> Task:
    """W7: train on few images, as they are, until none is wrong; then on with the last block and the head."""
    torch.manual_seed(seed)
    train = few(train)
    model, batches = SmallResNet(), loader(train, 16 if smoke else 128, shuffle=True)
    if not restored(model, store):
        train_all(model, batches, num_epochs=1 if smoke else 30, change=lambda x: x)
        model.eval()
        wrong = sum(int((model(x).argmax(dim=1) != y).sum()) for x, y in batches)
        print(f"wrong images of {len(train[0])} that it was trained on: {wrong}", flush=True)
        is_one = isinstance(restart, Perturb)
        collect(
            model,
            batches,
            F.cross_entropy,
            store=store,
            layers=["stages.3", "head"],
            num_trajectories=1 if is_one else 2 if smoke else 8,
            restart=restart,
            num_snapshots=20 if smoke else 300 if is_one else 40,
            lr=1e-3,
        )
        restored(model, store)
    # As many as of w6.
    return Task(model.eval(), loader((test[0][:2500], test[1][:2500]), 500))


def few(train: Split) -> Split:
    """The images that W7 learns by heart."""
    return train[0][:5000], train[1][:5000]


def restored(model: nn.Module, store: Path) -> bool:
    """Load the whole model that was recorded with the last snapshot, if there is one."""
    base = SnapshotStore.open(store).base() if store.exists() else None
    if base:
        model.load_state_dict(base)
    return base is not None


def train_all(
    model: nn.Module,
    batches: DataLoader[Any],
    *,
    num_epochs: int,
    logits: Any = lambda outputs: outputs,
    change: Any = augmented,
) -> None:
    """Train a whole model in place, with one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=5e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num_epochs * len(batches))
    for _ in range(num_epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(logits(model(change(x))), y).backward()
            optimizer.step()
            schedule.step()


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
    """Fit, print the table and the curves, and leave both in the folder."""
    brief = DiffusionConfig(max_steps=100) if smoke else DiffusionConfig()
    started = time.perf_counter()
    generator = fit(folder / "store", FitConfig(seed=seed, diffusion=brief), out=folder / "fit")
    print(f"fitted in {time.perf_counter() - started:.1f} s", flush=True)
    report = generator.report
    keys = ("latent_dim", "fidelity", "spread_ratio", "novelty", "copy_ratio", "trajectory_coverage", "diffusion_steps")
    print({key: report[key] for key in keys if key in report}, flush=True)

    started = time.perf_counter()
    num_members = 4 if smoke else 32
    result = evaluate(
        task, folder / "store", generator, num_members=num_members, seed=seed, sets="core" if smoke else "all"
    )
    print(f"{result}\njudged in {time.perf_counter() - started:.0f} s\n", flush=True)
    print(f"{best_of(result)}\n", flush=True)
    for num_passes in (1, 8):
        result.best(num_passes).save(folder / f"best-for-{num_passes}")
    started = time.perf_counter()
    curves = sweep(task, folder / "store", generator, num_members=4 if smoke else 16, seed=seed)
    print(f"{curves}\nswept in {time.perf_counter() - started:.0f} s\n", flush=True)
    curves.save_picture(folder / "curve.png")
    document = {"report": report, "evaluation": result.to_json(), "curves": curves.to_json()}
    (folder / "result.json").write_text(json.dumps(document, indent=2) + "\n")
    print(f"store, fit, figures and picture are in {folder}", flush=True)


def best_of(result: Evaluation) -> str:
    """What was chosen for one pass and for eight, and what that is worth on the half that chose nothing."""
    kind = result.kind
    lines = [f"{'':32} {kind.loss.title:>26} {kind.score.title:>26}"]
    for num_passes, choice in result.shown_choices():
        lines.append(f"{choice.title(num_passes)}: {choice.text}, {choice.num_passes:.2f} passes")
        lines.append(f"{'  this choice':32} {kind.loss.value(choice.loss):>26} {kind.score.value(choice.score):>26}")
        for text, other in choice.compared:
            lines.append(f"  {text:30} {kind.loss.value(other.loss):>26} {kind.score.value(other.score):>26}")
            loss = kind.loss.difference(other.loss_difference, other.loss_error)
            score = kind.score.difference(other.score_difference, other.score_error)
            lines.append(f"{'    choice minus that':32} {loss:>26} {score:>26}")
    return "\n".join(lines)


class SmallResNet(nn.Module):
    """Four residual stages; the last block's two BatchNorms have 512 channels: 2,048 weights and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        # The second convolution of the last block is 1 x 1: it is all that members of an ensemble compute one by one.
        last = Block(128, 512, 2, kernel_size=1)
        self.stages = nn.Sequential(Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2), last)
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(self.stem(x)).mean(dim=(2, 3)))
        return logits


class Block(nn.Module):
    """Two convolutions with BatchNorm around a shortcut without a norm of its own."""

    def __init__(self, inside: int, outside: int, stride: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, kernel_size, 1, kernel_size // 2, bias=False)
        self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False) if inside != outside else nn.Identity()
        self.norm1, self.norm2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


# Each trains a model and records into a store, unless it is there: (train, test, store, seed, smoke) -> its task.
WORKLOADS = {
    "w1": whole_mlp,
    "w2": last_norms,
    "w3": five_runs,
    "w5": lora,
    "w6": eight_branches,
    "w7": partial(overfitted, Perturb()),
    "w7-cycles": partial(overfitted, Cycle(warmup_steps=160)),
    "w7-branches": partial(overfitted, Reinit(warmup_steps=200)),
}

if __name__ == "__main__":
    main()
