"""What a fit says of its result: fidelity, spread, novelty, coverage, and whether trajectories lie too far apart.

Shapes: N snapshots, M members, k width of a trajectory's own coordinates, K latent width.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin.config import FitConfig
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.fitting.distances import nearest_at_another_time, nearest_of_own_run, spread_about_means
from pdiff_plugin.generator.alignment import align
from pdiff_plugin.generator.autoencoder import Encoded
from pdiff_plugin.generator.condition import Condition
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.samplers import run_sampler
from pdiff_plugin.snapshots.files import json_safe
from pdiff_plugin.snapshots.movement import movement
from pdiff_plugin.snapshots.split import Split
from pdiff_plugin.snapshots.statistics import Statistics

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
# Of a figure that may be NaN or infinite, which JSON does not have.
_DIGITS = 6
_TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


@torch.no_grad()
def measure_generator(
    generator: WeightGenerator, encoded: Encoded, local: Tensor, split: Split, history: list[dict[str, float]]
) -> dict[str, Any]:
    """Measure the generator in the coordinates it works in, against the snapshots.

    ``copy_ratio`` is the median distance of a sample to its nearest training snapshot over that of held-out snapshots,
    whose neighbours in time are at the edge of their block; ``novelty`` the same over that of snapshots to their
    nearest one at another time. Far below 1, samples copy. ``diversity_curve`` gives both the spread and the novelty of
    samples of the natural sampler over a range of temperatures; ``diversity`` is turned into a temperature by it.
    """
    config, heldout = generator.config, split.heldout
    report: dict[str, Any] = {
        "fidelity": encoded.fidelity,
        "fidelity_is_ok": encoded.fidelity >= config.autoencoder.min_fidelity,
        "latent_dim": generator.autoencoder.latent_dim,
        "diffusion_steps": int(history[-1]["best_step"]) if history else 0,
        "heldout_loss": json_safe(history[-1]["best_loss"], _DIGITS) if history else None,
        # What a normal distribution per trajectory reaches: the network has to be below.
        "heldout_loss_gaussian": json_safe(history[0]["heldout_loss"], _DIGITS)
        if config.diffusion.precondition
        else None,
    }
    samples = _Samples(generator, local, split)
    curve = []
    for temperature in _TEMPERATURES if config.diffusion.precondition else (1.0,):
        samples.draw(temperature)
        curve.append({"temperature": temperature, "spread_ratio": samples.spread_ratio, "novelty": samples.novelty})
        if temperature == 1.0:
            report |= {
                "spread_ratio": samples.spread_ratio,
                "spread_ratio_per_direction": samples.spread_ratio_per_direction(),
                "nearest_distance_samples": float(samples.nearest.median()),
                "novelty": samples.novelty,
                "trajectory_coverage": samples.coverage(encoded.latents[~heldout]),
            }
    if bool(heldout.any()):
        own = nearest_of_own_run(local[heldout], split.trajectory[heldout], samples.local, samples.trajectory)
        report["nearest_distance_heldout"] = float(own.median())
        report["copy_ratio"] = report["nearest_distance_samples"] / max(float(own.median()), 1e-12)
    if len(generator.trajectories) > 1:
        report["trajectory_separation"] = _separation(encoded.latents[~heldout], samples.trajectory)
        _warn_of_trajectories(report, is_aligned=config.align != "none")
    report["diversity_curve"] = curve
    return report


class _Samples:
    """Samples in local coordinates beside the training snapshots.

    Attributes:
        local: training snapshots, (n, k).
        trajectory: the run of each, (n,).
        labels: the run of each sample, (M,).
        values: samples of one temperature, (M, k), of the same noise at every one.
        nearest: distance of each to the nearest training snapshot of its run, (M,).
    """

    def __init__(self, generator: WeightGenerator, local: Tensor, split: Split) -> None:
        self.generator = generator
        self.local, self.trajectory = local[~split.heldout], split.trajectory[~split.heldout]
        self.labels = torch.arange(_NUM_MEMBERS if generator.config.diffusion.precondition else _NUM_MEMBERS_PLAIN)
        self.labels = self.labels % len(generator.trajectories)
        self.spread = spread_about_means(self.local, self.trajectory)
        self.reference = float(nearest_at_another_time(local, split.trajectory).nanmedian())

    def draw(self, temperature: float) -> None:
        generator = self.generator
        rng = torch.Generator().manual_seed(generator.config.seed + 1)
        noise = torch.randn(len(self.labels), generator.frames.width, generator=rng, dtype=torch.float32)
        device = next(generator.denoiser.parameters()).device
        noise, condition = (temperature * noise).to(device), Condition(self.labels).to(device)
        self.values = run_sampler(generator.denoiser, noise, condition, generator.config.diffusion).cpu()
        self.nearest = nearest_of_own_run(self.values, self.labels, self.local, self.trajectory)

    @property
    def spread_ratio(self) -> float:
        """Spread of the samples over that of the snapshots."""
        return round(spread_about_means(self.values, self.labels) / max(self.spread, 1e-12), 4)

    @property
    def novelty(self) -> float | None:
        """Distance to the nearest snapshot over that of snapshots at another time; None without such."""
        if not self.reference > 0:
            return None
        novelty: float | None = json_safe(float(self.nearest.median()) / self.reference, _DIGITS)
        return novelty

    def spread_ratio_per_direction(self) -> list[float]:
        """The same along each of the first axes of the trajectories."""
        ratios = [
            spread_about_means(self.values[:, [axis]], self.labels)
            / max(spread_about_means(self.local[:, [axis]], self.trajectory), 1e-12)
            for axis in range(min(_NUM_AXES, self.local.shape[1]))
        ]
        return [round(ratio, 4) for ratio in ratios]

    def coverage(self, latents: Tensor) -> dict[str, float]:
        """Share of the samples whose nearest training snapshot of all, by its latents (n, K), is of each trajectory."""
        samples = self.generator.frames.to_latents(self.values, Condition(self.labels))
        nearest = torch.cdist(samples, latents).argmin(dim=1)
        owner = self.trajectory[nearest]
        names = self.generator.trajectories
        return {name: round(float((owner == number).double().mean()), 4) for number, name in enumerate(names)}


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


def suggest_alignment(split: Split, config: FitConfig) -> None:
    """Say that trajectories would lie closer together if they were aligned, where that is cheap to know and true."""
    store, rows = split.store, split.rows[split.train_rows]
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
