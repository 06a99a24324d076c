"""The paper's own way to get snapshots: train the chosen layers of a finished model a little further."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pdiff_plugin.config import CollectConfig, Cycle, Perturb, Reinit, configured
from pdiff_plugin.errors import ConfigError, TrajectoryExistsError
from pdiff_plugin.modules.modes import modes_kept
from pdiff_plugin.progress import OnProgress, Progress
from pdiff_plugin.recording.branches import Branch, Lockstep, LossFn, Reset, Values, perturb
from pdiff_plugin.recording.recorder import PDiffRecorder
from pdiff_plugin.recording.selection import select
from pdiff_plugin.recording.sweep import Run, check_goes_on, plan_sweep
from pdiff_plugin.snapshots.store import SnapshotStore

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]

_SAME_STARTS: dict[type, str] = {
    Perturb: "needs a chosen tensor whose values vary, since noise is relative; choose other layers, or Cycle()",
    Reinit: "gives every branch the same values, since norm layers start at constants; choose other layers, Perturb() "
    "or Cycle()",
}
_RESTARTS: dict[str, type[Perturb | Reinit | Cycle]] = {"perturb": Perturb, "reinit": Reinit, "cycle": Cycle}


def collect(
    model: nn.Module,
    train_loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    config: CollectConfig | None = None,
    *,
    store: str | os.PathLike[str],
    conditions: Sequence[Mapping[str, Any]] | None = None,
    data: Callable[..., Iterable[Any]] | None = None,
    optimizer: MakeOptimizer | None = None,
    device: str | torch.device | None = None,
    on_progress: OnProgress | None = None,
    **changes: Any,
) -> SnapshotStore:
    """Freeze all but the chosen layers of a trained model, train on, and record every step.

    The rest of the network stays exactly as it is (its BatchNorms in eval mode), the rate is constant and high. The
    model comes back as it was given: weights, statistics, gradients, ``requires_grad`` and modes. That also holds after
    an error or Ctrl-C, and the snapshots up to then stay in the store.

    ``num_trajectories`` records several short trainings of the chosen layers (branches), each a trajectory of its own.
    How they come to differ is the choice of ``restart``: :class:`~pdiff_plugin.config.Perturb`,
    :class:`~pdiff_plugin.config.Reinit` or :class:`~pdiff_plugin.config.Cycle`.

    Branches of one trunk are less different than networks that are trained apart: they see the same features, and all
    but cycles the same batches in the same order. Nor can norms or a head differ much: with cross-entropy a head has a
    single optimum, to which its branches go. A whole last block (convolution, norm and head) has several. How different
    they came out is for the evaluation to say; where it matters, train several networks.

    Perturbed and reinitialised branches take their steps side by side. What comes before the first use of a chosen
    layer is computed once per batch, so that branches of a head cost little more than one of them, and each ends as it
    would alone. Where sharing could change that it is given up, and the log (level INFO) says why. So it is for
    compiled models, and for all that follows a random draw: dropout in the frozen part stays in train mode, and each
    branch draws its own masks.

    ``conditions`` records a sweep, one trajectory for each of them, to be fitted as a function of the condition::

        angles = [{"angle": angle} for angle in range(0, 360, 15)]
        collect(model, loss_fn=loss, store="runs/sweep", conditions=angles, data=rotated, restart=Cycle())

    Each starts at the given weights and statistics and has a loader of its own, ``data(angle=15)``. What is to be
    compared wants a rate that falls: ``Cycle()`` here lets it fall from ``lr`` to almost 0 over each condition's steps
    and records the last of them, and ``Cycle(warmup_steps=90)`` or ``Perturb(warmup_steps=90)`` (constant rate) says
    how many steps come first. The same call repeated after an interruption goes on: conditions whose trajectory is
    whole are left out, one that was begun is begun anew. Other layers, steps or frozen weights than those of the
    finished ones are refused; another rate or other data are not seen, so give ``trajectory`` another name then.

    Args:
        model: trained; in whatever mode.
        train_loader: yields ``(inputs, targets)``; it is repeated as often as needed. Left out with ``conditions``.
        loss_fn: called with the model's outputs and the targets.
        config: what is trained and recorded.
        store: folder to record into.
        conditions: settings of a sweep, each a mapping of names to values as for
            :class:`~pdiff_plugin.PDiffRecorder`. Their trajectories are ``sweep-001``, ``sweep-002``, ... (or
            ``trajectory``, if given, instead of ``sweep``).
        data: called with the names and values of a condition, when its turn comes; returns its ``train_loader``.
        optimizer: makes another optimizer from the chosen parameters, once for each branch or condition; ``lr`` and
            ``weight_decay`` are then not used (a cycle starts at the optimizer's own rates).
        device: where to train; where the model is unless given.
        on_progress: called after every step of every branch with its loss, and with the condition as text.
        changes: single fields of :class:`~pdiff_plugin.config.CollectConfig`: ``collect(..., layers="head")``. No
            global random state is touched by its ``seed``.

    Returns:
        The store, open for reading.

    Raises:
        ConfigError: a setting that cannot work; ``Reinit()`` of a module without ``reset_parameters()``.
        SelectionError: ``layers`` picks nothing that is trained.
        TrajectoryExistsError: the store has snapshots under such a name.
        ConditionError: a condition that is none, or unlike the others here or in the store.
    """
    config = configured(CollectConfig, config, changes if config is not None else _with_restart(changes))
    if loss_fn is None:
        raise ConfigError("loss_fn", loss_fn, "must be a function of the model's outputs and the targets")
    make = optimizer or partial(torch.optim.AdamW, lr=config.lr, weight_decay=config.weight_decay)
    if conditions is not None:
        if train_loader is not None:
            raise ConfigError(
                "train_loader", train_loader, "must be left out with conditions: data() gives the loaders"
            )
        runs = plan_sweep(Path(store), conditions, data, config)
        _record_sweep(runs, model, loss_fn, config, Path(store), make, device, on_progress)
        return SnapshotStore.open(store)
    if train_loader is None or data is not None:
        raise ConfigError("train_loader", train_loader, "must be given, or conditions and data without it")
    num_warmup = config.restart.num_warmup(config.num_snapshots)
    num_steps = num_warmup + config.num_snapshots
    recorders = [_recorder(store, config, trajectory=name) for name in _names(Path(store), config)]
    chosen = select(model, config.layers).tensors
    parameters = [tensor for tensor in chosen.values() if isinstance(tensor, nn.Parameter)]
    reset = Reset(model, parameters, config.restart) if isinstance(config.restart, Reinit) else None
    num_done = 0

    def after_step(branch: Branch, step: int, loss: Tensor) -> None:
        nonlocal num_done
        num_done += 1
        if step == num_warmup + 1 and len(recorders) > 1:
            branch.recorder.state_dict()  # opens its trajectory: free names are to follow the order of the branches
        if on_progress is not None:
            on_progress(Progress("collect", num_done, len(recorders) * num_steps, {"loss": loss.item()}))

    with _restored(model), _moved(model, parameters[0].device, device) as place:
        _train_only(model, chosen)
        # Frozen BatchNorms are in eval mode: they need not be carried from branch to branch.
        values = partial(Values, parameters, [module for module in model.modules() if module.training])
        if isinstance(config.restart, Cycle):
            given, made = values(), make(parameters)
            batches = _batches(train_loader, num_steps * len(recorders), place)
            set_rates = _cosine(made, num_steps)
            for recorder in recorders:
                lockstep = Lockstep(model, loss_fn, chosen, [Branch(recorder, made, given)])
                lockstep.train(batches, num_steps, after_step, set_rates)
        else:
            branches = _branches(config, recorders, parameters, make, values, reset)
            batches = _batches(train_loader, num_steps, place)
            Lockstep(model, loss_fn, chosen, branches).train(batches, num_steps, after_step)
    for recorder in recorders:
        if recorder.error is not None:
            raise recorder.error
    return SnapshotStore.open(store)


def _record_sweep(
    runs: Sequence[Run],
    model: nn.Module,
    loss_fn: LossFn,
    config: CollectConfig,
    store: Path,
    make: MakeOptimizer,
    device: str | torch.device | None,
    on_progress: OnProgress | None,
) -> None:
    """Train the chosen layers at each condition that is not recorded yet, from the given weights each time."""
    num_steps = config.restart.num_warmup(config.num_snapshots) + config.num_snapshots
    selection = select(model, config.layers)
    chosen = selection.tensors
    parameters = [tensor for tensor in chosen.values() if isinstance(tensor, nn.Parameter)]
    check_goes_on(store, runs, model, selection)
    made: Optimizer | None = None
    num_done = num_steps * sum(run.is_complete for run in runs)

    with _restored(model), _moved(model, parameters[0].device, device) as place:
        _train_only(model, chosen)
        given = Values(parameters, [module for module in model.modules() if module.training])
        for number, run in enumerate(runs, start=1):
            if run.is_complete:
                continue
            given.load()
            made, last = make(parameters), made
            if made is last:
                raise ConfigError("optimizer", make, "must make a new optimizer each time it is called")
            recorder = _recorder(store, config, trajectory=run.trajectory, condition=run.condition)
            if run.is_begun:
                recorder.load_state_dict({"step": 0, "trajectory": run.trajectory, "store": str(store)})
            text = f"{run.text} ({number} of {len(runs)})"

            def after_step(branch: Branch, step: int, loss: Tensor, text: str = text) -> None:
                nonlocal num_done
                num_done += 1
                if on_progress is not None:
                    on_progress(Progress("collect", num_done, len(runs) * num_steps, {"loss": loss.item()}, text))

            batches = _batches(run.load(), num_steps, place, f"data({run.text})")
            set_rates = _cosine(made, num_steps) if isinstance(config.restart, Cycle) else _keep_rates
            lockstep = Lockstep(model, loss_fn, chosen, [Branch(recorder, made, given)])
            lockstep.train(batches, num_steps, after_step, set_rates)
            if recorder.error is not None:
                raise recorder.error


def _recorder(store: str | os.PathLike[str], config: CollectConfig, **own: Any) -> PDiffRecorder:
    return PDiffRecorder(
        store,
        layers=config.layers,
        max_snapshots=config.num_snapshots,
        dtype=config.dtype,
        save_base=config.save_base,
        keep_sparse=False,  # steps before the first snapshot are for warming up, and an interrupted call goes on
        **own,
    )


def _with_restart(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with ``restart`` as an object, where they name it and have its own settings beside it."""
    changed = dict(changes)
    name = changed.get("restart", "perturb")
    if not isinstance(name, str) or not {"restart", "warmup_steps", "noise"} & set(changed):
        return changed
    warnings.warn(
        f"restart={name!r}, warmup_steps=... and noise=... of collect() will be removed: pass "
        "restart=Perturb(noise=...), Reinit(warmup_steps=...) or Cycle(warmup_steps=...) of pdiff_plugin",
        DeprecationWarning,
        stacklevel=3,
    )
    if name not in _RESTARTS:
        raise ConfigError("restart", name, f"must be one of {', '.join(_RESTARTS)}")
    own = {key: changed.pop(key) for key in ("warmup_steps", "noise") if key in changed}
    if own.get("warmup_steps") is None:
        own.pop("warmup_steps", None)
    if name != "perturb":
        own.pop("noise", None)
    return {**changed, "restart": _RESTARTS[name](**own)}


def _names(store: Path, config: CollectConfig) -> list[str | None]:
    """A name for each trajectory; None is the next free one."""
    if config.trajectory is None or config.num_trajectories == 1:
        return [config.trajectory] * config.num_trajectories
    names: list[str | None] = [f"{config.trajectory}-{number}" for number in range(1, config.num_trajectories + 1)]
    if (store / "layout.json").is_file():
        # Before a step is taken: the name of the last cycle must not turn out to be in use when all others are done.
        opened = SnapshotStore.open(store)
        for index, name in enumerate(opened.trajectories):
            if name in names:
                raise TrajectoryExistsError(
                    str(opened.path / "trajectories" / name), int((opened.trajectory_index == index).sum())
                )
    return names


def _branches(
    config: CollectConfig,
    recorders: list[PDiffRecorder],
    parameters: list[nn.Parameter],
    make: MakeOptimizer,
    values: Callable[[], Values],
    reset: Reset | None,
) -> list[Branch]:
    """A branch for each recorder, perturbed or reinitialised, with an optimizer of its own."""
    rng = torch.Generator().manual_seed(config.seed)
    given = values()
    branches: list[Branch] = []
    for recorder in recorders:
        given.load()
        if reset is not None:
            reset(rng)
        elif branches and isinstance(config.restart, Perturb):
            perturb(parameters, config.restart.noise, rng)
        if branches and branches[0].values.has_same_parameters():
            raise ConfigError("restart", config.restart, _SAME_STARTS[type(config.restart)])
        made = make(parameters)
        if any(made is branch.optimizer for branch in branches):
            raise ConfigError("optimizer", make, "must make a new optimizer each time it is called")
        branches.append(Branch(recorder, made, values()))
    return branches


def _cosine(optimizer: Optimizer, num_steps: int) -> Callable[[int], None]:
    """Sets the rates of a step in a cycle: from the optimizer's own down to almost 0."""
    tops = [group["lr"] for group in optimizer.param_groups]

    def set_rates(step: int) -> None:
        for group, top in zip(optimizer.param_groups, tops, strict=True):
            group["lr"] = top * (1 + math.cos(math.pi * (step - 1) / num_steps)) / 2

    return set_rates


def _keep_rates(step: int) -> None:
    """Leaves the rates of a step as they are."""


def _train_only(model: nn.Module, chosen: dict[str, Tensor]) -> None:
    """Gradients for the chosen parameters; train mode, but for BatchNorms whose running statistics are not recorded."""
    recorded = {id(tensor) for tensor in chosen.values()}
    for parameter in model.parameters():
        parameter.grad = None
        parameter.requires_grad_(id(parameter) in recorded)
    model.train()
    for module in model.modules():
        statistics = getattr(module, "running_mean", None)
        if isinstance(statistics, Tensor) and id(statistics) not in recorded:
            module.eval()


def _batches(
    loader: Iterable[Any], num_batches: int, device: str | torch.device, name: str = "train_loader"
) -> Iterator[tuple[Any, Any]]:
    """``num_batches`` of the loader (``name`` in errors), over and over, on ``device``."""
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise ConfigError(name, loader, "must be a loader that yields (inputs, targets)")
    while num_batches > 0:
        before = num_batches
        for inputs, targets in itertools.islice(loader, num_batches):
            num_batches -= 1
            yield _to(inputs, device), _to(targets, device)
        if num_batches == before:
            raise ConfigError(name, loader, "must yield at least one batch each time it is iterated")


@contextmanager
def _moved(model: nn.Module, home: torch.device, device: str | torch.device | None) -> Iterator[str | torch.device]:
    """The model on ``device``, if given, and back at ``home`` afterwards; gives where it is."""
    if device is None:
        yield home
        return
    try:
        model.to(device)
        yield device
    finally:
        model.to(home)


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
