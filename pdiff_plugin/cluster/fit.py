"""The fit on several workers, through Ray Train.

    driver ── supervisor ── Ray Train's controller ── worker 0 .. W-1     fit_on_ranks(), in a process group
       └──── board         what workers say to the driver: progress, warnings, errors

Workers keep their checkpoints in the run folder, as a fit in one process does, so that a lost worker, a lost driver and
Ctrl-C are all the same: what runs next, whatever its number of workers, goes on from there. Ray Train sets up the
process group and replaces what died. The supervisor exists so that the driver is free to watch: killing it ends all.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from pdiff_plugin.cluster.connection import (
    alive_nodes,
    check_shared,
    connected,
    is_on_this_machine,
    node_name,
    on_node,
    room_for,
    wait_for_room,
)
from pdiff_plugin.config import CACHE_GB, DistributedConfig, FitConfig
from pdiff_plugin.errors import ConfigError, PDiffError, WorkersFailedError
from pdiff_plugin.fitting.fit import TRAFFIC
from pdiff_plugin.fitting.folder import FitFolder, local_folder
from pdiff_plugin.fitting.ranks import check_cache, check_num_ranks, fit_on_ranks, opened_store, whole_path
from pdiff_plugin.fitting.several import Stores, one_store
from pdiff_plugin.fitting.statistics_stage import part_to_fit
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.loggers import Log, Loggers, logged
from pdiff_plugin.progress import OnProgress, Progress
from pdiff_plugin.snapshots.fingerprint import first_columns
from pdiff_plugin.snapshots.remote import is_remote
from pdiff_plugin.snapshots.scratch import scratch_folder
from pdiff_plugin.snapshots.shards import layout_files
from pdiff_plugin.snapshots.store import SnapshotStore

logger = logging.getLogger(__name__)

_POLL_S = 0.25
_WATCH_EVERY_S = 2.0
_TELL_EVERY_S = 0.5
_BOARD_TIMEOUT_S = 30.0
_COLLECTIVE_TIMEOUT_S = 7 * 24 * 3600
_GOES_ON = "What was finished is kept: the same command goes on from there."
_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a dead worker is noticed; 2 s by default
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # so that an elastic group soon tries with fewer; 60 s by default
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
}


def fit_distributed(
    store: Stores,
    config: FitConfig | None = None,
    distributed: DistributedConfig | None = None,
    *,
    out: str | os.PathLike[str],
    fresh: bool = False,
    on_progress: OnProgress | None = None,
    loggers: Loggers = (),
    cache_gb: float = CACHE_GB,
) -> WeightGenerator:
    """As :func:`pdiff_plugin.fit`, on the workers of a Ray cluster; the result is the same up to rounding.

    Args:
        store: a snapshot store, its folder on storage that every node sees, or the URL of one in a bucket; or several
            folders, as in one process.
        config: settings of the fit.
        distributed: where it runs.
        out: run folder on storage that every node sees, or the URL of one in a bucket.
        fresh: start anew, replacing the fit in ``out``.
        on_progress: told how the stages get on, in the calling thread.
        loggers: take the curves and figures, in the calling thread too.
        cache_gb: of a store in a bucket, bound on what each worker keeps on disk, in the folder for temporary files.

    Raises:
        UnusableSnapshotsError, FitExistsError: as in one process.
        ConfigError: ``cache_gb`` is too small for this kind of fit, or there are more workers than rows in a batch.
        BucketError: a bucket refuses us, or does not answer.
        ClusterUnreachableError, ClusterAccessError, ClusterTooSmallError: there is no such place to run.
        StorageNotSharedError: a node does not see ``store`` or ``out``.
        WorkersFailedError: workers were lost more often than ``max_failures``, or could not be replaced.
    """
    config, distributed = config or FitConfig(), distributed or DistributedConfig()
    check_num_ranks(distributed.num_workers, config)
    store = one_store(store, out, fresh=fresh, on_progress=on_progress)
    job = _Job(whole_path(store.path if isinstance(store, SnapshotStore) else store), whole_path(out), config, cache_gb)
    with ExitStack() as stack:
        # Of a store in a bucket the driver needs all but the rows.
        if not isinstance(store, SnapshotStore):
            store = stack.enter_context(opened_store(job.store, first_columns, config, cache_gb))
        store = part_to_fit(store, config)
        if is_remote(job.store):
            check_cache(store, config, cache_gb)
        with local_folder(job.out) as path:
            folder = FitFolder.open(store, config, path, fresh=fresh, source=job.store)
            is_finished = folder.is_finished
        if not is_finished:
            log = stack.enter_context(logged(loggers, {"fit": folder.settings}))
            with connected(distributed.address):
                wait_for_room(distributed)
                check_shared(job.shared_files())
                _Watch(job, distributed, on_progress, log).run()
        with local_folder(job.out) as path:
            generator = WeightGenerator.load(path)  # its file stays mapped where the folder is only a copy
        if not is_finished:
            log.figures({"report": generator.report})
            if "bytes_read" in generator.report:
                logger.info(TRAFFIC, generator.report["bytes_read"], generator.report["bytes_in_store"])
    return generator


@dataclass(frozen=True)
class _Job:
    """What a worker is told."""

    store: str
    out: str
    config: FitConfig
    cache_gb: float

    def shared_files(self) -> list[Path]:
        """Files that every node has to see."""
        of_store = [] if is_remote(self.store) else layout_files(Path(self.store))
        return of_store if is_remote(self.out) else [*of_store, Path(self.out) / "fit.json"]


@dataclass(frozen=True)
class _Joined:
    """A worker has started."""

    rank: int
    world_size: int
    node_id: str


@dataclass(frozen=True)
class _Failed:
    """A worker met an error that trying again would meet too."""

    error: PDiffError


@ray.remote(num_cpus=0)
class _Board:
    """Where workers leave messages for the driver, on the driver's own node."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def put(self, message: Any) -> None:
        self.messages.append(message)

    def take(self) -> list[Any]:
        messages, self.messages = self.messages, []
        return messages


