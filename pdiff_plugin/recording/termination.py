"""SIGTERM, which SLURM, Kubernetes and `timeout` send before they kill: what was recorded is written first.

Only where the process has no handler of its own. It ends as it would have without us.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import weakref
from types import FrameType
from typing import Protocol

logger = logging.getLogger(__name__)


class Closable(Protocol):
    """What is told that the process ends."""

    def close(self) -> None:
        """Write what is left."""

    def __hash__(self) -> int: ...


_open: weakref.WeakSet[Closable] = weakref.WeakSet()
_installed_by = 0  # the process that the handler is of: children that were forked have it, too


def close_on_sigterm(recorder: Closable) -> None:
    """Close ``recorder`` when the process is told to end, until :func:`forget`."""
    global _installed_by
    _open.add(recorder)
    if _may_handle() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        _installed_by = os.getpid()
        signal.signal(signal.SIGTERM, _end)


def forget(recorder: Closable) -> None:
    """Undo :func:`close_on_sigterm`; the handler goes with the last one."""
    _open.discard(recorder)
    if not _open and _may_handle() and signal.getsignal(signal.SIGTERM) is _end:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _may_handle() -> bool:
    return threading.current_thread() is threading.main_thread()  # Python allows no other one


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        if os.getpid() == _installed_by:
            for recorder in list(_open):
                recorder.close()
            logger.warning(
                "told to end (SIGTERM): every snapshot so far is on disk. To go on, run the same training again from "
                "its last checkpoint."
            )
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
