"""The run folder of a fit and its ``fit.json``: settings, history, measurements, and whether it is finished."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdiff_plugin.config import FitConfig
from pdiff_plugin.errors import FitExistsError, FormatError, FormatVersionError
from pdiff_plugin.fitting.runtime import CHECKPOINT_SUFFIX
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.generator_file import FILE_NAME
from pdiff_plugin.snapshots.files import is_number, json_safe, read_json, reading, remove_strays, write_json
from pdiff_plugin.snapshots.fingerprint import fingerprint, fingerprint_of_first_columns
from pdiff_plugin.snapshots.remote import is_remote, mirrored
from pdiff_plugin.snapshots.scratch import remove_abandoned
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.tensor_files import LateTensors

FORMAT = "pdiff-fit"
FORMAT_VERSION = 1
JSON_NAME = "fit.json"
_DIGITS = 6  # of the figures in the history


@dataclass
class FitFolder:
    """A fit's folder, the document of its ``fit.json``, and its settings; without a path nothing is kept."""

    path: Path | None
    document: dict[str, Any]
    config: FitConfig

    @classmethod
    def open(
        cls, store: SnapshotStore, config: FitConfig, path: Path | None, *, fresh: bool, source: str | None = None
    ) -> FitFolder:
        """Open or begin a fit; ``source`` is where the store came from, if not from its own folder.

        Raises:
            FitExistsError: the folder holds a fit of other settings or other snapshots.
        """
        remove_abandoned()
        source = source or str(store.path.resolve())
        begun = _read(path / JSON_NAME) if path is not None and (path / JSON_NAME).exists() and not fresh else None
        config = config.settled(store.layout.num_values, begun[1] if begun is not None else None)
        mine = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "status": "running",
            "store": source,
            "config": config.to_json(),
            "snapshots": fingerprint_of_first_columns(store),
            # A copy from a bucket may lack the columns that this one reads.
            "fingerprint": None if is_remote(source) else fingerprint(store),
            "seconds": {},
            "history": [],
        }
        opened = cls(path, mine, config)
        if path is None:
            return opened
        if begun is not None:
            found, settings = begun
            if settings != config:
                raise FitExistsError(str(path), "other settings")
            # Fits of old, and those that began on a store in a bucket, do not have it.
            known = found.get("fingerprint") or mine["fingerprint"]
            if found["snapshots"] != mine["snapshots"] or known != (mine["fingerprint"] or known):
                raise FitExistsError(str(path), "other snapshots")
            opened.document = found | {"fingerprint": known}
        elif fresh:
            for stale in (path / JSON_NAME, path / FILE_NAME, *path.glob(f"*{CHECKPOINT_SUFFIX}")):
                stale.unlink(missing_ok=True)
        path.mkdir(parents=True, exist_ok=True)
        if not opened.is_finished:  # which may be on a disk that can only be read
            remove_strays(path)
            opened.write()
        return opened

    @property
    def is_finished(self) -> bool:
        done = self.document["status"] == "finished"
        return done and self.path is not None and (self.path / FILE_NAME).is_file()

    @property
    def settings(self) -> dict[str, Any]:
        """What a logger is told of the fit."""
        return {**self.document["config"], "store": self.document["store"]}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds spent inside to ``document["seconds"][stage]``, over all attempts."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.document["seconds"]
            seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 3)
            self.write()

    def add_bytes_read(self, stage: str, count: int) -> None:
        """Add to ``document["bytes_read"][stage]`` what was read from a bucket, over all attempts; not yet written."""
        if count:
            found = self.document.setdefault("bytes_read", {})
            found[stage] = found.get(stage, 0) + count

    @property
    def bytes_read(self) -> int:
        """What was read from a bucket in the stages that have ended."""
        total: int = sum(self.document.get("bytes_read", {}).values())
        return total

    def write_history(self, history: list[dict[str, float]]) -> None:
        self.document["history"] = json_safe(history, _DIGITS)
        self.write()

    def finish(
        self, generator: WeightGenerator, history: list[dict[str, float]], late: LateTensors | None = None
    ) -> None:
        """Write the generator, with what is made only as its file is written, and that the fit is finished."""
        if self.path is not None:
            generator.save(self.path, late)
        self.document |= {
            "status": "finished",
            "history": json_safe(history, _DIGITS),
            "report": generator.report,
        }
        self.write()

    def write(self) -> None:
        if self.path is not None:
            write_json(self.path / JSON_NAME, self.document)


def _read(path: Path) -> tuple[dict[str, Any], FitConfig]:
    """The document of a ``fit.json``, and its settings.

    Raises:
        FormatError: it is none.
        FormatVersionError: from a newer release.
    """
    found = read_json(path, FORMAT, FORMAT_VERSION)
    with reading(str(path), f"a {FORMAT} document; fresh=True (--fresh) replaces it"):
        # By way of the dataclass, so that a setting which came later has its default.
        settings = FitConfig.from_json(found["config"])
        if not all(isinstance(found[key], str) for key in ("status", "store", "snapshots")):
            raise TypeError("a status, a store or snapshots that are no text")
        if not isinstance(found["history"], list) or not all(map(is_number, found["seconds"].values())):
            raise TypeError("a history or seconds that are none")
        if not all(type(count) is int for count in found.get("bytes_read", {}).values()):
            raise TypeError("numbers of bytes that are none")
    return found, settings


def local_folder(out: str) -> AbstractContextManager[Path]:
    """The run folder ``out``; of one in a bucket, a copy whose changes are put back."""
    if not is_remote(out):
        return nullcontext(Path(out))
    return mirrored(out, last=JSON_NAME, always=(JSON_NAME, FILE_NAME), is_final=_is_finished)


def _is_finished(path: Path) -> bool:
    """Whether a folder holds a finished fit; what cannot be read is for whoever opens it."""
    try:
        status = read_json(path / JSON_NAME, FORMAT, FORMAT_VERSION).get("status")
    except (FileNotFoundError, FormatError, FormatVersionError):
        return False
    return status == "finished" and (path / FILE_NAME).is_file()
