"""Distances and spread in the coordinates of trajectories: how novel samples are, and how far they reach.

Shapes: N snapshots, M samples, k width of a trajectory's own coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdiff_plugin.snapshots.split import BLOCK_SHARE


def nearest_at_another_time(local: Tensor, labels: Tensor) -> Tensor:
    """Distance of each snapshot to the nearest of its run that is not close in time, (N,); NaN where there is none.

    Close are those within a fifteenth of the run to either side: a snapshot all but equals the step before it.
    """
    out = torch.full((len(local),), float("nan"), dtype=local.dtype, device=local.device)
    for number in sorted(set(labels.tolist())):
        mine = (labels == number).nonzero().squeeze(1)
        places = torch.arange(len(mine), device=local.device)
        close = (places[:, None] - places).abs() <= round(BLOCK_SHARE * len(mine))
        distances = torch.cdist(local[mine], local[mine]).masked_fill(close, float("inf")).amin(dim=1)
        out[mine] = distances.masked_fill(distances.isinf(), float("nan"))
    return out


def nearest_of_own_run(samples: Tensor, sample_labels: Tensor, local: Tensor, labels: Tensor) -> Tensor:
    """Distance of each sample (M, k) to the nearest snapshot of the run it was made for, (M,)."""
    out = torch.empty(len(samples), dtype=samples.dtype, device=samples.device)
    for number in sorted(set(sample_labels.tolist())):
        mine = sample_labels == number
        out[mine] = torch.cdist(samples[mine], local[labels == number]).amin(dim=1)
    return out


def spread_about_means(local: Tensor, labels: Tensor) -> float:
    """Root mean square distance from the mean of the own trajectory, over all (N, k)."""
    squares = [
        (local[labels == number] - local[labels == number].mean(dim=0)).square().sum()
        for number in sorted(set(labels.tolist()))
    ]
    return float((torch.stack(squares).sum() / max(1, len(local))).sqrt())
