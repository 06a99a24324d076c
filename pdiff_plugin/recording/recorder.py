"""`PDiffRecorder`: takes snapshots of chosen layers while a model trains, and disturbs nothing.

With the recorder attached a run ends in the same weights, optimizer state and random state as without it, bit for bit
(``freeze_rest=True`` is the one setting that changes training, and says so). A step pays for one copy of the chosen
tensors; files are written by a background thread.
"""

from __future__ import annotations

import atexit
import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pdiff_plugin.errors import ConfigError, StoreNotFoundError, TrajectoryExistsError
from pdiff_plugin.recording.hooks import StepHook, unwrap_optimizer
from pdiff_plugin.recording.rest import FrozenRest, RestDrift, rest_names
from pdiff_plugin.recording.selection import Layers, label, select
from pdiff_plugin.recording.window import Window
from pdiff_plugin.recording.writer import BackgroundWriter, RowInfo
from pdiff_plugin.snapshots.files import read_json
from pdiff_plugin.snapshots.layout import DTYPES, Layout, named_tensors, unwrap, wrapped_names
from pdiff_plugin.snapshots.remote import is_remote
from pdiff_plugin.snapshots.shards import (
    check_sharding,
    is_sharded,
    local_part,
    next_free_trajectory,
    shard_folder,
    write_shapes,
)
from pdiff_plugin.snapshots.store import FORMAT, FORMAT_VERSION, TrajectoryWriter, read_base_header, read_chunks

logger = logging.getLogger(__name__)

DEFAULT_STORE = "pdiff-snapshots"


