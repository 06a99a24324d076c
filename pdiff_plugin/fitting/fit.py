"""Fit a generator to a snapshot store: statistics, autoencoder, diffusion, and what the result is like.

A run folder holds ``generator.safetensors``, ``fit.json`` (settings, history, measurements) and, while running, the
checkpoints from which the same call goes on.

Shapes: N snapshots, n of them for training, D values in a row, K latent width.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin._version import __version__
from pdiff_plugin.config import ConvConfig, FitConfig, SubspaceConfig
from pdiff_plugin.errors import UnusableSnapshotsError
from pdiff_plugin.fitting.conv_stage import train_conv
from pdiff_plugin.fitting.diffusion_stage import (
    train_diffusion,
)
from pdiff_plugin.fitting.distill_stage import distill
from pdiff_plugin.fitting.folder import Run
from pdiff_plugin.fitting.measures import FAR_APART, measure_generator, movement_report, suggest_alignment
from pdiff_plugin.fitting.runtime import Runtime, pick_device
from pdiff_plugin.fitting.subspace_stage import fit_subspace
from pdiff_plugin.generator.alignment import Alignment, align, reader
from pdiff_plugin.generator.autoencoder import Encoded
from pdiff_plugin.generator.frames import Frames, fit_frames, plain_frames
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.progress import OnProgress
from pdiff_plugin.snapshots.statistics import ColumnReader, NonFiniteRowsError, Statistics, measure
from pdiff_plugin.snapshots.store import SnapshotStore

logger = logging.getLogger(__name__)

MIN_SNAPSHOTS = 10
MAX_NONFINITE = 0.05


def fit(
    store: SnapshotStore | str | os.PathLike[str],
    config: FitConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    on_progress: OnProgress | None = None,
) -> WeightGenerator:
    """Learn an autoencoder and a latent diffusion on the snapshots of a store.

    The same call goes on where an interrupted one stopped, and returns at once when it had finished.

    Args:
        store: a snapshot store or its folder.
        config: settings; the defaults unless given.
        out: run folder, made if missing; without it nothing is written.
        fresh: start anew, replacing the fit in ``out``.
        on_progress: told how the stages get on.

    Raises:
        UnusableSnapshotsError: fewer than 10 snapshots, all equal, or more than 5 % with NaN or Inf.
        FitExistsError: ``out`` holds a fit of other settings or other snapshots.
    """
    config = config or FitConfig()
    store = store if isinstance(store, SnapshotStore) else SnapshotStore.open(store)
    check_num_snapshots(store)
    run = Run.open(store, config, Path(out) if out is not None else None, fresh=fresh)
    if run.is_finished and run.folder is not None:
        return WeightGenerator.load(run.folder)
    generator = run_stages(store, config, run, Runtime(run.folder, on_progress))
    assert generator is not None, "one process is rank 0"
    return generator


def check_num_snapshots(store: SnapshotStore) -> None:
    """Raise :class:`UnusableSnapshotsError` for a store with too few to fit."""
    if len(store) < MIN_SNAPSHOTS:
        advice = "Record more steps (last_steps, max_snapshots) or another run into the same store."
        if store.problems:
            advice = f"{len(store.problems)} files could not be read. {advice}"
        expected = f"at least {MIN_SNAPSHOTS}"
        raise UnusableSnapshotsError(str(store.path), f"{len(store)} snapshots", expected, advice)


def run_stages(store: SnapshotStore, config: FitConfig, run: Run, runtime: Runtime) -> WeightGenerator | None:
    """Run the stages as one process, or as one rank of a group: the generator on rank 0, None on the others."""
    with run.timed("statistics"):
        rows, statistics, alignment = measure_store(store, config, runtime)
    run.document["nonfinite_steps"] = sorted(set(_labels(store)) - {_labels(store)[i] for i in rows.tolist()})
    with run.timed("autoencoder"):
        subspace, heldout = _autoencoder(store, config, runtime, rows, statistics, alignment)
    trajectory = store.trajectory_index[rows]
    frames = runtime.on_rank_0(lambda: _frames(subspace.latents[~heldout], trajectory[~heldout], store, config))
    local = frames.to_local(subspace.latents, trajectory)
    device = pick_device(config.device)
    with run.timed("diffusion"):
        denoiser, history = train_diffusion(
            local,
            trajectory,
            heldout,
            frames=frames,
            config=config,
            device=device,
            runtime=runtime,
            on_history=run.write_history,
        )
    if runtime.rank != 0:
        return None
    one_step = None
    if config.diffusion.distill_steps:
        with run.timed("distill"):
            one_step = distill(denoiser, frames, config, device=device, runtime=runtime)
    generator = WeightGenerator(
        store.layout,
        config,
        subspace.autoencoder,
        frames,
        denoiser,
        store.trajectories,
        {},
        _provenance(store, rows, run.document["store"]),
        one_step,
        alignment,
    )
    with run.timed("report"):
        generator.report = measure_generator(generator, subspace, local, trajectory, heldout, history)
        generator.report |= movement_report(statistics, trajectory)
        if alignment is not None:
            generator.report["alignment"] = alignment.report
        elif generator.report.get("trajectory_separation", 0.0) > FAR_APART and runtime.world_size == 1:
            suggest_alignment(store, config, rows[~heldout])
    generator.to("cpu")
    run.finish(generator, history)
    runtime.drop_checkpoints()
    # Read back, so that the basis lies in the generator's own file and no longer in memory or scratch.
    return generator if run.folder is None else WeightGenerator.load(run.folder)


def heldout_blocks(num_snapshots: int, fraction: float) -> Tensor:
    """Choose contiguous blocks of one trajectory to hold out.

    Neighbours on a trajectory are nearly equal, so single snapshots picked at random would test nothing.

    Returns:
        (num_snapshots,) bool, True where held out: up to three evenly spaced blocks, none at the ends.
    """
    held = torch.zeros(num_snapshots, dtype=torch.bool)
    count = round(num_snapshots * fraction)
    if count == 0:
        return held
    num_blocks = max(1, min(3, count // 5))
    for block in range(num_blocks):
        size = count // num_blocks + (block < count % num_blocks)
        start = round((block + 0.5) / num_blocks * num_snapshots - size / 2)
        held[start : start + size] = True
    return held


def measure_store(
    store: SnapshotStore, config: FitConfig, runtime: Runtime
) -> tuple[Tensor, Statistics, Alignment | None]:
    """Indices of the usable snapshots, (N,), one pass over their columns, and how these are aligned if they are."""
    saved = runtime.load_checkpoint("statistics")
    if saved is not None:
        tensors, state = saved
        found = Alignment.from_state(store.layout, tensors, state["alignment"]) if config.align != "none" else None
        return tensors["rows"], Statistics(tensors["gram"], tensors["scales"]), found
    rows, alignment = torch.arange(len(store)), None
    columns = runtime.share(store.layout.num_values)
    while True:
        heldout = choose_heldout(store, rows, config.heldout_fraction)
        try:
            if config.align != "none":
                alignment = runtime.on_rank_0(partial(_align, store, config, rows))
            statistics = measure(
                partial(reader(store, alignment), indices=rows),
                store.layout,
                block_values=_block_values(len(rows), config.memory_gb),
                train_rows=(~heldout).nonzero().squeeze(1),
                columns=columns,
                all_reduce=runtime.all_reduce,
                on_columns=lambda done: runtime.report("statistics", done, columns.stop - columns.start),
            )
            break
        except NonFiniteRowsError as error:
            rows = _without(store, rows, error.rows)
    _check_runs(store, rows)
    if not statistics.gram.diagonal().sum() > 0:
        raise UnusableSnapshotsError(
            str(store.path),
            f"{len(rows)} snapshots that are all equal",
            "weights that move",
            "Record while the chosen layers train, with a learning rate above 0.",
        )
    tensors = {"rows": rows, "gram": statistics.gram, "scales": statistics.scales}
    if alignment is not None:
        tensors |= alignment.state_dict()
    runtime.save_checkpoint("statistics", tensors, {"alignment": alignment.report if alignment else {}})
    return rows, statistics, alignment


def _align(store: SnapshotStore, config: FitConfig, rows: Tensor) -> Alignment:
    blocks = _block_values(len(rows), config.memory_gb)
    heldout = choose_heldout(store, rows, config.heldout_fraction)
    return align(store, rows, ~heldout, block_values=blocks, seed=config.seed)


def _block_values(num_rows: int, memory_gb: float) -> int:
    """Columns to hold at a time: each value costs 4 bytes as read and 8 in each of three working copies."""
    # A working copy of more than 32 MiB is mapped anew every time (glibc's mmap threshold): its page faults double the
    # time of the pass. 16 MiB are 6990 columns of 300 snapshots.
    return max(1, min(16384, (16 << 20) // (8 * num_rows), int(memory_gb * 1e9 / (28 * num_rows))))


def _without(store: SnapshotStore, rows: Tensor, bad: list[int]) -> Tensor:
    labels = _labels(store)
    named = ", ".join(labels[int(rows[i])] for i in bad[:5]) + (", ..." if len(bad) > 5 else "")
    keep = torch.ones(len(rows), dtype=torch.bool)
    keep[bad] = False
    lost = len(store) - int(keep.sum())
    if lost > MAX_NONFINITE * len(store) or int(keep.sum()) < MIN_SNAPSHOTS:
        raise UnusableSnapshotsError(
            str(store.path),
            f"{lost} of {len(store)} snapshots with NaN or Inf ({named})",
            f"at most {MAX_NONFINITE:.0%}",
            "The recorded training diverged. Lower its learning rate and record again.",
        )
    logger.warning("%d snapshots hold NaN or Inf and are left out (%s)", len(bad), named)
    return rows[keep]


def _check_runs(store: SnapshotStore, rows: Tensor) -> None:
    """Refuse runs without a usable snapshot, and stores without a run that is long enough to show how weights move."""
    found = torch.bincount(store.trajectory_index[rows], minlength=len(store.trajectories))
    counts = dict(zip(store.trajectories, found.tolist(), strict=True))
    if lost := [name for name, count in counts.items() if count == 0]:
        raise UnusableSnapshotsError(
            str(store.path),
            f"no snapshot without NaN or Inf in {', '.join(lost)}",
            "some in every trajectory",
            "Delete the folders of these trajectories, and lower the learning rate of such runs.",
        )
    short = {name: count for name, count in counts.items() if count < MIN_SNAPSHOTS}
    if len(short) == len(counts):
        raise UnusableSnapshotsError(
            str(store.path),
            f"{len(counts)} trajectories of at most {max(counts.values())} snapshots",
            f"one of at least {MIN_SNAPSHOTS}",
            "Members are made from how weights move within a run. Record more steps of each.",
        )
    if short:
        logger.warning(
            "with fewer than %d snapshots each, these trajectories say little of how weights move: %s. Members made "
            "for them lie close to their snapshots.",
            MIN_SNAPSHOTS,
            ", ".join(f"{name} ({count})" for name, count in short.items()),
        )


def _autoencoder(
    store: SnapshotStore,
    config: FitConfig,
    runtime: Runtime,
    rows: Tensor,
    statistics: Statistics,
    alignment: Alignment | None,
) -> tuple[Encoded, Tensor]:
    """The fitted autoencoder, and which of ``rows`` were held out, (N,) bool."""
    read = reader(store, alignment)
    heldout = choose_heldout(store, rows, config.heldout_fraction)
    train_rows, heldout_rows = (~heldout).nonzero().squeeze(1), heldout.nonzero().squeeze(1)
    if isinstance(config.autoencoder, ConvConfig):
        device = pick_device(config.device)

        def train() -> Encoded:
            return train_conv(
                lambda lo, hi, places: read(lo, hi, rows[places]),
                store.layout,
                config,
                train_rows=train_rows,
                heldout_rows=heldout_rows,
                device=device,
                runtime=runtime,
            )

        encoded = runtime.on_rank_0(train)
    else:
        read = partial(read, indices=rows)
        encoded = _subspace(
            store, config, config.autoencoder, runtime, rows, read, statistics, train_rows, heldout_rows
        )
    if encoded.fidelity < config.autoencoder.min_fidelity:
        logger.warning(
            "the autoencoder keeps %.1f %% of the held-out snapshots' variance, below the %.0f %% asked for: samples "
            "will miss what it drops. Raise latent_dim (%d), or record more snapshots.",
            100 * encoded.fidelity,
            100 * config.autoencoder.min_fidelity,
            config.autoencoder.latent_dim,
        )
    return encoded, heldout


def _subspace(
    store: SnapshotStore,
    config: FitConfig,
    settings: SubspaceConfig,
    runtime: Runtime,
    rows: Tensor,
    read: ColumnReader,
    statistics: Statistics,
    train_rows: Tensor,
    heldout_rows: Tensor,
) -> Encoded:
    columns = runtime.share(store.layout.num_values)
    return fit_subspace(
        read,
        store.layout,
        statistics,
        settings,
        block_values=_block_values(len(rows), config.memory_gb),
        scratch=runtime.folder,
        train_rows=train_rows,
        heldout_rows=heldout_rows,
        trajectory=store.trajectory_index[rows][train_rows],
        columns=columns,
        join_columns=runtime.join_columns,
        on_columns=lambda done: runtime.report("autoencoder", done, columns.stop - columns.start),
    )


def choose_heldout(store: SnapshotStore, rows: Tensor, fraction: float) -> Tensor:
    """Which of the snapshots at ``rows`` are held out, (len(rows),) bool; blocks in every trajectory."""
    trajectory = store.trajectory_index[rows]
    held = torch.zeros(len(rows), dtype=torch.bool)
    for number in range(len(store.trajectories)):
        mine = trajectory == number
        held[mine] = heldout_blocks(int(mine.sum()), fraction)
    return held


def _frames(latents: Tensor, trajectory: Tensor, store: SnapshotStore, config: FitConfig) -> Frames:
    """Coordinates for the diffusion, from the training snapshots' latents."""
    R, is_linear = len(store.trajectories), isinstance(config.autoencoder, SubspaceConfig)
    if config.diffusion.precondition:
        # The subspace is that of all runs together; the other autoencoder's `latent_dim` is that of one chunk.
        return fit_frames(latents, trajectory, R, config.autoencoder.latent_dim if is_linear else latents.shape[1])
    return plain_frames(latents, R, scaled=config.diffusion.scale_latents)


def _labels(store: SnapshotStore) -> list[str]:
    """``trajectory step S`` of every snapshot."""
    names = [store.trajectories[t] for t in store.trajectory_index.tolist()]
    return [f"{name} step {step}" for name, step in zip(names, store.steps.tolist(), strict=True)]


def _provenance(store: SnapshotStore, rows: Tensor, source: str) -> dict[str, Any]:
    return {
        "store": source,
        "num_snapshots": len(rows),
        "num_trajectories": len(store.trajectories),
        "layout_digest": store.layout.digest,
        "pdiff_plugin": __version__,
        "torch": torch.__version__,
    }
