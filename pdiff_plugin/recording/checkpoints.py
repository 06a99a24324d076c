"""Snapshots from checkpoints that a training has left on disk.

Read are ``.pt``/``.pth``/``.bin`` and Lightning ``.ckpt`` (with ``weights_only=True``, so that opening a stranger's
file cannot run code), ``.safetensors``, a sharded index of either, and the ``checkpoint-*`` folders of transformers.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pdiff_plugin.config import Layers, RecorderConfig
from pdiff_plugin.errors import CheckpointError, LayoutMismatchError
from pdiff_plugin.recording.runs import Conditions, runs_of
from pdiff_plugin.recording.selection import select
from pdiff_plugin.recording.writer import CHUNK_BYTES, CHUNK_ROWS
from pdiff_plugin.snapshots.conditions import write_condition
from pdiff_plugin.snapshots.layout import DTYPES, LAYOUT_NAME, Layout, read_layout
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

logger = logging.getLogger(__name__)

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
)
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_WEIGHT_KEYS = ("state_dict", "model_state_dict", "model", "net", "module")
_EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_STEP_KEYS = ("global_step", "step", "iteration", "num_updates", "epoch")


@dataclass(frozen=True)
class _Checkpoint:
    path: Path
    state: dict[str, Tensor]
    counters: dict[str, int]
    """What the file says of its place in the run, in the order of ``_STEP_KEYS``."""
    epoch: float | None


def import_checkpoints(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    store: str | os.PathLike[str],
    layers: Layers = RecorderConfig.layers,
    model: nn.Module | None = None,
    ema: bool = False,
    trajectory: str | None = None,
    conditions: Conditions | None = None,
    dtype: str = RecorderConfig.dtype,
    save_base: bool = RecorderConfig.save_base,
) -> SnapshotStore:
    """Take one snapshot from each checkpoint of one run, or of a sweep of runs with ``conditions``.

    Those of a run are ordered by the step (else the epoch) that the files themselves name, if it tells them all apart,
    else by natural name order. Prefixes that wrappers add to names (``module.``, ``_orig_mod.``, ``model.``) are
    stripped where that makes the layouts meet.

    Args:
        paths: files and folders: a transformers ``checkpoint-*`` folder, or one that holds checkpoints. Of a folder
            that also holds a final model only the ``checkpoint-*`` folders are taken.
        store: folder to add to. If it holds snapshots, their layout decides which tensors are taken.
        layers: which tensors, see :func:`~pdiff_plugin.recording.selection.select`.
        model: the network they are of. Without it, norm layers and heads are told by the names and shapes in the first
            file; a ``.safetensors`` file does not keep the order of layers, so name them or give the model.
        ema: take the averaged weights that timm and others keep beside the trained ones.
        trajectory: name of the run in the store (of several: NAME-1, NAME-2, ...); the next free one unless given.
        conditions: that the runs were trained at. A function that takes the path of a checkpoint and returns its
            condition; a mapping of runs, files or folders to conditions; or the path of a table with a row for each
            run. Checkpoints with the same condition and the same place, but for the step, are one run. See
            :mod:`~pdiff_plugin.recording.runs`, also for a function that finds conditions in names.
        dtype: of the numbers on disk.
        save_base: also keep the whole last checkpoint.

    Returns:
        The store, open for reading.

    Raises:
        CheckpointError: a file that cannot be read, or only by running code from it.
        SelectionError: ``layers`` picks nothing.
        LayoutMismatchError: naming the first tensor that a checkpoint lacks or has in another shape.
        ConditionError: a checkpoint without a condition, or with one unlike the others; nothing is imported then.
        FormatError: a table of conditions that cannot be read.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files = sorted({file for path in given for file in _expand(Path(path))}, key=_natural)
    if not files:
        raise CheckpointError(
            ", ".join(map(str, given)) or "[]", "there is no checkpoint", "Give files or their folder."
        )
    runs = runs_of(files, conditions, Path(store))
    orders = [_order(run.files, ema) for run in runs]
    layout = _layout(Path(store), _load(orders[0][0][1], ema), layers, model)
    is_one = trajectory is None or len(runs) == 1
    names = [trajectory if is_one else f"{trajectory}-{number}" for number in range(1, len(runs) + 1)]
    # All of them first: a name in use is told before anything is written.
    writers = [TrajectoryWriter(store, layout, DTYPES[dtype], name) for name in names]
    for run, order, writer in zip(runs, orders, writers, strict=True):
        if run.condition is not None:
            write_condition(writer.folder, run.condition)
        base = _write_rows(writer, order, ema)
        if save_base:
            writer.write_base(base, {"step": str(order[-1][0])})
        writer.close()
    return SnapshotStore.open(store)


