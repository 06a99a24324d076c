"""What a fit says of its result: fidelity, spread, novelty, coverage, and whether trajectories lie too far apart.

Shapes: N snapshots, M members, k width of a trajectory's own coordinates, K latent width.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin.config import FitConfig
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.fitting.diffusion_stage import nearest_at_another_time, nearest_of_own_run, spread_about_means
from pdiff_plugin.generator.alignment import align
from pdiff_plugin.generator.autoencoder import Encoded
from pdiff_plugin.generator.generator import WeightGenerator, walk
from pdiff_plugin.snapshots.movement import movement
from pdiff_plugin.snapshots.statistics import Statistics
from pdiff_plugin.snapshots.store import SnapshotStore

logger = logging.getLogger(__name__)

_NUM_MEMBERS = 256
_NUM_MEMBERS_PLAIN = 64
_NUM_AXES = 16
# Two clouds whose centres are this many spreads apart do not touch.
FAR_APART = 3.0
# Aligning is recommended where it brings trajectories this much closer: 1.05 for networks with random weights, 1.26 for
# three runs of a CIFAR-10 MLP, whose pooled averages it lifts from 20 to 38 %. It is tried in stores up to this many
# values, for a second or two.
_WORTH_ALIGNING = 1.2
_MAX_TRIED_VALUES = 10**8
_TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


@torch.no_grad()
def measure_generator(
    generator: WeightGenerator,
    subspace: Encoded,
    local: Tensor,
    trajectory: Tensor,
    heldout: Tensor,
    history: list[dict[str, float]],
) -> dict[str, Any]:
    """Measure the generator in the coordinates it works in, against the snapshots.

    ``copy_ratio`` is the median distance of a sample to its nearest training snapshot over that of held-out snapshots,
    whose neighbours in time are at the edge of their block; ``novelty`` the same over that of snapshots to their
    nearest one at another time. Far below 1, samples copy. ``diversity_curve`` gives both the spread and the novelty of
    samples of the natural sampler over a range of temperatures; ``diversity`` is turned into a temperature by it.
    """
    config, train = generator.config, ~heldout
    report: dict[str, Any] = {
        "fidelity": subspace.fidelity,
        "fidelity_is_ok": subspace.fidelity >= config.autoencoder.min_fidelity,
        "latent_dim": generator.autoencoder.latent_dim,
        "diffusion_steps": int(history[-1]["best_step"]) if history else 0,
        "heldout_loss": finite_or_none(history[-1]["best_loss"]) if history else None,
        # What a normal distribution per trajectory reaches: the network has to be below.
        "heldout_loss_gaussian": finite_or_none(history[0]["heldout_loss"]) if config.diffusion.precondition else None,
    }
    num_members = _NUM_MEMBERS if config.diffusion.precondition else _NUM_MEMBERS_PLAIN
    labels = torch.arange(num_members) % len(generator.trajectories)
    reference = float(nearest_at_another_time(local, trajectory).nanmedian())
    spread = spread_about_means(local[train], trajectory[train])
    temperatures = _TEMPERATURES if config.diffusion.precondition else (1.0,)
    curve = []
    for temperature in temperatures:
        samples = _samples(generator, labels, temperature)
        nearest = nearest_of_own_run(samples, labels, local[train], trajectory[train])
        curve.append(
            {
                "temperature": temperature,
                "spread_ratio": round(spread_about_means(samples, labels) / max(spread, 1e-12), 4),
                "novelty": finite_or_none(float(nearest.median()) / reference) if reference > 0 else None,
            }
        )
        if temperature == 1.0:
            report |= {
                "spread_ratio": curve[-1]["spread_ratio"],
                "spread_ratio_per_direction": _spread_per_direction(samples, labels, local[train], trajectory[train]),
                "nearest_distance_samples": float(nearest.median()),
                "novelty": curve[-1]["novelty"],
                "trajectory_coverage": _coverage(generator, subspace, samples, labels, trajectory, train),
            }
    if bool(heldout.any()):
        own = nearest_of_own_run(local[heldout], trajectory[heldout], local[train], trajectory[train])
        report["nearest_distance_heldout"] = float(own.median())
        report["copy_ratio"] = report["nearest_distance_samples"] / max(float(own.median()), 1e-12)
    if len(generator.trajectories) > 1:
        report["trajectory_separation"] = _separation(subspace.latents[train], trajectory[train])
        _warn_of_trajectories(report, is_aligned=config.align != "none")
    report["diversity_curve"] = curve
    return report


def _separation(latents: Tensor, trajectory: Tensor) -> float:
    """Median distance between the means of two trajectories over the spread of snapshots about their own mean."""
    means = torch.stack([latents[trajectory == run].mean(dim=0) for run in sorted(set(trajectory.tolist()))])
    between = torch.nn.functional.pdist(means.double()).median()
    return round(float(between) / max(spread_about_means(latents, trajectory), 1e-12), 3)


def _warn_of_trajectories(report: dict[str, Any], *, is_aligned: bool) -> None:
    coverage = report["trajectory_coverage"]
    if report["trajectory_separation"] > FAR_APART:
        logger.warning(
            "the %d trajectories lie far apart (%.1f times the spread within one): members are made for each by "
            "itself. An average or a Gaussian across them would be %s; compare with those taken per run.",
            len(coverage),
            report["trajectory_separation"],
            "of different models" if is_aligned else "no model",
        )
    missed = [name for name, share in coverage.items() if not 0.5 <= share * len(coverage) <= 2.0]
    if missed:
        logger.warning(
            "samples cover some trajectories less than half or more than twice as often as asked (%s): those runs "
            "overlap with others.",
            ", ".join(missed),
        )


def _samples(generator: WeightGenerator, labels: Tensor, temperature: float) -> Tensor:
    """Samples in local coordinates, on the CPU, the same noise at every temperature."""
    rng = torch.Generator().manual_seed(generator.config.seed + 1)
    noise = temperature * torch.randn(len(labels), generator.frames.width, generator=rng)
    device = next(generator.denoiser.parameters()).device
    return walk(generator.denoiser, noise.to(device), labels.to(device), generator.config).cpu()


def _spread_per_direction(samples: Tensor, labels: Tensor, local: Tensor, trajectory: Tensor) -> list[float]:
    """Spread of samples over that of snapshots along the first axes of the trajectories."""
    ratios = [
        spread_about_means(samples[:, [axis]], labels) / max(spread_about_means(local[:, [axis]], trajectory), 1e-12)
        for axis in range(min(_NUM_AXES, local.shape[1]))
    ]
    return [round(ratio, 4) for ratio in ratios]


def _coverage(
    generator: WeightGenerator, subspace: Encoded, samples: Tensor, labels: Tensor, trajectory: Tensor, train: Tensor
) -> dict[str, float]:
    """Share of the samples whose nearest snapshot of all is of each trajectory."""
    nearest = torch.cdist(generator.frames.to_latents(samples, labels), subspace.latents[train]).argmin(dim=1)
    owner = trajectory[train][nearest]
    return {
        name: round(float((owner == number).double().mean()), 4) for number, name in enumerate(generator.trajectories)
    }


def movement_report(statistics: Statistics, trajectory: Tensor) -> dict[str, Any]:
    """How snapshots move within their runs, with a warning where they hardly differ.

    Args:
        statistics: of the snapshots, those held out among them.
        trajectory: the run of each, (N,).
    """
    found = movement(statistics.gram, trajectory)
    if found is None:
        return {}
    if found.warning:
        logger.warning(found.warning)
    return {"movement": found.to_json()}


def suggest_alignment(store: SnapshotStore, config: FitConfig, rows: Tensor) -> None:
    """Say that trajectories would lie closer together if they were aligned, where that is cheap to know and true."""
    if len(rows) * store.layout.num_values > _MAX_TRIED_VALUES:
        return
    try:
        found = align(store, rows, torch.ones(len(rows), dtype=torch.bool), block_values=16384, seed=config.seed).report
    except ConfigError:
        return
    gain = found["separation_before"] / max(found["separation_after"], 1e-12)
    if gain >= _WORTH_ALIGNING:
        logger.warning(
            "with their hidden units matched (--align rebasin) the trajectories would lie %.1f times closer together, "
            "if this network is a plain stack without shortcuts, as it seems.",
            gain,
        )


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return round(value, 6) if math.isfinite(value) else None
