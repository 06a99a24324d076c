"""The accuracy-diversity curve of a generator: what is given up for members that differ more."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from pdiff_plugin.evaluation.baselines import rng_for
from pdiff_plugin.evaluation.evaluate import evaluate
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.progress import OnProgress, Progress
from pdiff_plugin.snapshots.store import SnapshotStore

DIVERSITIES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def sweep(
    task: Task,
    store: SnapshotStore | str | os.PathLike[str],
    generator: WeightGenerator,
    *,
    diversities: Sequence[float] = DIVERSITIES,
    num_members: int = 32,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> list[dict[str, Any]]:
    """Judge one set of members per value of the ``diversity`` setting, all from the same noise.

    Args:
        task: the model and held-out data.
        store: the snapshots that distances are measured to.
        generator: makes the members.
        diversities: values in (0, 2].
        num_members: of each set.
        seed: of the noise.
        on_progress: told how many sets are done.

    Returns:
        The figures of :meth:`Evaluation.to_json` for each set, with its ``diversity``.
    """
    store = store if isinstance(store, SnapshotStore) else SnapshotStore.open(store)
    curve = []
    for number, diversity in enumerate(diversities, start=1):
        weights = generator.sample(num_members, diversity=diversity, rng=rng_for(seed, "generated"))
        result = evaluate(task, store, weights=weights, num_members=num_members, seed=seed, sets=["generated"])
        curve.append({"diversity": diversity, **result.sets["generated"]})
        if on_progress is not None:
            on_progress(Progress("sweep", number, len(diversities)))
    return curve
