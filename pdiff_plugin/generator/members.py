"""Members as files: one safetensors state dict each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.files import replacing

# Members decoded at a time. One number for every way of working, so that all of them give the same bits.
MEMBER_CHUNK = 8


def write_members(
    generator: WeightGenerator,
    latents: Tensor,
    folder: Path,
    header: Mapping[str, str],
    *,
    first: int = 0,
    on_member: Callable[[int], None] | None = None,
) -> list[Path]:
    """Decode ``latents`` (M, K) and write ``member-0000.safetensors`` and so on; returns the paths in order.

    Args:
        generator: decodes.
        latents: as from ``generator.sample_latents``.
        folder: must exist.
        header: of every file, beside the member's own number.
        first: number of the first member.
        on_member: told each number that is done.
    """
    paths = []
    for start in range(0, len(latents), MEMBER_CHUNK):
        flat = generator.autoencoder.decode(latents[start : start + MEMBER_CHUNK])
        for offset, state in enumerate(WeightSet.from_flat(flat, generator.layout).members()):
            number = first + start + offset
            path = folder / f"member-{number:04d}.safetensors"
            with replacing(path) as temp:
                contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
                save_file(contiguous, temp, {**header, "member": str(number)})
            paths.append(path)
            if on_member is not None:
                on_member(number)
    return paths
