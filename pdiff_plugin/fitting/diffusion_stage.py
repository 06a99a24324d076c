"""The diffusion stage: train the denoiser until it stops improving on held-out snapshots, or starts to copy.

Shapes: N snapshots, n of them for training, k width of a trajectory's own coordinates, B rows in a batch, R runs.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pdiff_plugin.config import DiffusionConfig, FitConfig, SamplingConfig
from pdiff_plugin.fitting.distances import nearest_at_another_time, nearest_of_own_run, spread_about_means
from pdiff_plugin.fitting.runtime import Runtime, pick_device
from pdiff_plugin.fitting.training import Schedule, Training, compiled, seeded
from pdiff_plugin.generator.condition import Condition
from pdiff_plugin.generator.denoiser import new_denoiser
from pdiff_plugin.generator.diffusion import NoisedBatch, loss, noised_batch
from pdiff_plugin.generator.frames import Frames
from pdiff_plugin.generator.samplers import run_sampler, sampler_for
from pdiff_plugin.snapshots.files import is_number
from pdiff_plugin.snapshots.split import Split

# Draws of noise and time per held-out snapshot: fixed ones, so that two measurements differ by the weights alone.
_EVAL_REPEATS = 32
# Samples drawn at each measurement, and the steps a preconditioned flow takes to them: a tenth of a second in all.
_EVAL_SAMPLES = 128
_EVAL_STEPS = 8
# Entries of the history that are no figure of the denoiser.
_OF_THE_TRAINING = ("step", "best_step", "best_loss", "seconds")


@dataclass(frozen=True)
class FittedDiffusion:
    """What the stage gives.

    Attributes:
        frames: the coordinates that the denoiser works in.
        denoiser: averaged, in eval mode.
        history: one entry per measurement.
    """

    frames: Frames
    denoiser: nn.Module
    history: list[dict[str, float]]

    def draw(self, num_rows: int, rng: torch.Generator) -> Condition:
        """Conditions to ask the denoiser for: all runs in turn."""
        del rng
        return Condition(torch.arange(num_rows) % self.frames.num_trajectories)


def train_diffusion(
    local: Tensor,
    split: Split,
    frames: Frames,
    config: FitConfig,
    runtime: Runtime,
    on_history: Callable[[list[dict[str, float]]], None],
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train on the snapshots that are not held out.

    Kept are the averaged weights of the lowest held-out loss among the measurements at which samples were still novel
    (``min_novelty``). Training stops when that has not improved for ``patience`` measurements. Without held-out
    snapshots, or without a measurement that was novel enough, the last weights that were novel count as best.

    Args:
        local: (N, k) float32, snapshots in the coordinates of their trajectory.
        split: the runs of these snapshots, and which are held out.
        frames: the coordinates.
        config: of the fit.
        runtime: checkpoints and progress.
        on_history: told the history after each measurement.

    Returns:
        The best averaged denoiser, in eval mode, and one entry per measurement: step, train_loss, heldout_loss,
        novelty, spread_ratio, best_step, best_loss, seconds.
    """
    device = pick_device(config.device)
    denoiser = seeded(lambda: new_denoiser(config, frames), config.seed).to(device)
    local, condition = local.to(device), Condition(split.trajectory).to(device)
    batches = Batches(local, condition, split.trajectory, split.train_rows, config)
    training = DenoiserTraining(denoiser, Judge(local, condition, split.heldout, config), config, runtime)
    training.run(batches, on_history)
    return training.chosen(), training.history


class Batches:
    """Draws training batches, in which all runs have equal shares.

    Args:
        local: (N, k), snapshots.
        condition: what each was made under.
        runs: the run of each, (N,).
        train_rows: (n,), those to train on.
        config: of the fit.
    """

    def __init__(
        self, local: Tensor, condition: Condition, runs: Tensor, train_rows: Tensor, config: FitConfig
    ) -> None:
        self.local, self.condition, self.train_rows, self.config = local, condition, train_rows, config.diffusion
        own = runs[train_rows]
        self.shares = 1.0 / torch.bincount(own)[own].double()

    def draw(self, rng: torch.Generator) -> tuple[NoisedBatch, Condition]:
        """A batch of noised snapshots, and the condition of each."""
        B, kind = self.config.batch_size, torch.float32
        rows = self.train_rows[torch.multinomial(self.shares, B, replacement=True, generator=rng)]
        rows = rows.to(self.local.device)
        noise = torch.randn(B, self.local.shape[1], generator=rng, dtype=kind).to(self.local)
        uniform = torch.rand(B, generator=rng, dtype=kind).to(self.local)
        return noised_batch(self.local[rows], noise, uniform, self.config), self.condition[rows]


