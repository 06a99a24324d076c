"""The `conv` autoencoder's stage: train it on standardised snapshots, with noise on inputs and latents.

Shapes: N snapshots, D values in a row, K latent width, B rows in a batch.
"""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor

from pdiff_plugin.config import ConvConfig
from pdiff_plugin.fitting import training
from pdiff_plugin.fitting.runtime import Runtime
from pdiff_plugin.fitting.training import (
    flat_optimizer,
    interrupts_held,
    lr_factor,
    restore_optimizer,
    set_lr,
    strip,
)
from pdiff_plugin.generator.autoencoder import Encoded, transform
from pdiff_plugin.generator.conv import ConvAutoencoder, ConvNetwork
from pdiff_plugin.snapshots.layout import Layout

_REPORT_EVERY = 10


def train_conv(
    flat: Tensor,
    layout: Layout,
    config: ConvConfig,
    *,
    train_rows: Tensor,
    heldout_rows: Tensor,
    seed: int,
    device: torch.device,
    runtime: Runtime,
) -> Encoded:
    """Train the autoencoder for its whole number of steps.

    Args:
        flat: snapshots, (N, D).
        layout: of a row.
        config: of the autoencoder.
        train_rows: (n,) int64 places of the training rows among the N.
        heldout_rows: (m,) int64 places of the others.
        seed: of the initial weights, the batches and the noise.
        device: to train on.
        runtime: checkpoints and progress.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # for the initial weights; the caller's state comes back
        network = ConvNetwork(layout.num_values, config)
    autoencoder = ConvAutoencoder(layout, config, network, *_standards(flat[train_rows], layout, config))
    rows = autoencoder.standardise(flat).to(device)
    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, fused=device.type in ("cpu", "cuda"))
    rng = torch.Generator().manual_seed(seed)
    step = 0
    saved = runtime.load_checkpoint("autoencoder")
    if saved is not None:
        tensors, state = saved
        network.load_state_dict(strip(tensors, "network."))
        restore_optimizer(optimizer, strip(tensors, "optimizer."))
        rng.set_state(tensors["rng"])
        step = state["step"]

    def checkpoint() -> None:
        tensors = {"rng": rng.get_state()}
        tensors |= {"network." + name: tensor for name, tensor in network.state_dict().items()}
        tensors |= {"optimizer." + name: tensor for name, tensor in flat_optimizer(optimizer).items()}
        runtime.save_checkpoint("autoencoder", tensors, {"step": step})

    last_checkpoint = time.perf_counter()
    is_between_steps = True
    try:
        with interrupts_held() as interrupt:
            while step < config.max_steps:
                is_between_steps = False
                chosen = train_rows[torch.randperm(len(train_rows), generator=rng)[: config.batch_size]].to(device)
                value = _loss(network, rows[chosen], rng, config)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(value)
                set_lr(optimizer, config.lr * lr_factor(step, config.max_steps, "cosine"))
                optimizer.step()
                step += 1
                is_between_steps = True
                if step % _REPORT_EVERY == 0 or step == config.max_steps:
                    runtime.report("autoencoder", step, config.max_steps, train_loss=float(value.detach()))
                if time.perf_counter() - last_checkpoint > training.CHECKPOINT_EVERY_S:
                    checkpoint()
                    last_checkpoint = time.perf_counter()
                interrupt.raise_if_asked()
    except KeyboardInterrupt:
        if is_between_steps:
            checkpoint()
        raise
    checkpoint()
    network.cpu().eval().requires_grad_(False)
    latents = autoencoder.encode(flat)
    judged = heldout_rows if len(heldout_rows) else train_rows
    return Encoded(
        autoencoder,
        latents,
        latents[train_rows].double().var(dim=0) / latents[train_rows].double().var(dim=0).sum().clamp_min(1e-300),
        _fidelity(autoencoder, flat, latents, train_rows, judged),
    )


def _loss(network: ConvNetwork, rows: Tensor, rng: torch.Generator, config: ConvConfig) -> Tensor:
    """Reconstruction error of noisy rows through noisy latents (p-diff, section 2.2), plus the variational term."""
    draw = partial(torch.randn, generator=rng)
    mean, log_variance = network.encode(rows + config.input_noise * draw(rows.shape).to(rows))
    noise = draw(mean.shape).to(rows)
    if config.kl_weight == 0:
        return (network.decode(mean + config.latent_noise * noise) - rows).square().mean()
    # Kingma & Welling 2014, appendix B, with the reparametrised sample.
    divergence = -0.5 * (1.0 + log_variance - mean.square() - log_variance.exp()).sum(dim=1).mean()
    reconstruction = (network.decode(mean + (0.5 * log_variance).exp() * noise) - rows).square().mean()
    return reconstruction + config.kl_weight * divergence


def _standards(flat: Tensor, layout: Layout, config: ConvConfig) -> tuple[Tensor, Tensor]:
    """What is subtracted, (D,), and what is divided by, (number of tensors,)."""
    mean, scales = torch.empty(layout.num_values), torch.ones(len(layout.tensors))
    for number, spec in enumerate(layout):
        values = transform(flat[:, layout.slices[spec.name]], spec.name).double()
        centre = values.mean() if config.standardise == "tensor" else values.mean(dim=0)
        mean[layout.slices[spec.name]] = centre.float()
        scales[number] = float((values - centre).square().mean().sqrt()) or 1.0
    return mean, scales


def _fidelity(autoencoder: ConvAutoencoder, flat: Tensor, latents: Tensor, train_rows: Tensor, judged: Tensor) -> float:
    """Share of the variance of the judged rows about the training mean that survives encoding and decoding."""
    truth = autoencoder.standardise(flat[judged]).double()
    decoded = autoencoder.standardise(autoencoder.decode(latents[judged])).double()
    movement = (truth - autoencoder.standardise(flat[train_rows]).double().mean(dim=0)).square().sum()
    return float(1.0 - (truth - decoded).square().sum() / movement) if movement > 0 else 1.0
