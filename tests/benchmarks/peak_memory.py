"""The most memory that a process held, for the benchmarks beside this file."""

from __future__ import annotations

import threading
from pathlib import Path


class PeakMemory:
    """The largest RssAnon of this process while the ``with`` block runs, in GB; zero on other systems than Linux.

    Mapped files, which the system can drop at any time, are not counted.

    Attributes:
        start_gb: what the process held when the block began.
        peak_gb: the most since then.
    """

    start_gb = peak_gb = 0.0

    def __enter__(self) -> PeakMemory:
        self.start_gb = anonymous_gb()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while True:
            self.peak_gb = max(self.peak_gb, anonymous_gb())
            if self._done.wait(0.02):
                return


def anonymous_gb() -> float:
    """RssAnon of this process, in GB; zero on other systems than Linux."""
    status = Path("/proc/self/status")
    return int(status.read_text().split("RssAnon:")[1].split()[0]) * 1024 / 1e9 if status.exists() else 0.0
