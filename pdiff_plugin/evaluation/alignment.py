"""Whether a model is one whose hidden units may change places as ``align="rebasin"`` takes for granted."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from pdiff_plugin.errors import ConfigError
from pdiff_plugin.evaluation.kinds import KINDS
from pdiff_plugin.evaluation.rows import SnapshotRows, change_since_fit
from pdiff_plugin.evaluation.task import Data, Task, batches, evaluating
from pdiff_plugin.generator.alignment import Alignment, recognise
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.modules.batches import logits_of
from pdiff_plugin.modules.names import named_tensors
from pdiff_plugin.modules.swap import swapped
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.store import SnapshotStore

logger = logging.getLogger(__name__)

# Another order of summation moves logits by 1e-6 of their spread in float32 and 1e-2 in bfloat16; units that are not
# free to move change them altogether.
_TOLERANCE = 0.05


@torch.no_grad()
def check_alignment(task: Task, weights: Mapping[str, Tensor] | None = None) -> None:
    """Raise unless the model gives the same logits with its hidden units in another order.

    Names and shapes, which are all that a fit has, do not show every shortcut; the model's own outputs do.

    Args:
        task: a trained model and data, of which the first batch is used.
        weights: name -> tensor, to put into the model for this; all that it has unless given.

    Raises:
        ConfigError: the model is not a plain stack, by its names and shapes or by what it computes.
    """
    if weights is None:
        weights = {name: t.detach().cpu() for name, t in named_tensors(task.model).items() if t.is_floating_point()}
    layout = Layout.from_tensors(weights)
    num_units = [width for _, width in recognise(layout).layers]
    rng = torch.Generator().manual_seed(0)
    alignment = Alignment(layout, {"": torch.cat([torch.randperm(width, generator=rng) for width in num_units])})
    permuted = layout.unflatten(layout.flatten(weights)[alignment.columns("", 0, layout.num_values)])
    with evaluating(task) as model:
        data = Data(task.eval_loader, has_targets=False)
        args, kwargs, _ = next(batches(data, KINDS[task.kind], task.target_device()))
        with swapped(model, weights):
            before = logits_of(model(*args, **kwargs)).double()
        with swapped(model, permuted):
            after = logits_of(model(*args, **kwargs)).double()
    change = float((after - before).square().mean().sqrt() / before.std().clamp_min(1e-12))
    if not change < _TOLERANCE:
        raise ConfigError(
            "align",
            "rebasin",
            f"changes what this model computes, by {change:.2g} of the spread of its logits: it is no plain stack, "
            "though its names and shapes look like one (a shortcut?). Fit with align='none'",
        )


def aligned_rows(task: Task, store: SnapshotStore, generator: WeightGenerator | None, memory_gb: float) -> SnapshotRows:
    """Snapshots with their hidden units in the order in which ``generator`` makes them, if its fit aligned them.

    Warns where they are not those that it was fitted on.

    Raises:
        ConfigError: it did, although that changes what the model computes.
    """
    alignment = generator.alignment if generator is not None else None
    rows = SnapshotRows.measure(store, alignment, memory_gb=memory_gb)
    if generator is not None and (change := change_since_fit(rows, generator)):
        logger.warning("%s: %s", store.path, change)
    if alignment is not None and alignment.permutations:
        check_alignment(task, rows.members(torch.tensor([0])).member(0))
    return rows
