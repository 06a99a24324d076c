"""The `conv` autoencoder, strided 1-D convolutions, of the p-diff paper (arXiv 2402.13144).

Vectors may have any length: they are padded with zeros to what the strides need, and cropped again. Long ones can be
cut into chunks that share one set of weights: the networks then see chunks of any vectors, a few at a time.

Shapes: B vectors in a batch, D values in a flat vector, C chunks of L values (C L >= D), P chunks in a batch, k latent
width of one chunk, K = C k latent width in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdiff_plugin.config import ConvConfig
from pdiff_plugin.generator.autoencoder import BLOCK_VALUES, ROWS_AT_A_TIME
from pdiff_plugin.generator.layers import BatchNorm1d, Conv1d, ConvTranspose1d, Linear
from pdiff_plugin.generator.state import StateError, check_shapes, rebuilt
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.statistics import ColumnReader, column_blocks, inverse_transform, transform


class ConvNetwork(nn.Module):
    """Strided convolutions down to a dense latent, transposed ones back up.

    Args:
        num_values: D.
        config: channels, kernel, latent width and chunks.
    """

    def __init__(self, num_values: int, config: ConvConfig) -> None:
        super().__init__()
        self.num_values = num_values
        multiple = 2 ** len(config.channels)
        wanted = min(config.chunk_values or num_values, num_values)
        self.chunk_values = -(-wanted // multiple) * multiple
        self.num_chunks = -(-num_values // self.chunk_values)
        self.latent_dim = self.num_chunks * config.latent_dim
        kernel, pad = config.kernel_size, config.kernel_size // 2
        down, before = [], 1
        for after in config.channels:
            down += [Conv1d(before, after, kernel, 2, pad), BatchNorm1d(after), nn.LeakyReLU()]
            before = after
        self.down = nn.Sequential(*down)
        self.inner = (before, self.chunk_values // multiple)
        dense = self.inner[0] * self.inner[1]
        self.to_latent = Linear(dense, config.latent_dim)
        self.to_mean = Linear(config.latent_dim, config.latent_dim)
        self.to_log_variance = Linear(config.latent_dim, config.latent_dim)
        self.from_latent = Linear(config.latent_dim, dense)
        up: list[nn.Module] = []
        for after in (*reversed(config.channels[:-1]), config.channels[0]):
            up += [
                ConvTranspose1d(before, after, kernel, 2, pad, output_padding=1),
                BatchNorm1d(after),
                nn.ELU(),
            ]
            before = after
        self.up = nn.Sequential(*up, Conv1d(before, 1, kernel, 1, pad))

    def encode(self, chunks: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents, (P, L or less) -> (P, k) each; what is missing counts as zeros."""
        padded = F.pad(chunks, (0, self.chunk_values - chunks.shape[1]))
        hidden = self.to_latent(self.down(padded[:, None, :]).flatten(1))
        return self.to_mean(hidden), self.to_log_variance(hidden)

    def decode(self, latents: Tensor) -> Tensor:
        """Chunks of latents, (P, k) -> (P, L)."""
        chunks: Tensor = self.up(self.from_latent(latents).reshape(-1, *self.inner))  # (P, 1, L)
        return chunks[:, 0]


