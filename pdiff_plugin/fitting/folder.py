"""The run folder of a fit and its ``fit.json``: settings, history, measurements, and whether it is finished."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdiff_plugin.config import FitConfig
from pdiff_plugin.errors import FitExistsError
from pdiff_plugin.fitting.measures import finite_or_none
from pdiff_plugin.fitting.runtime import CHECKPOINT_SUFFIX
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.generator_file import FILE_NAME
from pdiff_plugin.snapshots.files import read_json, write_json
from pdiff_plugin.snapshots.store import SnapshotStore

FORMAT = "pdiff-fit"
FORMAT_VERSION = 1
STAGES = ("statistics", "autoencoder", "diffusion")


@dataclass
class Run:
    """The run folder's ``fit.json``."""

    folder: Path | None
    document: dict[str, Any]

    @classmethod
    def open(
        cls, store: SnapshotStore, config: FitConfig, folder: Path | None, *, fresh: bool, source: str | None = None
    ) -> Run:
        """Open or begin a run; ``source`` is where the store came from, if not from its own folder.

        Raises:
            FitExistsError: the folder holds a fit of other settings or other snapshots.
        """
        mine = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "status": "running",
            "store": source or str(store.path.resolve()),
            "config": config.to_json(),
            "snapshots": fingerprint(store),
            "seconds": {},
            "history": [],
        }
        run = cls(folder, mine)
        if folder is None:
            return run
        path = folder / "fit.json"
        if path.exists() and not fresh:
            found = read_json(path, FORMAT, FORMAT_VERSION)
            # By way of the dataclass, so that a setting which came later has its default.
            if FitConfig.from_json(found["config"]) != config:
                raise FitExistsError(str(folder), "other settings")
            if found["snapshots"] != mine["snapshots"]:
                raise FitExistsError(str(folder), "other snapshots")
            run.document = found
        elif fresh:
            for name in ("fit.json", FILE_NAME, *(f"{stage}{CHECKPOINT_SUFFIX}" for stage in STAGES)):
                (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        run.write()
        return run

    @property
    def is_finished(self) -> bool:
        done = self.document["status"] == "finished"
        return done and self.folder is not None and (self.folder / FILE_NAME).is_file()

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

    def write_history(self, history: list[dict[str, float]]) -> None:
        self.document["history"] = _plain(history)
        self.write()

    def finish(self, generator: WeightGenerator, history: list[dict[str, float]]) -> None:
        self.document |= {"status": "finished", "history": _plain(history), "report": generator.report}
        if self.folder is not None:
            generator.save(self.folder)
        self.write()

    def write(self) -> None:
        if self.folder is not None:
            write_json(self.folder / "fit.json", self.document)


def _plain(history: list[dict[str, float]]) -> list[dict[str, float | None]]:
    return [
        {key: value if isinstance(value, int) else finite_or_none(value) for key, value in entry.items()}
        for entry in history
    ]


def fingerprint(store: SnapshotStore) -> str:
    """Hex digest of the layout, of which snapshots there are, and of their first values."""
    text = json.dumps([store.layout.digest, store.trajectories, store.trajectory_index.tolist(), store.steps.tolist()])
    values = store.rows(0, fingerprint_columns(store.layout.num_values).stop)
    return hashlib.sha256(text.encode() + values.numpy().tobytes()).hexdigest()[:16]


def fingerprint_columns(num_values: int) -> slice:
    """The columns that :func:`fingerprint` reads: all of a short row, few of a long one."""
    return slice(0, min(num_values, 64))
