"""Errors keep their fields and their text on the way home from another process."""

from __future__ import annotations

import inspect
import pickle

import pytest

from pdiff_plugin import errors

CLASSES = [getattr(errors, name) for name in errors.__all__ if name != "PDiffError"]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling_with_its_text(kind: type[errors.PDiffError]) -> None:
    fields = list(inspect.signature(kind.__init__).parameters)[1:]
    values = {"nearest": ("a", "b"), "num_snapshots": 3, "supported": 1, "found": 2}
    error = kind(*(values.get(field, f"<{field}>") for field in fields))

    again = pickle.loads(pickle.dumps(error))

    assert str(again) == str(error)
    assert vars(again) == vars(error)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_is_ours_and_of_a_builtin_kind(kind: type[errors.PDiffError]) -> None:
    assert issubclass(kind, errors.PDiffError)
    assert issubclass(kind, ValueError | TypeError | OSError | RuntimeError | ImportError)
