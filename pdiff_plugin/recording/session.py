"""One recorded training: the window, the writer, the store, the drift of what is not recorded."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pdiff_plugin.config import RecorderConfig
from pdiff_plugin.errors import (
    ConditionError,
    FormatError,
    FormatVersionError,
    LayoutMismatchError,
    StoreNotFoundError,
    TrajectoryExistsError,
    TrajectoryInUseError,
)
from pdiff_plugin.modules.names import named_tensors, unwrap, wrapped_names
from pdiff_plugin.recording.rest import FrozenRest, RestDrift, rest_names
from pdiff_plugin.recording.selection import Selection, select
from pdiff_plugin.recording.window import Window
from pdiff_plugin.recording.writer import BackgroundWriter, RowInfo
from pdiff_plugin.snapshots.base import read_base_header
from pdiff_plugin.snapshots.chunks import read_chunks
from pdiff_plugin.snapshots.conditions import (
    Condition,
    check_fits,
    check_same_kind,
    folder_of,
    read_conditions,
    write_condition,
)
from pdiff_plugin.snapshots.files import ABANDONED_S, remove_strays
from pdiff_plugin.snapshots.layout import DTYPES, LAYOUT_NAME, Layout, read_layout
from pdiff_plugin.snapshots.ownership import holder
from pdiff_plugin.snapshots.shards import (
    check_sharding,
    is_sharded,
    local_part,
    next_free_trajectory,
    shard_folder,
    write_shapes,
)
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

logger = logging.getLogger(__name__)

# A larger model is written as the base without a copy in memory, which takes a second or more of training's end.
_LARGE_BASE_BYTES = 256 << 20
# Compared at a time with the last row.
_COMPARED_VALUES = 1 << 20


@dataclass
class Outcome:
    """What a recorded training came to.

    Attributes:
        error: why recording stopped early, if it did.
        rest_drift: relative L2 change of the trained tensors that were not recorded, over the window; None until known.
    """

    error: Exception | None = None
    rest_drift: float | None = None


class Session:
    """The recording of one training, from ``start`` to ``close`` of a recorder.

    Args:
        model: wrapped or not.
        config: what is recorded.
        window: the steps that are.
        store: the store's folder.
        is_default_store: nobody chose it: where it is for other tensors, another beside it is taken.
        steps_per_epoch: optimizer steps in an epoch, if known.
        averaged: ``model`` is an averaged copy, whose parameters need no gradient.

    Raises:
        SelectionError: ``layers`` picks nothing that is trained.
        LayoutMismatchError: the store holds snapshots of other tensors.
        ConditionError: the condition does not fit those of the other runs in the store.
        UnsupportedTensorError: the model is sharded, and not by ``fully_shard``.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RecorderConfig,
        window: Window,
        store: Path,
        *,
        is_default_store: bool = False,
        steps_per_epoch: int | None = None,
        averaged: bool = False,
    ) -> None:
        self.model, self.config, self.window = unwrap(model), config, window
        self.steps_per_epoch, self.averaged = steps_per_epoch, averaged
        self.outcome = Outcome()
        self._condition: Condition | None = dict(config.condition) if isinstance(config.condition, Mapping) else None
        self.is_writer = _rank() == 0
        self.step, self.trajectory = 0, config.trajectory
        self._shapes: dict[str, tuple[int, ...]] | None = None  # whole shapes, if the model is sharded
        self.num_recorded = self._num_in_window = 0
        self.last_recorded = 0
        self._num_observed = 0
        self._resume_step: int | None = None
        self._names: list[str] = []
        self._selected_from: dict[str, tuple[int, bool]] = {}
        self._layout: Layout | None = None
        self._sizes: list[int] = []
        self._read: Callable[[], list[Tensor]] = list
        self._drift = RestDrift(list)
        self._frozen: FrozenRest | None = None
        self._writer: BackgroundWriter | None = None
        self._is_measured = False
        check_sharding(self.model)
        # Wrong `layers`, a store of other tensors or conditions must not surface at the end of a long training.
        self._planned_layout = self.selection().layout
        self.store = self._folder = self._own_store(store) if is_default_store else store
        self._check_store()
        # Ranks of a sharded model all write and must agree on a name: this is found before any of them has written.
        self._shared_trajectory = next_free_trajectory(self.store) if world_size() > 1 else None
        self._check_condition()
        self._freeze_in_window()
        _running.add(self)

    def selection(self) -> Selection:
        """The tensors that are recorded, looked for anew where the model's have been replaced, added or frozen.

        Some trainers do so after the recorder was attached. Only names are kept, so that no replaced tensor stays in
        memory.
        """
        present = _fingerprint(self.model)
        if present != self._selected_from:
            found = select(self.model, self.config.layers, averaged=self.averaged)
            self._selected_from, self._names = present, list(found.tensors)
            return found
        tensors = named_tensors(self.model)
        return Selection({name: tensors[name] for name in self._names}, ())

    def restore(self, counters: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: at its step, in its trajectory, without the rows that came after it."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self.step, self.trajectory = int(counters["step"]), counters["trajectory"]
        self._resume_step = self.step
        self._leave_other_runs_alone(counters.get("store"))
        self._check_condition()
        self._num_observed = self.num_recorded = self._num_in_window = 0
        self._layout, self._is_measured = None, False
        self._freeze_in_window()

    def _leave_other_runs_alone(self, store: str | None) -> None:
        """Begin a trajectory of its own if the checkpoint is of a run whose snapshots are not this one's to drop."""
        if store is not None and Path(store).is_dir() and Path(store).resolve() != self.store.resolve():
            reason, trajectory = f"it was recorded in another store, {store}", self.config.trajectory
        elif self.trajectory is not None and (end := finished_at(self.store, self.trajectory)) > self.step:
            reason, trajectory = f"{self.trajectory} has since been recorded to its end at step {end}", None
        else:
            return
        if self.is_writer:
            logger.warning(
                "the run of this checkpoint (step %d) is left as it is and another is begun: %s", self.step, reason
            )
        self.trajectory, self._resume_step = trajectory, None

    def counters(self) -> dict[str, Any]:
        """Where the recording is, as plain JSON."""
        return {"step": self.step, "trajectory": self.trajectory, "store": str(self.store)}

    def state(self) -> dict[str, Any]:
        """The counters for a checkpoint, once every row so far is on disk."""
        if self.is_writer and self.outcome.error is None and self._num_observed:
            # The trajectory is claimed even without rows, so that a resumed run goes on in the same one.
            writer = self._ready_writer()
            writer.flush()
            if writer.trajectory is not None:
                self.trajectory = writer.trajectory.trajectory
        return self.counters()

    def flush(self) -> None:
        """Return when every row so far is on disk, or writing has failed."""
        if self._writer is not None:
            self._writer.flush()

    def observe(
        self, step: int, epoch: float | None, metrics: Mapping[str, Any] | None, found_inf: Tensor | None = None
    ) -> None:
        """Take the model after optimizer step ``step`` as a row, if that step is in the window.

        Args:
            step: 1 after the first update.
            epoch: stored beside the row; worked out from ``steps_per_epoch`` unless given.
            metrics: stored beside the row; what is no number is left out.
            found_inf: on a CUDA device, the gradient scaler's verdict; the row is dropped if it is not 0.
        """
        if torch.is_inference_mode_enabled():
            # What is allocated here is written to later, and outside.
            with torch.inference_mode(False), torch.no_grad():
                return self.observe(step, epoch, metrics, found_inf)
        self.step = step
        is_due = self.window.is_due(step)
        if self._num_observed == 0:
            self._resolve()
            self._check_trajectory()
            # However soon it ends after this, there is a row.
            is_due = is_due or (self.window.is_before(step) and self.is_writer and not self._holds_rows())
        self._num_observed += 1
        if is_due and self.is_writer and self.outcome.error is None:
            if epoch is None and self.steps_per_epoch:
                epoch = step / self.steps_per_epoch
            try:
                self._record(RowInfo(step, epoch, _scalars(metrics or {})), found_inf)
            except Exception as error:
                # Nothing of ours may break a training step.
                self._fail(error)
        self._freeze_in_window()

    def close(self) -> None:
        """Write what is left, with the base and the drift where the model is still the one of the last row."""
        try:
            if self._writer is not None:
                self._finish(self._writer)
        finally:
            _running.discard(self)
            if self._frozen is not None:
                self._frozen.restore()
        if _rank() == 0 and self._num_observed and self.outcome.error is None:
            self._tell_early_end()

    def _record(self, info: RowInfo, found_inf: Tensor | None) -> None:
        writer = self._ready_writer()
        tensors = self._read()
        if list(map(Tensor.numel, tensors)) != self._sizes:
            _tell_other_shape(writer.layout, tensors)
        if not writer.add(tensors, info, found_inf):
            self.outcome.error = writer.error
            return
        self._mark_reference(info.step)
        self.num_recorded += 1
        self.last_recorded = info.step
        if info.step == self.window.total_steps:
            self._measure_end(writer)

    def _mark_reference(self, step: int) -> None:
        """Have the drift of the rest measured from the oldest row that will be kept, or one a little older."""
        window = self.window
        if window.total_steps is None:
            is_reference = self.num_recorded % window.num_rows == 0
        elif step < window.first:
            is_reference = self.num_recorded == 0 or window.is_doubled(step)
        else:
            is_reference = self._num_in_window == 0
            self._num_in_window += 1
        if is_reference:
            self._drift.mark(step)
        if self._num_in_window == window.num_enough:
            self._drift.forget_older()

    def _ready_writer(self) -> BackgroundWriter:
        if self._writer is None:
            layout = self._resolve()
            dtype = DTYPES[self.config.dtype]
            folder, trajectory, resume_step, shapes = self._folder, self.trajectory, self._resume_step, self._shapes
            store, condition = self.store, self._condition if _rank() == 0 else None
            # Ranks agree on a name, and a user's own is not ours to change.
            has_free_name = self.config.trajectory is None and shapes is None

            def open_trajectory() -> TrajectoryWriter:
                try:
                    opened = TrajectoryWriter(folder, layout, dtype, trajectory, resume_step)
                except TrajectoryInUseError as error:
                    if not has_free_name:
                        raise
                    # This training's snapshots are worth no less than the other's.
                    opened = TrajectoryWriter(folder, layout, dtype)
                    logger.warning("%s This training goes on in %s.", error, opened.folder)
                for path in (store / "trajectories").glob("*"):
                    remove_strays(path, min_age_s=ABANDONED_S)
                if shapes is not None:
                    write_shapes(folder, shapes)
                if condition is not None:
                    write_condition(folder_of(store, opened.trajectory), condition)
                return opened

            self._writer = BackgroundWriter(
                open_trajectory,
                layout,
                dtype,
                self._read()[0].device,
                self.window,
            )
            # A recorder that is forgotten without close(), and its session with it, still leaves no thread behind.
            weakref.finalize(self, self._writer.close).atexit = False
        return self._writer

    def _resolve(self) -> Layout:
        """Find the tensors, as late as possible: some trainers replace parameters after the recorder was attached."""
        if self._layout is None:
            check_sharding(self.model)
            selection = self.selection()
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
            self._sizes = [spec.numel for spec in self._layout]
            self._read = _reader(self.model, self._layout.names)
            self._drift = RestDrift(_reader(self.model, rest_names(self.model, list(selection.tensors))))
        return self._layout

    def _measure_end(self, writer: BackgroundWriter) -> None:
        """Measure the drift and save the base, while the model is the one of the last row."""
        drift = self.outcome.rest_drift = self._drift.measure()
        header = {"step": str(self.last_recorded)}
        if self.window.total_steps is not None:
            header["total_steps"] = str(self.window.total_steps)
        if drift is not None:
            header |= {"rest_drift": repr(drift), "rest_drift_from_step": str(self._drift.from_step)}
        if self.config.save_base:
            self._save_base(writer, header)
        self._is_measured = True

    def _save_base(self, writer: BackgroundWriter, header: Mapping[str, str]) -> None:
        """Have the whole model written: from a copy in the background, unless it is large."""
        live = _base_state(self.model)
        if self._shapes is not None and _rank() != 0:
            live = {name: tensor for name, tensor in live.items() if name in self._shapes}
        is_large = sum(tensor.nbytes for tensor in live.values()) > _LARGE_BASE_BYTES
        state = live if is_large else _copied(live)
        for device in {tensor.device for tensor in live.values() if tensor.is_cuda} if is_large else ():
            torch.cuda.synchronize(device)  # the thread that writes has a stream of its own
        writer.submit(lambda trajectory: trajectory.write_base(state, header))
        if is_large:  # training, which is at its end, must not go on with what is being written
            writer.flush()

    def _finish(self, writer: BackgroundWriter) -> None:
        if self.num_recorded and not self._is_measured and writer.is_active and self.outcome.error is None:
            try:
                self._measure_if_unchanged(writer)
            except Exception as error:
                # An exception that ended training must not be hidden by one of ours.
                self._fail(error)
        writer.close()
        self.outcome.error = self.outcome.error or writer.error
        if writer.trajectory is not None:
            self.trajectory = writer.trajectory.trajectory
        if self.num_recorded and writer.trajectory is not None:
            drift, from_step = self.outcome.rest_drift, self._drift.from_step
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
        chunks, _ = read_chunks(trajectory.folder, trajectory.layout, trajectory.row_dtype, with_sparse=True)
        if not chunks:
            return False
        for spec, tensor in zip(trajectory.layout, self._read(), strict=True):
            start, flat = trajectory.layout.slices[spec.name].start, tensor.detach().reshape(-1)
            for lo in range(0, spec.numel, _COMPARED_VALUES):
                # Through the recorder's own dtype, as the row went: the store may keep more digits than it was given.
                values = flat[lo : lo + _COMPARED_VALUES].to(DTYPES[self.config.dtype]).to(trajectory.row_dtype).cpu()
                if not torch.equal(values, chunks[-1].columns(start + lo, start + lo + len(values))[-1]):
                    return False
        return True

    def _own_store(self, store: Path) -> Path:
        """``store``, or the first of ``store-2``, ``store-3``, ... that is not for other tensors."""
        own, numbers = store, itertools.count(2)
        while any(known != self._planned_layout for known in _layouts_of(own)):
            own = store.with_name(f"{store.name}-{next(numbers)}")
        if own != store and self.is_writer:
            logger.warning("%s is for other tensors: these are recorded in %s", store, own)
        return own

    def _check_store(self) -> None:
        if self.store.exists() and not self.store.is_dir():
            raise StoreNotFoundError(str(self.store), "it is a file")
        for known in _layouts_of(self.store):
            known.check_same(self._planned_layout, f"the store {self.store}")

    def _check_condition(self) -> None:
        """Raise :class:`ConditionError` where the condition is not that of the run that goes on, or is unlike those of
        the other runs. What cannot be read is left to whoever opens the store.
        """
        if self._condition is None:
            return
        others, _ = read_conditions(self.store)
        own = others.pop(self.trajectory, None) if self.trajectory is not None else None
        if own is not None and self._resume_step is not None:
            name = f"{self.trajectory}, which goes on"
            check_same_kind(self._condition, "this run", own, name)
            if own != self._condition:
                raise ConditionError("this run", str(self._condition), f"{own}, that of {name}")
        check_fits(self._condition, "this run", others)

    def _check_trajectory(self) -> None:
        # Other ranks come here when rank 0 may have written its first chunk.
        if not self.is_writer or self.trajectory is None:
            return
        folder = self._folder / "trajectories" / self.trajectory
        if self.config.trajectory is not None and (writer := holder(folder)) is not None:
            raise TrajectoryInUseError(str(folder), writer)
        if self._resume_step is None and any(folder.glob("chunk-*.safetensors")):
            chunks, _ = read_chunks(folder, *read_layout(self._folder))
            raise TrajectoryExistsError(str(folder), sum(map(len, chunks)))

    def _holds_rows(self) -> bool:
        """Whether this run goes on in a trajectory that has rows of it."""
        folder = self._folder / "trajectories" / (self.trajectory or "")
        if self._resume_step is None or not folder.is_dir() or not (self._folder / LAYOUT_NAME).is_file():
            return False
        chunks, _ = read_chunks(folder, *read_layout(self._folder), with_sparse=True)
        return any(step <= self._resume_step for chunk in chunks for step in chunk.steps)

    def _tell_early_end(self) -> None:
        """Say what is there of a training that ended before its window had enough rows."""
        window, written = self.window, self._writer.trajectory if self._writer is not None else None
        if written is not None and written.sparse_steps:
            steps = written.sparse_steps
            beside = f", beside {written.num_window_rows} in the window" if written.num_window_rows else ""
            kept = f"sparse snapshots from before it are kept, {len(steps)} of steps {steps[0]} to {steps[-1]}{beside}"
        elif window.total_steps is not None and self.step < window.first:
            kept = "no snapshot was taken"
        else:
            return
        logger.warning(
            "training ended at step %d of the planned %d, and the recording window begins at step %d: %s. For training "
            "that may stop early, keep_newest=True keeps the newest %d snapshots, wherever it ends.",
            *(self.step, window.total_steps, window.first, kept, self.config.max_snapshots),
        )

    def _freeze_in_window(self) -> None:
        if self.config.freeze_rest and self._frozen is None and self.step >= self.window.first - 1:
            self._frozen = FrozenRest(self.model, self.selection().tensors)
            self._selected_from = _fingerprint(self.model)  # what is frozen was not chosen

    def _fail(self, error: Exception) -> None:
        self.outcome.error = error
        logger.warning("recording stopped, training goes on: %s", error, exc_info=error)


# Those that have not been closed: what they are going to write is not in their stores yet.
_running: weakref.WeakSet[Session] = weakref.WeakSet()


def _layouts_of(store: Path) -> list[Layout]:
    """What is recorded in ``store``, or is about to be."""
    planned = [session._planned_layout for session in _running if session.store == store]
    return planned + ([read_layout(store)[0]] if (store / LAYOUT_NAME).is_file() else [])


def _fingerprint(model: nn.Module) -> dict[str, tuple[int, bool]]:
    """Which object each tensor of ``model`` is, and whether it is trained."""
    return {name: (id(tensor), tensor.requires_grad) for name, tensor in named_tensors(model).items()}


def _tell_other_shape(layout: Layout, tensors: Sequence[Tensor]) -> None:
    """Raise about the first tensor of another size, which a copy would broadcast in silence; others it refuses."""
    for spec, tensor in zip(layout, tensors, strict=True):
        if tensor.numel() != spec.numel:
            raise LayoutMismatchError(spec.name, str(spec.shape), str(tuple(tensor.shape)))


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


def finished_at(store: Path, trajectory: str) -> int:
    """The last step of a run that was recorded to its planned end, else 0."""
    ends = [0]
    for folder in (store, *store.glob("shards/rank-00000-of-*")):
        try:
            header = read_base_header(folder / "trajectories" / trajectory)
        except (FormatError, FormatVersionError) as error:
            logger.warning("%s The run is taken for unfinished.", error)
        else:
            ends += [int(header["step"])] if "step" in header and header["step"] == header.get("total_steps") else []
    return max(ends)


def _base_state(model: nn.Module) -> dict[str, Tensor]:
    """The live state dict under the names before any wrapping, of sharded tensors this rank's parts."""
    clean = {inside: name for name, inside in wrapped_names(model).items()}
    return {
        clean.get(name, name.replace("_orig_mod.", "")): local_part(tensor.detach())
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor)
    }


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the tensors on the CPU; tied ones stay tied."""
    copies: dict[tuple[int, Any, Any], Tensor] = {}
    copied: dict[str, Tensor] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (id(tensor), (), ())
        if key not in copies:
            copies[key] = tensor.to("cpu", copy=True)
        copied[name] = copies[key]
    return copied


def _scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers among ``metrics``. One on a device is copied there, to be read by the writer without waiting."""
    scalars: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            if value.is_cuda and not value.is_complex():
                scalars[name] = value.detach().clone()
            elif not value.is_complex():
                scalars[name] = value.item()
        elif hasattr(value, "__float__") and not isinstance(value, Tensor) and getattr(value, "size", 1) == 1:
            # Not a number after all, or a whole one beyond all floats; no metric is worth the recording.
            with suppress(TypeError, ValueError, OverflowError):
                scalars[name] = float(value.item() if hasattr(value, "item") else value)  # numpy's have item()
    return scalars


def _rank() -> int:
    return torch.distributed.get_rank() if _is_distributed() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if _is_distributed() else 1


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
