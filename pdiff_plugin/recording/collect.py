"""The paper's own way to get snapshots: train the chosen layers of a finished model a little further."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pdiff_plugin.errors import ConfigError, TrajectoryExistsError
from pdiff_plugin.modules.modes import modes_kept
from pdiff_plugin.progress import OnProgress, Progress
from pdiff_plugin.recording.branches import Branch, Lockstep, Reset, Values, perturb
from pdiff_plugin.recording.recorder import PDiffRecorder
from pdiff_plugin.recording.selection import Layers, select
from pdiff_plugin.snapshots.store import SnapshotStore

Restart = Literal["perturb", "reinit", "cycle"]

# Steps before the first snapshot, in snapshots: a cycle is recorded in its last quarter, below 15 % of its top rate.
_WARMUP: dict[Restart, int] = {"perturb": 0, "reinit": 1, "cycle": 3}
_SAME_STARTS: dict[Restart, str] = {
    "perturb": "needs a chosen tensor whose values vary, since noise is relative; choose other layers, or 'cycle'",
    "reinit": "gives every branch the same values, since norm layers start at constants; choose other layers, "
    "'perturb' or 'cycle'",
}


def collect(
    model: nn.Module,
    train_loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    store: str | os.PathLike[str],
    layers: Layers = "last-norms:2",
    num_snapshots: int = 300,
    lr: float = 3e-2,
    weight_decay: float = 0.0,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    trajectory: str | None = None,
    num_trajectories: int = 1,
    restart: Restart = "perturb",
    warmup_steps: int | None = None,
    noise: float = 0.5,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    save_base: bool = True,
    on_progress: OnProgress | None = None,
) -> SnapshotStore:
    """Freeze all but the chosen layers of a trained model, train on, and record every step.

    The rest of the network stays exactly as it is (its BatchNorms in eval mode), the rate is constant and high. The
    model comes back as it was given: weights, statistics, gradients, ``requires_grad`` and modes. That also holds after
    an error or Ctrl-C, and the snapshots up to then stay in the store.

    ``num_trajectories`` records several short trainings of the chosen layers (branches), each a trajectory of its own:

    - ``"perturb"``: the first starts from the given weights, the others from them plus noise. The cheapest and the
      least different: where training removes the noise again, there is one mode several times.
    - ``"reinit"``: each starts from newly initialised layers. More different, at the price of ``warmup_steps`` each;
      what these layers had learnt is learnt anew, so compare the losses with the given model's.
    - ``"cycle"``: one run after the other, each from where the last one ended. The learning rate falls from ``lr`` to
      almost 0 along a cosine, then starts again (Huang et al. 2017, arXiv 1704.00109); only the low end of each cycle
      is recorded. The longest: every trajectory costs full training steps.

    Branches of one trunk are less different than networks that are trained apart: they see the same features, and under
    ``"perturb"`` and ``"reinit"`` the same batches in the same order. Nor can norms or a head differ much: with
    cross-entropy a head has a single optimum, to which its branches go. A whole last block (convolution, norm and head)
    has several. How different they came out is for the evaluation to say; where it matters, train several networks.

    Branches of ``"perturb"`` and ``"reinit"`` take their steps side by side. What comes before the first use of a
    chosen layer is computed once per batch, so that branches of a head cost little more than one of them, and each ends
    as it would alone. Where sharing could change that it is given up, and the log (level INFO) says why. So it is for
    compiled models, and for all that follows a random draw: dropout in the frozen part stays in train mode, and each
    branch draws its own masks.

    Args:
        train_loader: yields ``(inputs, targets)``; it is repeated as often as needed.
        loss_fn: called with the model's outputs and the targets.
        store: folder to record into.
        layers: which tensors, see :func:`~pdiff_plugin.recording.selection.select`.
        num_snapshots: of each trajectory: its last steps, one snapshot each.
        lr: learning rate of AdamW: constant, or the top of each cycle.
        weight_decay: of AdamW.
        optimizer: makes another optimizer from the chosen parameters, once for each branch; ``lr`` and
            ``weight_decay`` are then not used (a cycle starts at the optimizer's own rates).
        trajectory: name of this run in the store (of several: ``<trajectory>-1``, ...); the next free one unless given.
        num_trajectories: how many to record.
        restart: how they come to differ.
        warmup_steps: steps of each trajectory before its first snapshot. By default 0 for ``"perturb"``,
            ``num_snapshots`` for ``"reinit"``, whose first steps are worth nothing, and ``3 * num_snapshots`` for
            ``"cycle"``, which are then recorded in their last quarter.
        noise: of ``"perturb"``, in standard deviations of each tensor's own values; a constant tensor gets none.
        seed: of ``"perturb"`` and ``"reinit"``. No global random state is touched.
        device: where to train; where the model is unless given.
        dtype: of the numbers on disk.
        save_base: also keep the whole model of the last snapshot of each trajectory.
        on_progress: called after every step of every branch with its loss.

    Returns:
        The store, open for reading.

    Raises:
        ConfigError: a setting that cannot work; ``"reinit"`` of a module without ``reset_parameters()``.
        SelectionError: ``layers`` picks nothing that is trained.
        TrajectoryExistsError: the store has snapshots under such a name.
    """
    if restart not in get_args(Restart):
        raise ConfigError("restart", restart, f"must be one of {', '.join(get_args(Restart))}")
    if num_trajectories < 1:
        raise ConfigError("num_trajectories", num_trajectories, "must be at least 1")
    if warmup_steps is not None and warmup_steps < 0:
        raise ConfigError("warmup_steps", warmup_steps, "must be 0 or more")
    if noise <= 0:
        raise ConfigError("noise", noise, "must be positive, or all branches would be the same")
    num_warmup = _WARMUP[restart] * num_snapshots if warmup_steps is None else warmup_steps
    num_steps = num_warmup + num_snapshots
    recorders = [
        PDiffRecorder(
            store, layers=layers, max_snapshots=num_snapshots, trajectory=name, dtype=dtype, save_base=save_base
        )
        for name in _names(store, trajectory, num_trajectories)
    ]
    chosen = select(model, layers).tensors
    parameters = [tensor for tensor in chosen.values() if isinstance(tensor, nn.Parameter)]
    reset = Reset(model, parameters) if restart == "reinit" else None
    rng = torch.Generator().manual_seed(seed)
    home = parameters[0].device
    num_done = 0

    def make_optimizer() -> Optimizer:
        if optimizer is not None:
            return optimizer(parameters)
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)

    def after_step(branch: Branch, step: int, loss: Tensor) -> None:
        nonlocal num_done
        num_done += 1
        if step == num_warmup + 1 and num_trajectories > 1:
            branch.recorder.state_dict()  # opens its trajectory: free names are to follow the order of the branches
        if on_progress is not None:
            on_progress(Progress("collect", num_done, num_trajectories * num_steps, {"loss": loss.item()}))

    with _restored(model):
        try:
            if device is not None:
                model.to(device)
            for parameter in model.parameters():
                parameter.grad = None
                parameter.requires_grad_(any(parameter is p for p in parameters))
            _set_modes(model, chosen)
            num_batches = num_steps * (num_trajectories if restart == "cycle" else 1)
            batches = (
                (_to(inputs, device or home), _to(targets, device or home))
                for inputs, targets in _cycle(train_loader, num_batches)
            )
            # Frozen BatchNorms are in eval mode: they need not be carried from branch to branch.
            values = partial(Values, parameters, [module for module in model.modules() if module.training])
            given = values()
            if restart == "cycle":
                made = make_optimizer()
                falling = _cosine(made, num_steps)
                for recorder in recorders:
                    lockstep = Lockstep(model, loss_fn, chosen, [Branch(recorder, made, given)])
                    lockstep.train(batches, num_steps, after_step, falling)
            else:
                branches: list[Branch] = []
                for recorder in recorders:
                    given.load()
                    if reset is not None:
                        reset(rng)
                    elif branches:
                        perturb(parameters, noise, rng)
                    if branches and branches[0].values.has_same_parameters():
                        raise ConfigError("restart", restart, _SAME_STARTS[restart])
                    made = make_optimizer()
                    if any(made is branch.optimizer for branch in branches):
                        raise ConfigError("optimizer", optimizer, "must make a new optimizer each time it is called")
                    branches.append(Branch(recorder, made, values()))
                Lockstep(model, loss_fn, chosen, branches).train(batches, num_steps, after_step)
        finally:
            if device is not None:
                model.to(home)
    for recorder in recorders:
        if recorder.error is not None:
            raise recorder.error
    return SnapshotStore.open(store)


def _names(store: str | os.PathLike[str], trajectory: str | None, num_trajectories: int) -> list[str | None]:
    """A name for each trajectory; None is the next free one."""
    if trajectory is None or num_trajectories == 1:
        return [trajectory] * num_trajectories
    names: list[str | None] = [f"{trajectory}-{number}" for number in range(1, num_trajectories + 1)]
    if (Path(store) / "layout.json").is_file():
        # Before a step is taken: the name of the last cycle must not turn out to be in use when all others are done.
        found = SnapshotStore.open(store)
        for index, name in enumerate(found.trajectories):
            if name in names:
                raise TrajectoryExistsError(
                    str(found.path / "trajectories" / name), int((found.trajectory_index == index).sum())
                )
    return names


def _cosine(optimizer: Optimizer, num_steps: int) -> Callable[[int], None]:
    """Sets the rates of a step in a cycle: from the optimizer's own down to almost 0."""
    tops = [group["lr"] for group in optimizer.param_groups]

    def set_rates(step: int) -> None:
        for group, top in zip(optimizer.param_groups, tops, strict=True):
            group["lr"] = top * (1 + math.cos(math.pi * (step - 1) / num_steps)) / 2

    return set_rates


def _set_modes(model: nn.Module, chosen: dict[str, Tensor]) -> None:
    """Train mode, but for BatchNorms whose running statistics are not recorded."""
    model.train()
    recorded = {id(tensor) for tensor in chosen.values()}
    for module in model.modules():
        statistics = getattr(module, "running_mean", None)
        if isinstance(statistics, Tensor) and id(statistics) not in recorded:
            module.eval()


def _cycle(loader: Iterable[Any], num_batches: int) -> Iterator[Any]:
    while num_batches > 0:
        before = num_batches
        for batch in itertools.islice(loader, num_batches):
            num_batches -= 1
            yield batch
        if num_batches == before:
            raise ConfigError("train_loader", loader, "must yield at least one batch each time it is iterated")


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Give the model back as it is, whatever happens inside."""
    values = Values(model.parameters(), model.modules())
    with modes_kept(model, gradients=True):
        try:
            yield
        finally:
            values.load()


def _to(batch: Any, device: str | torch.device) -> Any:
    """Move the tensors of a nested batch."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        return type(batch)(_to(value, device) for value in batch)
    return batch
