"""The kinds of task that can be judged, by the name in :attr:`pdiff_plugin.Task.kind`."""

from __future__ import annotations

from pdiff_plugin.evaluation.classification import CLASSIFICATION
from pdiff_plugin.evaluation.kind import TaskKind

KINDS: dict[str, TaskKind] = {kind.name: kind for kind in (CLASSIFICATION,)}