class PDiffRecorder:
    """Records snapshots of chosen layers into a store.

        with PDiffRecorder("runs/a").attach(model, optimizer, total_steps=9000):
            train()

    Args:
        store: the store's folder, made when the first snapshot is written; ``./pdiff-snapshots`` unless given.
        layers: which tensors, see :func:`~pdiff_plugin.recording.selection.select`.
        every_n_steps: optimizer steps between snapshots. Unless given, as few as ``max_snapshots`` allows.
        last_epochs: the window is this many epochs at the end of training, where their length is known,
        last_steps: or this many optimizer steps, which wins,
        max_snapshots: else as many steps as there may be snapshots. While the end is not known the newest are kept.
        keep_newest: take the end as not known, even from a trainer that plans one: for training that may stop early.
            Snapshots are then written from the first step on, and the oldest deleted.
        trajectory: name of this run in the store; the next free ``run-001``, ``run-002``, ... unless given.
        freeze_rest: train only the chosen tensors during the window, as the p-diff paper does.
        dtype: of the numbers on disk, ``float32`` or ``bfloat16`` (half the size); ``float64`` and ``float16`` too.
        save_base: also keep the whole model of the last snapshot, once.

    Attributes:
        rest_drift: relative L2 change of the trained tensors that were not recorded, over the window; None until known.
        error: why recording stopped early, if it did.

    Raises:
        ConfigError: a setting that cannot work.
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | None = None,
        *,
        layers: Layers = "last-norms:2",
        every_n_steps: int | None = None,
        last_epochs: int = 1,
        last_steps: int | None = None,
        max_snapshots: int = 300,
        keep_newest: bool = False,
        trajectory: str | None = None,
        freeze_rest: bool = False,
        dtype: str = "float32",
        save_base: bool = True,
    ) -> None:
        counts = {"every_n_steps": every_n_steps, "last_steps": last_steps}
        counts |= {"last_epochs": last_epochs, "max_snapshots": max_snapshots}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ConfigError(name, value, "must be at least 1")
        if dtype not in DTYPES:
            raise ConfigError("dtype", dtype, f"must be one of {', '.join(DTYPES)}")
        if store is not None and is_remote(store):
            raise ConfigError("store", store, "must be a folder of this machine; copy it to the bucket after the run")
        self.store = None if store is None else os.fspath(store)
        if freeze_rest and keep_newest:
            raise ConfigError("freeze_rest", True, "needs to know where the window begins: leave keep_newest out")
        if isinstance(layers, str) and layers.startswith("<function "):
            raise ConfigError(
                "layers",
                layers,
                "was a function, which settings in a checkpoint only name: pass the function itself "
                "(in transformers, without restore_callback_states_from_checkpoint)",
            )
        # A list, as after a way through JSON.
        self.layers: Layers = layers if isinstance(layers, str) or callable(layers) else list(layers)
        self.every_n_steps, self.last_epochs, self.last_steps = every_n_steps, last_epochs, last_steps
        self.max_snapshots, self.keep_newest = max_snapshots, keep_newest
        self.trajectory, self.freeze_rest = trajectory, freeze_rest
        self.dtype, self.save_base = dtype, save_base
        self.rest_drift: float | None = None
        self.error: Exception | None = None
        self._run: _Run | None = None
        self._hook: StepHook | None = None
        self._is_watching = False  # whether the hook only tells observe() that a step was really taken
        self._took_step = False
        self._found_inf: Tensor | None = None
        self._state: dict[str, Any] = {"step": 0, "trajectory": trajectory, "store": self.store}
        self._is_restored = False  # whether _state came from a checkpoint and waits for start()

    def attach(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        averaged: bool = False,
        default_store: str | os.PathLike[str] = DEFAULT_STORE,
    ) -> PDiffRecorder:
        """Record ``model`` after each step of ``optimizer``; leave the optimizer out to call :meth:`step` yourself.

        Args:
            model: wrapped or not (DistributedDataParallel, ``torch.compile``).
            optimizer: any torch optimizer; of several, the last that trains a chosen tensor is followed.
            total_steps: optimizer steps of the whole run, resumed part included.
            steps_per_epoch: optimizer steps in an epoch, for ``last_epochs``.
            averaged: ``model`` is an averaged copy (EMA, SWA), whose parameters need no gradient.
            default_store: folder to use when the recorder was built without one.

        Raises:
            SelectionError: ``layers`` picks nothing that is trained.
            NotHookableError: ``optimizer`` has no step hooks.
            LayoutMismatchError: the store holds snapshots of other tensors.
            UnsupportedTensorError: the model is sharded, and not by ``fully_shard``.
        """
        given = optimizer if isinstance(optimizer, Sequence) else [optimizer] if optimizer is not None else []
        optimizers = [unwrap_optimizer(one) for one in given]
        self.start(
            model,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            averaged=averaged,
            default_store=default_store,
        )
        if optimizers:
            chosen = {id(tensor) for tensor in select(model, self.layers, averaged=averaged).tensors.values()}
            owners = [
                o for o in optimizers if any(id(p) in chosen for group in o.param_groups for p in group["params"])
            ]
            self._hook = StepHook((owners or optimizers)[-1], self._on_optimizer_step)
        return self

    def start(
        self,
        model: nn.Module,
        *,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        averaged: bool = False,
        default_store: str | os.PathLike[str] = DEFAULT_STORE,
        default_store_changes: bool = False,
        watch: Any = None,
    ) -> None:
        """Begin a run that :meth:`observe` or :meth:`step` will follow. For trainer adapters; see :meth:`attach`.

        Args:
            default_store_changes: whether ``default_store`` is another one each time a run is resumed (Lightning's
                ``version_N``); it then goes on in the store of its checkpoint.
            watch: the optimizer, if torch's; :meth:`observe` then records nothing unless it has taken a step (not in
                the middle of gradient accumulation, not a step that the gradient scaler skipped).
        """
        self.close()
        self.rest_drift, self.error = None, None
        total_steps = None if self.keep_newest else total_steps
        window = Window.plan(
            total_steps,
            steps_per_epoch=steps_per_epoch,
            every_n_steps=self.every_n_steps,
            last_epochs=self.last_epochs,
            last_steps=self.last_steps,
            max_snapshots=self.max_snapshots,
        )
        if self.freeze_rest and total_steps is None:
            raise ConfigError("freeze_rest", True, "needs to know where the window begins: pass total_steps")
        if self.freeze_rest and _world_size() > 1:
            raise ConfigError(
                "freeze_rest", True, "cannot be used in distributed training, which expects all gradients"
            )
        restored_store = self._state.get("store") if self._is_restored and default_store_changes else None
        if restored_store is not None and not Path(restored_store).is_dir():
            restored_store = None  # the checkpoint was moved to another machine
        store = Path(self.store or restored_store or default_store)
        self._run = _Run(self, model, window, steps_per_epoch, averaged, store)
        if self._is_restored:
            self._run.restore(self._state)
            self._is_restored = False
        self._is_watching = watch is not None
        if watch is not None:
            self._hook = StepHook(unwrap_optimizer(watch), self._on_watched_step)
        atexit.register(_close_at_exit, weakref.ref(self))

    def step(self, epoch: float | None = None, metrics: Mapping[str, Any] | None = None) -> None:
        """Say that an optimizer step has been taken. Not needed when :meth:`attach` was given the optimizer."""
        if self._run is None:
            raise ConfigError("model", None, "must be given with attach(model) before step() is called")
        self._run.observe(self._run.step + 1, epoch, metrics)

    def observe(
        self,
        model: nn.Module,
        *,
        step: int | None = None,
        epoch: float | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Say that ``model`` has taken optimizer step number ``step``; a step that was seen before is skipped.

        Without :meth:`start` the run's length counts as unknown. Without a number it is the next step.
        """
        if self._run is None:
            self.start(model)
        assert self._run is not None
        took_step, found_inf = self._took_step or not self._is_watching, self._found_inf
        self._took_step, self._found_inf = False, None
        if took_step and (step is None or step > self._run.step):
            self._run.observe(self._run.step + 1 if step is None else step, epoch, metrics, found_inf)

    def close(self) -> None:
        """Write what is left and let go of the model. May be called again."""
        hook, run, self._hook, self._run = self._hook, self._run, None, None
        if hook is not None:
            hook.remove()
        if run is not None:
            run.close()
            self._state = run.counters()

    def state_dict(self) -> dict[str, Any]:
        """Counters for a checkpoint, as plain JSON. Every snapshot so far is on disk when this returns."""
        return self._run.state() if self._run is not None else dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a run from its checkpoint: snapshots past its step are dropped, none is taken twice.

        A run that was recorded to its end, or in another store, is left alone: another trajectory is begun.
        """
        self._state, self._is_restored = dict(state), True
        if self._run is not None:
            self._run.restore(self._state)
            self._is_restored = False

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON; of a function as ``layers`` only its name."""
        names = ("store", "layers", "every_n_steps", "last_epochs", "last_steps", "max_snapshots", "keep_newest")
        settings = {name: getattr(self, name) for name in (*names, "trajectory", "freeze_rest", "dtype", "save_base")}
        return settings | ({"layers": label(self.layers)} if callable(self.layers) else {})

    def __enter__(self) -> PDiffRecorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _on_optimizer_step(self, optimizer: Optimizer) -> None:
        self._on_watched_step(optimizer)
        if self._run is not None and self._took_step:
            self._run.observe(self._run.step + 1, None, None, self._found_inf)
        self._took_step, self._found_inf = False, None

    def _on_watched_step(self, optimizer: Optimizer) -> None:
        # Fused optimizers run their hooks for steps that the gradient scaler made them skip, too.
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        if found_inf is None:
            self._took_step = True
        elif found_inf.is_cuda:  # reading it would wait for the device; the writer drops the row
            self._took_step, self._found_inf = True, found_inf.clone()
        else:
            self._took_step = not found_inf.item()