class DenoiserTraining(Training):
    """The denoiser in training, the running average of its weights, and the best of these averages so far.

    Ranks draw the same batches and answer for a share of each.

    Args:
        denoiser: untrained, on the device to train on.
        judge: measures the average: a denoiser -> ``heldout_loss``, ``novelty``, and what else the history is to hold.
        config: of the fit.
        runtime: checkpoints, progress, and the other ranks.
        stage: name of the checkpoint and of the reports.
        stop_on: which of the measured figures is to fall.
    """

    counters = ("history", "step", "best_step", "best_loss", "seconds")

    def __init__(
        self,
        denoiser: nn.Module,
        judge: Callable[[nn.Module], dict[str, float]],
        config: FitConfig,
        runtime: Runtime,
        *,
        stage: str = "diffusion",
        stop_on: str = "heldout_loss",
    ) -> None:
        settings = config.diffusion
        self.average = copy.deepcopy(denoiser).requires_grad_(False).eval()
        self.best = copy.deepcopy(self.average)
        modules = {"denoiser": denoiser, "average": self.average, "best": self.best}
        schedule = Schedule(settings.max_steps, settings.lr, settings.lr_schedule, settings.weight_decay)
        super().__init__(stage, modules, schedule, config, runtime, config.seed)
        self.settings, self.judge, self.predict = settings, judge, compiled(denoiser, config)
        self.stop_on = stop_on
        self.averaged: list[Tensor] = list(self.average.parameters())
        # BatchNorm statistics are averages already.
        self.buffers, self.averaged_buffers = list(denoiser.buffers()), list(self.average.buffers())
        B = settings.batch_size
        self.own = runtime.share(B)
        self.weight = (self.own.stop - self.own.start) / B
        if any(isinstance(module, nn.BatchNorm1d) for module in denoiser.modules()):
            # Its statistics are those of the whole batch: every rank answers for all of it, and equals are averaged.
            self.own, self.weight = slice(0, B), 1.0 / runtime.world_size
        self.history: list[dict[str, float]] = []
        self.best_step, self.best_loss, self.seconds = 0, float("inf"), 0.0
        # The loss since the last measurement, summed on the device: reading it each step would stall a GPU.
        self.running = torch.zeros((), device=self.device, dtype=torch.float32)
        self.tensors = {"running": self.running}
        self.restore()
        if not self.history and settings.precondition:
            self.measure()  # before its first step the network already samples the normal distribution

    def run(self, batches: Batches, on_history: Callable[[list[dict[str, float]]], None]) -> None:
        """Train until nothing is gained any more; ``on_history`` is told the history after each measurement."""
        if self.history and self.step == 0:
            self.tell(on_history)
        with self.checkpointed() as steps:
            while self.goes_on:
                with steps.step():
                    self.train_on(*batches.draw(self.rng))
                    if self.is_measured:
                        self.measure()
                if self.is_measured:
                    self.tell(on_history)

    def tell(self, on_history: Callable[[list[dict[str, float]]], None]) -> None:
        """Report the last measurement."""
        now = {key: value for key, value in self.history[-1].items() if key not in _OF_THE_TRAINING}
        self.runtime.report(self.stage, self.step, self.settings.max_steps, **now)
        on_history(self.history)

    @property
    def seconds(self) -> float:
        """Time since the training began, over all attempts."""
        return self._seconds_before + time.perf_counter() - self._started

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._seconds_before, self._started = value, time.perf_counter()

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        if not (is_number(state["best_loss"]) and is_number(state["seconds"]) and is_number(state["best_step"])):
            raise ValueError("a best loss, a best step or seconds that are no number")
        for one in state["history"]:
            if not all(is_number(one[key]) for key in ("step", "train_loss", "heldout_loss", "novelty")):
                raise ValueError("a history of other things than figures")
        super()._restore(tensors, state)

    @property
    def goes_on(self) -> bool:
        patience = self.settings.patience * self.settings.eval_every_n_steps
        return self.step < self.settings.max_steps and self.step - self.best_step < patience

    @property
    def is_measured(self) -> bool:
        """Whether this step is one after which the average is measured."""
        return self.step % self.settings.eval_every_n_steps == 0 or self.step == self.settings.max_steps

    def train_on(self, batch: NoisedBatch, condition: Condition) -> None:
        """One step on a batch and what its rows were made under."""
        # Every rank has drawn the whole batch and answers for its share of it: the sum is the batch's own gradient.
        own = NoisedBatch(batch.inputs[self.own], batch.times[self.own], batch.targets[self.own])
        predict = partial(self.predict, condition=condition[self.own])
        self.running += self.advance(lambda: self.weight * loss(predict, own))
        # The average forgets its start quickly: decay 0.1 at step 1, the configured one after some hundred.
        decay = min(self.settings.ema_decay, self.step / (self.step + 9.0))
        torch._foreach_lerp_(self.averaged, self.parameters, 1.0 - decay)

    def add_up(self, value: Tensor) -> Tensor:
        return self.runtime.sum_gradients(self.parameters, value)

    def measure(self) -> None:
        """Judge the average, keep it if it is the best, and add to the history."""
        if self.buffers:
            torch._foreach_copy_(self.averaged_buffers, self.buffers)
        # Rank 0's figures: ranks that disagree in a last digit would stop at different steps.
        found = self.runtime.on_rank_0(lambda: self.judge(self.average))
        least = least_novelty(self.settings.min_novelty, self.history, self.settings.precondition)
        # NaN, of what is not measured, decides nothing.
        value = found[self.stop_on]
        if not found["novelty"] < least and not value >= self.best_loss:
            self.best_step = self.step
            # Without held-out snapshots every later measurement counts as better.
            self.best_loss = float("inf") if math.isnan(value) else value
            self.best.load_state_dict(self.average.state_dict())
        steps_taken = self.step - int(self.history[-1]["step"] if self.history else 0)
        self.history.append(
            {
                "step": self.step,
                "train_loss": float(self.running) / steps_taken if steps_taken else float("nan"),
                **found,
                "best_step": self.best_step,
                "best_loss": self.best_loss,
                "seconds": round(self.seconds, 3),
            }
        )
        self.running.zero_()

    def chosen(self) -> nn.Module:
        """The best average; the last one where nothing was novel enough, as untrained weights are no generator."""
        if self.best_step == 0 and not self.settings.precondition:
            self.best.load_state_dict(self.average.state_dict())
        return self.best


