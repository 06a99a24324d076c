"""Processes that tests start and kill: fits, nodes of a cluster, and all that these start in turn."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

DRIVER = """
import json, sys, time
from pdiff_plugin.config import DistributedConfig, FitConfig
from pdiff_plugin.errors import PDiffError
from pdiff_plugin.cluster.fit import fit_distributed

settings = json.loads(sys.argv[1])
def show(report):
    workers = report.metrics["workers"]
    print(json.dumps([time.time(), report.stage, report.step, report.total_steps, workers]), flush=True)
try:
    fit_distributed(
        settings["store"], FitConfig.from_json(settings["config"]), DistributedConfig(**settings["distributed"]),
        out=settings["out"], on_progress=show, **settings["options"],
    )
except PDiffError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class Process:
    """A process whose output is read as it comes, and that is killed with all below it."""

    def __init__(self, command: list[str], limit_s: float, **environment: str) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.deadline = time.monotonic() + limit_s
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**inherited, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **environment},
        )
        readers = ((self.process.stdout, self.lines), (self.process.stderr, self.errors))
        self.threads = [threading.Thread(target=_read, args=reader) for reader in readers]
        for thread in self.threads:
            thread.start()

    @property
    def text(self) -> str:
        return "".join(self.lines + self.errors)

    def wait_until(self, condition, what: str) -> None:
        while not condition():
            assert self.process.poll() is None, f"ended before {what}: {self.text}"
            assert time.monotonic() < self.deadline, f"no {what}: {self.text}"
            time.sleep(0.02)

    def finish(self) -> int:
        """Wait for the end; the exit code."""
        self.process.wait(max(1.0, self.deadline - time.monotonic()))
        for thread in self.threads:
            thread.join(10)
        return self.process.returncode

    def kill(self, grace_s: float = 20.0) -> None:
        """SIGKILL, and wait until what it had started has left too."""
        below = descendants(self.process.pid)
        self.process.kill()
        self.process.wait()
        end_all(below, grace_s)
        for thread in self.threads:
            thread.join()


class FitProcess(Process):
    """A distributed fit in a process of its own, with what it reported: (time, stage, step, total steps, workers)."""

    def __init__(
        self,
        store: Path,
        out: Path,
        config: dict,
        *,
        limit_s: float = 300.0,
        options: dict | None = None,
        **distributed,
    ) -> None:
        settings = {"store": str(store), "out": str(out), "config": config, "distributed": distributed}
        settings["options"] = options or {}
        super().__init__([sys.executable, "-c", DRIVER, json.dumps(settings)], limit_s)

    @property
    def reports(self) -> list[list]:
        return [json.loads(line) for line in list(self.lines) if line.startswith("[")]

    def wait_for(self, stage: str, step: int = 0, since: float = 0.0) -> list:
        """The first report of ``stage`` from ``step`` on, sent after ``since``."""

        def found() -> list[list]:
            return [r for r in self.reports if r[0] > since and r[1] == stage and r[2] >= step]

        self.wait_until(found, f"report of {stage}")
        return found()[0]

    def workers(self) -> list[int]:
        """Process ids of its Ray Train workers, in the order in which they started; only of a cluster of its own."""
        return sorted(pid for pid, title in descendants(self.process.pid).items() if "RayTrainWorker" in title)


class Node(Process):
    """A node of a Ray cluster on this machine: the head, or one more where ``address`` is given."""

    def __init__(self, folder: str, *, address: str | None = None, num_cpus: int = 1, **environment: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={num_cpus}"]
        command += ["--object-store-memory=100000000", "--disable-usage-stats"]
        command += [f"--dashboard-agent-listen-port={free_port()}"]  # the usual one serves one node of a machine only
        if address is None:
            port = free_port()
            self.address, self.dashboard = f"127.0.0.1:{port}", f"127.0.0.1:{free_port()}"
            command += ["--head", f"--port={port}", f"--temp-dir={folder}"]
            command += [f"--dashboard-port={self.dashboard.rpartition(':')[2]}"]
        else:
            self.address = address
            command += [f"--address={address}"]
        super().__init__(command, 600.0, **environment)
        self.wait_until(lambda: any("--block" in line for line in self.lines), "start of a node")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def descendants(pid: int) -> dict[int, str]:
    """Process id -> command line, of all processes below one."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(entry.name)] = _title(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue  # gone meanwhile
    below, found = {pid}, {}
    while new := {child for child, parent in parents.items() if parent in below} - below:
        below |= new
        found |= {child: titles[child] for child in new}
    return found


def end_all(processes: dict[int, str], grace_s: float) -> None:
    """Wait for processes to leave by themselves, then kill those that are still there."""
    deadline = time.monotonic() + grace_s
    while any(_is_there(pid) for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in processes:
        if _is_there(pid):
            os.kill(pid, signal.SIGKILL)


def _is_there(pid: int) -> bool:
    try:
        return bool(_title(pid))  # empty for one that waits to be collected
    except (FileNotFoundError, ProcessLookupError):
        return False


def _title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


def _read(stream, lines: list[str]) -> None:
    with stream:
        for line in stream:
            lines.append(line)


def listening(pids: Iterable[int]) -> list[tuple[str, int]]:
    """(address, port) of every TCP socket on which one of the processes listens."""
    inodes = {inode for pid in pids for inode in _sockets(pid)}
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # LISTEN
                host, _, port = fields[1].partition(":")
                found.append((_address(bytes.fromhex(host)), int(port, 16)))
    return found


def _sockets(pid: int) -> list[str]:
    links = []
    with suppress(FileNotFoundError, ProcessLookupError):  # the process is gone
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # closed meanwhile
                links.append(os.readlink(entry))
    return [link[len("socket:[") : -1] for link in links if link.startswith("socket:[")]


def _address(words: bytes) -> str:
    """As text, from the kernel's words of four bytes, each turned round."""
    turned = b"".join(words[start : start + 4][::-1] for start in range(0, len(words), 4))
    address = ipaddress.ip_address(turned)
    return str(getattr(address, "ipv4_mapped", None) or address)
