"""Members as files: one safetensors state dict each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from pdiff_plugin.generator.autoencoder import ROWS_AT_A_TIME
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.snapshots.files import replacing
from pdiff_plugin.snapshots.layout import DTYPES
from pdiff_plugin.snapshots.tensor_files import TensorFileWriter

# Members whose files are written side by side. As many as the autoencoders decode together, so that every way of
# working gives the same bits.
MEMBER_CHUNK = ROWS_AT_A_TIME


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

    A few columns of a few members are in memory at a time. A file appears when it is whole.

    Args:
        generator: decodes.
        latents: as from ``generator.sample_latents``.
        folder: must exist.
        header: of every file, beside the member's own number.
        first: number of the first member.
        on_member: told each number that is done.
    """
    layout = generator.layout
    tensors = {spec.name: (DTYPES[spec.dtype], spec.shape) for spec in layout}
    paths = [folder / f"member-{number:04d}.safetensors" for number in range(first, first + len(latents))]
    for start in range(0, len(latents), MEMBER_CHUNK):
        chunk = range(start, min(start + MEMBER_CHUNK, len(latents)))
        with ExitStack() as stack:
            temps = [stack.enter_context(replacing(paths[place])) for place in chunk]
            files = [
                stack.enter_context(TensorFileWriter(temp, tensors, {**header, "member": str(first + place)}))
                for place, temp in zip(chunk, temps, strict=True)
            ]
            for name, columns, values in generator.autoencoder.decode_blocks(latents[chunk.start : chunk.stop]):
                for file, row in zip(files, values, strict=True):
                    file.write(name, row, columns.start - layout.slices[name].start)
        if on_member is not None:
            for place in chunk:
                on_member(first + place)
    return paths
