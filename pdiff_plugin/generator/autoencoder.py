"""What a generator needs of an autoencoder, and what fitting one leaves.

Shapes: N snapshots, D values in a row, K latent width, B rows in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.tensor_files import LateTensors

# Rows encoded or decoded at a time: with one number for every way of working, all of them give the same bits.
ROWS_AT_A_TIME = 16
# Columns encoded or decoded at a time: with 300 directions, 79 MB of the basis in float32.
BLOCK_VALUES = 1 << 16


class Autoencoder(Protocol):
    """What a generator needs of an autoencoder.

    Attributes:
        scales: what each tensor's values are divided by, (number of tensors,).
    """

    scales: Tensor

    @property
    def latent_dim(self) -> int:
        """K."""

    def encode(self, flat: Tensor) -> Tensor:
        """Latents (B, K) float32 of flat vectors (B, D)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Flat vectors (B, D) float32 of latents (B, K)."""

    def decode_blocks(self, latents: Tensor, block_values: int = BLOCK_VALUES) -> Iterator[tuple[str, slice, Tensor]]:
        """(tensor name, place in the flat vector, values (B, place)) of a few columns at a time."""

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that rebuild it together with its layout and config."""

    @classmethod
    def from_state(cls, layout: Layout, config: Any, state: Mapping[str, Tensor]) -> Autoencoder:
        """The autoencoder of :meth:`state_dict`, of the settings in its own config.

        Raises:
            StateError: a tensor is missing or of another shape.
        """


@dataclass(frozen=True)
class Encoded:
    """A fitted autoencoder and what is known of the rows it was fitted on.

    Attributes:
        autoencoder: the encoder and decoder.
        latents: (N, K) float32, of all rows that were read, held-out ones included.
        variances: (K,) float64, share of the training rows' variance along each kept direction.
        fidelity: share of the held-out rows' variance about the mean of their trajectory (of all rows', if none are
            held out) that survives encoding and decoding; one minus the relative squared error.
        late: writes the autoencoder's tensors on the device ``meta`` into the generator's file, where a large basis is
            made only as it is written; else None.
    """

    autoencoder: Autoencoder
    latents: Tensor
    variances: Tensor
    fidelity: float
    late: LateTensors | None = None