def least_novelty(min_novelty: float, history: list[dict[str, float]], precondition: bool) -> float:
    """Novelty that weights must keep to count as best.

    Where even normal samples lie close to snapshots (few directions, many snapshots) they set the measure.
    """
    if not precondition or not history or math.isnan(history[0]["novelty"]):
        return min_novelty
    return min_novelty * min(1.0, history[0]["novelty"])


def evenly_noised(x0: Tensor, process: DiffusionConfig, rng: torch.Generator) -> NoisedBatch:
    """Clean coordinates (B, k) at times spread evenly over [0, 1) and shuffled over the rows."""
    noise = torch.randn(x0.shape, generator=rng, dtype=torch.float32).to(x0)
    uniform = (torch.arange(len(x0), dtype=torch.float32) + 0.5) / len(x0)
    uniform = uniform[torch.randperm(len(x0), generator=rng)].to(x0)
    return noised_batch(x0, noise, uniform, process)


def sampled_briefly(denoiser: nn.Module, noise: Tensor, condition: Condition, process: DiffusionConfig) -> Tensor:
    """Samples of the noise (B, k): a preconditioned flow's in a few steps, others' in their usual number."""
    is_quick = sampler_for(process).needs == "preconditioned denoiser"
    sampling = SamplingConfig(num_sampling_steps=_EVAL_STEPS if is_quick else None)
    return run_sampler(denoiser, noise, condition, process, sampling)


class Judge:
    """Measures a denoiser with noise and times that are fixed once.

    Called with a denoiser it returns ``heldout_loss`` (NaN without held-out snapshots), ``novelty`` (median distance of
    samples to their nearest snapshot over the same of snapshots, see :func:`nearest_at_another_time`; NaN if neither
    the setting nor the snapshots ask for it) and ``spread_ratio`` (of samples to training snapshots).

    Args:
        local: (N, k) on the device of the denoiser.
        condition: of the N rows.
        heldout: (N,) bool.
        config: of the fit.
    """

    def __init__(self, local: Tensor, condition: Condition, heldout: Tensor, config: FitConfig) -> None:
        self.has_heldout = bool(heldout.any())
        labels = condition.trajectory
        self.config, self.local, self.labels = config, local, labels
        rng, kind = torch.Generator().manual_seed(config.seed + 2), torch.float32
        heldout = heldout.to(local.device)
        if self.has_heldout:
            self.batch = evenly_noised(local[heldout].repeat(_EVAL_REPEATS, 1), config.diffusion, rng)
            self.batch_condition = condition[heldout].repeat(_EVAL_REPEATS)
        self.reference = float(nearest_at_another_time(local, labels).nanmedian())
        runs = torch.tensor(sorted(set(labels.tolist())), device=local.device)
        self.sample_labels = runs[torch.arange(_EVAL_SAMPLES, device=local.device) % len(runs)]
        self.noise = torch.randn(_EVAL_SAMPLES, local.shape[1], generator=rng, dtype=kind).to(local)
        self.spread = spread_about_means(local[~heldout], labels[~heldout])

    @torch.no_grad()
    def __call__(self, denoiser: nn.Module) -> dict[str, float]:
        found = {"heldout_loss": float("nan"), "novelty": float("nan"), "spread_ratio": float("nan")}
        if self.has_heldout:
            found["heldout_loss"] = float(loss(lambda x, t: denoiser(x, t, self.batch_condition), self.batch))
        if self.config.diffusion.min_novelty > 0:
            samples = sampled_briefly(denoiser, self.noise, Condition(self.sample_labels), self.config.diffusion)
            found["spread_ratio"] = spread_about_means(samples, self.sample_labels) / max(self.spread, 1e-12)
            if self.reference > 0:  # false for NaN too: a trajectory may be too short for a reference
                nearest = nearest_of_own_run(samples, self.sample_labels, self.local, self.labels)
                found["novelty"] = float(nearest.median()) / self.reference
        return found