@ray.remote(num_cpus=0)
class _Supervisor:
    """Runs Ray Train's driver, which blocks and takes over SIGINT, in a process of its own."""

    def fit(self, job: _Job, distributed: DistributedConfig, board: Any) -> dict[int, str]:
        """Rank (-1 for the group as a whole) -> what went wrong for good; empty after a success."""
        os.environ.update({name: value for name, value in _TRAIN_SETTINGS.items() if name not in os.environ})
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.callback import UserCallback
        from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

        from pdiff_plugin.cluster.meeting import MeetAtFile

        if distributed.elastic and not hasattr(ScalingConfig, "max_workers"):
            raise ConfigError("elastic", True, f"needs a newer Ray than {ray.__version__}")

        class TellBoard(UserCallback):
            def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
                board.put.remote({rank: _cause(error) for rank, error in worker_exceptions.items()})

        W, gpus = distributed.num_workers, distributed.gpus_per_worker
        resources = {"CPU": distributed.cpus_per_worker, **({"GPU": gpus} if gpus > 0 else {})}
        # As mappings, because a type checker sees the classes of Ray Train's first version.
        scaling: dict[str, Any] = {
            "num_workers": (1, W) if distributed.elastic else W,
            "use_gpu": gpus > 0,
            "resources_per_worker": resources,
        }
        group: dict[str, Any] = {
            # NCCL wants a whole GPU per rank; what stays on the CPU (statistics, messages) goes through gloo.
            "backend": "cpu:gloo,cuda:nccl" if gpus >= 1 else "gloo",
            # Ranks wait for rank 0 while it trains the `conv` autoencoder alone; of one that died Ray itself knows.
            "timeout_s": _COLLECTIVE_TIMEOUT_S,
        }
        with scratch_folder() as storage:
            run: dict[str, Any] = {
                "name": "fit",
                "storage_path": str(storage),  # nothing is put there: checkpoints are in the run folder
                "failure_config": FailureConfig(max_failures=distributed.max_failures),
                "callbacks": [TellBoard()],
            }
            trainer = TorchTrainer(
                _work,
                train_loop_config={"job": job, "board": board, "uses_gpu": gpus > 0},
                torch_config=MeetAtFile(**group, folder=str(storage)) if is_on_this_machine() else TorchConfig(**group),
                scaling_config=ScalingConfig(**scaling),
                run_config=RunConfig(**run),
            )
            try:
                trainer.fit()
            except WorkerGroupError as error:
                return {rank: _cause(failure) for rank, failure in error.worker_failures.items()}
            except ControllerError as error:
                return {-1: _cause(error.controller_failure)}
        return {}


