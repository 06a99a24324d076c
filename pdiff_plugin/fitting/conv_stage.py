"""The `conv` autoencoder's stage: train it on standardised snapshots, with noise on inputs and latents.

Rows that are taken whole are held in memory. Of rows that are cut into chunks, each step reads one chunk at random of
every snapshot in its batch, so that neither a step's time nor its memory grows with their length.

Shapes: N snapshots, D values in a row, K latent width, B rows in a batch, W values of a row or chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from pdiff_plugin.config import ConvConfig, FitConfig
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
from pdiff_plugin.generator.autoencoder import BLOCK_VALUES, Encoded
from pdiff_plugin.generator.conv import ConvAutoencoder, ConvNetwork
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.statistics import ColumnReader, column_blocks, transform

_REPORT_EVERY = 10


class RowReader(Protocol):
    """Reads columns [lo, hi) of the snapshots at ``places``: (len(places), hi - lo) float32."""

    def __call__(self, lo: int, hi: int, places: Tensor) -> Tensor: ...


def train_conv(
    read: RowReader,
    layout: Layout,
    config: FitConfig,
    *,
    train_rows: Tensor,
    heldout_rows: Tensor,
    device: torch.device,
    runtime: Runtime,
) -> Encoded:
    """Train the autoencoder for its whole number of steps.

    Args:
        read: gives columns of some of the N snapshots.
        layout: of a row.
        config: of the fit.
        train_rows: (n,) int64 places of the training rows among the N.
        heldout_rows: (m,) int64 places of the others.
        device: to train on.
        runtime: checkpoints and progress.
    """
    settings = config.autoencoder
    assert isinstance(settings, ConvConfig), "the other kind is not trained"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # for the initial weights; the caller's state comes back
        network = ConvNetwork(layout.num_values, settings)
    read_train = partial(read, places=train_rows)
    autoencoder = ConvAutoencoder(layout, settings, network, *_standards(read_train, layout, settings))
    everything = torch.arange(len(train_rows) + len(heldout_rows))
    is_whole = network.num_chunks == 1
    rows = autoencoder.standardise(read(0, layout.num_values, everything)).to(device) if is_whole else None
    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, fused=device.type in ("cpu", "cuda"))
    rng = torch.Generator().manual_seed(config.seed)
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

    encode, decode = compiled(network.encode, config), compiled(network.decode, config)
    with checkpointed(checkpoint) as steps:
        while step < settings.max_steps:
            with steps.step():
                chosen = train_rows[torch.randperm(len(train_rows), generator=rng)[: settings.batch_size]]
                if rows is not None:
                    batch = rows[chosen.to(device)]
                else:
                    batch = _random_chunks(read, autoencoder, chosen, rng).to(device)
                with autocast(config, device):
                    value = _loss(encode, decode, batch, rng, settings, network.num_chunks)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(value)
                set_lr(optimizer, settings.lr * lr_factor(step, settings.max_steps, "cosine"))
                optimizer.step()
                step += 1
            if step % _REPORT_EVERY == 0 or step == settings.max_steps:
                runtime.report("autoencoder", step, settings.max_steps, train_loss=float(value.detach()))
    network.cpu().eval().requires_grad_(False)
    del rows
    latents = autoencoder.encode_columns(partial(read, places=everything))
    judged = heldout_rows if len(heldout_rows) else train_rows
    return Encoded(
        autoencoder,
        latents,
        latents[train_rows].double().var(dim=0) / latents[train_rows].double().var(dim=0).sum().clamp_min(1e-300),
        _fidelity(autoencoder, read, latents, train_rows, judged),
    )


def _random_chunks(read: RowReader, autoencoder: ConvAutoencoder, chosen: Tensor, rng: torch.Generator) -> Tensor:
    """One chunk of each of the snapshots ``chosen`` (B,), standardised, (B, W); zeros fill the last chunk up."""
    W, D = autoencoder.network.chunk_values, autoencoder.layout.num_values
    numbers = torch.randint(autoencoder.network.num_chunks, chosen.shape, generator=rng)
    out = torch.zeros(len(chosen), W)
    for row, place, number in zip(out, chosen[:, None], numbers.tolist(), strict=True):
        lo, hi = number * W, min((number + 1) * W, D)
        row[: hi - lo] = autoencoder.standardise(read(lo, hi, place), lo)[0]
    return out


def _loss(
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    decode: Callable[[Tensor], Tensor],
    rows: Tensor,
    rng: torch.Generator,
    config: ConvConfig,
    num_chunks: int,
) -> Tensor:
    """Reconstruction error of noisy rows through noisy latents (p-diff, section 2.2), plus the variational term."""
    draw = partial(torch.randn, generator=rng)
    mean, log_variance = encode(rows + config.input_noise * draw(rows.shape).to(rows))
    noise = draw(mean.shape).to(rows)

    def error_of(latents: Tensor) -> Tensor:
        difference: Tensor = decode(latents)[:, : rows.shape[1]] - rows
        return difference.square().mean()

    if config.kl_weight == 0:
        return error_of(mean + config.latent_noise * noise)
    # Kingma & Welling 2014, appendix B, with the reparametrised sample; of all chunks of a row.
    of_each = -0.5 * (1.0 + log_variance - mean.square() - log_variance.exp()).sum(dim=1)
    divergence: Tensor = num_chunks * of_each.mean()
    return error_of(mean + (0.5 * log_variance).exp() * noise) + config.kl_weight * divergence


def _standards(read: ColumnReader, layout: Layout, config: ConvConfig) -> tuple[Tensor, Tensor]:
    """What is subtracted, (D,), and what is divided by, (number of tensors,), from the training rows that are read."""
    mean = torch.empty(layout.num_values)
    counts, sums, squares = (torch.zeros(len(layout.tensors), dtype=torch.float64) for _ in range(3))

    def blocks() -> Iterator[tuple[int, slice, Tensor]]:
        for number, lo, hi in column_blocks(layout, BLOCK_VALUES):
            yield number, slice(lo, hi), transform(read(lo, hi), layout.tensors[number].name).double()

    for number, place, values in blocks():
        mean[place] = values.mean(dim=0).float()
        sums[number] += values.sum()
        counts[number] += values.numel()
    for number, place, values in blocks():
        if config.standardise == "tensor":
            mean[place] = (sums[number] / counts[number]).float()
            values -= sums[number] / counts[number]
        else:
            values -= values.mean(dim=0)
        squares[number] += values.square().sum()
    return mean, torch.where(squares > 0, (squares / counts.clamp_min(1)).sqrt(), 1.0).float()


def _fidelity(
    autoencoder: ConvAutoencoder, read: RowReader, latents: Tensor, train_rows: Tensor, judged: Tensor
) -> float:
    """Share of the variance of the judged rows about the training mean that survives encoding and decoding."""
    lost, movement = 0.0, 0.0
    for _, place, values in autoencoder.decode_blocks(latents[judged]):
        lo, hi = place.start, place.stop
        truth = autoencoder.standardise(read(lo, hi, judged), lo).double()
        centre = autoencoder.standardise(read(lo, hi, train_rows), lo).double().mean(dim=0)
        lost += float((truth - autoencoder.standardise(values, lo).double()).square().sum())
        movement += float((truth - centre).square().sum())
    return 1.0 - lost / movement if movement > 0 else 1.0
