"""What long work says of itself while it runs, and what ends it early."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn


@dataclass(frozen=True)
class Progress:
    """One report of long work, handed to ``on_progress``."""

    stage: str
    step: int
    total_steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    """What is being worked on, for people."""


OnProgress = Callable[[Progress], None]


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the seconds spent inside to ``seconds[stage]``."""
    started = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started


class Terminated(KeyboardInterrupt):
    """SIGTERM, taken as Ctrl-C is: what was finished is kept."""


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    """A handler of SIGTERM, as ``signal.default_int_handler`` is one of SIGINT."""
    raise Terminated
