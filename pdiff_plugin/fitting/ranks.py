"""The fit, and its refinement, as one rank of a process group, whoever started it: torchrun, srun, Ray.

# torchrun --nnodes 2 --nproc-per-node 4 ... fit.py
torch.distributed.init_process_group("cpu:gloo,cuda:nccl")     # "gloo" without GPUs
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))           # only with GPUs
fit_on_ranks("runs/cifar", out="fits/cifar")
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from pdiff_plugin.config import CACHE_GB, FitConfig, RefineConfig
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.fitting.fit import autoencoder_stage, run_stages
from pdiff_plugin.fitting.folder import FitFolder, local_folder
from pdiff_plugin.fitting.refine import Loss, Losses, finished_in, run_refinement
from pdiff_plugin.fitting.runtime import GroupRuntime
from pdiff_plugin.fitting.statistics_stage import part_to_fit
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.loggers import Loggers, logged
from pdiff_plugin.progress import OnProgress
from pdiff_plugin.snapshots.bucket_store import opened_in_bucket
from pdiff_plugin.snapshots.fingerprint import first_columns
from pdiff_plugin.snapshots.mapped import disk_folder
from pdiff_plugin.snapshots.remote import is_remote
from pdiff_plugin.snapshots.scratch import scratch_folder
from pdiff_plugin.snapshots.store import SnapshotStore


def fit_on_ranks(
    store: str | os.PathLike[str],
    config: FitConfig | None = None,
    *,
    out: str | os.PathLike[str],
    fresh: bool = False,
    on_progress: OnProgress | None = None,
    loggers: Loggers = (),
    cache_gb: float = CACHE_GB,
) -> WeightGenerator | None:
    """As :func:`pdiff_plugin.fit`, on all ranks of the default process group, every one of which calls this alike.

    The group needs a backend for tensors on the CPU (gloo) even where it trains on GPUs, and a timeout of more than the
    time that rank 0 needs to train the `conv` autoencoder, which the others wait for.

    Args:
        store: folder of a snapshot store that every rank sees, or the URL of one in a bucket.
        config: settings of the fit; the defaults unless given.
        out: run folder, seen by rank 0 alone or by all, or the URL of one in a bucket.
        fresh: start anew, replacing the fit in ``out``.
        on_progress: told how the stages get on, on rank 0.
        loggers: take the curves and figures, on rank 0; those of the other ranks are neither opened nor used.
        cache_gb: of a store in a bucket, bound on what each rank keeps on disk, in the folder for temporary files.

    Returns:
        The generator on rank 0, None on the others.

    Raises:
        ConfigError: there are more ranks than rows in a batch, or ``cache_gb`` is too small for this kind of fit.
        BucketError: a bucket refuses us, or does not answer.
        UnusableSnapshotsError, FitExistsError: as in one process, on every rank.
    """
    config, source, out = config or FitConfig(), whole_path(store), whole_path(out)
    runtime = GroupRuntime(None, on_progress)
    check_num_ranks(runtime.world_size, config)
    with ExitStack() as stack:
        if runtime.rank == 0:
            runtime.folder = stack.enter_context(local_folder(out))
        else:  # keeps nothing, but needs a place for a large basis
            runtime.folder = stack.enter_context(scratch_folder())
        share = partial(_columns, config=config, runtime=runtime)
        opened = stack.enter_context(opened_store(source, share, config, cache_gb))
        opened = part_to_fit(opened, config)
        if is_remote(source):
            check_cache(opened, config, cache_gb, shutil.disk_usage(disk_folder()).free / 1e9)
        folder = runtime.on_rank_0(lambda: FitFolder.open(opened, config, runtime.folder, fresh=fresh, source=source))
        if runtime.on_rank_0(lambda: folder.is_finished):
            return WeightGenerator.load(runtime.folder) if runtime.rank == 0 else None
        if runtime.rank != 0:
            folder = replace(folder, path=None)
        folder.document.setdefault("attempts", []).append(
            {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "num_workers": runtime.world_size}
        )
        folder.write()
        mine = loggers if runtime.rank == 0 else ()
        log = stack.enter_context(logged(mine, {"fit": folder.settings}, on_progress))
        runtime.on_progress = log.on_progress
        generator = run_stages(opened, folder, runtime)
        if generator is not None:
            log.figures({"report": generator.report})
        return generator


def refine_on_ranks(
    generator: WeightGenerator,
    model: nn.Module,
    loss: Loss,
    config: RefineConfig | None = None,
    *,
    conditions: Sequence[Mapping[str, Any]] | None = None,
    measure: Loss | None = None,
    out: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> WeightGenerator | None:
    """As :func:`pdiff_plugin.refine`, on all ranks of the default process group, which share the conditions of a step.

    Every rank calls this alike, with a model on its own device. The result is that of one process, up to rounding, if
    ``loss`` draws its batch from the global random state, and not from what goes on from call to call.

    Args:
        generator, model, loss, config, conditions, measure: as in one process.
        out: folder for the generator and for checkpoints, used by rank 0 alone.
        on_progress: told the loss, on rank 0.

    Returns:
        The generator on rank 0, None on the others.

    Raises:
        ConfigError: there are more ranks than conditions in a step; or as in one process.
    """
    config = config or RefineConfig()
    folder = None if out is None else Path(out)
    runtime = GroupRuntime(folder, on_progress)
    if runtime.world_size > config.conditions_per_step:
        found = config.conditions_per_step
        raise ConfigError("conditions_per_step", found, f"must be at least {runtime.world_size}, the number of ranks")
    if folder is not None and runtime.on_rank_0(lambda: finished_in(folder, config) is not None):
        return WeightGenerator.load(folder) if runtime.rank == 0 else None
    return run_refinement(generator, model, Losses(loss, measure or loss), config, conditions, runtime)


def _columns(num_values: int, config: FitConfig, runtime: GroupRuntime) -> slice:
    """The columns of a store that this rank reads, and on rank 0 those that tell whether it is still the same."""
    own = slice(0, num_values) if _reads_all(config) else runtime.share(num_values)
    return slice(0, max(own.stop, first_columns(num_values).stop)) if runtime.rank == 0 else own


def _reads_all(config: FitConfig) -> bool:
    """Whether every rank reads all columns, in any order and again and again, and not its share from first to last."""
    # What is aligned mixes the columns.
    return autoencoder_stage(config).reads_whole_rows or config.align != "none"


def check_cache(store: SnapshotStore, config: FitConfig, cache_gb: float, room_gb: float = math.inf) -> None:
    """Refuse a fit that would fetch a store in a bucket many times over, because the cache cannot hold it.

    Args:
        store: in a bucket.
        config: of the fit.
        cache_gb: bound on the cache of each rank.
        room_gb: on the disk that it is on, where that is known.

    Raises:
        ConfigError: ``cache_gb`` is too small, or the disk.
    """
    if not cache_gb > 0:
        raise ConfigError("cache_gb", cache_gb, "must be above 0")
    needed = len(store) * store.layout.num_values * store.row_dtype.itemsize / 1e9
    if not _reads_all(config) or needed <= min(cache_gb, room_gb):
        return
    kind = f"align={config.align}" if config.align != "none" else f"the {config.autoencoder.kind} autoencoder"
    room = "" if needed <= room_gb else f", and so must the room in {disk_folder()} ({room_gb:.3g} GB)"
    expected = f"must be at least {needed:.3g} for {kind}, which reads the whole store again and again{room}"
    raise ConfigError("cache_gb", cache_gb, f"{expected}. Or copy the store to a disk that every node sees")


def check_num_ranks(num_ranks: int, config: FitConfig) -> None:
    """Raise :class:`ConfigError` for more ranks than a batch has rows."""
    if num_ranks > config.diffusion.batch_size:
        raise ConfigError("num_workers", num_ranks, "must be at most diffusion.batch_size")


def whole_path(path: str | os.PathLike[str]) -> str:
    """A path that means the same in another process, be it a folder's or a URL."""
    return str(path) if is_remote(path) else str(Path(path).resolve())


@contextmanager
def opened_store(
    source: str, columns: Callable[[int], slice], config: FitConfig, cache_gb: float
) -> Iterator[SnapshotStore]:
    """The store at ``source``; of one in a bucket, some columns of their number are read in passes."""
    if not is_remote(source):
        yield SnapshotStore.open(source)
        return
    sizes = {"cache_bytes": int(cache_gb * 1e9), "memory_bytes": int(config.memory_gb * 1e9)}
    with opened_in_bucket(source, columns, **sizes) as store:
        yield store
