"""The diffusion stage of a store with conditions: weights as a function of the setting that runs were recorded at.

Some conditions are held out. What is expected at a condition (the centre) is fitted on the others, a diffusion learns
what is left about it, and one without a centre learns all: whichever predicts the held-out conditions best is then
trained on all of them, for as many steps as were best.

Errors are those of latents, in which a direction counts by the variance between conditions along it (``leading``).

Shapes: N snapshots, R different conditions, H of them held out, F features, K latent width, M samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pdiff_plugin.config import FitConfig
from pdiff_plugin.fitting.centre_stage import ALL_KINDS, fit_centre, leading, spread_choice
from pdiff_plugin.fitting.diffusion_stage import Batches, DenoiserTraining, evenly_noised, sampled_briefly
from pdiff_plugin.fitting.runtime import Runtime, pick_device
from pdiff_plugin.fitting.training import seeded
from pdiff_plugin.generator.centres import Centre
from pdiff_plugin.generator.condition import Condition
from pdiff_plugin.generator.condition_frames import ConditionFrames, condition_frames
from pdiff_plugin.generator.denoiser import new_denoiser
from pdiff_plugin.generator.diffusion import loss

# Snapshots and samples at held-out conditions by which a denoiser is measured.
_EVAL_ROWS = 512
_LEAST_SAMPLES, _MOST_SAMPLES = 4, 16
_NUM_NEIGHBOURS = 3
# Choices are made by this many held-out conditions, in several trainings where a fifth of them is less.
_MIN_HELDOUT = 8
_MAX_FOLDS = 4
# Of a diffusion that learns all: too few steps cost far more than too many, and the gaps that held-out conditions leave
# are twice as wide as those that members are then made for, so that they ask for fewer.
_LEAST_STEPS = 500

History = list[dict[str, float]]


@dataclass(frozen=True)
class Cloud:
    """The snapshots in latents, with their conditions.

    Attributes:
        latents: (N, K) float32.
        run: of each snapshot, (N,).
        features: of the R different conditions, (R, F).
        place: of each snapshot's condition among them, (N,).
    """

    latents: Tensor
    run: Tensor
    features: Tensor
    place: Tensor

    @classmethod
    def of(cls, latents: Tensor, run: Tensor, features: Tensor) -> Cloud:
        """From latents (N, K), the run of each, (N,), and the features of the runs' conditions."""
        different, place = torch.unique(features, dim=0, return_inverse=True)
        return cls(latents, run, different, place[run])

    @property
    def means(self) -> Tensor:
        """Mean latents at each condition, (R, K)."""
        member = nn.functional.one_hot(self.place, len(self.features)).double()
        return ((member / member.sum(dim=0)).T @ self.latents.double()).float()

    @property
    def condition(self) -> Condition:
        """Of each snapshot."""
        return Condition.of(self.features[self.place])

    def only(self, conditions: Tensor) -> Cloud:
        """The snapshots at some of the conditions, (R,) bool."""
        rows, numbers = conditions[self.place], conditions.long().cumsum(0) - 1
        return Cloud(self.latents[rows], self.run[rows], self.features[conditions], numbers[self.place[rows]])


class Errors:
    """Squared errors at held-out conditions, as a share of those of the average of the others."""

    def __init__(self, train: Cloud, heldout: Cloud) -> None:
        self.expected, self.counts = heldout.means, leading(train.means)
        self.scale = 1.0
        self.scale = max(self(train.means.mean(dim=0)), 1e-30)

    def __call__(self, found: Tensor) -> float:
        """Of latents that broadcast to (H, K), or of M samples of each, (M, H, K)."""
        squares = (found.double() - self.expected.double()).square() * self.counts
        return float(squares.sum(dim=-1).mean()) / self.scale


@dataclass(frozen=True)
class FittedCondition:
    """What the stage gives.

    Attributes:
        frames: the coordinates that the denoiser works in.
        denoiser: averaged, in eval mode.
        history: one entry per measurement; without held-out conditions in the last training, losses alone.
        report: what was found on the way, by name.
    """

    frames: ConditionFrames
    denoiser: nn.Module
    history: History
    report: dict[str, Any]

    def draw(self, num_rows: int, rng: torch.Generator) -> Condition:
        """Conditions to ask the denoiser for: recorded ones, and places between one and a neighbour."""
        features = self.frames.centre.features
        near = torch.cdist(features, features).argsort(dim=1)[:, 1 : 1 + _NUM_NEIGHBOURS]  # (R, up to 3)
        first = torch.randint(len(features), (num_rows,), generator=rng)
        second = near[first, torch.randint(near.shape[1], (num_rows,), generator=rng)]
        share = torch.rand(num_rows, 1, generator=rng).mul_(2.0).sub_(1.0).clamp_min_(0.0)  # half of them zero
        return Condition.of(torch.lerp(features[first], features[second], share))