def _cause(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    # A worker's own exception ends with the line that says what it was; the rest is its traceback.
    last = next((line for line in reversed(lines) if line and not line.startswith(" ")), lines[-1])
    return f"{type(error).__name__}: {last}" if last else type(error).__name__


def _work(settings: dict[str, Any]) -> None:
    """The life of one worker, under Ray Train."""
    import torch.distributed

    job: _Job = settings["job"]
    board = settings["board"]
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    board.put.remote(_Joined(rank, world_size, ray.get_runtime_context().get_node_id()))
    if not settings["uses_gpu"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # `auto` would take a GPU that was not asked for
    handler = _ToBoard(board)
    package = logging.getLogger("pdiff_plugin")
    if rank == 0:
        package.addHandler(handler)
    try:
        fit_on_ranks(job.store, job.config, out=job.out, on_progress=_Teller(board), cache_gb=job.cache_gb)
    except PDiffError as error:
        ray.get(board.put.remote(_Failed(error)), timeout=_BOARD_TIMEOUT_S)
        raise
    finally:
        package.removeHandler(handler)


class _Teller:
    """``on_progress`` of a worker: passes on all figures, of other reports one in a while, and the last of a stage."""

    def __init__(self, board: Any) -> None:
        self.board, self.stage, self.told = board, "", 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        is_due = bool(progress.metrics) or progress.stage != self.stage or now - self.told > _TELL_EVERY_S
        if is_due or progress.step >= progress.total_steps:
            self.stage, self.told = progress.stage, now
            self.board.put.remote(progress)


class _ToBoard(logging.Handler):
    """Carries warnings to the driver."""

    def __init__(self, board: Any) -> None:
        super().__init__(logging.WARNING)
        self.board = board

    def emit(self, record: logging.LogRecord) -> None:
        self.board.put.remote(record.getMessage())


class _Watch:
    """The driver's side: starts the work, shows how it gets on, and ends it when it cannot go on."""

    def __init__(self, job: _Job, distributed: DistributedConfig, on_progress: OnProgress | None, log: Log) -> None:
        self.job, self.distributed, self.on_progress, self.log = job, distributed, on_progress, log
        self.nodes = alive_nodes()
        self.joined: dict[int, _Joined] = {}
        self.short_since: float | None = None
        self.looked = time.monotonic()

    def run(self) -> None:
        """Return when the fit is finished."""
        here = ray.get_runtime_context().get_node_id()
        board = on_node(_Board, here).remote()
        supervisor = on_node(_Supervisor, here).remote()
        try:
            pending = supervisor.fit.remote(self.job, self.distributed, board)
            is_done = False
            while not is_done:
                is_done = bool(ray.wait([pending], timeout=_POLL_S)[0])
                for message in self._messages(board):
                    self._take(message)
                self._look_at_nodes()
            failures: dict[int, str] = ray.get(pending)
        except RayTaskError as error:
            if isinstance(error.cause, PDiffError):
                raise error.cause from error
            raise
        except RayActorError as error:
            raise WorkersFailedError("the supervisor of the workers", _cause(error), _GOES_ON) from error
        finally:
            # Ends the controller and the workers too, which belong to it.
            ray.kill(supervisor)
            ray.kill(board)
        if failures:
            # A rank whose partner died fails as well, of the broken connection: the death is what to tell.
            rank = min(failures, key=lambda r: ("Died" not in failures[r] and "Health" not in failures[r], r))
            raise WorkersFailedError(
                self._name(rank),
                failures[rank],
                f"It was tried {self.distributed.max_failures + 1} times (--max-failures). {_GOES_ON}",
            )

    def _messages(self, board: Any) -> list[Any]:
        try:
            messages: list[Any] = ray.get(board.take.remote(), timeout=_BOARD_TIMEOUT_S)
        except GetTimeoutError:
            logger.warning("no news from the workers for %.0f s; is this machine overloaded?", _BOARD_TIMEOUT_S)
            return []
        return messages

    def _take(self, message: Any) -> None:
        if isinstance(message, Progress):
            self.log.record(message)
            if self.on_progress is not None:
                metrics = {**message.metrics, "workers": float(len(self.joined))}
                self.on_progress(Progress(message.stage, message.step, message.total_steps, metrics))
        elif isinstance(message, _Joined):
            if message.rank == 0 or message.world_size != len(self.joined):
                self.joined = {r: j for r, j in self.joined.items() if r < message.world_size}
            self.joined[message.rank] = message
        elif isinstance(message, _Failed):
            raise message.error
        elif isinstance(message, dict):
            lost = "; ".join(f"{self._name(rank)}: {cause}" for rank, cause in message.items())
            logger.warning("workers stopped and are started again from the last checkpoint (%s)", lost)
        else:
            logger.warning("%s", message)

    def _name(self, rank: int) -> str:
        joined = self.joined.get(rank)
        node = self.nodes.get(joined.node_id) if joined else None
        if rank < 0:
            return "the group of workers"
        return f"worker {rank} on node {node_name(node)}" if node else f"worker {rank}"

    def _look_at_nodes(self) -> None:
        now = time.monotonic()
        if now - self.looked < _WATCH_EVERY_S:
            return
        self.looked = now
        alive = alive_nodes()
        self.nodes |= alive
        room = room_for(self.distributed)
        needed = 1 if self.distributed.elastic else self.distributed.num_workers
        if room >= needed:
            self.short_since = None
            return
        self.short_since = self.short_since or now
        if now - self.short_since > self.distributed.start_timeout_s:
            gone = ", ".join(node_name(node) for key, node in self.nodes.items() if key not in alive)
            raise WorkersFailedError(
                f"node {gone}" if gone else "the cluster",
                f"gone for {now - self.short_since:.0f} s, and there is room for {room} of {needed} workers",
                "Run the same command again when the node is back, or with --elastic or fewer --num-workers: it goes "
                "on from the last checkpoint.",
            )
