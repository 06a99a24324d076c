"""The demo of a dial: one small network at 24 rotations of scikit-learn's digits, every other one never fitted.

OUT/base.safetensors   the network that every training starts from, trained on all rotations mixed
OUT/store/             one trajectory per angle: its last 20 steps
OUT/fit/               the generator, fitted to the angles 0, 30, 60, ...
OUT/task.py            the model and its test images at an angle, for `pdiff evaluate`
OUT/evaluation/        the comparison at 15, 45, 75, ...
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pdiff_plugin.config import ConditionConfig, DiffusionConfig, FitConfig
from pdiff_plugin.demo import DemoFolder
from pdiff_plugin.evaluation.condition_result import JSON_NAME, ConditionEvaluation
from pdiff_plugin.evaluation.conditions import evaluate_conditions
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.fitting.fit import fit
from pdiff_plugin.progress import OnProgress, Progress, timed
from pdiff_plugin.recording.recorder import PDiffRecorder
from pdiff_plugin.snapshots.conditions import Condition
from pdiff_plugin.snapshots.tensor_files import load_tensors, save_tensors

ANGLES = tuple(range(0, 360, 15))
GAP = 30  # degrees between fitted angles
NUM_TRAIN = 900
BATCH_SIZE = 64
BASE_STEPS, BASE_LR = 1000, 3e-3
NUM_STEPS, LR = 150, 1e-2
LAST_STEPS = 20
NOISE = 0.1  # added to training images, so that the loss does not reach zero
NUM_MEMBERS = 16
DIFFUSION_STEPS = 400  # at most; the default's thousands change little here and take half a minute
JOINT_STEPS = 1800  # as many as the twelve fitted angles took together

_TASK_FILE = '''"""The demo's model and test images at an angle, for seed {seed}.

Used by:  pdiff evaluate fit --task task:task --conditions held-out
"""

from pathlib import Path

from pdiff_plugin import Task
from pdiff_plugin.dial_demo import load_task


def task(angle: float) -> Task:
    return load_task(Path(__file__).parent, angle)
'''


@cache  # reading them takes longer than the training at an angle
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images (n, 1, 8, 8) in [0, 1] and their classes, always split in the same way."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16.0
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return (images[train], labels[train]), (images[test], labels[test])


def rotated(images: Tensor, degrees: Tensor | float) -> Tensor:
    """Images turned by an angle, or each by its own, (n, 1, 8, 8)."""
    angle = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float32)).expand(len(images))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(len(images))
    turns = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)  # (n, 2, 3)
    grid = F.affine_grid(turns, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def build_model() -> nn.Module:
    """A network of 2,474 parameters: small, so that one for all angles does worse than one for each."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 10))


Draw = Callable[[int], Tensor]  # number of images -> an angle for each


def at(*angles: float) -> Draw:
    """Angles drawn among these, the same chance for each."""
    return lambda count: torch.tensor(angles)[torch.randint(len(angles), (count,))]


def anywhere(count: int) -> Tensor:
    """Angles from the whole circle."""
    return 360 * torch.rand(count)


def train(model: nn.Module, draw: Draw, num_steps: int, lr: float, recorder: PDiffRecorder | None = None) -> None:
    """Train the whole network on images turned by angles that are drawn; draws come from the global seed."""
    images, labels = digits()[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    if recorder is not None:
        recorder.attach(model, optimizer, total_steps=num_steps)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = lr * (0.05 + 0.475 * (1 + math.cos(math.pi * step / num_steps)))
        rows = torch.randint(NUM_TRAIN, (BATCH_SIZE,))
        x = rotated(images[rows], draw(BATCH_SIZE))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x + NOISE * torch.randn_like(x)), labels[rows])
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
    if recorder is not None:
        recorder.close()


def record(folder: Path, store: Path, seed: int, on_progress: OnProgress | None = None) -> None:
    """Train one base on all rotations, and from it at each angle, recording the last steps of each."""
    torch.manual_seed(seed)
    model = build_model()
    train(model, anywhere, BASE_STEPS, BASE_LR)
    save_tensors(folder / "base.safetensors", model.state_dict(), "pt", 1)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number, angle in enumerate(ANGLES):
        model.load_state_dict(base)
        recorder = PDiffRecorder(
            store, layers="all", condition={"angle": angle}, last_steps=LAST_STEPS, save_base=False
        )
        train(model, at(angle), NUM_STEPS, LR, recorder)
        if recorder.error is not None:
            raise recorder.error
        if on_progress is not None:
            on_progress(Progress("train", number + 1, len(ANGLES), {"angle": float(angle)}))


def load_task(folder: Path, angle: float) -> Task:
    """The network that every training started from, and the test images at an angle."""
    model = build_model()
    model.load_state_dict(load_tensors(folder / "base.safetensors", "pt", 1)[0])
    images, labels = digits()[1]
    data = TensorDataset(rotated(images, angle), labels)
    return Task(model.eval(), DataLoader(data, 900), name="rotated digits")


def run(
    folder: str | os.PathLike[str], *, seed: int = 0, fresh: bool = False, on_progress: OnProgress | None = None
) -> ConditionEvaluation:
    """Run the whole path, leave everything in ``folder`` and return the comparison; see :func:`pdiff_plugin.demo.run`.

    Raises:
        FitExistsError: the folder holds a finished demo, one of another seed, or a store that is not the demo's.
    """
    place = DemoFolder(Path(folder), _TASK_FILE.format(seed=seed), JSON_NAME)
    place.prepare(fresh)
    seconds: dict[str, float] = {}
    if not place.store.exists():
        with timed(seconds, "train"), place.recording() as unfinished:
            record(place.folder, unfinished, seed, on_progress)
    held_out = ",".join(str(angle) for angle in ANGLES if angle % GAP)
    condition = ConditionConfig(kinds=("angle:cyclic=360",), hold_out=(f"angle={held_out}",))
    with timed(seconds, "fit"):
        config = FitConfig(seed=seed, condition=condition, diffusion=DiffusionConfig(max_steps=DIFFUSION_STEPS))
        generator = fit(place.store, config, out=place.folder / "fit", on_progress=on_progress)

    def train_there(model: nn.Module, conditions: list[Condition], num_steps: int) -> None:
        train(model, at(*(float(one["angle"]) for one in conditions)), num_steps, LR)  # type: ignore[arg-type]

    result = evaluate_conditions(
        lambda angle: load_task(place.folder, angle),
        place.store,
        generator,
        train=train_there,
        num_members=NUM_MEMBERS,
        joint_steps=JOINT_STEPS,
        seed=seed,
        on_progress=on_progress,
    )
    result = dataclasses.replace(
        result, details={**result.details, "seconds": {**seconds, **result.details["seconds"]}}
    )
    result.save(place.folder / "evaluation")
    return result
