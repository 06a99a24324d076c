"""A fit over several stores: they are merged into one in the fit's folder, by links, which take no room.

The fit, its workers and whoever judges the result then read that one as any other.
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pdiff_plugin.errors import ConfigError, FitExistsError
from pdiff_plugin.fitting.folder import JSON_NAME
from pdiff_plugin.progress import OnProgress
from pdiff_plugin.snapshots.merge import is_merge_of, merge_stores
from pdiff_plugin.snapshots.remote import is_remote
from pdiff_plugin.snapshots.store import SnapshotStore

logger = logging.getLogger(__name__)

MERGED_NAME = "merged-store"

Stores = SnapshotStore | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def one_store(
    stores: Stores, out: str | os.PathLike[str] | None, *, fresh: bool, on_progress: OnProgress | None = None
) -> SnapshotStore | str:
    """The store itself if it is one, else that into which several are merged, in the folder of the fit.

    Args:
        stores: a store, its folder or URL; or several folders, or patterns that match some.
        out: folder of the fit.
        fresh: merge anew.
        on_progress: told how merging gets on.

    Raises:
        ConfigError: there is no such folder, or something is in a bucket.
        FitExistsError: ``out`` holds a fit of other stores, or of what was in them before.
        StoresDifferError, UnmergeableStoreError, ConditionError, StoreNotFoundError: they cannot be merged.
    """
    if isinstance(stores, SnapshotStore):
        return stores
    given = [str(one) for one in ([stores] if isinstance(stores, str | os.PathLike) else stores)]
    if len(given) == 1 and not is_pattern(given[0]):
        return given[0]
    if out is None or is_remote(out) or any(map(is_remote, given)):
        where = "out" if out is None or is_remote(out) else "store"
        found = None if out is None else str(out) if where == "out" else given
        advice = "must be on disk where several stores are fitted: `pdiff merge` makes one of them first"
        raise ConfigError(where, found, advice)
    out = Path(out)
    merged = out / MERGED_NAME
    if any(Path(one).resolve() == merged.resolve() for one in given):
        raise ConfigError("store", given, f"must be other stores than {merged}, which they are merged into")
    if fresh and merged.exists():
        shutil.rmtree(merged)
    if fresh or not (out / JSON_NAME).exists():
        report = merge_stores(given, merged, on_progress=on_progress)
        for sentence in report.left_out:
            logger.warning(sentence)
    if not is_merge_of(merged, given):
        raise FitExistsError(str(out), "other snapshots")
    return str(merged)


def is_pattern(store: str) -> bool:
    """Whether it stands for the stores that it matches."""
    return "*" in store if is_remote(store) else glob.has_magic(store) and not Path(store).exists()
