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

    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error) == dict(zip(fields, vars(error).values(), strict=True))
    assert again.args == error.args


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_arguments_may_be_named_and_the_text_is_all_that_args_hold(kind: type[errors.PDiffError]) -> None:
    fields = list(inspect.signature(kind.__init__).parameters)[1:]
    values = {field: 3 if field.startswith("num_") else f"<{field}>" for field in fields}
    named, in_order = kind(**values), kind(*values.values())

    assert str(named) == str(in_order)
    assert named.args == in_order.args == (str(named),)
    if isinstance(named, OSError):
        # Two positional arguments of an OSError are an errno and its text.
        assert (in_order.errno, in_order.strerror, in_order.filename) == (None, None, None)


def test_notes_and_a_subclass_of_somebody_else_survive_pickling_too() -> None:
    error = errors.ConfigError("lr", -1, "must be positive")
    error.__notes__ = ["in the second trial"]
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["in the second trial"]
    assert pickle.loads(pickle.dumps(Theirs("a", "b"))).args == ("a", "b")


def test_names_in_errors_do_not_reach_the_terminal_as_control_characters() -> None:
    error = errors.FormatError("a\x1b[2J", "the tensor 'b\u202e\ud800'", "another")
    assert str(error).startswith("a\\x1b[2J: found the tensor 'b\\u202e\\ud800', expected another.")
    assert error.args == (str(error),)
    assert error.path == "a\x1b[2J"


def test_what_a_file_holds_is_told_in_part_where_it_is_long() -> None:
    assert len(str(errors.FormatError("a", "x" * 100_000, "less"))) < 1000


class Theirs(errors.PDiffError):
    """An error of a user's own."""


def test_wrong_data_are_caught_as_a_wrong_setting_is() -> None:
    assert issubclass(errors.DataError, errors.ConfigError)
    assert str(errors.DataError("loader", 3, "must yield pairs")) == "loader = 3: it must yield pairs."


def test_a_file_that_is_another_says_what_to_do() -> None:
    text = str(errors.FormatError("a/layout.json", "a list", "a JSON object"))
    assert text == (
        "a/layout.json: found a list, expected a JSON object. "
        "Check the path; if it is right, copy the file again or write it anew."
    )


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_is_ours_and_of_a_builtin_kind(kind: type[errors.PDiffError]) -> None:
    assert issubclass(kind, errors.PDiffError)
    assert issubclass(kind, ValueError | TypeError | OSError | RuntimeError | ImportError)
