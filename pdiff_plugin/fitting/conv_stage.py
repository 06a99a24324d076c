"""The `conv` autoencoder's stage: train it on standardised snapshots, with noise on inputs and latents.

Rows that are taken whole are held in memory. Of rows that are cut into chunks, each step reads one chunk at random of
every snapshot in its batch, so that neither a step's time nor its memory grows with their length.

Shapes: N snapshots, D values in a row, K latent width, B rows in a batch, W values of a row or chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor

from pdiff_plugin.config import ConvConfig, FitConfig
from pdiff_plugin.fitting.runtime import Runtime, pick_device
from pdiff_plugin.fitting.training import Schedule, Training, compiled, seeded
from pdiff_plugin.generator.autoencoder import BLOCK_VALUES, Encoded
from pdiff_plugin.generator.conv import ConvAutoencoder, ConvNetwork
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.split import Split
from pdiff_plugin.snapshots.statistics import ColumnReader, Statistics, column_blocks, transform

_REPORT_EVERY = 10


def fit_conv(split: Split, statistics: Statistics, config: FitConfig, runtime: Runtime) -> Encoded:
    """Train the autoencoder for its whole number of steps, on rank 0.

    Args:
        split: the snapshots.
        statistics: of no use here: this autoencoder standardises in its own way.
        config: of the fit.
        runtime: checkpoints and progress.
    """
    del statistics
    return runtime.on_rank_0(lambda: _train(split, config, runtime))


def _train(split: Split, config: FitConfig, runtime: Runtime) -> Encoded:
    layout, settings = split.store.layout, cast(ConvConfig, config.autoencoder)
    device, train_rows = pick_device(config.device), split.train_rows
    network = seeded(lambda: ConvNetwork(layout.num_values, settings), config.seed)
    standards = _standards(partial(split.read, places=train_rows), layout, settings)
    autoencoder = ConvAutoencoder(layout, settings, network, *standards)
    is_whole = network.num_chunks == 1
    rows = autoencoder.standardise(split.read(0, layout.num_values)).to(device) if is_whole else None
    schedule = Schedule(settings.max_steps, settings.lr)
    network.to(device).train()
    training = Training("autoencoder", {"network": network}, schedule, config, runtime, config.seed)
    training.restore()
    encode, decode, rng = compiled(network.encode, config), compiled(network.decode, config), training.rng
    with training.checkpointed() as steps:
        while training.step < settings.max_steps:
            with steps.step():
                chosen = train_rows[torch.randperm(len(train_rows), generator=rng)[: settings.batch_size]]
                if rows is not None:
                    batch = rows[chosen.to(device)]
                else:
                    batch = _random_chunks(split, autoencoder, chosen, rng).to(device)
                value = training.advance(partial(_loss, encode, decode, batch, rng, settings, network.num_chunks))
            training.report(value, _REPORT_EVERY)
    network.cpu().eval().requires_grad_(False)
    del rows
    latents = autoencoder.encode_columns(split.read)
    variances = latents[train_rows].double().var(dim=0)
    shares = variances / variances.sum().clamp_min(1e-300)
    return Encoded(autoencoder, latents, shares, _fidelity(autoencoder, split, latents))


def _random_chunks(split: Split, autoencoder: ConvAutoencoder, chosen: Tensor, rng: torch.Generator) -> Tensor:
    """One chunk of each of the snapshots ``chosen`` (B,), standardised, (B, W); zeros fill the last chunk up."""
    W, D = autoencoder.network.chunk_values, autoencoder.layout.num_values
    numbers = torch.randint(autoencoder.network.num_chunks, chosen.shape, generator=rng)
    out = torch.zeros(len(chosen), W, dtype=torch.float32)
    for row, place, number in zip(out, chosen[:, None], numbers.tolist(), strict=True):
        lo, hi = number * W, min((number + 1) * W, D)
        row[: hi - lo] = autoencoder.standardise(split.read(lo, hi, place), lo)[0]
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
    draw = partial(torch.randn, generator=rng, dtype=torch.float32)
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
    mean = torch.empty(layout.num_values, dtype=torch.float32)
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


def _fidelity(autoencoder: ConvAutoencoder, split: Split, latents: Tensor) -> float:
    """Share of the variance of the judged rows about the training mean that survives encoding and decoding."""
    lost, movement = 0.0, 0.0
    for _, place, values in autoencoder.decode_blocks(latents[split.judged_rows]):
        lo, hi = place.start, place.stop
        truth = autoencoder.standardise(split.read(lo, hi, split.judged_rows), lo).double()
        centre = autoencoder.standardise(split.read(lo, hi, split.train_rows), lo).double().mean(dim=0)
        lost += float((truth - autoencoder.standardise(values, lo).double()).square().sum())
        movement += float((truth - centre).square().sum())
    return 1.0 - lost / movement if movement > 0 else 1.0
