"""What the adapters share. They only translate a trainer's events; tensors and files are the core recorder's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from pdiff_plugin.errors import MissingDependencyError, NotHookableError
from pdiff_plugin.recording.hooks import unwrap_optimizer
from pdiff_plugin.recording.recorder import PDiffRecorder as Recorder

DEFAULT_FOLDER = "pdiff-snapshots"


class Adapter:
    """A core recorder and its counters.

    Args:
        store: the store's folder; inside the trainer's own output folder unless given.
        settings: as for :class:`pdiff_plugin.PDiffRecorder`, with the same defaults.
    """

    _package, _extra, _is_missing = "", "", False

    def __init__(self, store: str | os.PathLike[str] | None = None, **settings: Any) -> None:
        if self._is_missing:
            raise MissingDependencyError(self._package, self._extra)
        super().__init__()
        self.recorder = Recorder(store, **settings)

    def close(self) -> None:
        """Write what is left. Only needed where a trainer has no event for an exception in training."""
        self.recorder.close()

    def state_dict(self) -> dict[str, Any]:
        """Counters for a checkpoint, as plain JSON."""
        return self.recorder.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's counters."""
        self.recorder.load_state_dict(state_dict)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def hookable(optimizer: Any) -> Any:
    """The torch optimizer inside ``optimizer``; None if (as DeepSpeed's) it has no hooks."""
    try:
        return unwrap_optimizer(optimizer)
    except NotHookableError:
        return None
