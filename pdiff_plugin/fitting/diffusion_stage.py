"""The diffusion stage: train the denoiser on latents until the held-out loss stops improving.

Shapes: N latents, n of them for training, K latent width, B latents in a batch.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin.config import FitConfig
from pdiff_plugin.fitting.runtime import Runtime
from pdiff_plugin.generator.denoiser import Denoiser
from pdiff_plugin.generator.diffusion import NoisedBatch, loss, noised_batch
from pdiff_plugin.generator.generator import new_denoiser

_CHECKPOINT_EVERY_S = 5.0
# Draws of noise and time per held-out latent: fixed ones, so that two measurements differ by the weights alone.
_EVAL_REPEATS = 32


def train_diffusion(
    latents: Tensor,
    trajectory: Tensor,
    heldout: Tensor,
    *,
    num_trajectories: int,
    config: FitConfig,
    device: torch.device,
    runtime: Runtime,
    on_history: Callable[[list[dict[str, float]]], None],
) -> tuple[Denoiser, list[dict[str, float]]]:
    """Train on the latents that are not held out.

    Args:
        latents: (N, K) float32.
        trajectory: (N,) int64, the run each latent belongs to; batches take runs in equal shares.
        heldout: (N,) bool.
        num_trajectories: runs the denoiser is conditioned on.
        config: of the fit.
        device: to train on.
        runtime: checkpoints and progress.
        on_history: told the history after each measurement.

    Returns:
        The averaged denoiser of the best held-out loss (of the last step, if nothing is held out), in eval mode, and
        one entry per measurement: step, train_loss, heldout_loss, best_step, best_loss, seconds.
    """
    settings = config.diffusion
    rng = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # for the initial weights; the caller's state comes back
        denoiser = new_denoiser(config, latents.shape[1], num_trajectories).to(device)
    average = copy.deepcopy(denoiser).requires_grad_(False).eval()
    best = copy.deepcopy(average)
    optimizer = torch.optim.AdamW(
        denoiser.parameters(),
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        fused=device.type in ("cpu", "cuda"),  # half the time of the loop over tensors, on a CPU too
    )

    train = (~heldout).nonzero().squeeze(1)
    counts = torch.bincount(trajectory[train], minlength=num_trajectories).clamp_min(1)
    shares = 1.0 / counts[trajectory[train]].double()
    on_device = latents.to(device)
    labels = trajectory.to(device)
    judge = _Judge(on_device[heldout.to(device)], labels[heldout.to(device)], config)

    history: list[dict[str, float]] = []
    step, best_step, best_loss, seconds = 0, 0, float("inf"), 0.0
    running = torch.zeros((), device=device)  # summed on the device: reading it each step would stall a GPU
    saved = runtime.load_checkpoint("diffusion")
    if saved is not None:
        tensors, state = saved
        for prefix, module in (("denoiser.", denoiser), ("average.", average), ("best.", best)):
            module.load_state_dict(_strip(tensors, prefix))
        _restore_optimizer(optimizer, _strip(tensors, "optimizer."))
        rng.set_state(tensors["rng"])
        history, step, best_step = state["history"], state["step"], state["best_step"]
        best_loss, seconds = state["best_loss"], state["seconds"]
        running.copy_(tensors["running"])

    def checkpoint() -> None:
        tensors = {"rng": rng.get_state(), "running": running}
        for prefix, module in (("denoiser.", denoiser), ("average.", average), ("best.", best)):
            tensors |= {prefix + name: tensor for name, tensor in module.state_dict().items()}
        tensors |= {"optimizer." + name: tensor for name, tensor in _flat_optimizer(optimizer).items()}
        state: dict[str, Any] = {
            "history": history,
            "step": step,
            "best_step": best_step,
            "best_loss": best_loss,
            "seconds": seconds + time.perf_counter() - started,
        }
        runtime.save_checkpoint("diffusion", tensors, state)

    started = last_checkpoint = time.perf_counter()
    parameters: list[Tensor] = list(denoiser.parameters())
    averaged: list[Tensor] = list(average.parameters())
    B = settings.batch_size
    mine = runtime.share(B)
    share = (mine.stop - mine.start) / B
    patience = settings.patience * settings.eval_every_n_steps if judge.has_data else settings.max_steps
    is_between_steps = True
    try:
        while step < settings.max_steps and step - best_step < patience:
            is_between_steps = False
            batch, batch_labels = _draw(on_device, labels, train, shares, rng, config)
            optimizer.zero_grad(set_to_none=True)
            # Every rank draws the whole batch and answers for its share of it: the sum is the batch's own gradient.
            own = NoisedBatch(batch.inputs[mine], batch.times[mine], batch.targets[mine])
            own_labels = batch_labels[mine]
            value = share * loss(lambda x, t, c=own_labels: denoiser(x, t, c), own)  # type: ignore[misc]  # bound per step
            value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            value = runtime.sum_gradients(parameters, value.detach())
            optimizer.step()
            step += 1
            # The average forgets its start quickly: decay 0.1 at step 1, the configured one after some hundred steps.
            decay = min(settings.ema_decay, step / (step + 9.0))
            torch._foreach_lerp_(averaged, parameters, 1.0 - decay)
            running += value
            if step % settings.eval_every_n_steps == 0 or step == settings.max_steps:
                # Rank 0's figure: ranks that disagree in a last digit would stop at different steps.
                heldout_loss = runtime.on_rank_0(lambda: judge(average))
                if not judge.has_data or heldout_loss < best_loss:
                    best_step, best_loss = step, heldout_loss
                    best.load_state_dict(average.state_dict())
                train_loss = float(running) / (step - (history[-1]["step"] if history else 0))
                running.zero_()
                history.append(
                    {
                        "step": step,
                        "train_loss": train_loss,
                        "heldout_loss": heldout_loss,
                        "best_step": best_step,
                        "best_loss": best_loss,
                        "seconds": round(seconds + time.perf_counter() - started, 3),
                    }
                )
                is_between_steps = True
                runtime.report("diffusion", step, settings.max_steps, train_loss=train_loss, heldout_loss=heldout_loss)
                on_history(history)
            is_between_steps = True
            if time.perf_counter() - last_checkpoint > _CHECKPOINT_EVERY_S:
                checkpoint()
                last_checkpoint = time.perf_counter()
    except KeyboardInterrupt:
        # In the middle of a step the tensors do not belong together: then the last checkpoint stays the newest.
        if is_between_steps:
            checkpoint()
        raise
    checkpoint()
    return best, history


class _Judge:
    """The held-out loss, with noise and times fixed once; NaN without held-out latents."""

    def __init__(self, latents: Tensor, labels: Tensor, config: FitConfig) -> None:
        self.has_data = len(latents) > 0
        if not self.has_data:
            return
        rng = torch.Generator().manual_seed(config.seed + 2)
        x0 = latents.repeat(_EVAL_REPEATS, 1)
        noise = torch.randn(x0.shape, generator=rng).to(latents)
        # Times spread evenly over [0, 1) and shuffled over the latents.
        uniform = ((torch.arange(len(x0)) + 0.5) / len(x0))[torch.randperm(len(x0), generator=rng)].to(latents)
        self.batch = noised_batch(x0, noise, uniform, config.diffusion)
        self.labels = labels.repeat(_EVAL_REPEATS)

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser) -> float:
        if not self.has_data:
            return float("nan")
        return float(loss(lambda x, t: denoiser(x, t, self.labels), self.batch))


def _draw(
    latents: Tensor, labels: Tensor, train: Tensor, shares: Tensor, rng: torch.Generator, config: FitConfig
) -> tuple[NoisedBatch, Tensor]:
    B = config.diffusion.batch_size
    rows = train[torch.multinomial(shares, B, replacement=True, generator=rng)].to(latents.device)
    noise = torch.randn(B, latents.shape[1], generator=rng).to(latents)
    uniform = torch.rand(B, generator=rng).to(latents)
    return noised_batch(latents[rows], noise, uniform, config.diffusion), labels[rows]


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _flat_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of AdamW as named tensors, because nothing here is pickled."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, values in state.items() for key, value in values.items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
