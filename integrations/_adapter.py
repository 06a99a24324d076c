"""What the adapters share. They only translate a trainer's events; tensors and files are the core recorder's."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from inspect import Parameter, Signature
from types import TracebackType
from typing import Any, ClassVar, get_type_hints

from torch import Tensor

from pdiff_plugin.config import RecorderConfig
from pdiff_plugin.errors import ConditionError, ConfigError, MissingDependencyError, NotHookableError
from pdiff_plugin.recording.hooks import unwrap_optimizer
from pdiff_plugin.recording.recorder import PDiffRecorder as Recorder
from pdiff_plugin.recording.recorder import is_by_name
from pdiff_plugin.snapshots.conditions import parse_condition


@dataclass(frozen=True)
class Requires:
    """What an adapter needs, and what its import said.

    Attributes:
        module: the trainer's.
        error: why it could not be imported, if so.
        package: that holds it, where that has another name.
        extra: of ours that installs it, where that has another name.
    """

    module: str
    error: ImportError | None = None
    package: str | None = None
    extra: str | None = None

    def check(self) -> None:
        """Raise what a user can act on.

        Raises:
            MissingDependencyError: the trainer is not installed.
            ImportError: it is, but cannot be imported; its own error.
        """
        if self.error is None:
            return
        if isinstance(self.error, ModuleNotFoundError) and (self.error.name or "").split(".")[0] == self.module:
            raise MissingDependencyError(self.package or self.module, self.extra or self.module) from self.error
        raise self.error


class Adapter:
    """A core recorder and its counters.

    Args:
        store: the store's folder; inside the trainer's own output folder unless given.
        config: what is recorded and when.
        recorder: a core recorder with its own store and settings, instead of those.
        changes: single fields of :class:`pdiff_plugin.RecorderConfig`.
    """

    requires: ClassVar[Requires]

    def __init__(
        self,
        store: str | os.PathLike[str] | None = None,
        config: RecorderConfig | None = None,
        *,
        recorder: Recorder | None = None,
        **changes: Any,
    ) -> None:
        self._check()
        super().__init__()
        if recorder is not None and (store is not None or config is not None or changes):
            raise TypeError("a recorder has its store and settings already: give it, or them")
        self.recorder = recorder if recorder is not None else Recorder(store, config, **changes)

    def _check(self) -> None:
        """Raise where the trainer cannot be used."""
        self.requires.check()

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


def with_settings_named(init: Callable[..., None]) -> Signature:
    """The signature of ``init`` with each setting of a recorder in the place of ``**changes``; None is its default."""
    signature = inspect.signature(init)
    types = get_type_hints(init) | get_type_hints(RecorderConfig, localns={"Tensor": Tensor})
    named = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=None, annotation=types[field.name] | None)
        for field in fields(RecorderConfig)
    ]
    kept = [p.replace(annotation=types.get(p.name, p.annotation)) for p in signature.parameters.values()]
    return signature.replace(parameters=[*kept[:-1], *named])


def hookable(optimizer: Any) -> Any:
    """The torch optimizer inside ``optimizer``; None if (as DeepSpeed's) it has no hooks."""
    try:
        return unwrap_optimizer(optimizer)
    except NotHookableError:
        return None


def looked_up(
    condition: Any, hparams: Mapping[str, Any], where: str, others: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """What a trainer has of a ``condition`` that is not a dict of the user's own; None if it is one, or none is wanted.

    Args:
        condition: of the settings: ``"hparams"`` for all of ``hparams`` that can be in a condition, or a list of names.
        hparams: the trainer's own, by name.
        where: these are, for errors.
        others: also found by name, but not part of ``"hparams"``.

    Raises:
        ConfigError: another text, no hparams, or a name that is in neither.
    """
    if not is_by_name(condition):
        return None
    if isinstance(condition, str):
        if condition != "hparams":
            raise ConfigError("condition", condition, "must be a dict, 'hparams', or a list of names")
        found = {name: value for name, value in hparams.items() if _is_possible(name, value)}
        if not found:
            raise ConfigError("condition", condition, f"needs {where}, which has none that is a number, text or list")
        return found
    known = {**(others or {}), **hparams}
    missing = [name for name in condition if name not in known]
    if missing:
        raise ConfigError("condition", list(condition), f"names {missing[0]!r}, which {where} does not have")
    return {name: known[name] for name in condition}


def _is_possible(name: Any, value: Any) -> bool:
    try:
        parse_condition({name: value}, "")
    except ConditionError:
        return False
    return True
