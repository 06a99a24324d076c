"""Where in a bucket a merged trajectory was copied from, so that the next merge need not read it again to know it.

    STORE/trajectories/<id>/origin.json
    {"format": "pdiff-origin", "format_version": 1, "where": URL, "files": {NAME: version}}

A version is what the bucket tells of an object: its size, and a text that changes when it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pdiff_plugin.errors import FormatError, FormatVersionError
from pdiff_plugin.snapshots.files import read_json, write_json

FORMAT = "pdiff-origin"
FORMAT_VERSION = 1
FILE_NAME = "origin.json"


@dataclass(frozen=True)
class Origin:
    """A trajectory in a bucket as it was at one time.

    Attributes:
        where: its URL.
        files: names and versions, by name.
    """

    where: str
    files: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, where: str, files: Mapping[str, str]) -> Origin:
        return cls(where, tuple(sorted(files.items())))


def write_origin(folder: Path, origin: Origin) -> None:
    """Keep where the trajectory in ``folder`` comes from."""
    document = {"format": FORMAT, "format_version": FORMAT_VERSION}
    write_json(folder / FILE_NAME, {**document, "where": origin.where, "files": dict(origin.files)})


def read_origin(folder: Path) -> Origin | None:
    """Where a trajectory comes from; None if that is not known, or not all of it is there."""
    try:
        document = read_json(folder / FILE_NAME, FORMAT, FORMAT_VERSION)
    except (FileNotFoundError, FormatError, FormatVersionError):
        return None  # it is then read again
    match document:
        case {"where": str(where), "files": dict(files)} if all(isinstance(text, str) for text in files.values()):
            return Origin.of(where, files) if {path.name for path in folder.iterdir()} >= files.keys() else None
    return None
