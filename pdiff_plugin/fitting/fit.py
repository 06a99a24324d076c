"""Fit a generator to a snapshot store: statistics, autoencoder, diffusion, and what the result is like.

A run folder holds ``generator.safetensors``, ``fit.json`` (settings, history, measurements) and, while running, the
checkpoints from which the same call goes on.

Shapes: N snapshots, n of them for training, D values in a row, K latent width.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pdiff_plugin._version import __version__
from pdiff_plugin.config import FitConfig
from pdiff_plugin.fitting.condition_measures import measure_conditions
from pdiff_plugin.fitting.condition_stage import Cloud, FittedCondition, train_condition_diffusion
from pdiff_plugin.fitting.conv_stage import fit_conv
from pdiff_plugin.fitting.diffusion_stage import FittedDiffusion, train_diffusion
from pdiff_plugin.fitting.distill_stage import distill
from pdiff_plugin.fitting.folder import FitFolder
from pdiff_plugin.fitting.measures import FAR_APART, measure_generator, movement_report, suggest_alignment
from pdiff_plugin.fitting.runtime import Runtime
from pdiff_plugin.fitting.several import Stores, one_store
from pdiff_plugin.fitting.statistics_stage import measure_store, nonfinite_names, part_to_fit, variables_of
from pdiff_plugin.fitting.subspace_stage import fit_subspace
from pdiff_plugin.fitting.training import with_gradients
from pdiff_plugin.generator.autoencoder import Encoded
from pdiff_plugin.generator.condition import Condition
from pdiff_plugin.generator.frames import Frames, fit_frames, plain_frames
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.loggers import Loggers, logged
from pdiff_plugin.progress import OnProgress
from pdiff_plugin.snapshots.bucket_store import BucketStore
from pdiff_plugin.snapshots.fingerprint import fingerprint
from pdiff_plugin.snapshots.split import Split
from pdiff_plugin.snapshots.statistics import Statistics
from pdiff_plugin.snapshots.store import SnapshotStore

logger = logging.getLogger(__name__)

TRAFFIC = "the workers read %d bytes from the bucket, of a store of %d"


@dataclass(frozen=True)
class AutoencoderStage:
    """How one kind of autoencoder is fitted.

    Attributes:
        fit: the stage.
        reads_whole_rows: every rank reads all columns; else each reads its own share of them.
        counts_per_trajectory: the setting ``latent_dim`` is the number of a trajectory's own directions, and with it
            the width of its frame; else all latents are in it.
    """

    fit: Callable[[Split, Statistics, FitConfig, Runtime], Encoded]
    reads_whole_rows: bool
    counts_per_trajectory: bool


AUTOENCODER_STAGES = {
    "subspace": AutoencoderStage(fit_subspace, reads_whole_rows=False, counts_per_trajectory=True),
    # Its `latent_dim` is that of one chunk.
    "conv": AutoencoderStage(fit_conv, reads_whole_rows=True, counts_per_trajectory=False),
}


def autoencoder_stage(config: FitConfig) -> AutoencoderStage:
    """The stage that fits the autoencoder of ``config``."""
    return AUTOENCODER_STAGES[config.autoencoder.kind]


def fit(
    store: Stores,
    config: FitConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    on_progress: OnProgress | None = None,
    loggers: Loggers = (),
) -> WeightGenerator:
    """Learn an autoencoder and a latent diffusion on the snapshots of a store.

    The same call goes on where an interrupted one stopped, and returns at once when it had finished.

    Args:
        store: a snapshot store or its folder; or a list of folders, or a pattern such as ``runs/*/pdiff-snapshots``,
            whose stores are merged in ``out`` first, see :func:`pdiff_plugin.merge_stores`.
        config: settings; the defaults unless given.
        out: run folder, made if missing; without it nothing is written.
        fresh: start anew, replacing the fit in ``out``.
        on_progress: told how the stages get on.
        loggers: take the curves and figures, see :class:`pdiff_plugin.Logger`; a text such as ``tensorboard:runs/a`` is
            opened and closed here.

    Raises:
        UnusableSnapshotsError: fewer than 10 snapshots, all equal, or more than 5 % with NaN or Inf.
        FitExistsError: ``out`` holds a fit of other settings or other snapshots.
    """
    config = config or FitConfig()
    store = one_store(store, out, fresh=fresh, on_progress=on_progress)
    store = store if isinstance(store, SnapshotStore) else SnapshotStore.open(store)
    store = part_to_fit(store, config)
    folder = FitFolder.open(store, config, Path(out) if out is not None else None, fresh=fresh)
    if folder.is_finished and folder.path is not None:
        return WeightGenerator.load(folder.path)
    with logged(loggers, {"fit": folder.settings}, on_progress) as log:
        generator = run_stages(store, folder, Runtime(folder.path, log.on_progress))
        assert generator is not None, "one process is rank 0"
        log.figures({"report": generator.report})
    return generator


@with_gradients
def run_stages(store: SnapshotStore, folder: FitFolder, runtime: Runtime) -> WeightGenerator | None:
    """Run the stages as one process, or as one rank of a group: the generator on rank 0, None on the others."""
    config = folder.config
    with folder.timed("statistics"):
        split, statistics, alignment = measure_store(store, config, runtime)
        digest = fingerprint(store, runtime.share(store.layout.num_values), runtime.all_reduce)
        _count_bytes("statistics", store, folder, runtime)
    folder.document["nonfinite_steps"] = nonfinite_names(split)
    with folder.timed("autoencoder"):
        encoded = autoencoder_stage(config).fit(split, statistics, config, runtime)
        _count_bytes("autoencoder", store, folder, runtime)
    _warn_of_fidelity(encoded, config)
    variables = variables_of(store, config)
    conditions = [store.conditions[name] for name in store.trajectories] if variables else []
    fitted: FittedDiffusion | FittedCondition
    with folder.timed("diffusion"):
        if variables is None:
            fitted = _fit_runs(encoded, split, config, runtime, folder)
        else:
            cloud = Cloud.of(encoded.latents, split.trajectory, variables.encode(conditions))
            fitted = train_condition_diffusion(cloud, config, runtime, folder.write_history)
    if runtime.rank != 0:
        return None
    one_step = None
    if config.diffusion.distill_steps:
        with folder.timed("distill"):
            one_step = distill(fitted, config, runtime)
    generator = WeightGenerator(
        layout=store.layout,
        config=config,
        autoencoder=encoded.autoencoder,
        frames=fitted.frames,
        denoiser=fitted.denoiser,
        trajectories=store.trajectories,
        variables=variables,
        conditions=conditions,
        provenance={
            "store": folder.document["store"],
            "num_snapshots": len(split),
            "num_trajectories": len(store.trajectories),
            "layout_digest": store.layout.digest,
            "fingerprint": digest,
            "pdiff_plugin": __version__,
            "torch": torch.__version__,
        },
        one_step=one_step,
        alignment=alignment,
    )
    with folder.timed("report"):
        if isinstance(fitted, FittedCondition):
            generator.report = measure_conditions(generator, encoded, split, statistics.gram, cloud, fitted)
        else:
            local = fitted.frames.to_local(encoded.latents, Condition(split.trajectory))
            generator.report = measure_generator(generator, encoded, local, split, fitted.history)
            generator.report |= movement_report(statistics, split.trajectory)
        if alignment is not None:
            generator.report["alignment"] = alignment.report
        elif generator.report.get("trajectory_separation", 0.0) > FAR_APART and runtime.world_size == 1:
            suggest_alignment(split, config)
        if isinstance(store, BucketStore):
            folder.add_bytes_read("report", store.take_num_bytes())
            generator.report |= {"bytes_read": folder.bytes_read, "bytes_in_store": store.size_bytes}
            logger.info(TRAFFIC, folder.bytes_read, store.size_bytes)
    generator.to("cpu")
    with folder.timed("file"):
        folder.finish(generator, fitted.history, encoded.late)
    runtime.drop_checkpoints()
    # Read back, so that the basis lies in the generator's own file and no longer in memory or scratch.
    return generator if folder.path is None else WeightGenerator.load(folder.path)


def _count_bytes(stage: str, store: SnapshotStore, folder: FitFolder, runtime: Runtime) -> None:
    """Keep how many bytes all ranks have read from a bucket in a stage, of a store that is in one."""
    if isinstance(store, BucketStore):
        folder.add_bytes_read(stage, int(runtime.all_reduce(torch.tensor(store.take_num_bytes()))))


def _fit_runs(
    encoded: Encoded, split: Split, config: FitConfig, runtime: Runtime, folder: FitFolder
) -> FittedDiffusion:
    """The diffusion of runs that are only numbered."""
    frames = runtime.on_rank_0(lambda: _frames(encoded, split, config))
    local = frames.to_local(encoded.latents, Condition(split.trajectory))
    denoiser, history = train_diffusion(local, split, frames, config, runtime, folder.write_history)
    return FittedDiffusion(frames, denoiser, history)


def _warn_of_fidelity(encoded: Encoded, config: FitConfig) -> None:
    if encoded.fidelity < config.autoencoder.min_fidelity:
        logger.warning(
            "the autoencoder keeps %.1f %% of the held-out snapshots' variance, below the %.0f %% asked for: samples "
            "will miss what it drops. Raise latent_dim (%d), or record more snapshots.",
            100 * encoded.fidelity,
            100 * config.autoencoder.min_fidelity,
            config.autoencoder.latent_dim,
        )


def _frames(encoded: Encoded, split: Split, config: FitConfig) -> Frames:
    """Coordinates for the diffusion, from the training snapshots' latents."""
    latents, R = encoded.latents[split.train_rows], len(split.store.trajectories)
    if not config.diffusion.precondition:
        return plain_frames(latents, R, scaled=config.diffusion.scale_latents)
    is_counted = autoencoder_stage(config).counts_per_trajectory
    width = config.autoencoder.latent_dim if is_counted else latents.shape[1]
    return fit_frames(latents, split.trajectory[split.train_rows], R, width)
