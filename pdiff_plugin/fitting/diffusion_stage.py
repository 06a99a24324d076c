"""The diffusion stage: train the denoiser until it stops improving on held-out snapshots, or starts to copy.

Shapes: N snapshots, n of them for training, k width of a trajectory's own coordinates, B rows in a batch, R runs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pdiff_plugin.config import FitConfig, SamplingConfig
from pdiff_plugin.fitting.runtime import Runtime
from pdiff_plugin.fitting.training import (
    autocast,
    checkpointed,
    compiled,
    flat_optimizer,
    lr_factor,
    restore_optimizer,
    set_lr,
    strip,
)
from pdiff_plugin.generator.condition import Condition
from pdiff_plugin.generator.denoiser import new_denoiser
from pdiff_plugin.generator.diffusion import NoisedBatch, loss, noised_batch
from pdiff_plugin.generator.frames import Frames
from pdiff_plugin.generator.samplers import run_sampler, sampler_for

# Draws of noise and time per held-out snapshot: fixed ones, so that two measurements differ by the weights alone.
_EVAL_REPEATS = 32
# Samples drawn at each measurement, and the steps a preconditioned flow takes to them: a tenth of a second in all.
_EVAL_SAMPLES = 128
_EVAL_STEPS = 8
# Share of a trajectory, to each side of a snapshot, that is too close in time to be a reference for it: +-20 of 300.
BLOCK_SHARE = 1 / 15


def train_diffusion(
    local: Tensor,
    trajectory: Tensor,
    heldout: Tensor,
    *,
    frames: Frames,
    config: FitConfig,
    device: torch.device,
    runtime: Runtime,
    on_history: Callable[[list[dict[str, float]]], None],
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train on the snapshots that are not held out.

    Kept are the averaged weights of the lowest held-out loss among the measurements at which samples were still novel
    (``min_novelty``). Training stops when that has not improved for ``patience`` measurements. Without held-out
    snapshots, or without a measurement that was novel enough, the last weights that were novel count as best.

    Args:
        local: (N, k) float32, snapshots in the coordinates of their trajectory.
        trajectory: (N,) int64, the run of each; batches take runs in equal shares.
        heldout: (N,) bool.
        frames: the coordinates.
        config: of the fit.
        device: to train on.
        runtime: checkpoints and progress.
        on_history: told the history after each measurement.

    Returns:
        The best averaged denoiser, in eval mode, and one entry per measurement: step, train_loss, heldout_loss,
        novelty, spread_ratio, best_step, best_loss, seconds.
    """
    settings = config.diffusion
    rng = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # for the initial weights; the caller's state comes back
        denoiser = new_denoiser(config, frames).to(device)
    average = copy.deepcopy(denoiser).requires_grad_(False).eval()
    best = copy.deepcopy(average)
    parameters: list[Tensor] = list(denoiser.parameters())
    averaged: list[Tensor] = list(average.parameters())
    buffers, averaged_buffers = list(denoiser.buffers()), list(average.buffers())
    optimizer = torch.optim.AdamW(
        denoiser.parameters(),
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        fused=device.type in ("cpu", "cuda"),  # half the time of the loop over tensors, on a CPU too
    )

    train = (~heldout).nonzero().squeeze(1)
    counts = torch.bincount(trajectory[train], minlength=frames.num_trajectories).clamp_min(1)
    shares = 1.0 / counts[trajectory[train]].double()
    on_device = local.to(device)
    labels = trajectory.to(device)
    judge = Judge(on_device, labels, heldout, config)

    history: list[dict[str, float]] = []
    step, best_step, best_loss, seconds = 0, 0, float("inf"), 0.0
    running = torch.zeros((), device=device)  # summed on the device: reading it each step would stall a GPU
    saved = runtime.load_checkpoint("diffusion")
    if saved is not None:
        tensors, state = saved
        for prefix, module in (("denoiser.", denoiser), ("average.", average), ("best.", best)):
            module.load_state_dict(strip(tensors, prefix))
        restore_optimizer(optimizer, strip(tensors, "optimizer."))
        rng.set_state(tensors["rng"])
        history, step, best_step = state["history"], state["step"], state["best_step"]
        best_loss, seconds = state["best_loss"], state["seconds"]
        running.copy_(tensors["running"])

    def checkpoint() -> None:
        tensors = {"rng": rng.get_state(), "running": running}
        for prefix, module in (("denoiser.", denoiser), ("average.", average), ("best.", best)):
            tensors |= {prefix + name: tensor for name, tensor in module.state_dict().items()}
        tensors |= {"optimizer." + name: tensor for name, tensor in flat_optimizer(optimizer).items()}
        state: dict[str, Any] = {
            "history": history,
            "step": step,
            "best_step": best_step,
            "best_loss": best_loss,
            "seconds": seconds + time.perf_counter() - started,
        }
        runtime.save_checkpoint("diffusion", tensors, state)

    def measure() -> None:
        nonlocal best_step, best_loss
        # Rank 0's figures: ranks that disagree in a last digit would stop at different steps.
        found = runtime.on_rank_0(lambda: judge(average))
        is_novel = not found["novelty"] < least_novelty(settings.min_novelty, history, settings.precondition)
        if is_novel and not found["heldout_loss"] >= best_loss:
            best_step, best_loss = step, found["heldout_loss"] if judge.has_heldout else float("inf")
            best.load_state_dict(average.state_dict())
        steps_taken = step - int(history[-1]["step"] if history else 0)
        history.append(
            {
                "step": step,
                "train_loss": float(running) / steps_taken if steps_taken else float("nan"),
                **found,
                "best_step": best_step,
                "best_loss": best_loss,
                "seconds": round(seconds + time.perf_counter() - started, 3),
            }
        )
        running.zero_()

    started = time.perf_counter()
    B = settings.batch_size
    mine = runtime.share(B)
    share = (mine.stop - mine.start) / B
    if any(isinstance(module, nn.BatchNorm1d) for module in denoiser.modules()):
        # Its statistics are those of the whole batch: every rank answers for all of it, and equals are averaged.
        mine, share = slice(0, B), 1.0 / runtime.world_size
    predict = compiled(denoiser, config)
    patience = settings.patience * settings.eval_every_n_steps
    if not history and settings.precondition:
        measure()  # before its first step the network already samples the normal distribution
    with checkpointed(checkpoint) as steps:
        while step < settings.max_steps and step - best_step < patience:
            is_measured = (step + 1) % settings.eval_every_n_steps == 0 or step + 1 == settings.max_steps
            with steps.step():
                batch, batch_labels = _draw(on_device, labels, train, shares, rng, config)
                optimizer.zero_grad(set_to_none=True)
                # Every rank draws the whole batch and answers for its share of it: the sum is the batch's own gradient.
                own = NoisedBatch(batch.inputs[mine], batch.times[mine], batch.targets[mine])
                with autocast(config, device):
                    value = share * loss(partial(predict, condition=Condition(batch_labels[mine])), own)
                torch.autograd.backward(value)
                value = runtime.sum_gradients(parameters, value.detach())
                set_lr(optimizer, settings.lr * lr_factor(step, settings.max_steps, settings.lr_schedule))
                optimizer.step()
                step += 1
                # The average forgets its start quickly: decay 0.1 at step 1, the configured one after some hundred.
                decay = min(settings.ema_decay, step / (step + 9.0))
                torch._foreach_lerp_(averaged, parameters, 1.0 - decay)
                running += value
                if is_measured:
                    if buffers:
                        torch._foreach_copy_(averaged_buffers, buffers)  # BatchNorm statistics are averages already
                    measure()
            if is_measured:
                now = {key: history[-1][key] for key in ("train_loss", "heldout_loss", "novelty")}
                runtime.report("diffusion", step, settings.max_steps, **now)
                on_history(history)
    if best_step == 0 and not settings.precondition:
        best.load_state_dict(average.state_dict())  # nothing was novel enough, and untrained weights are no generator
    return best, history


