"""Fit a generator to a snapshot store: statistics, autoencoder, diffusion, and what the result is like.

A run folder holds ``generator.safetensors``, ``fit.json`` (settings, history, measurements) and, while running, the
checkpoints from which the same call goes on.

Shapes: N snapshots, n of them for training, D values in a row, K latent width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pdiff_plugin
from pdiff_plugin.config import ConvConfig, FitConfig, SubspaceConfig
from pdiff_plugin.errors import ConfigError, FitExistsError, UnusableSnapshotsError
from pdiff_plugin.fitting.conv_stage import train_conv
from pdiff_plugin.fitting.diffusion_stage import (
    nearest_at_another_time,
    nearest_of_own_run,
    spread_about_means,
    train_diffusion,
)
from pdiff_plugin.fitting.distill_stage import distill
from pdiff_plugin.fitting.runtime import CHECKPOINT_SUFFIX, Runtime, pick_device
from pdiff_plugin.generator.alignment import Alignment, align, reader
from pdiff_plugin.generator.autoencoder import (
    ColumnReader,
    Encoded,
    NonFiniteRowsError,
    Statistics,
    fit_subspace,
    measure,
)
from pdiff_plugin.generator.frames import Frames, fit_frames, plain_frames
from pdiff_plugin.generator.generator import FILE_NAME, WeightGenerator, walk
from pdiff_plugin.progress import OnProgress
from pdiff_plugin.snapshots.files import read_json, write_json
from pdiff_plugin.snapshots.store import SnapshotStore

logger = logging.getLogger(__name__)

FORMAT = "pdiff-fit"
FORMAT_VERSION = 1
STAGES = ("statistics", "autoencoder", "diffusion")
MIN_SNAPSHOTS = 10
MAX_NONFINITE = 0.05
_NUM_REPORT_MEMBERS = 256
_NUM_REPORT_MEMBERS_PLAIN = 64
_NUM_REPORT_STEPS = 20
_NUM_REPORT_AXES = 16
# Two clouds whose centres are this many spreads apart do not touch.
_FAR_APART = 3.0
# Aligning is recommended where it brings trajectories this much closer: 1.05 for networks with random weights, 1.26 for
# three runs of a CIFAR-10 MLP, whose pooled averages it lifts from 20 to 38 %. It is tried in stores up to this many
# values, for a second or two.
_WORTH_ALIGNING = 1.2
_MAX_TRIED_VALUES = 10**8
_TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


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
        generator.report = _report(generator, subspace, local, trajectory, heldout, history)
        if alignment is not None:
            generator.report["alignment"] = alignment.report
        elif generator.report.get("trajectory_separation", 0.0) > _FAR_APART and runtime.world_size == 1:
            _suggest_alignment(store, config, rows[~heldout])
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


def _suggest_alignment(store: SnapshotStore, config: FitConfig, rows: Tensor) -> None:
    """Say that trajectories would lie closer together if they were aligned, where that is cheap to know and true."""
    if len(rows) * store.layout.num_values > _MAX_TRIED_VALUES:
        return
    try:
        found = align(store, rows, torch.ones(len(rows), dtype=torch.bool), block_values=16384, seed=config.seed).report
    except ConfigError:
        return
    gain = found["separation_before"] / max(found["separation_after"], 1e-12)
    if gain >= _WORTH_ALIGNING:
        logger.warning(
            "with their hidden units matched (--align rebasin) the trajectories would lie %.1f times closer together, "
            "if this network is a plain stack without shortcuts, as it seems.",
            gain,
        )


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
        settings = config.autoencoder
        device = pick_device(config.device)

        def train() -> Encoded:
            return train_conv(
                lambda lo, hi, places: read(lo, hi, rows[places]),
                store.layout,
                settings,
                train_rows=train_rows,
                heldout_rows=heldout_rows,
                seed=config.seed,
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
    R = len(store.trajectories)
    if config.diffusion.precondition:
        return fit_frames(latents, trajectory, R, config.autoencoder.latent_dim)
    return plain_frames(latents, R, scaled=config.diffusion.scale_latents)


@torch.no_grad()
def _report(
    generator: WeightGenerator,
    subspace: Encoded,
    local: Tensor,
    trajectory: Tensor,
    heldout: Tensor,
    history: list[dict[str, float]],
) -> dict[str, Any]:
    """Measure the generator in the coordinates it works in, against the snapshots.

    ``copy_ratio`` is the median distance of a sample to its nearest training snapshot over that of held-out snapshots,
    whose neighbours in time are at the edge of their block; ``novelty`` the same over that of snapshots to their
    nearest one at another time. Far below 1, samples copy. ``diversity_curve`` gives both the spread and the novelty of
    samples over a range of temperatures; ``diversity`` is turned into a temperature by it.
    """
    config, train = generator.config, ~heldout
    report: dict[str, Any] = {
        "fidelity": subspace.fidelity,
        "fidelity_is_ok": subspace.fidelity >= config.autoencoder.min_fidelity,
        "latent_dim": generator.autoencoder.latent_dim,
        "diffusion_steps": int(history[-1]["best_step"]) if history else 0,
        "heldout_loss": _number(history[-1]["best_loss"]) if history else None,
        # What a normal distribution per trajectory reaches: the network has to be below.
        "heldout_loss_gaussian": _number(history[0]["heldout_loss"]) if config.diffusion.precondition else None,
    }
    num_members = _NUM_REPORT_MEMBERS if config.diffusion.precondition else _NUM_REPORT_MEMBERS_PLAIN
    labels = torch.arange(num_members) % len(generator.trajectories)
    reference = float(nearest_at_another_time(local, trajectory).nanmedian())
    spread = spread_about_means(local[train], trajectory[train])
    temperatures = _TEMPERATURES if config.diffusion.precondition else (1.0,)
    curve = []
    for temperature in temperatures:
        samples = _samples(generator, labels, temperature)
        nearest = nearest_of_own_run(samples, labels, local[train], trajectory[train])
        curve.append(
            {
                "temperature": temperature,
                "spread_ratio": round(spread_about_means(samples, labels) / max(spread, 1e-12), 4),
                "novelty": _number(float(nearest.median()) / reference),
            }
        )
        if temperature == 1.0:
            report |= {
                "spread_ratio": curve[-1]["spread_ratio"],
                "spread_ratio_per_direction": _spread_per_direction(samples, labels, local[train], trajectory[train]),
                "nearest_distance_samples": float(nearest.median()),
                "novelty": curve[-1]["novelty"],
                "trajectory_coverage": _coverage(generator, subspace, samples, labels, trajectory, train),
            }
    if bool(heldout.any()):
        own = nearest_of_own_run(local[heldout], trajectory[heldout], local[train], trajectory[train])
        report["nearest_distance_heldout"] = float(own.median())
        report["copy_ratio"] = report["nearest_distance_samples"] / max(float(own.median()), 1e-12)
    if len(generator.trajectories) > 1:
        report["trajectory_separation"] = _separation(subspace.latents[train], trajectory[train])
        _warn_of_trajectories(report, is_aligned=config.align != "none")
    report["diversity_curve"] = curve
    return report


def _separation(latents: Tensor, trajectory: Tensor) -> float:
    """Median distance between the means of two trajectories over the spread of snapshots about their own mean."""
    means = torch.stack([latents[trajectory == run].mean(dim=0) for run in sorted(set(trajectory.tolist()))])
    between = torch.nn.functional.pdist(means.double()).median()
    return round(float(between) / max(spread_about_means(latents, trajectory), 1e-12), 3)


def _warn_of_trajectories(report: dict[str, Any], *, is_aligned: bool) -> None:
    coverage = report["trajectory_coverage"]
    if report["trajectory_separation"] > _FAR_APART:
        logger.warning(
            "the %d trajectories lie far apart (%.1f times the spread within one): members are made for each by "
            "itself. An average or a Gaussian across them would be %s; compare with those taken per run.",
            len(coverage),
            report["trajectory_separation"],
            "of different models" if is_aligned else "no model",
        )
    missed = [name for name, share in coverage.items() if not 0.5 <= share * len(coverage) <= 2.0]
    if missed:
        logger.warning(
            "samples cover some trajectories less than half or more than twice as often as asked (%s): those runs "
            "overlap with others.",
            ", ".join(missed),
        )


def _samples(generator: WeightGenerator, labels: Tensor, temperature: float) -> Tensor:
    """Samples in local coordinates, on the CPU, the same noise at every temperature."""
    rng = torch.Generator().manual_seed(generator.config.seed + 1)
    noise = temperature * torch.randn(len(labels), generator.frames.width, generator=rng)
    device = next(generator.denoiser.parameters()).device
    return walk(generator.denoiser, noise.to(device), labels.to(device), generator.config, _NUM_REPORT_STEPS).cpu()


def _spread_per_direction(samples: Tensor, labels: Tensor, local: Tensor, trajectory: Tensor) -> list[float]:
    """Spread of samples over that of snapshots along the first axes of the trajectories."""
    ratios = [
        spread_about_means(samples[:, [axis]], labels) / max(spread_about_means(local[:, [axis]], trajectory), 1e-12)
        for axis in range(min(_NUM_REPORT_AXES, local.shape[1]))
    ]
    return [round(ratio, 4) for ratio in ratios]


def _coverage(
    generator: WeightGenerator, subspace: Encoded, samples: Tensor, labels: Tensor, trajectory: Tensor, train: Tensor
) -> dict[str, float]:
    """Share of the samples whose nearest snapshot of all is of each trajectory."""
    nearest = torch.cdist(generator.frames.to_latents(samples, labels), subspace.latents[train]).argmin(dim=1)
    owner = trajectory[train][nearest]
    return {
        name: round(float((owner == number).double().mean()), 4) for number, name in enumerate(generator.trajectories)
    }


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return round(value, 6) if math.isfinite(value) else None


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
        "pdiff_plugin": pdiff_plugin.__version__,
        "torch": torch.__version__,
    }


@dataclass
class Run:
    """The run folder's ``fit.json``."""

    folder: Path | None
    document: dict[str, Any]

    @classmethod
    def open(
        cls, store: SnapshotStore, config: FitConfig, folder: Path | None, *, fresh: bool, source: str | None = None
    ) -> Run:
        """Open or begin a run; ``source`` is where the store came from, if not from its own folder.

        Raises:
            FitExistsError: the folder holds a fit of other settings or other snapshots.
        """
        mine = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "status": "running",
            "store": source or str(store.path.resolve()),
            "config": config.to_json(),
            "snapshots": _fingerprint(store),
            "seconds": {},
            "history": [],
        }
        run = cls(folder, mine)
        if folder is None:
            return run
        path = folder / "fit.json"
        if path.exists() and not fresh:
            found = read_json(path, FORMAT, FORMAT_VERSION)
            # By way of the dataclass, so that a setting which came later has its default.
            if FitConfig.from_json(found["config"]) != config:
                raise FitExistsError(str(folder), "other settings")
            if found["snapshots"] != mine["snapshots"]:
                raise FitExistsError(str(folder), "other snapshots")
            run.document = found
        elif fresh:
            for name in ("fit.json", FILE_NAME, *(f"{stage}{CHECKPOINT_SUFFIX}" for stage in STAGES)):
                (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        run.write()
        return run

    @property
    def is_finished(self) -> bool:
        done = self.document["status"] == "finished"
        return done and self.folder is not None and (self.folder / FILE_NAME).is_file()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds spent inside to ``document["seconds"][stage]``, over all attempts."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.document["seconds"]
            seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 3)
            self.write()

    def write_history(self, history: list[dict[str, float]]) -> None:
        self.document["history"] = _plain(history)
        self.write()

    def finish(self, generator: WeightGenerator, history: list[dict[str, float]]) -> None:
        self.document |= {"status": "finished", "history": _plain(history), "report": generator.report}
        if self.folder is not None:
            generator.save(self.folder)
        self.write()

    def write(self) -> None:
        if self.folder is not None:
            write_json(self.folder / "fit.json", self.document)


def _plain(history: list[dict[str, float]]) -> list[dict[str, float | None]]:
    return [
        {key: value if isinstance(value, int) else _number(value) for key, value in entry.items()} for entry in history
    ]


def _fingerprint(store: SnapshotStore) -> str:
    """Hex digest of the layout and of which snapshots there are; sizes and steps stand for their values."""
    text = json.dumps([store.layout.digest, store.trajectories, store.trajectory_index.tolist(), store.steps.tolist()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
