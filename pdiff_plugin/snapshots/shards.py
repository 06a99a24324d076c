"""Snapshots of a model that is sharded over processes (FSDP2's ``fully_shard``).

Each rank writes the part of every tensor that it holds, which needs no communication, into a store of its own:

    STORE/shards/rank-00000-of-00002/             layout.json, trajectories/ as in any store; local shapes
    STORE/shards/rank-00000-of-00002/shard.json   {"format": "pdiff-shard", "shapes": {NAME: whole shape}}

Tensors that are not sharded (buffers) are in rank 0's store alone. Opening STORE joins what all ranks have into
ordinary trajectories, in which nothing of this shows any more.

Shapes: n rows, D values in a row of the whole, R ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from pdiff_plugin.errors import FormatError, UnsupportedTensorError
from pdiff_plugin.snapshots.chunks import read_base_header, read_chunks, write_base
from pdiff_plugin.snapshots.files import read_json, write_json
from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

FORMAT = "pdiff-shard"
FORMAT_VERSION = 1
_JOIN_ROWS = 64


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of ``tensor``."""
    return hasattr(tensor, "device_mesh")  # DTensor, without importing torch.distributed where it is not built in


def local_part(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this process holds, the same memory; the tensor itself if it is whole."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return local


def check_sharding(model: nn.Module) -> None:
    """Refuse a model that is sharded, but not by ``fully_shard``: what a process sees of it is no part of a tensor.

    Raises:
        UnsupportedTensorError: naming the first parameter.
    """
    parameters = dict(model.named_parameters())
    # fully_shard marks modules in the same way, but its parameters are DTensors.
    by_fsdp1 = any(getattr(module, "_is_fsdp_managed_module", False) for module in model.modules())
    by_fsdp1 = by_fsdp1 and not any(map(is_sharded, parameters.values()))
    for name, parameter in parameters.items():
        if by_fsdp1 or hasattr(parameter, "ds_id"):
            raise UnsupportedTensorError(
                name,
                "sharded by FullyShardedDataParallel or DeepSpeed ZeRO-3",
                "models are recorded under fully_shard (FSDP2), DistributedDataParallel and ZeRO up to stage 2",
            )


def shard_folder(store: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Where this process writes its part of ``tensors``.

    Raises:
        UnsupportedTensorError: naming the first tensor that is not simply cut along its first dimension.
    """
    meshes = []
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            placements = tensor.placements  # type: ignore[attr-defined]  # DTensor's
            if len(placements) != 1 or not placements[0].is_shard(0):
                raise UnsupportedTensorError(
                    name,
                    f"laid out as {placements}",
                    "only shards along dimension 0 of one mesh dimension can be joined",
                )
            meshes.append(tensor.device_mesh)  # type: ignore[attr-defined]
    return store / "shards" / f"rank-{meshes[0].get_local_rank():05d}-of-{meshes[0].size():05d}"


def write_shapes(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Keep the whole shapes of the sharded tensors, chosen or not."""
    document = {name: list(shape) for name, shape in shapes.items()}
    write_json(folder / "shard.json", {"format": FORMAT, "format_version": FORMAT_VERSION, "shapes": document})


def next_free_trajectory(store: Path) -> str:
    """A name that no rank has used. All ranks find the same one if they ask before any of them writes."""
    used = {path.name for path in [*store.glob("trajectories/*"), *store.glob("shards/*/trajectories/*")]}
    return next(name for number in range(1, len(used) + 2) if (name := f"run-{number:03d}") not in used)


def join_shards(store: Path) -> None:
    """Bring the joined trajectories of ``store`` up to date with what all its ranks have written.

    Raises:
        FormatError: the folders of some ranks are missing.
    """
    worlds: dict[int, dict[int, Path]] = {}
    for folder in (store / "shards").iterdir():
        if (match := re.fullmatch(r"rank-(\d+)-of-(\d+)", folder.name)) and (folder / "layout.json").is_file():
            worlds.setdefault(int(match[2]), {})[int(match[1])] = folder
    for size, folders in worlds.items():
        missing = sorted(set(range(size)) - set(folders))
        if missing:
            raise FormatError(
                str(store / "shards"), f"no snapshots of rank {missing[0]}", f"one folder for each of {size} ranks"
            )
    opened = [_World([folders[rank] for rank in range(size)]) for size, folders in sorted(worlds.items())]
    for trajectory in sorted({name for world in opened for name in world.ranks[0].trajectories}):
        _join_rows(store, trajectory, opened)
        _join_base(store, trajectory, opened)


class _World:
    """The stores of R ranks that trained together. A run that is resumed on another number of ranks has several."""

    def __init__(self, folders: list[Path]) -> None:
        self.ranks = [SnapshotStore.open(folder) for folder in folders]
        shapes = read_json(folders[0] / "shard.json", FORMAT, FORMAT_VERSION)["shapes"]
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.layout = Layout(
            tuple(
                TensorSpec(s.name, self.shapes.get(s.name, s.shape), s.dtype, s.kind)
                for s in self.ranks[0].layout.tensors
            )
        )

    def places(self, trajectory: str) -> dict[int, list[int]]:
        """Step -> index in each rank's store, for the steps of a trajectory that all ranks have."""
        places = [_places(rank, trajectory) for rank in self.ranks]
        return {step: [place[step] for place in places] for step in sorted(set.intersection(*map(set, places)))}

    def base_step(self, trajectory: str) -> int:
        """The step of a trajectory's base, 0 unless all ranks have written it."""
        steps = {int(rank.base_header(trajectory).get("step", 0)) for rank in self.ranks}
        return steps.pop() if len(steps) == 1 else 0


def _join_rows(store: Path, trajectory: str, worlds: list[_World]) -> None:
    found = [(places, world) for world in worlds if (places := world.places(trajectory))]
    rows: dict[int, tuple[_World, list[int]]] = {}
    for places, world in sorted(found, key=lambda one: max(one[0])):  # where steps overlap, that which got further wins
        rows |= {step: (world, indices) for step, indices in places.items()}
    folder, layout = store / "trajectories" / trajectory, worlds[0].layout
    for world in worlds[1:]:
        layout.check_same(world.layout, f"the store {store}")
    present = read_chunks(folder, layout)[0] if folder.is_dir() else []
    steps = sorted(rows)
    if [step for chunk in present for step in chunk.steps] == steps:
        return
    writer = TrajectoryWriter(store, layout, worlds[0].ranks[0].row_dtype, trajectory, resume_step=-1)
    for _, group in groupby(steps, key=lambda step: id(rows[step][0])):
        alike = list(group)
        for start in range(0, len(alike), _JOIN_ROWS):
            some = alike[start : start + _JOIN_ROWS]
            world = rows[some[0]][0]
            indices = [list(column) for column in zip(*(rows[step][1] for step in some), strict=True)]  # of each rank
            parts = [
                rank.layout.unflatten(rank.rows(indices=own)) for rank, own in zip(world.ranks, indices, strict=True)
            ]
            writer.write_chunk(
                layout.flatten(_joined(parts, world.shapes, dim=1)),  # (n, D)
                some,
                [world.ranks[0].epochs[index] for index in indices[0]],
                [world.ranks[0].metrics[index] for index in indices[0]],
            )


def _join_base(store: Path, trajectory: str, worlds: list[_World]) -> None:
    world = max(worlds, key=lambda world: world.base_step(trajectory))
    step = world.base_step(trajectory)
    folder = store / "trajectories" / trajectory
    if not step or not folder.is_dir() or int(read_base_header(folder).get("step", 0)) == step:
        return
    bases = [base for rank in world.ranks if (base := rank.base(trajectory)) is not None]
    header = world.ranks[0].base_header(trajectory)
    kept = ("step", "total_steps", "rest_drift", "rest_drift_from_step")
    write_base(folder, _joined(bases, world.shapes, dim=0), {key: header[key] for key in kept if key in header})


def _places(store: SnapshotStore, trajectory: str) -> dict[int, int]:
    """Step -> index in the store, for one trajectory."""
    if trajectory not in store.trajectories:
        return {}
    number = store.trajectories.index(trajectory)
    inside = (store.trajectory_index == number).nonzero().squeeze(1).tolist()
    return {int(store.steps[index]): index for index in inside}


def _joined(parts: list[dict[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], dim: int) -> dict[str, Tensor]:
    """Whole tensors from those of R ranks, cut along ``dim``; what is not sharded comes from rank 0."""
    return {
        name: torch.cat([part[name] for part in parts], dim=dim) if name in shapes else tensor
        for name, tensor in parts[0].items()
    }
