"""Time and memory of judging a generator of a whole ResNet-18: 11.2 million values in each snapshot.

    python tests/benchmarks/evaluation_memory.py record FOLDER --data ~/data    # needs 14 GB in FOLDER
    python tests/benchmarks/evaluation_memory.py judge FOLDER --members 4 --sets core
    PYTHONPATH=OTHER_RELEASE python tests/benchmarks/evaluation_memory.py judge FOLDER --members 4 --sets core

The first trains briefly on CIFAR-10 (a folder as for examples/whole_resnet.py), records and fits; the second prints
one line of JSON: seconds of CPU and of the clock, the most memory, seconds by stage, and the figures of every set, so
that two releases can be compared on one store.

Memory is the process's own (RssAnon); mapped files, which the system can drop at any time, are not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from peak_memory import PeakMemory
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from workload_data import augmented, cifar10, loader

from pdiff_plugin import FitConfig, PDiffRecorder, SnapshotStore, Task, WeightGenerator, evaluate, fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("folder", type=Path)
    recording.add_argument("--data", type=Path, required=True)
    recording.add_argument("--snapshots", type=int, default=300)
    recording.add_argument("--items", type=int, default=2000)
    judging = commands.add_parser("judge")
    judging.add_argument("folder", type=Path)
    judging.add_argument("--members", type=int, default=4)
    judging.add_argument("--sets", default="core")
    judging.add_argument("--quick", action="store_true")
    judging.add_argument("--memory-gb", type=float)
    options = parser.parse_args()
    if options.command == "record":
        record(options.folder, options.data, options.snapshots, options.items)
        return
    changes = {"quick": True} if options.quick else {}
    changes |= {"memory_gb": options.memory_gb} if options.memory_gb else {}
    print(json.dumps(judge(options.folder, num_members=options.members, sets=options.sets, **changes)))


def record(folder: Path, data: Path, num_snapshots: int, num_items: int) -> None:
    torch.manual_seed(0)
    train, test = cifar10(data)
    model, batches = new_model(), loader(train, 16, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=1e-2)
    num_steps = 100 + num_snapshots
    recorder = PDiffRecorder(folder / "store", layers="all", last_steps=num_snapshots, dtype="float32")
    with recorder.attach(model, optimizer, total_steps=num_steps):
        for _, (x, y) in zip(range(num_steps), batches, strict=False):
            optimizer.zero_grad()
            F.cross_entropy(model(augmented(x)), y).backward()
            optimizer.step()
    torch.save((test[0][:num_items].clone(), test[1][:num_items].clone()), folder / "test.pt")
    fit(SnapshotStore.open(folder / "store"), FitConfig(), out=folder / "fit")


def judge(folder: Path, **options: object) -> dict[str, object]:
    store, generator = SnapshotStore.open(folder / "store"), WeightGenerator.load(folder / "fit")
    model = new_model()
    model.load_state_dict(store.base() or {})
    task = Task(model, loader(torch.load(folder / "test.pt", weights_only=True), 500))
    with PeakMemory() as memory:
        wall, cpu = time.perf_counter(), time.process_time()
        result = evaluate(task, store, generator, **options)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    times = {stage: round(seconds, 1) for stage, seconds in result.seconds.items()}
    return {
        "cpu_s": round(cpu, 1),
        "wall_s": round(wall, 1),
        "peak_gb": round(memory.peak_gb, 2),
        "seconds": times,
        "sets": result.sets,
        "verdict": result.verdict.sentence,
    }


def new_model() -> nn.Module:
    model: nn.Module = timm.create_model("resnet18", num_classes=10)
    return model


if __name__ == "__main__":
    main()