class ConvAutoencoder:
    """Encode (B, D) -> (B, K) and decode back through a :class:`ConvNetwork` on standardised values.

    Attributes:
        layout: of a flat vector.
        config: of the network.
        network: in eval mode, on the CPU.
        mean: (D,) float32, subtracted after the logarithm of running variances.
        scales: (number of tensors,) float32, divided by.
    """

    def __init__(self, layout: Layout, config: ConvConfig, network: ConvNetwork, mean: Tensor, scales: Tensor) -> None:
        self.layout, self.config, self.network, self.mean, self.scales = layout, config, network, mean, scales

    @property
    def latent_dim(self) -> int:
        return int(self.network.latent_dim)

    def standardise(self, values: Tensor, first: int = 0) -> Tensor:
        """Columns of flat vectors from number ``first`` on as the network sees them, (B, any) float32."""
        out = torch.empty(values.shape, dtype=torch.float32)
        for name, scale, place in self._pieces(first, first + values.shape[1]):
            own = slice(place.start - first, place.stop - first)
            out[:, own] = (transform(values[:, own], name) - self.mean[place]) / scale
        return out

    def encode(self, flat: Tensor) -> Tensor:
        """Latents (B, K) of flat vectors (B, D)."""
        return self.encode_columns(lambda lo, hi: flat[:, lo:hi])

    @torch.no_grad()
    def encode_columns(self, read: ColumnReader) -> Tensor:
        """Latents (B, K) of vectors that ``read`` gives a few columns at a time."""
        parts = []
        for lo, hi in self._groups():
            values = self.standardise(read(lo, hi), lo)
            missing = -values.shape[1] % self.network.chunk_values
            chunks = F.pad(values, (0, missing)).reshape(-1, self.network.chunk_values)
            means = [self.network.encode(part)[0] for part in torch.split(chunks, ROWS_AT_A_TIME)]
            parts.append(torch.cat(means).reshape(len(values), -1))
        return torch.cat(parts, dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Flat vectors (B, D) of latents (B, K)."""
        out = torch.empty(len(latents), self.layout.num_values, dtype=torch.float32)
        for _, place, values in self.decode_blocks(latents):
            out[:, place] = values
        return out

    def decode_blocks(self, latents: Tensor, block_values: int = BLOCK_VALUES) -> Iterator[tuple[str, slice, Tensor]]:
        """As :meth:`SubspaceAutoencoder.decode_blocks`; one chunk is decoded at a time, or as many as fill a block."""
        latents = latents.to("cpu", torch.float32)
        width = self.config.latent_dim
        for lo, hi in self._groups():
            first = lo // self.network.chunk_values
            own = latents[:, first * width : -(-hi // self.network.chunk_values) * width]
            rows = [
                self._decode(part.reshape(-1, width)).reshape(len(part), -1)
                for part in torch.split(own, ROWS_AT_A_TIME)
            ]
            values = torch.cat(rows)  # (B, hi - lo or more)
            for name, scale, place in self._pieces(lo, hi, block_values):
                block = values[:, place.start - lo : place.stop - lo] * scale + self.mean[place]
                yield name, place, inverse_transform(block, name)

    def _groups(self) -> Iterator[tuple[int, int]]:
        """Columns [lo, hi) of as many whole chunks as fill a block."""
        size = self.network.chunk_values * max(1, BLOCK_VALUES // self.network.chunk_values)
        D = self.layout.num_values
        return ((lo, min(lo + size, D)) for lo in range(0, D, size))

    def _pieces(self, lo: int, hi: int, block_values: int = BLOCK_VALUES) -> Iterator[tuple[str, Tensor, slice]]:
        """Name, scale and place of columns [lo, hi), tensor by tensor."""
        for number, first, last in column_blocks(self.layout, block_values, slice(lo, hi)):
            yield self.layout.tensors[number].name, self.scales[number], slice(first, last)

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        """Chunks (P, L) of latents (P, k)."""
        # The published script never leaves train mode and decodes one sample at a time: BatchNorm then normalises each
        # by itself.
        slip = self.config.decode_in_train_mode
        statistics = [buffer.clone() for buffer in self.network.buffers()]
        self.network.train(slip)
        chunks = [self.network.decode(part) for part in torch.split(latents, 1 if slip else ROWS_AT_A_TIME)]
        self.network.eval()
        for buffer, kept in zip(self.network.buffers(), statistics, strict=True):
            buffer.copy_(kept)
        return torch.cat(chunks)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that rebuild this autoencoder together with its layout and config."""
        network = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        return {"mean": self.mean, "scales": self.scales, **network}

    @classmethod
    def from_state(cls, layout: Layout, config: ConvConfig, state: Mapping[str, Tensor]) -> ConvAutoencoder:
        check_shapes(state, {"mean": (layout.num_values,), "scales": (len(layout.tensors),)})
        if not 0 < len(config.channels) <= len(state):
            raise StateError("network", f"of {len(state)} tensors", f"those of {len(config.channels)} layers")
        network = rebuilt(partial(ConvNetwork, layout.num_values, config), state, "network.")
        return cls(layout, config, network, state["mean"].float(), state["scales"].float())