class _Run:
    """One training run as the recorder sees it, from ``start`` to ``close``."""

    def __init__(
        self,
        recorder: PDiffRecorder,
        model: nn.Module,
        window: Window,
        steps_per_epoch: int | None,
        averaged: bool,
        store: Path,
    ) -> None:
        self.recorder, self.model, self.window = recorder, unwrap(model), window
        self.steps_per_epoch, self.averaged, self.store = steps_per_epoch, averaged, store
        self.is_writer = _rank() == 0
        self.step, self.trajectory = 0, recorder.trajectory
        # Ranks of a sharded model all write and must agree on a name: this is found before any of them has written.
        self._shared_trajectory = next_free_trajectory(store) if _world_size() > 1 else None
        self._folder = store
        self._shapes: dict[str, tuple[int, ...]] | None = None  # whole shapes, if the model is sharded
        self.num_recorded = 0
        self.last_recorded = 0
        self._num_observed = 0
        self._resume_step: int | None = None
        self._layout: Layout | None = None
        self._read: Callable[[], list[Tensor]] = list
        self._drift = RestDrift(list)
        self._frozen: FrozenRest | None = None
        self._writer: BackgroundWriter | None = None
        self._is_measured = False
        check_sharding(self.model)
        # Wrong `layers` or a store of other tensors must not surface at the end of a long training.
        self._check_store(select(model, recorder.layers, averaged=averaged).layout)
        self._freeze_in_window()

    def restore(self, counters: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self.step, self.trajectory = int(counters["step"]), counters["trajectory"]
        self._resume_step = self.step
        self._leave_other_runs_alone(counters.get("store"))
        self._num_observed = self.num_recorded = 0
        self._layout, self._is_measured = None, False
        self._freeze_in_window()

    def _leave_other_runs_alone(self, store: str | None) -> None:
        """Begin a trajectory of its own if the checkpoint is of a run whose snapshots are not this one's to drop."""
        if store is not None and Path(store).is_dir() and Path(store).resolve() != self.store.resolve():
            reason, trajectory = f"it was recorded in another store, {store}", self.recorder.trajectory
        elif self.trajectory is not None and (end := _finished_at(self.store, self.trajectory)) > self.step:
            reason, trajectory = f"{self.trajectory} has since been recorded to its end at step {end}", None
        else:
            return
        if self.is_writer:
            logger.warning(
                "the run of this checkpoint (step %d) is left as it is and another is begun: %s", self.step, reason
            )
        self.trajectory, self._resume_step = trajectory, None

    def counters(self) -> dict[str, Any]:
        return {"step": self.step, "trajectory": self.trajectory, "store": str(self.store)}

    def state(self) -> dict[str, Any]:
        if self.is_writer and self.recorder.error is None and self._num_observed:
            # The trajectory is claimed even without rows, so that a resumed run goes on in the same one.
            writer = self._ready_writer()
            writer.flush()
            if writer.trajectory is not None:
                self.trajectory = writer.trajectory.trajectory
        return self.counters()

    def observe(
        self, step: int, epoch: float | None, metrics: Mapping[str, Any] | None, found_inf: Tensor | None = None
    ) -> None:
        self.step = step
        if self._num_observed == 0:
            self._resolve()
            self._check_trajectory()
        self._num_observed += 1
        if self.is_writer and self.recorder.error is None and self.window.is_due(step):
            if epoch is None and self.steps_per_epoch:
                epoch = step / self.steps_per_epoch
            try:
                self._record(RowInfo(step, epoch, _scalars(metrics or {})), found_inf)
            except Exception as error:
                # Nothing of ours may break a training step.
                self._fail(error)
        self._freeze_in_window()

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._finish(self._writer)
        finally:
            if self._frozen is not None:
                self._frozen.restore()
        first = self.window.first
        if self.is_writer and self._num_observed and self.step < first:
            logger.warning(
                "training ended at step %d, before the recording window opened at step %d: no snapshot was taken. "
                "For training that may stop early, keep_newest=True keeps the newest %d snapshots, wherever it ends.",
                *(self.step, first, self.recorder.max_snapshots),
            )

    def _record(self, info: RowInfo, found_inf: Tensor | None) -> None:
        writer = self._ready_writer()
        writer.add(self._read(), info, found_inf)
        if not writer.is_active:
            self.recorder.error = writer.error
            return
        is_ring = self.window.total_steps is None
        if self.num_recorded == 0 or (is_ring and self.num_recorded % self.window.num_rows == 0):
            self._drift.mark(info.step)
        self.num_recorded += 1
        self.last_recorded = info.step
        if info.step == self.window.total_steps:
            self._measure_end(writer)

    def _ready_writer(self) -> BackgroundWriter:
        if self._writer is None:
            layout = self._resolve()
            dtype = DTYPES[self.recorder.dtype]
            folder, trajectory, resume_step, shapes = self._folder, self.trajectory, self._resume_step, self._shapes

            def open_trajectory() -> TrajectoryWriter:
                opened = TrajectoryWriter(folder, layout, dtype, trajectory, resume_step)
                if shapes is not None:
                    write_shapes(folder, shapes)
                return opened

            self._writer = BackgroundWriter(
                open_trajectory,
                layout,
                dtype,
                self._read()[0].device,
                keep=self.window.num_rows if self.window.total_steps is None else None,
            )
            # A recorder that is forgotten without close() still leaves no thread behind.
            weakref.finalize(self.recorder, self._writer.close).atexit = False
        return self._writer

    def _resolve(self) -> Layout:
        """Find the tensors, as late as possible: some trainers replace parameters after the recorder was attached."""
        if self._layout is None:
            check_sharding(self.model)
            selection = select(self.model, self.recorder.layers, averaged=self.averaged)
            tensors = selection.tensors
            if any(map(is_sharded, tensors.values())):
                self._folder = shard_folder(self.store, tensors)
                self.trajectory = self.trajectory or self._shared_trajectory
                self._shapes = {n: tuple(t.shape) for n, t in named_tensors(self.model).items() if is_sharded(t)}
                if not self.is_writer:  # rank 0 records what is not sharded
                    tensors = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
                self.is_writer = True
            local = {name: local_part(tensor) for name, tensor in tensors.items()}
            self._layout = Layout.from_tensors(local, selection.kinds)
            self._read = _reader(self.model, self._layout.names)
            self._drift = RestDrift(_reader(self.model, rest_names(self.model, list(selection.tensors))))
        return self._layout

    def _measure_end(self, writer: BackgroundWriter) -> None:
        """Measure the drift and save the base, while the model is the one of the last row."""
        drift = self.recorder.rest_drift = self._drift.measure()
        header = {"step": str(self.last_recorded)}
        if self.window.total_steps is not None:
            header["total_steps"] = str(self.window.total_steps)
        if drift is not None:
            header |= {"rest_drift": repr(drift), "rest_drift_from_step": str(self._drift.from_step)}
        if self.recorder.save_base:
            state = _base_state(self.model)
            if self._shapes is not None and _rank() != 0:
                state = {name: tensor for name, tensor in state.items() if name in self._shapes}
            writer.submit(lambda trajectory: trajectory.write_base(state, header))
        self._is_measured = True

    def _finish(self, writer: BackgroundWriter) -> None:
        if self.num_recorded and not self._is_measured and writer.is_active and self.recorder.error is None:
            try:
                self._measure_if_unchanged(writer)
            except Exception as error:
                # An exception that ended training must not be hidden by one of ours.
                self._fail(error)
        writer.close()
        self.recorder.error = self.recorder.error or writer.error
        if writer.trajectory is not None:
            self.trajectory = writer.trajectory.trajectory
        if self.num_recorded and writer.trajectory is not None:
            drift, from_step = self.recorder.rest_drift, self._drift.from_step
            rest = "" if drift is None else f"; the rest of the network moved by {drift:.2%} since step {from_step}"
            logger.info("recorded %d snapshots in %s%s", writer.trajectory.num_rows, writer.trajectory.folder, rest)

    def _measure_if_unchanged(self, writer: BackgroundWriter) -> None:
        writer.flush()
        if writer.trajectory is not None and self._is_last_row(writer.trajectory):
            self._measure_end(writer)
        else:
            logger.info(
                "the model has changed since its last snapshot at step %d (other weights were loaded, or training "
                "ended between two snapshots): no base weights and no drift are kept",
                self.last_recorded,
            )

    def _is_last_row(self, trajectory: TrajectoryWriter) -> bool:
        chunks, _ = read_chunks(trajectory.folder, trajectory.layout)
        if not chunks:
            return False
        values = dict(zip(trajectory.layout.names, self._read(), strict=True))
        last = chunks[-1].rows[len(chunks[-1].steps) - 1 : len(chunks[-1].steps)][0]
        # Through the recorder's own dtype, as the row went: the store may keep more digits than it was given.
        row = trajectory.layout.flatten(values, DTYPES[self.recorder.dtype])
        return torch.equal(row.to(trajectory.row_dtype).cpu(), last)

    def _check_store(self, layout: Layout) -> None:
        if self.store.exists() and not self.store.is_dir():
            raise StoreNotFoundError(str(self.store), "it is a file")
        if (self.store / "layout.json").is_file():
            document = read_json(self.store / "layout.json", FORMAT, FORMAT_VERSION)
            Layout.from_json(document["tensors"]).check_same(layout, f"the store {self.store}")

    def _check_trajectory(self) -> None:
        # Other ranks come here when rank 0 may have written its first chunk.
        if self.is_writer and self.trajectory is not None and self._resume_step is None:
            folder = self._folder / "trajectories" / self.trajectory
            if any(folder.glob("chunk-*.safetensors")):
                raise TrajectoryExistsError(
                    str(folder), sum(len(c.steps) for c in read_chunks(folder, self._resolve())[0])
                )

    def _freeze_in_window(self) -> None:
        if self.recorder.freeze_rest and self._frozen is None and self.step >= self.window.first - 1:
            self._frozen = FrozenRest(self.model, select(self.model, self.recorder.layers).tensors)

    def _fail(self, error: Exception) -> None:
        self.recorder.error = error
        logger.warning("recording stopped, training goes on: %s", error, exc_info=error)


def _reader(model: nn.Module, names: Sequence[str]) -> Callable[[], list[Tensor]]:
    """A function that returns the present tensors of these names (this rank's parts of sharded ones).

    They are looked up each time, should the model replace them.
    """
    inside = wrapped_names(model)
    places: list[tuple[dict[str, Any], str]] = []
    for name in names:
        prefix, _, leaf = inside[name].rpartition(".")
        module = model.get_submodule(prefix)
        places.append((module._parameters if leaf in module._parameters else module._buffers, leaf))
    if any(is_sharded(tensors[leaf]) for tensors, leaf in places):
        return lambda: [local_part(tensors[leaf]) for tensors, leaf in places]
    return lambda: [tensors[leaf] for tensors, leaf in places]


def _finished_at(store: Path, trajectory: str) -> int:
    """The last step of a run that was recorded to its planned end, else 0."""
    header = read_base_header(store / "trajectories" / trajectory)
    return int(header["step"]) if "step" in header and header["step"] == header.get("total_steps") else 0


def _base_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict under the names before any wrapping; tied tensors stay tied."""
    clean = {inside: name for name, inside in wrapped_names(model).items()}
    copies: dict[tuple[int, Any, Any], Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            local = local_part(tensor.detach())
            key = (local.data_ptr(), local.shape, local.stride()) if local.numel() else (id(local), (), ())
            if key not in copies:
                copies[key] = local.to("cpu", copy=True)
            state[clean.get(name, name.replace("_orig_mod.", ""))] = copies[key]
    return state


def _scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers among ``metrics``. One on a device is copied there, to be read by the writer without waiting."""
    scalars: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            scalars[name] = value.detach().clone() if value.is_cuda else value.item()
        elif hasattr(value, "__float__") and not isinstance(value, Tensor) and getattr(value, "size", 1) == 1:
            with suppress(TypeError, ValueError):  # not a number after all; no metric is worth the recording
                scalars[name] = float(value.item() if hasattr(value, "item") else value)  # numpy's have item()
    return scalars


def _rank() -> int:
    return torch.distributed.get_rank() if _is_distributed() else 0


def _world_size() -> int:
    return torch.distributed.get_world_size() if _is_distributed() else 1


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _close_at_exit(recorder: weakref.ref[PDiffRecorder]) -> None:
    alive = recorder()
    if alive is not None:
        alive.close()
