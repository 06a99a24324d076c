"""Making members on the workers of a Ray cluster."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pdiff_plugin.cluster.connection import check_shared, connected, map_in_order, wait_for_room
from pdiff_plugin.config import DistributedConfig
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.generator_file import FILE_NAME
from pdiff_plugin.generator.members import MEMBER_CHUNK, write_latents
from pdiff_plugin.progress import OnProgress, Progress
from pdiff_plugin.snapshots.files import TEMP_MARK


def write_members_on_workers(
    latents: Tensor,
    folder: Path,
    header: Mapping[str, str],
    on_progress: OnProgress | None = None,
    *,
    generator: Path,
    distributed: DistributedConfig,
) -> list[Path]:
    """As :func:`write_latents`, a few members to a task of the cluster; the same files, in the order of the members.

    Workers map the generator's file instead of getting a copy, because a basis may be as large as many models.

    Args:
        latents: (M, K).
        folder: exists, on storage that every node sees.
        header: of every file.
        on_progress: told the number of members done.
        generator: folder or file, on storage that every node sees.
        distributed: where to work.
    """
    path = (generator / FILE_NAME if generator.is_dir() else generator).resolve()
    starts = list(range(0, len(latents), MEMBER_CHUNK))
    with connected(distributed.address):
        wait_for_room(distributed)
        # A file made for it tells whether what a node sees there is this very folder.
        mark = folder.resolve() / f"{TEMP_MARK}{uuid.uuid4().hex}"
        mark.write_text(mark.name, encoding="utf-8")
        try:
            check_shared([path, mark])
        finally:
            mark.unlink()

        def tell(done: int) -> None:
            if on_progress is not None:
                on_progress(Progress("generate", min(done * MEMBER_CHUNK, len(latents)), len(latents)))

        shared = (path, folder.resolve(), dict(header))
        items = [(start, latents[start : start + MEMBER_CHUNK]) for start in starts]
        parts = map_in_order(_write, shared, items, distributed, tell)
    return [folder / name for part in parts for name in part]


def _write(shared: tuple[Path, Path, dict[str, str]], item: tuple[int, Tensor]) -> list[str]:
    path, folder, header = shared
    first, latents = item
    return [p.name for p in write_latents(WeightGenerator.load(path), latents, folder, header, first=first)]