def train_condition_diffusion(
    cloud: Cloud, config: FitConfig, runtime: Runtime, on_history: Callable[[History], None]
) -> FittedCondition:
    """Choose the centre at held-out conditions, and train on all.

    Args:
        cloud: the snapshots.
        config: of the fit.
        runtime: checkpoints and progress.
        on_history: told the history of each training after each measurement.
    """
    kind, num_steps, report = _choose(cloud, config, runtime, on_history)
    centre = runtime.on_rank_0(lambda: fit_centre(kind, cloud.features, cloud.means, config.seed))
    frames = condition_frames(centre, cloud.latents, cloud.features[cloud.place])
    denoiser, history = _train(frames, cloud, None, config, runtime, "diffusion", on_history, num_steps)
    report |= {"centre": kind, "centre_settings": dict(centre.settings), "diffusion_steps": int(history[-1]["step"])}
    return FittedCondition(frames, denoiser, history, report)


def _choose(
    cloud: Cloud, config: FitConfig, runtime: Runtime, on_history: Callable[[History], None]
) -> tuple[str, int | None, dict[str, Any]]:
    """Kind of centre and number of steps (None: all) that do best at held-out conditions, and what was found."""
    wanted, folds = config.condition.centre, _folds(cloud, config)
    report: dict[str, Any] = {"num_conditions": len(cloud.features)}
    if not folds:
        return "mean" if wanted == "auto" else wanted, None, report
    fitted = runtime.on_rank_0(lambda: [_fit_centres(fold, config) for fold in folds])
    by_kind = {kind: [centres[kind] for centres in fitted] for kind in ALL_KINDS}
    alone = {
        kind: _mean(fold.error(centre(fold.heldout.features)) for fold, centre in zip(folds, centres, strict=True))
        for kind, centres in by_kind.items()
    }
    tried = {
        kind: _try(by_kind[kind], folds, config, runtime, on_history) for kind in _kinds_to_try(wanted, alone, config)
    }
    kind = min(tried, key=lambda kind: tried[kind][0])
    error, num_steps = tried[kind]
    if kind == "mean":
        num_steps = max(num_steps, min(_LEAST_STEPS, config.diffusion.max_steps))
    report |= {
        "num_heldout": sum(len(fold.heldout.features) for fold in folds),
        "heldout_error": error,
        "centre_errors": alone,
        "diffusion_errors": {kind: error for kind, (error, _) in tried.items()},
    }
    return kind, num_steps, report


@dataclass(frozen=True)
class Fold:
    """Conditions to train on and others to judge by."""

    train: Cloud
    heldout: Cloud
    error: Errors


def _folds(cloud: Cloud, config: FitConfig) -> list[Fold]:
    """Random choices of the conditions to hold out; several where one would hold too few to choose by."""
    fraction, seed = config.condition.heldout_fraction, config.seed
    count = int(spread_choice(cloud.features, fraction, seed).sum()) if fraction > 0 else 0
    num_folds = min(_MAX_FOLDS, math.ceil(_MIN_HELDOUT / count)) if count else 0
    folds = []
    for number in range(num_folds):
        held = spread_choice(cloud.features, fraction, seed + number)
        train, heldout = cloud.only(~held), cloud.only(held)
        folds.append(Fold(train, heldout, Errors(train, heldout)))
    return folds


def _kinds_to_try(wanted: str, errors: dict[str, float], config: FitConfig) -> Sequence[str]:
    """Centres about which a diffusion is trained: none at all, and the best."""
    if wanted != "auto":
        return [wanted]
    if not config.diffusion.precondition:
        return ["mean"]  # what is left about a good centre has spreads of all sizes
    best = min(errors, key=lambda kind: errors[kind])
    return ["mean"] if best == "mean" else ["mean", best]


