"""Which stores a user means by folders, glob patterns and URLs of buckets, and a short name for each of them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pdiff_plugin.errors import StoreNotFoundError
from pdiff_plugin.snapshots.layout import LAYOUT_NAME
from pdiff_plugin.snapshots.remote import find_stores_in_bucket, is_remote
from pdiff_plugin.snapshots.shards import layout_files

_MAX_DEPTH = 3  # below a folder, where stores are looked for to name them in an error
_SAY_NOTHING = ("pdiff-snapshots", "snapshots", "store")  # names of folders; the first is the recorder's own
_MAX_LABEL = 80  # characters; a file name has at most 255 bytes


@dataclass(frozen=True)
class Source:
    """One store to be read.

    Attributes:
        path: its folder, as it was given or found, or its URL.
        label: what tells it from the others, fit for the name of a trajectory.
    """

    path: str
    label: str

    @property
    def is_remote(self) -> bool:
        return is_remote(self.path)


def find_sources(given: Sequence[str | os.PathLike[str]], without: Path) -> list[Source]:
    """The stores that are meant, each once, in the order given, those of a pattern by their names.

    Args:
        given: folders, glob patterns (``**`` for folders of any depth) and URLs, with or without a pattern.
        without: left out where a pattern, or the shell, has found it: the store that others are merged into.

    Raises:
        StoreNotFoundError: a folder that is no store, or a pattern that matches none.
        BucketError: a bucket refuses us, or does not answer.
    """
    found: dict[str, str] = {}
    for one in (str(one) for one in given):
        for path in find_stores_in_bucket(one) if is_remote(one) else _local(one):
            place = path if is_remote(path) else str(Path(path).resolve())
            if place != str(without.resolve()):
                found.setdefault(place, path)
    labels = _labels(list(found))
    return [Source(path, labels[place]) for place, path in found.items()]


def _local(given: str) -> list[str]:
    path = Path(given)
    if layout_files(path):
        return [given]
    if not path.exists() and glob.has_magic(given):
        matches = [match for match in sorted(glob.glob(given, recursive=True)) if layout_files(Path(match))]
        if not matches:
            raise StoreNotFoundError(given, "the pattern matches no store")
        return matches
    if not path.is_dir():
        raise StoreNotFoundError(given, "it is a file" if path.exists() else "there is no such folder")
    for depth in range(1, _MAX_DEPTH + 1):
        below = [p.parent for p in path.glob(f"{'*/' * depth}{LAYOUT_NAME}")]
        if below:
            names = {p.name for p in below}
            last = names.pop() if depth > 1 and len(names) == 1 else "*"
            pattern = Path(given, *["*"] * (depth - 1), last)
            raise StoreNotFoundError(given, f"it holds {len(below)} further down, which '{pattern}' names")
    raise StoreNotFoundError(given, f"it has no {LAYOUT_NAME}")


def _labels(places: Sequence[str]) -> dict[str, str]:
    """Place -> the last part of its path that no other place has there, or else as many last parts as it takes.

    Of ``runs/lr-0.1/pdiff-snapshots`` and ``runs/lr-0.2/pdiff-snapshots`` these are ``lr-0.1`` and ``lr-0.2``.
    """
    parts = {place: [part for part in re.split(r"[/\\]+", place) if part] for place in places}

    def is_alone(own: list[str], start: int, stop: int | None) -> bool:
        return sum(other[start:stop] == own[start:stop] for other in parts.values()) == 1

    labels = {}
    for place, own in parts.items():
        last = [(-k, -k + 1 or None) for k in range(1, len(own) + 1) if own[-k] not in _SAY_NOTHING]
        longer = [(-k, None) for k in range(2, len(own) + 1)]
        start, stop = next((piece for piece in last + longer if is_alone(own, *piece)), (-1, None))
        labels[place] = as_id("-".join(own[start:stop])[-_MAX_LABEL:])
    return labels


def as_id(text: str) -> str:
    """``text`` as a name that a trajectory may have."""
    return re.sub(r"[^\w.+=-]+", "-", text).lstrip(".") or "store"