def _write_rows(writer: TrajectoryWriter, order: Sequence[tuple[int, Path]], ema: bool) -> dict[str, Tensor]:
    """Write a snapshot of each checkpoint; returns the whole of the last."""
    layout = writer.layout
    limit = max(1, min(CHUNK_ROWS, CHUNK_BYTES // (layout.num_values * writer.row_dtype.itemsize)))
    rows: list[Tensor] = []
    steps: list[int] = []
    epochs: list[float | None] = []
    for number, (step, path) in enumerate(order, start=1):
        checkpoint = _load(path, ema)
        base = _meet(checkpoint.state, layout)
        rows.append(layout.flatten(base))  # a copy: the state itself stays on disk
        steps.append(step)
        epochs.append(checkpoint.epoch)
        if len(rows) == limit or number == len(order):
            writer.write_chunk(torch.stack(rows), steps, epochs)
            for column in (rows, steps, epochs):
                column.clear()
    return base


def _order(files: list[Path], ema: bool) -> list[tuple[int, Path]]:
    """Step and file of each checkpoint: by the first counter that tells all apart, else numbered as they are given."""
    kept: dict[Path, dict[str, int]] = {}
    for file in files:
        counters = _load(file, ema).counters
        same = next((other for other, its in kept.items() if counters and its == counters), None)
        if same is None:
            kept[file] = counters
        else:
            text = ", ".join(f"{key} {value}" for key, value in counters.items())
            logger.warning("%s is left out: it is of %s, as %s is", file, text, same)
    for key in _STEP_KEYS:
        steps = {its[key]: file for file, its in kept.items() if key in its}
        if len(steps) == len(kept):
            return sorted(steps.items())
    if any(kept.values()):
        logger.warning(
            "the checkpoints are numbered in the order of their names: no counter (%s) is in all of them and tells "
            "them apart",
            ", ".join(_STEP_KEYS),
        )
    return list(enumerate(kept, start=1))


def _expand(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(str(path), "there is no such file or folder", "Check the path.")
    # First these: the trainer saves the final model, one more time, beside its checkpoints.
    folders = [child for child in path.glob("checkpoint-*") if _CHECKPOINT.fullmatch(child.name) and _weights(child)]
    if folders or _weights(path):
        return folders or [path]
    return [child for child in path.iterdir() if child.suffix in SUFFIXES]


def _weights(folder: Path) -> Path | None:
    """The file with the weights in a folder of transformers."""
    return next((folder / name for name in _FOLDER_FILES if (folder / name).is_file()), None)


def _natural(path: Path) -> list[Any]:
    """Sort key in which ``step-9`` comes before ``step-10``."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", str(path))]


def _load(path: Path, ema: bool) -> _Checkpoint:
    if (file := _weights(path)) is not None:
        trainer = json.loads(text.read_text()) if (text := path / "trainer_state.json").is_file() else {}
        number = re.search(r"(\d+)$", path.name)
        step = trainer.get("global_step", int(number[1]) if number else None)
        return _Checkpoint(path, _read(file), {} if step is None else {"global_step": step}, trainer.get("epoch"))
    document = _read(path)
    state = _state_dict(path, document, ema)
    counters = {key: document[key] for key in _STEP_KEYS if isinstance(document.get(key), int)}
    epoch = document.get("epoch")
    return _Checkpoint(path, state, counters, float(epoch) if isinstance(epoch, int | float) else None)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.name.endswith(".index.json"):
            parts = sorted(set(json.loads(path.read_text())["weight_map"].values()))
            return {name: tensor for part in parts for name, tensor in _read(path.with_name(part)).items()}
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # timm keeps its command line's settings in its checkpoints; a Namespace is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            document = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (OSError, KeyError, EOFError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                str(path),
                f"it is a pickle that needs {unsafe[1]}, and building that can run code from the file",
                "If you trust it, load it yourself and save its state_dict alone.",
            ) from error
        reason = str(error).split("WeightsUnpickler error: ")[-1].splitlines()[0]
        raise CheckpointError(str(path), f"it is unreadable ({reason})", "Give complete checkpoint files.") from error
    if not isinstance(document, Mapping):
        raise CheckpointError(str(path), f"it holds a {type(document).__name__}", "Give a state dict or a checkpoint.")
    return dict(document)


def _state_dict(path: Path, document: dict[str, Any], ema: bool) -> dict[str, Tensor]:
    keys = [key for key in (_EMA_KEYS if ema else _WEIGHT_KEYS) if isinstance(document.get(key), Mapping)]
    if keys:  # with a tensor beside it, too: the best accuracy so far is one in many scripts
        found: Any = document[keys[0]]
    elif not ema and any(isinstance(value, Tensor) for value in document.values()):
        found = document
    else:
        kind = "averaged weights" if ema else "weights"
        looked = ", ".join(_EMA_KEYS if ema else _WEIGHT_KEYS)
        raise CheckpointError(
            str(path),
            f"it has no {kind} under any of {looked} (found {', '.join(map(str, list(document)[:8]))})",
            "Save them under one of these names.",
        )
    return {str(name): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _layout(store: Path, first: _Checkpoint, layers: Layers, model: nn.Module | None) -> Layout:
    if (store / LAYOUT_NAME).is_file():
        return read_layout(store)[0]
    if model is None:
        model = _skeleton(next(_renamed(first.state)))
        return select(model, layers, averaged=True).layout
    selection = select(model, layers, averaged=True)
    state = _meet(first.state, selection.layout)
    for spec in selection.layout:
        found = state.get(spec.name)
        if found is None or tuple(found.shape) != spec.shape:
            text = "no tensor of this name" if found is None else str(tuple(found.shape))
            raise LayoutMismatchError(spec.name, text, f"{spec.shape} in the given model", str(first.path))
    return Layout.from_tensors({name: state[name] for name in selection.tensors}, selection.kinds)


def _meet(state: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """``state`` under the names of ``layout``, if stripping the prefixes of wrappers gets it there."""
    for renamed in _renamed(state):
        if all(spec.name in renamed and tuple(renamed[spec.name].shape) == spec.shape for spec in layout):
            return renamed
    return state


def _renamed(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """``state`` with prefixes stripped; first without those that only wrappers give.

    PEFT leaves the adapter's name, ``default`` in a live model, out of its files.
    """
    strips: list[Callable[[str], str]] = [
        lambda name: name.replace("_orig_mod.", ""),
        lambda name: name.removeprefix("module."),
        lambda name: name.removeprefix("model."),
        lambda name: re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", name),
    ]
    for wanted in sorted(product((True, False), repeat=4), key=lambda w: (w[3], w[2], not w[0], not w[1])):
        names = list(state)
        for strip, is_wanted in zip(strips, wanted, strict=True):
            names = [strip(name) for name in names] if is_wanted else names
        if len(set(names)) == len(names):
            yield dict(zip(names, state.values(), strict=True))


def _skeleton(state: dict[str, Tensor]) -> nn.Module:
    """Modules that hold ``state``, of the classes that its names and shapes speak for."""
    root = nn.Module()
    for name, tensor in state.items():
        prefix, _, leaf = name.rpartition(".")
        module = root
        path = prefix.split(".") if prefix else []
        for depth, part in enumerate(path):
            if part not in module._modules:
                owner = ".".join(path[: depth + 1])
                module.add_module(part, _empty(_class_of(owner, state)))
            module = module._modules[part]  # type: ignore[assignment]  # it was just put there
        if leaf in ("running_mean", "running_var", "num_batches_tracked") or not tensor.is_floating_point():
            module.register_buffer(leaf, tensor)
        else:
            module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return root


def _class_of(prefix: str, state: dict[str, Tensor]) -> type[nn.Module]:
    weight, bias = state.get(f"{prefix}.weight"), state.get(f"{prefix}.bias")
    if f"{prefix}.running_mean" in state:
        return nn.BatchNorm2d
    if weight is not None and weight.ndim == 1:
        return nn.LayerNorm  # a scale per channel; no other common layer has a flat weight
    if weight is not None and weight.ndim == 2 and (bias is not None or "embed" not in prefix):
        return nn.Linear
    return nn.Module


def _empty(kind: type[nn.Module]) -> nn.Module:
    """A module of this class without anything in it."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    return module