def _fit_centres(fold: Fold, config: FitConfig) -> dict[str, Centre]:
    return {kind: fit_centre(kind, fold.train.features, fold.train.means, config.seed) for kind in ALL_KINDS}


def _try(
    centres: Sequence[Centre],
    folds: Sequence[Fold],
    config: FitConfig,
    runtime: Runtime,
    on_history: Callable[[History], None],
) -> tuple[float, int]:
    """Train about a centre without the held-out conditions: the error there, and the step at which it was least."""
    best = []
    for number, (centre, fold) in enumerate(zip(centres, folds, strict=True)):
        frames = condition_frames(centre, fold.train.latents, fold.train.features[fold.train.place])
        stage = f"diffusion-{centre.kind}" + (f"-{number + 1}" if len(folds) > 1 else "")
        _, history = _train(frames, fold.train, fold, config, runtime, stage, on_history)
        best.append(next(entry for entry in history if entry["step"] == history[-1]["best_step"]))
    return _mean(entry["heldout_error"] for entry in best), round(_mean(entry["step"] for entry in best))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _train(
    frames: ConditionFrames,
    train: Cloud,
    fold: Fold | None,
    config: FitConfig,
    runtime: Runtime,
    stage: str,
    on_history: Callable[[History], None],
    num_steps: int | None = None,
) -> tuple[nn.Module, History]:
    if num_steps is not None:
        diffusion = replace(config.diffusion, max_steps=max(1, num_steps), patience=10**9)
        config = replace(config, diffusion=diffusion)
    device = pick_device(config.device)
    denoiser = seeded(lambda: new_denoiser(config, frames), config.seed).to(device)
    local = frames.to_local(train.latents, train.condition).to(device)
    batches = Batches(local, train.condition.to(device), train.run, torch.arange(len(local)), config)
    judge = ConditionJudge(frames, fold, config, device)
    training = DenoiserTraining(denoiser, judge, config, runtime, stage=stage, stop_on="heldout_error")
    training.run(batches, on_history)
    return training.chosen(), training.history


class ConditionJudge:
    """Measures a denoiser at held-out conditions, with noise and times that are fixed once.

    Called with a denoiser it returns ``heldout_loss`` (of the diffusion), ``heldout_error`` (of single samples against
    the mean of the snapshots), ``heldout_error_of_mean`` (of the mean of samples), and NaN for ``novelty``, which means
    nothing where nothing was recorded. Without held-out conditions all are NaN.

    Training stops on the error of single samples. The mean of samples is best earlier, while they are still spread so
    widely that each by itself is a bad model.
    """

    def __init__(self, frames: ConditionFrames, fold: Fold | None, config: FitConfig, device: torch.device) -> None:
        self.frames, self.fold, self.process = frames, fold, config.diffusion
        if fold is None:
            return
        heldout = fold.heldout
        rng = torch.Generator().manual_seed(config.seed + 2)
        rows = torch.linspace(0, len(heldout.latents) - 1, _EVAL_ROWS).round().long()  # some several times, or not all
        x0 = frames.to_local(heldout.latents, heldout.condition)[rows].to(device)
        self.batch = evenly_noised(x0, config.diffusion, rng)
        self.batch_condition = heldout.condition[rows].to(device)
        self.num_samples = max(_LEAST_SAMPLES, min(_MOST_SAMPLES, _EVAL_ROWS // len(heldout.features)))
        self.condition = Condition.of(heldout.features.repeat(self.num_samples, 1))
        shape = (len(self.condition), frames.width)
        self.noise = torch.randn(shape, generator=rng, dtype=torch.float32).to(device)

    @torch.no_grad()
    def __call__(self, denoiser: nn.Module) -> dict[str, float]:
        nan = float("nan")
        if self.fold is None:
            return dict.fromkeys(("heldout_loss", "heldout_error", "heldout_error_of_mean", "novelty"), nan)
        value = float(loss(lambda x, t: denoiser(x, t, self.batch_condition), self.batch))
        samples = sampled_briefly(denoiser, self.noise, self.condition.to(self.noise.device), self.process).cpu()
        found = self.frames.to_latents(samples, self.condition).view(
            self.num_samples, len(self.fold.heldout.features), -1
        )
        return {
            "heldout_loss": value,
            "heldout_error": self.fold.error(found),
            "heldout_error_of_mean": self.fold.error(found.mean(dim=0)),
            "novelty": nan,
        }
