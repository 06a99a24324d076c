"""The whole path on data that ships with a dependency: record, fit, generate, swap, judge.

Scikit-learn's handwritten digits (1,797 images of 8 x 8 pixels), a small convolutional network with BatchNorm, and so
few training images that the test error stays at 5-10 %, where differences between sets of weights can be seen.

    OUT/store/       snapshots of the last two BatchNorms over the last 300 steps
    OUT/fit/         the generator
    OUT/task.py      the model and its test data, for `pdiff evaluate`
    OUT/evaluation/  the figures of the table, and report.html where the extra `report` is installed
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pdiff_plugin.config import FitConfig
from pdiff_plugin.errors import FitExistsError
from pdiff_plugin.evaluation.evaluate import evaluate
from pdiff_plugin.evaluation.result import JSON_NAME, Evaluation
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.fitting.fit import fit
from pdiff_plugin.progress import OnProgress, Progress, timed
from pdiff_plugin.recording.recorder import PDiffRecorder
from pdiff_plugin.snapshots.files import replacing
from pdiff_plugin.snapshots.store import SnapshotStore

NUM_TRAIN = 150
BATCH_SIZE = 50
NUM_EPOCHS = 150
NUM_SNAPSHOTS = 300
LR = 3e-3
RECORDING_LR = 3e-2
NOISE = 0.3  # added to training images: without it the loss reaches zero and the weights stop moving
NUM_MEMBERS = 32

_TASK_FILE = '''"""The demo's model and test data, for seed {seed}.

Used by:  pdiff evaluate fit --task task:task
"""

from pathlib import Path

from pdiff_plugin import Task
from pdiff_plugin.demo import load_task


def task() -> Task:
    return load_task(Path(__file__).parent)
'''


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Training and test images (n, 1, 8, 8) in [0, 1] and their classes, always split in the same way."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16.0
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def build_model() -> nn.Module:
    """A convolutional network of about 12,000 parameters with three BatchNorms."""

    def block(num_in: int, num_out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(num_in, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU())

    return nn.Sequential(
        block(1, 16), nn.MaxPool2d(2), block(16, 32), block(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    )  # fmt: skip


def train(store: Path, seed: int, on_progress: OnProgress | None = None) -> nn.Module:
    """Train the network and record its last two BatchNorms over the last 300 steps, the rest frozen."""
    torch.manual_seed(seed)
    model = build_model()
    data, _ = digits()
    loader = DataLoader(data, BATCH_SIZE, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    total_steps = NUM_EPOCHS * len(loader)
    recorder = PDiffRecorder(store, layers="last-norms:2", last_steps=NUM_SNAPSHOTS, freeze_rest=True)
    step = 0
    with recorder.attach(model, optimizer, total_steps=total_steps):
        for _ in range(NUM_EPOCHS):
            for images, labels in loader:
                if step == total_steps - NUM_SNAPSHOTS:
                    # As in the paper: a high constant rate while recording, so that snapshots differ.
                    optimizer.param_groups[0]["lr"] = RECORDING_LR
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images + NOISE * torch.randn_like(images)), labels)
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimizer.step()
                step += 1
            if on_progress is not None:
                on_progress(Progress("train", step, total_steps, {"loss": float(loss.detach())}))
    if recorder.error is not None:  # which stops no training, but here there is nothing without it
        raise recorder.error
    return model.eval()


def load_task(folder: Path) -> Task:
    """The model as it was at the end of the demo's training, and the test images."""
    store = SnapshotStore.open(folder / "store")
    model = build_model()
    base = store.base()
    assert base is not None, "the demo records base weights"
    model.load_state_dict(base)
    train_data, test_data = digits()
    return Task(model.eval(), DataLoader(test_data, 500), DataLoader(train_data, BATCH_SIZE), name="handwritten digits")


@dataclass(frozen=True)
class DemoFolder:
    """A folder that a demo leaves everything in, and goes on from.

    Attributes:
        folder: made if missing.
        task_text: of task.py, which tells one seed's demo from another's, and from a user's own folder.
        result_name: of the file in ``evaluation/`` that says that the demo is finished.
    """

    folder: Path
    task_text: str
    result_name: str

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def prepare(self, fresh: bool) -> None:
        """Delete what an earlier demo left, or refuse to go on from what is no unfinished demo of this seed.

        Raises:
            FitExistsError: the folder holds a finished demo, one of another seed, or a store that is not the demo's.
        """
        task_file = self.folder / "task.py"
        if fresh:
            for path in (self.store, self.folder / "fit", self.folder / "evaluation"):
                shutil.rmtree(path, ignore_errors=True)
        elif self.store.exists():
            if (self.folder / "evaluation" / self.result_name).exists():
                raise FitExistsError(str(self.folder), "the demo has run here before")
            if not task_file.exists() or task_file.read_text(encoding="utf-8") != self.task_text:
                raise FitExistsError(str(self.folder), "a store that is not of a demo with this seed")
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(task_file) as temp:
            temp.write_text(self.task_text, encoding="utf-8")

    @contextmanager
    def recording(self) -> Iterator[Path]:
        """Yield where to record; it becomes the store at the end, so that a folder of that name is complete."""
        unfinished = self.folder / "store-unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        with torch.random.fork_rng(devices=[]):
            yield unfinished
        unfinished.rename(self.store)


def run(
    folder: str | os.PathLike[str], *, seed: int = 0, fresh: bool = False, on_progress: OnProgress | None = None
) -> Evaluation:
    """Run the whole path, leave everything in ``folder`` and return the evaluation.

    After an interruption the same call goes on: behind the training if that was finished, else from the start.

    Args:
        folder: made if missing.
        seed: of every draw.
        fresh: delete what an earlier demo left there first.
        on_progress: told how the stages get on.

    Raises:
        FitExistsError: the folder holds a finished demo, one of another seed, or a store that is not the demo's.
    """
    place = DemoFolder(Path(folder), _TASK_FILE.format(seed=seed), JSON_NAME)
    place.prepare(fresh)
    seconds: dict[str, float] = {}
    if not place.store.exists():
        with timed(seconds, "train"), place.recording() as unfinished:
            train(unfinished, seed, on_progress)
    with timed(seconds, "fit"):
        generator = fit(place.store, FitConfig(seed=seed), out=place.folder / "fit", on_progress=on_progress)
    task = load_task(place.folder)
    result = evaluate(task, place.store, generator, num_members=NUM_MEMBERS, seed=seed, on_progress=on_progress)
    result = dataclasses.replace(result, seconds=seconds | result.seconds)
    result.save(place.folder / "evaluation")
    return result
