"""The kinds of task that can be judged, by the name in :attr:`pdiff_plugin.Task.kind`."""

from __future__ import annotations

from pdiff_plugin.evaluation.classification import CLASSIFICATION
from pdiff_plugin.evaluation.custom import Combine, Loss, custom
from pdiff_plugin.evaluation.kind import TaskKind
from pdiff_plugin.evaluation.multilabel import MULTILABEL
from pdiff_plugin.evaluation.positions import IGNORED, dense, language, tokens
from pdiff_plugin.evaluation.regression import GAUSSIAN_REGRESSION, REGRESSION

_OF_POSITIONS = {"dense": dense, "tokens": tokens, "language": language}

KINDS: dict[str, TaskKind] = {
    kind.name: kind
    for kind in (
        CLASSIFICATION,
        MULTILABEL,
        *(make() for make in _OF_POSITIONS.values()),
        REGRESSION,
        GAUSSIAN_REGRESSION,
        custom(),
    )
}


def kind_for(name: str, loss: Loss | None, combine: Combine | None, ignore_index: int) -> TaskKind:
    """The kind of that name, with what a task may change of it."""
    if loss is not None:
        return custom(loss, combine)
    if ignore_index != IGNORED and name in _OF_POSITIONS:
        return _OF_POSITIONS[name](ignore_index)
    return KINDS[name]


__all__ = ["IGNORED", "KINDS", "kind_for"]
