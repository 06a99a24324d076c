"""Which steps of a run are recorded."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from pdiff_plugin.config import RecorderConfig
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.snapshots.chunks import PlannedWindow

# A fit needs 10; until there are so many, a training that ends may have too few of its window alone.
ENOUGH_ROWS = 32
# Rows before a window that nobody gave a length, though an epoch be shorter: a tenth of a run leaves some to fit.
MIN_SPARSE_ROWS = 100


@dataclass(frozen=True)
class Window:
    """The steps to record: the end of a run of known length, or a ring of the newest rows.

    Should a run of known length never get to its end, there are sparse rows from before: of steps 1,
    1 + ``sparse_every``, 1 + 2 ``sparse_every``, ..., about as many as the window has. The newer half to three quarters
    are kept, and none once there are enough of the window.

    Attributes:
        total_steps: length of the run; None when it is not known.
        first: first step of the window; 1 for a ring.
        every: one step in this many is recorded.
        num_rows: rows at most. With an unknown length this is the length of the ring.
        num_enough: with so many rows of the window, those from before it are not needed any more.
        sparse_every: before the window, one step in this many is recorded; None for none.
        last: step of the last row, if training gets to its planned end; None when that is not known.
    """

    total_steps: int | None
    first: int
    every: int
    num_rows: int
    num_enough: int
    sparse_every: int | None = None
    last: int | None = None

    @classmethod
    def plan(cls, config: RecorderConfig, total_steps: int | None, steps_per_epoch: int | None) -> Window:
        """Lay the window at the end of the run: ``last_steps``, else ``last_epochs``, else ``max_snapshots`` steps.

        Without ``every_n_steps`` a longer window than ``max_snapshots`` is thinned out evenly. With it, the newest
        ``max_snapshots`` rows of the window are kept.

        Raises:
            ConfigError: a run of no steps.
        """
        planned_steps = total_steps
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
        # What was trained with everything else is not to be mixed with what was trained alone.
        num_enough = 1 if config.freeze_rest else min(num_rows, ENOUGH_ROWS)
        if total_steps is None:
            last = planned_steps - planned_steps % every if planned_steps else None
            return cls(None, 1, every, num_rows, num_enough, last=last or None)
        first = total_steps - (num_rows - 1) * every
        num_sparse = num_rows if config.last_steps else min(config.max_snapshots, max(num_rows, MIN_SPARSE_ROWS))
        sparse_every = max(every, ceil((first - 1) / num_sparse)) if config.keep_sparse else None
        return cls(total_steps, first, every, num_rows, num_enough, sparse_every, total_steps)

    @property
    def planned(self) -> PlannedWindow:
        """What is stored beside rows from before the window."""
        assert self.total_steps is not None
        return PlannedWindow(self.first, self.total_steps, self.num_enough)

    def is_due(self, step: int) -> bool:
        """Whether ``step`` (1 after the first update) is recorded. The last step of a known length always is."""
        if self.total_steps is None:
            return step % self.every == 0
        if step < self.first:
            return self.sparse_every is not None and (step - 1) % self.sparse_every == 0
        return step <= self.total_steps and (self.total_steps - step) % self.every == 0

    def is_before(self, step: int) -> bool:
        """Whether ``step`` may be recorded sparsely."""
        return self.sparse_every is not None and step < self.first

    def is_doubled(self, step: int) -> bool:
        """Whether there are twice as many sparse rows at ``step`` as when this was so before."""
        assert self.sparse_every is not None
        number, rest = divmod(step - 1, self.sparse_every)
        return rest == 0 and number & (number - 1) == 0

    def kept_from(self, step: int) -> int:
        """The oldest sparse row that is kept once there is that of ``step``.

        It is that of the last doubling of their number but one, in the window of the last: the older of the two
        references that the drift of the rest is measured from.
        """
        assert self.sparse_every is not None
        number = (min(step, self.first - 1) - 1) // self.sparse_every
        doubled = (1 << number.bit_length()) >> (2 if step < self.first else 1)
        return 1 + doubled * self.sparse_every
