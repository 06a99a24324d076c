"""Which steps of a run are recorded."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from pdiff_plugin.config import RecorderConfig
from pdiff_plugin.errors import ConfigError


@dataclass(frozen=True)
class Window:
    """The steps to record: the end of a run of known length, or a ring of the newest rows.

    Attributes:
        total_steps: length of the run; None when it is not known.
        first: first step of the window; 1 for a ring.
        every: one step in this many is recorded.
        num_rows: rows at most. With an unknown length this is the length of the ring.
    """

    total_steps: int | None
    first: int
    every: int
    num_rows: int

    @classmethod
    def plan(cls, config: RecorderConfig, total_steps: int | None, steps_per_epoch: int | None) -> Window:
        """Lay the window at the end of the run: ``last_steps``, else ``last_epochs``, else ``max_snapshots`` steps.

        Without ``every_n_steps`` a longer window than ``max_snapshots`` is thinned out evenly. With it, the newest
        ``max_snapshots`` rows of the window are kept.

        Raises:
            ConfigError: a run of no steps.
        """
        if config.keep_newest:
            total_steps = None
        if total_steps is not None and total_steps < 1:
            raise ConfigError("total_steps", total_steps, "must be at least 1; leave it out if it is not known")
        length = config.last_steps or (config.last_epochs * steps_per_epoch if steps_per_epoch else None)
        length = length or config.max_snapshots * (config.every_n_steps or 1)
        if total_steps is not None:
            length = min(length, total_steps)
        every = config.every_n_steps or ceil(length / config.max_snapshots)
        num_rows = min(config.max_snapshots, ceil(length / every))
        if total_steps is None:
            return cls(None, 1, every, num_rows)
        return cls(total_steps, total_steps - (num_rows - 1) * every, every, num_rows)

    def is_due(self, step: int) -> bool:
        """Whether ``step`` (1 after the first update) is recorded. The last step of a known length always is."""
        if self.total_steps is None:
            return step % self.every == 0
        return self.first <= step <= self.total_steps and (self.total_steps - step) % self.every == 0
