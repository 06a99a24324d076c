"""A Ray cluster to work on: joining one or starting one here, and finding out early what cannot work.

Ray's own waits are long: an address where nothing listens blocks it for minutes, a request that no node can meet for
ever. Everything that can be known before the work starts is therefore checked first.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import socket
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pdiff_plugin.cluster.loopback import is_loopback, on_loopback
from pdiff_plugin.config import DistributedConfig
from pdiff_plugin.errors import (
    ClusterAccessError,
    ClusterTooSmallError,
    ClusterUnreachableError,
    ConfigError,
    PDiffError,
    StorageNotSharedError,
    WorkersFailedError,
)
from pdiff_plugin.progress import terminate

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_PROBE_TIMEOUT_S = 3.0
_CHECK_TIMEOUT_S = 60.0
# What passes through the object store is small; Ray's own default is a third of the machine's memory.
_OBJECT_STORE_BYTES = 200 << 20
_LINE_LENGTH = 200
_LOCAL = "local"
# Older releases of Ray have no tokens and refuse nobody.
_REFUSED: type[Exception] = getattr(ray.exceptions, "AuthenticationError", PermissionError)


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Be connected to the cluster at ``address``, at RAY_ADDRESS, or to one started on this machine for the time.

    That one is this machine's alone. A process that is connected already stays so.

    Raises:
        ClusterUnreachableError: nothing answers within seconds.
        ClusterAccessError: it asks for a token.
    """
    if ray.is_initialized():
        yield
        return
    # Named in any case: left out, Ray would join whatever cluster it finds on this machine.
    address = address or os.environ.get("RAY_ADDRESS") or _LOCAL
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address == _LOCAL:
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    else:
        _probe(address)
    with on_loopback() if address == _LOCAL else nullcontext(), _short_messages():
        _join(address, options)
        try:
            if address == _LOCAL:
                _tell_what_is_open()
            yield
        finally:
            ray.shutdown()


def _join(address: str, options: dict[str, Any]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **options)
        if before is terminate:  # Ray takes SIGTERM for itself, and would leave out what our own exit does
            signal.signal(signal.SIGTERM, before)
    except _REFUSED as error:
        raise ClusterAccessError(address, _first_line(error)) from error
    except (ConnectionError, RuntimeError) as error:
        if address == _LOCAL:
            raise ClusterUnreachableError(address, _first_line(error)) from error
        # Something listens there and does not answer us: to a client that shows no token, Ray says no more than that.
        raise ClusterAccessError(address, _first_line(error)) from error


@contextmanager
def _short_messages() -> Iterator[None]:
    """Log the first line of what Ray's nodes report; Ray prints it all to stdout, of a lost node some 50 lines."""
    told = set()

    def log(data: dict[str, Any], **_: Any) -> None:
        first = next(iter("\n".join(data["lines"]).strip().splitlines()), "")
        if first not in told:  # several watch a node
            told.add(first)
            logger.warning("Ray says: %s", textwrap.shorten(first, _LINE_LENGTH))

    # There is no setting for it: `log_to_driver` is about what workers print.
    module: Any = ray._private.worker
    printing = module.print_to_stdstream
    module.print_to_stdstream = log
    try:
        yield
    finally:
        module.print_to_stdstream = printing


def _tell_what_is_open() -> None:
    """Warn where this release of Ray is not to be kept to this machine."""
    for node in alive_nodes().values():
        if not is_loopback(node):
            logger.warning(
                "Ray %s listens at %s, where other machines may reach it and run code: keep them off by a firewall",
                ray.__version__,
                node["NodeManagerAddress"],
            )


