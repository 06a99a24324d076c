"""The first stage: which snapshots can be used, and what one pass over their columns tells.

Shapes: N snapshots in use, n of them for training, D values in a row.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin.config import FitConfig
from pdiff_plugin.errors import ConditionError, UnusableSnapshotsError
from pdiff_plugin.fitting.runtime import Runtime
from pdiff_plugin.generator.alignment import Alignment, align, reader
from pdiff_plugin.generator.state import check_finite, check_shapes
from pdiff_plugin.generator.variables import Variables
from pdiff_plugin.snapshots.conditions import matching
from pdiff_plugin.snapshots.split import Split
from pdiff_plugin.snapshots.statistics import Statistics, measure, without_nonfinite
from pdiff_plugin.snapshots.store import SnapshotStore

logger = logging.getLogger(__name__)

# Of two rows of float32: more than any have, and still a number when it is squared.
_MAX_PRODUCT = 1e100

MIN_SNAPSHOTS = 10
MAX_NONFINITE = 0.05
# With fewer different conditions there is nothing to learn from and to hold out: runs are only numbered.
MIN_CONDITIONS = 5


def part_to_fit(store: SnapshotStore, config: FitConfig) -> SnapshotStore:
    """The store without the runs that the fit is not to see.

    Raises:
        UnusableSnapshotsError: what is left has too few snapshots.
        ConditionError: a run or value to hold out that is not there, or a run without a condition among others.
    """
    hold_out = config.condition.hold_out
    if hold_out:
        known = {name: store.conditions.get(name, {}) for name in store.trajectories}
        held = matching(known, hold_out, "condition.hold_out")
        store = store.only([name for name in store.trajectories if name not in held])
    _check_num_snapshots(store)
    if variables_of(store, config) is None and store.conditions and config.condition.use:
        logger.warning(
            "fewer than %d different conditions say nothing of what lies between them: runs are only numbered",
            MIN_CONDITIONS,
        )
    return store


def variables_of(store: SnapshotStore, config: FitConfig) -> Variables | None:
    """What the conditions of all runs are made of; None where the fit makes nothing of them.

    Raises:
        ConditionError: some runs have none, or not all fit together.
        ConfigError: a kind that a name cannot be.
    """
    if not config.condition.use or not store.conditions:
        return None
    if bare := [name for name in store.trajectories if name not in store.conditions]:
        found = f"{len(bare)} of {len(store.trajectories)} runs without a condition, {bare[0]!r} first"
        raise ConditionError(str(store.path), found, "a condition for each (pdiff condition STORE --set), or none used")
    variables = Variables.infer([store.conditions[name] for name in store.trajectories], config.condition.kind_of)
    different = {str(store.conditions[name]) for name in store.trajectories}
    return variables if len(different) >= MIN_CONDITIONS else None


def _split(store: SnapshotStore, rows: Tensor, config: FitConfig) -> Split:
    return Split.choose(store, rows, config.heldout_fraction, is_pooled=variables_of(store, config) is not None)


def _check_num_snapshots(store: SnapshotStore) -> None:
    if len(store) < MIN_SNAPSHOTS:
        advice = "Record more steps (last_steps, max_snapshots) or another run into the same store."
        if store.problems:
            advice = f"{len(store.problems)} files could not be read. {advice}"
        expected = f"at least {MIN_SNAPSHOTS}"
        raise UnusableSnapshotsError(str(store.path), f"{len(store)} snapshots", expected, advice)


def measure_store(
    store: SnapshotStore, config: FitConfig, runtime: Runtime
) -> tuple[Split, Statistics, Alignment | None]:
    """The usable snapshots, one pass over their columns, and how they are aligned, if they are.

    Raises:
        UnusableSnapshotsError: there are too few of them, or they are all equal.
    """
    saved = runtime.load_checkpoint("statistics")
    if saved is not None:
        with runtime.restoring("statistics"):
            return _restored(store, config, *saved)
    split, statistics, alignment = without_nonfinite(
        len(store), lambda rows: _measure(store, rows, config, runtime), partial(_check_dropped, store)
    )
    _check_runs(split)
    if not statistics.gram.diagonal().sum() > 0:
        raise UnusableSnapshotsError(
            str(store.path),
            f"{len(split)} snapshots that are all equal",
            "weights that move",
            "Record while the chosen layers train, with a learning rate above 0.",
        )
    tensors = {"rows": split.rows, "gram": statistics.gram, "scales": statistics.scales}
    if alignment is not None:
        tensors |= alignment.state_dict()
    runtime.save_checkpoint("statistics", tensors, {"alignment": alignment.report if alignment else {}})
    return split, statistics, alignment


def _restored(
    store: SnapshotStore, config: FitConfig, tensors: dict[str, Tensor], state: dict[str, Any]
) -> tuple[Split, Statistics, Alignment | None]:
    found = Alignment.from_state(store.layout, tensors, state["alignment"]) if config.align != "none" else None
    check_shapes(tensors, {"rows": ("N",)}, (torch.int64,))
    check_shapes(tensors, {"gram": ("N", "N"), "scales": (len(store.layout.tensors),)}, (torch.float64,))
    check_finite(tensors, ("gram", "scales"))
    if tensors["gram"].numel() and float(tensors["gram"].abs().max()) > _MAX_PRODUCT:
        raise ValueError(f"products of rows above {_MAX_PRODUCT:.0e}")
    rows = tensors["rows"]
    if len(rows) != len(tensors["gram"]) or bool((rows.diff() <= 0).any()) or not 0 <= rows[0] <= rows[-1] < len(store):
        raise ValueError("rows that are not places in the store, in order")
    split = replace(_split(store, rows, config), reader=reader(store, found))
    _check_runs(split)
    return split, Statistics(tensors["gram"], tensors["scales"]), found


def _measure(
    store: SnapshotStore, rows: Tensor, config: FitConfig, runtime: Runtime
) -> tuple[Split, Statistics, Alignment | None]:
    """As :func:`measure_store`, of the snapshots at ``rows``; raises NonFiniteRowsError if some cannot be used."""
    split, alignment = _split(store, rows, config), None
    block_values = split.block_values(config.memory_gb)
    if config.align != "none":
        arguments = {"block_values": block_values, "seed": config.seed}
        alignment = runtime.on_rank_0(lambda: align(store, rows, ~split.heldout, **arguments))
        split = replace(split, reader=reader(store, alignment))
    columns = runtime.share(store.layout.num_values)
    statistics = measure(
        split.read,
        store.layout,
        block_values=block_values,
        train_rows=split.train_rows,
        columns=columns,
        all_reduce=runtime.all_reduce,
        on_columns=lambda done: runtime.report("statistics", done, columns.stop - columns.start),
    )
    return split, statistics, alignment


def names_of(store: SnapshotStore, rows: Tensor) -> list[str]:
    """``trajectory step S`` of the snapshots at ``rows``."""
    places = zip(store.trajectory_index[rows].tolist(), store.steps[rows].tolist(), strict=True)
    return [f"{store.trajectories[trajectory]} step {step}" for trajectory, step in places]


def nonfinite_names(split: Split) -> list[str]:
    """Names of the snapshots that hold NaN or Inf, in the order of the store: by trajectory and step."""
    is_used = torch.zeros(len(split.store), dtype=torch.bool).index_fill_(0, split.rows, True)
    return names_of(split.store, (~is_used).nonzero().squeeze(1))


def _check_dropped(store: SnapshotStore, kept: Tensor, lost: Tensor) -> None:
    """Say which snapshots were just left out; refuse the store if too many were."""
    named = ", ".join(names_of(store, lost[:5])) + (", ..." if len(lost) > 5 else "")
    num_lost = len(store) - len(kept)
    if num_lost > MAX_NONFINITE * len(store) or len(kept) < MIN_SNAPSHOTS:
        raise UnusableSnapshotsError(
            str(store.path),
            f"{num_lost} of {len(store)} snapshots with NaN or Inf ({named})",
            f"at most {MAX_NONFINITE:.0%}",
            "The recorded training diverged. Lower its learning rate and record again.",
        )
    logger.warning("%d snapshots hold NaN or Inf and are left out (%s)", len(lost), named)


def _check_runs(split: Split) -> None:
    """Refuse runs without a usable snapshot, and stores without a run that is long enough to show how weights move."""
    store = split.store
    found = torch.bincount(split.trajectory, minlength=len(store.trajectories))
    counts = dict(zip(store.trajectories, found.tolist(), strict=True))
    if lost := [name for name, count in counts.items() if count == 0]:
        raise UnusableSnapshotsError(
            str(store.path),
            f"no snapshot without NaN or Inf in {', '.join(lost)}",
            "some in every trajectory",
            "Delete the folders of these trajectories, and lower the learning rate of such runs.",
        )
    if split.is_pooled:
        return
    short = {name: count for name, count in counts.items() if count < MIN_SNAPSHOTS}
    if len(short) == len(counts):
        raise UnusableSnapshotsError(
            str(store.path),
            f"{len(counts)} trajectories of at most {max(counts.values())} snapshots",
            f"one of at least {MIN_SNAPSHOTS}",
            "Members are made from how weights move within a run. Record more steps of each.",
        )
    if short:
        logger.warning(
            "with fewer than %d snapshots each, these trajectories say little of how weights move: %s. Members made "
            "for them lie close to their snapshots.",
            MIN_SNAPSHOTS,
            ", ".join(f"{name} ({count})" for name, count in short.items()),
        )
