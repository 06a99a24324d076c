"""Which process a file belongs to, and whether that process has ended."""

from __future__ import annotations

import hashlib
import os
import socket
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process, told from every other one, also of other machines and other times.

    Attributes:
        host: name of its machine, for people.
        machine: 12 hex digits, the same for processes that know each other by their numbers: those of one boot of one
            machine and, on Linux, of one container.
        pid: its number.
        started: when it started, in clock ticks after the boot; 0 where the system does not tell (only Linux does).
    """

    host: str
    machine: str
    pid: int
    started: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @classmethod
    def from_json(cls, document: object) -> Process | None:
        """The process that a document names, given anything; None if it names none."""
        match document:
            case {"host": str(host), "machine": str(machine), "pid": int(pid), "started": int(started)}:
                return cls(host, machine, pid, started)
        return None

    def has_ended(self) -> bool | None:
        """Whether it has; None if that cannot be known from here."""
        if self.machine != _machine() or os.name != "posix":  # elsewhere os.kill ends what it is asked about
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            pass
        state, started = _state(self.pid)
        return state in ("Z", "X") or started != self.started


def this_process() -> Process:
    """The process that asks."""
    pid = os.getpid()  # a forked child is another one
    return Process(socket.gethostname(), _machine(), pid, _state(pid)[1])


@cache
def _machine() -> str:
    parts = [socket.gethostname()]
    try:
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    except OSError:  # no Linux
        parts += [hex(uuid.getnode())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _state(pid: int) -> tuple[str, int]:
    """One letter (Z for one that only waits for its parent), and when the process started; see ``proc(5)``."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # no Linux, or it has just ended
        return "", 0
    return fields[0], int(fields[19])
