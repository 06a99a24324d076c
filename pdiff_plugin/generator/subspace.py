"""The `subspace` autoencoder: leading principal directions of the standardised snapshots.

Shapes: D values in a row, K latent width, B rows in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pdiff_plugin.config import SubspaceConfig
from pdiff_plugin.generator.autoencoder import BLOCK_VALUES, ROWS_AT_A_TIME
from pdiff_plugin.generator.state import check_shapes
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.statistics import column_blocks, inverse_transform, transform


class SubspaceAutoencoder:
    """Encode (B, D) -> (B, K) and decode (B, K) -> (B, D) by an orthonormal basis of the standardised coordinates.

    Latents keep the relative size of their directions and have unit variance over all their entries, so that a
    diffusion meets neither vanishing nor exploding inputs.

    Attributes:
        mean: (D,) float32, of the transformed training rows.
        basis: (K, D) float32 or bfloat16, orthonormal rows in standardised coordinates; computed with in float32.
        scales: (number of tensors,) float32.
        latent_scale: standard deviation that latents were divided by.
    """

    def __init__(self, layout: Layout, mean: Tensor, basis: Tensor, scales: Tensor, latent_scale: float) -> None:
        self.layout, self.mean, self.basis, self.scales, self.latent_scale = layout, mean, basis, scales, latent_scale

    @property
    def latent_dim(self) -> int:
        return len(self.basis)

    def encode(self, flat: Tensor) -> Tensor:
        """Latents (B, K) float32 of flat vectors (B, D)."""
        latents = torch.zeros(len(flat), self.latent_dim, dtype=torch.float64)
        for number, lo, hi in column_blocks(self.layout, BLOCK_VALUES):
            values = transform(flat[:, lo:hi].float(), self.layout.tensors[number].name) - self.mean[lo:hi]
            latents += (values.div_(self.scales[number]) @ self.basis[:, lo:hi].float().T).double()
        return (latents / self.latent_scale).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Flat vectors (B, D) float32 of latents (B, K)."""
        out = torch.empty(len(latents), self.layout.num_values, dtype=torch.float32)
        for _, place, values in self.decode_blocks(latents):
            out[:, place] = values
        return out

    def decode_blocks(self, latents: Tensor, block_values: int = BLOCK_VALUES) -> Iterator[tuple[str, slice, Tensor]]:
        """Decode a few columns at a time.

        Args:
            latents: (B, K).
            block_values: columns at most in a block.

        Yields:
            (tensor name, place [lo, hi) in the flat vector, values (B, hi - lo)).
        """
        scaled = latents.to("cpu", torch.float32) * self.latent_scale
        for number, lo, hi in column_blocks(self.layout, block_values):
            name, scale = self.layout.tensors[number].name, float(self.scales[number])
            mean, basis = self.mean[lo:hi], self.basis[:, lo:hi].float()
            rows = [torch.addmm(mean, part, basis, alpha=scale) for part in torch.split(scaled, ROWS_AT_A_TIME)]
            yield name, slice(lo, hi), inverse_transform(torch.cat(rows), name)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that rebuild this autoencoder together with its layout."""
        return {
            "mean": self.mean,
            "basis": self.basis,
            "scales": self.scales,
            "latent_scale": torch.tensor(self.latent_scale, dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, layout: Layout, config: SubspaceConfig, state: Mapping[str, Tensor]) -> SubspaceAutoencoder:
        D, num_tensors = layout.num_values, len(layout.tensors)
        check_shapes(state, {"mean": (D,), "basis": ("K", D), "scales": (num_tensors,), "latent_scale": ()})
        check_shapes(state, {"basis": ("K", D)}, (torch.float32, torch.bfloat16))
        mean, scales = state["mean"].float(), state["scales"].float()
        return cls(layout, mean, state["basis"], scales, float(state["latent_scale"]))