def least_novelty(min_novelty: float, history: list[dict[str, float]], precondition: bool) -> float:
    """Novelty that weights must keep to count as best.

    Where even normal samples lie close to snapshots (few directions, many snapshots) they set the measure.
    """
    if not precondition or not history or history[0]["novelty"] != history[0]["novelty"]:
        return min_novelty
    return min_novelty * min(1.0, history[0]["novelty"])


class Judge:
    """Measures a denoiser with noise and times that are fixed once.

    Called with a denoiser it returns ``heldout_loss`` (NaN without held-out snapshots), ``novelty`` (median distance of
    samples to their nearest snapshot over the same of snapshots, see :func:`nearest_at_another_time`; NaN if neither
    the setting nor the snapshots ask for it) and ``spread_ratio`` (of samples to training snapshots).

    Args:
        local: (N, k) on the device of the denoiser.
        labels: (N,) trajectories.
        heldout: (N,) bool.
        config: of the fit.
    """

    def __init__(self, local: Tensor, labels: Tensor, heldout: Tensor, config: FitConfig) -> None:
        self.has_heldout = bool(heldout.any())
        self.config, self.local, self.labels = config, local, labels
        rng = torch.Generator().manual_seed(config.seed + 2)
        heldout = heldout.to(local.device)
        if self.has_heldout:
            x0 = local[heldout].repeat(_EVAL_REPEATS, 1)
            noise = torch.randn(x0.shape, generator=rng).to(local)
            # Times spread evenly over [0, 1) and shuffled over the snapshots.
            uniform = ((torch.arange(len(x0)) + 0.5) / len(x0))[torch.randperm(len(x0), generator=rng)].to(local)
            self.batch = noised_batch(x0, noise, uniform, config.diffusion)
            self.batch_condition = Condition(labels[heldout]).repeat(_EVAL_REPEATS)
        self.reference = float(nearest_at_another_time(local, labels).nanmedian())
        runs = torch.tensor(sorted(set(labels.tolist())), device=local.device)
        self.sample_labels = runs[torch.arange(_EVAL_SAMPLES, device=local.device) % len(runs)]
        self.noise = torch.randn(_EVAL_SAMPLES, local.shape[1], generator=rng).to(local)
        self.spread = spread_about_means(local[~heldout], labels[~heldout])

    @torch.no_grad()
    def __call__(self, denoiser: nn.Module) -> dict[str, float]:
        found = {"heldout_loss": float("nan"), "novelty": float("nan"), "spread_ratio": float("nan")}
        if self.has_heldout:
            found["heldout_loss"] = float(loss(lambda x, t: denoiser(x, t, self.batch_condition), self.batch))
        if self.config.diffusion.min_novelty > 0:
            process = self.config.diffusion
            is_quick = sampler_for(process).needs == "preconditioned denoiser"
            sampling = SamplingConfig(num_sampling_steps=_EVAL_STEPS if is_quick else None)
            samples = run_sampler(denoiser, self.noise, Condition(self.sample_labels), process, sampling)
            found["spread_ratio"] = spread_about_means(samples, self.sample_labels) / max(self.spread, 1e-12)
            if self.reference > 0:  # false for NaN too: a trajectory may be too short for a reference
                nearest = nearest_of_own_run(samples, self.sample_labels, self.local, self.labels)
                found["novelty"] = float(nearest.median()) / self.reference
        return found


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


def _draw(
    local: Tensor, labels: Tensor, train: Tensor, shares: Tensor, rng: torch.Generator, config: FitConfig
) -> tuple[NoisedBatch, Tensor]:
    B = config.diffusion.batch_size
    rows = train[torch.multinomial(shares, B, replacement=True, generator=rng)].to(local.device)
    noise = torch.randn(B, local.shape[1], generator=rng).to(local)
    uniform = torch.rand(B, generator=rng).to(local)
    return noised_batch(local[rows], noise, uniform, config.diffusion), labels[rows]
