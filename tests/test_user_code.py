"""What `package.module:name` may be, and what is said of common slips."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdiff_plugin.errors import ConfigError
from pdiff_plugin.user_code import find_function, made_by

MODULE = """
made = [1]

def make():
    return [2]

def with_name(name):
    return [name]

number = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_user_code.py").write_text(MODULE)
    (tmp_path / "my_broken_code.py").write_text("import math\nmath.no_such_function()\n")
    monkeypatch.chdir(tmp_path)


def test_a_function_is_called_and_a_finished_object_is_taken_as_it_is() -> None:
    assert made_by("--task", "my_user_code:make", list) == [2]
    assert made_by("--task", "my_user_code:made", list) == [1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("./my_user_code.py:make", "not a path; give my_user_code:make"),
        ("my_user_code.py:make", "not a path; give my_user_code:make"),
        ("tasks/my_user_code:make", "not a path; give my_user_code:make"),
        (".my_user_code:make", "must be package.module:function"),
        (":make", "must be package.module:function"),
        ("my_user_code:", "must be package.module:function"),
        ("my_user_code:makes", "must name a function of that module (module 'my_user_code' has no attribute 'makes')"),
        ("my_user_code:number", "must name a function or a list, not an object of type int"),
        ("my_user_code:with_name", "must name a function without arguments (missing a required argument: 'name')"),
    ],
)
def test_a_slip_is_named(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made_by("--task", text, list)
    assert str(caught.value).startswith(f"--task = {text!r}: ")
    assert expected in str(caught.value)


def test_a_training_function_must_take_a_seed() -> None:
    assert find_function("--train-with", "my_user_code:with_name", "seed")(7) == [7]
    with pytest.raises(ConfigError, match=r"must name a function that takes seed \(too many positional arguments\)"):
        find_function("--train-with", "my_user_code:make", "seed")


def test_an_error_inside_a_users_module_is_not_taken_for_a_missing_function() -> None:
    with pytest.raises(AttributeError, match="no_such_function"):
        made_by("--task", "my_broken_code:make", list)