def _probe(address: str) -> None:
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ConfigError(
            "address", address, "must be host:port of a cluster; from outside it, use `ray job submit -- pdiff fit ...`"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterUnreachableError(address, str(error)) from error


def alive_nodes() -> dict[str, dict[str, Any]]:
    """Node id -> what Ray knows of it, for the nodes that are up."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]  # Ray leaves it untyped
    return {node["NodeID"]: node for node in nodes if node["Alive"]}


def is_on_this_machine() -> bool:
    """Whether no node is, or can be, on another machine."""
    return all(is_loopback(node) for node in alive_nodes().values())


def node_name(node: dict[str, Any]) -> str:
    """Host and address, for people."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def room_for(config: DistributedConfig) -> int:
    """Workers that the cluster could hold if it did nothing else."""
    needs = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    total = 0
    for node in alive_nodes().values():
        found = node["Resources"]
        total += min(int(found.get(name, 0.0) / need) for name, need in needs.items() if need > 0)
    return total


def wait_for_room(config: DistributedConfig) -> None:
    """Return as soon as the cluster could hold the workers.

    Raises:
        ClusterTooSmallError: it could not for ``start_timeout_s``.
    """
    needed = 1 if config.elastic else config.num_workers
    # A cluster of this machine alone gets no larger; nodes of another one may still be joining.
    timeout_s = 0.0 if _is_own() else config.start_timeout_s
    started = time.monotonic()
    while (room := room_for(config)) < needed:
        if time.monotonic() - started >= timeout_s:
            raise ClusterTooSmallError(_request_text(config), _room_text(room), round(timeout_s))
        time.sleep(0.5)


def _is_own() -> bool:
    """Whether the cluster was started by this process."""
    node = ray._private.worker._global_node  # there is no public way to know
    return bool(node is not None and node.is_head())


def _request_text(config: DistributedConfig) -> str:
    each = f"{config.cpus_per_worker:g} CPUs"
    if config.gpus_per_worker > 0:
        each += f" and {config.gpus_per_worker:g} GPUs"
    return f"{'at least 1' if config.elastic else config.num_workers} worker(s) of {each} each"


def _room_text(room: int) -> str:
    nodes = [
        f"{node_name(node)}: {node['Resources'].get('CPU', 0.0):g} CPUs, {node['Resources'].get('GPU', 0.0):g} GPUs"
        for node in alive_nodes().values()
    ]
    return f"{room} on {len(nodes)} node(s) [{'; '.join(nodes)}]"


def check_shared(files: Sequence[Path]) -> None:
    """Find out whether every node sees the same content in ``files``.

    Raises:
        StorageNotSharedError: naming the first file that a node sees differently or not at all.
    """
    mine = [_digest(path) for path in files]
    nodes = {key: node for key, node in alive_nodes().items() if node["Resources"].get("CPU", 0.0) > 0}
    here = ray.get_runtime_context().get_node_id()
    answers = {key: on_node(_digests, key).remote(list(files)) for key in nodes if key != here}
    for key, answer in answers.items():
        try:
            theirs = ray.get(answer, timeout=_CHECK_TIMEOUT_S)
        except RayError as error:
            logger.warning("node %s did not say whether it sees the files (%s)", node_name(nodes[key]), error)
            continue
        for path, expected, found in zip(files, mine, theirs, strict=True):
            if expected != found:
                raise StorageNotSharedError(str(path), node_name(nodes[key]))


def on_node(what: Any, node_id: str) -> Any:
    """A remote function or actor class that runs on one node and takes none of its CPUs."""
    return what.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False))


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


@ray.remote(max_retries=1)
def _digests(paths: list[Path]) -> list[str | None]:
    return [_digest(path) for path in paths]


def map_in_order(
    function: Callable[[Any, T], R],
    shared: Any,
    items: Sequence[T],
    config: DistributedConfig,
    on_done: Callable[[int], None] | None = None,
) -> list[R]:
    """``function(shared, item)`` of every item in tasks of the cluster, in the order of the items.

    Args:
        function: importable on every node.
        shared: put into the object store once, however many items there are; or a reference to what is there.
        items: one task each; tasks of a lost node run again elsewhere.
        config: says what a task gets and how often it is retried.
        on_done: told how many tasks have ended.

    Raises:
        WorkersFailedError: a task's worker was lost more often than ``max_failures``.
        PDiffError: whatever ``function`` raised of ours, as it was.
    """
    reference = shared if isinstance(shared, ray.ObjectRef) else ray.put(shared)
    task = _call.options(
        num_cpus=config.cpus_per_worker, num_gpus=config.gpus_per_worker, max_retries=config.max_failures
    )
    answers = [task.remote(function, reference, item) for item in items]
    waiting = list(answers)
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=1)
        if on_done is not None:
            on_done(len(answers) - len(waiting))
    try:
        results: list[R] = ray.get(answers)
    except RayTaskError as error:
        if isinstance(error.cause, PDiffError):
            raise error.cause from error
        raise
    except (WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
        advice = f"It was tried {config.max_failures + 1} times. Is there enough memory for a task?"
        raise WorkersFailedError("a task of the cluster", _first_line(error), advice) from error
    return results


@ray.remote
def _call(function: Callable[[Any, Any], Any], shared: Any, item: Any) -> Any:
    return function(shared, item)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
