"""Members as files, ``pdiff-member`` version 1: one safetensors state dict each.

The header holds ``format``, ``format_version``, the ``generator`` they were made by (where it was loaded from, if it
was), the ``seed`` of the draw and the number of the ``member`` in it; of members that were made for a condition, also
this ``condition`` as JSON text, and a ``warning`` if it lies outside what was recorded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin.config import SamplingConfig, configured
from pdiff_plugin.errors import MembersExistError, StorageError
from pdiff_plugin.generator.autoencoder import ROWS_AT_A_TIME
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.weights import MEMBER_FORMAT, MEMBER_FORMAT_VERSION, WeightSet
from pdiff_plugin.progress import OnProgress, Progress
from pdiff_plugin.snapshots.conditions import parse_condition
from pdiff_plugin.snapshots.files import remove_strays, replacing
from pdiff_plugin.snapshots.layout import DTYPES
from pdiff_plugin.snapshots.tensor_files import TensorFileWriter

# Members whose files are written side by side. As many as the autoencoders decode together, so that every way of
# working gives the same bits.
MEMBER_CHUNK = ROWS_AT_A_TIME

# (latents (M, K), folder, header, on_progress) -> paths; as write_latents, with its generator.
LatentWriter = Callable[[Tensor, Path, Mapping[str, str], OnProgress | None], list[Path]]


def write_members(
    generator: WeightGenerator,
    folder: str | os.PathLike[str],
    config: SamplingConfig | None = None,
    *,
    condition: Mapping[str, Any] | None = None,
    num_members: int = 16,
    seed: int = 0,
    overwrite: bool = False,
    keep: Callable[[WeightSet], Sequence[int]] | None = None,
    write: LatentWriter | None = None,
    on_progress: OnProgress | None = None,
    **changes: Any,
) -> list[Path]:
    """Sample members into ``member-0000.safetensors`` and so on, for ``model.load_state_dict(..., strict=False)``.

    Args:
        generator: makes them.
        folder: for the files; made if missing.
        config: how they are drawn; the defaults of :class:`SamplingConfig` unless given.
        condition: what they are made for, as of :meth:`WeightGenerator.conditions_of_members`.
        num_members: how many to draw.
        seed: of the draw.
        overwrite: replace members that are in the folder already.
        keep: chooses those to write, by their places among the members drawn.
        write: decodes latents into files; in this process unless given.
        on_progress: told the number of members done.
        **changes: single fields of ``config``.

    Returns:
        The paths, in order.

    Raises:
        MembersExistError: the folder holds members, and ``overwrite`` is False. Nothing has been changed.
        ConfigError, ConditionError: as of :meth:`WeightGenerator.sample`. Nothing has been changed.
        StorageError: the disk is full, or can only be read. The folder then holds no members.
    """
    folder, config = Path(folder), configured(SamplingConfig, config, changes)
    earlier = sorted(folder.glob("member-*.safetensors"))
    if earlier and not overwrite:
        raise MembersExistError(str(folder), len(earlier))
    latents = generator.sample_latents(
        num_members, config, condition=condition, rng=torch.Generator().manual_seed(seed)
    )
    folder.mkdir(parents=True, exist_ok=True)
    remove_strays(folder)
    if keep is not None:
        latents = latents[list(keep(generator.decode(latents)))]
    for path in earlier:
        path.unlink()
    source = {} if generator.path is None else {"generator": str(generator.path)}
    header = {"format": MEMBER_FORMAT, "format_version": str(MEMBER_FORMAT_VERSION), **source, "seed": str(seed)}
    if condition:
        told = generator.told_of(condition)
        header |= {"condition": json.dumps(dict(parse_condition(condition, "the condition")))}
        header |= {"warning": told} if told else {}
    try:
        return (write or partial(write_latents, generator))(latents, folder, header, on_progress)
    except StorageError:
        for path in folder.glob("member-*.safetensors"):  # part of what was asked for, and in the way of the next call
            path.unlink()
        raise


def write_latents(
    generator: WeightGenerator,
    latents: Tensor,
    folder: Path,
    header: Mapping[str, str],
    on_progress: OnProgress | None = None,
    *,
    first: int = 0,
) -> list[Path]:
    """Decode ``latents`` (M, K) into the files of members; returns their paths in order.

    A few columns of a few members are in memory at a time. A file appears when it is whole.

    Args:
        generator: decodes.
        latents: as from ``generator.sample_latents``.
        folder: must exist.
        header: of every file, beside the member's own number.
        on_progress: told the number of members done.
        first: number of the first member.
    """
    layout, M = generator.layout, len(latents)
    tensors = {spec.name: (DTYPES[spec.dtype], spec.shape) for spec in layout}
    paths = [folder / f"member-{number:04d}.safetensors" for number in range(first, first + M)]
    for start in range(0, M, MEMBER_CHUNK):
        chunk = range(start, min(start + MEMBER_CHUNK, M))
        with ExitStack() as stack:
            temps = [stack.enter_context(replacing(paths[place])) for place in chunk]
            files = [
                stack.enter_context(TensorFileWriter(temp, tensors, {**header, "member": str(first + place)}))
                for place, temp in zip(chunk, temps, strict=True)
            ]
            for name, columns, values in generator.autoencoder.decode_blocks(latents[chunk.start : chunk.stop]):
                for file, row in zip(files, values, strict=True):
                    file.write(name, row, columns.start - layout.slices[name].start)
        if on_progress is not None:
            on_progress(Progress("generate", chunk.stop, M))
    return paths
