"""The user's own code that a flag names as `package.module:function`: tasks, models and training functions."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from pdiff_plugin.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


def load_model(text: str) -> nn.Module:
    """The model that `timm:NAME` or `package.module:function` names."""
    from torch import nn

    if text.startswith("timm:"):
        import timm

        try:
            model: nn.Module = timm.create_model(text.removeprefix("timm:"), pretrained=False)
        except RuntimeError as error:
            near = ", ".join(timm.list_models(f"*{text.removeprefix('timm:')[:6]}*")[:5])
            raise ConfigError(
                "model", text, f"must name a timm model ({error}); near it: {near or 'nothing'}"
            ) from error
        return model
    made: nn.Module = made_by("model", text, nn.Module)
    return made


def made_by(flag: str, text: str, kind: type[Any]) -> Any:
    """What `package.module:name` names where that is of ``kind``, else what this function returns, which must be."""
    named = _named(flag, text)
    if isinstance(named, kind):
        return named
    made = _checked(flag, text, named, (), f"a function or a {kind.__name__}")()
    if not isinstance(made, kind):
        raise ConfigError(flag, text, f"must return a {kind.__name__}, not a {type(made).__name__}")
    return made


def find_function(flag: str, text: str, *arguments: str) -> Callable[..., Any]:
    """The function that `package.module:function` names, which must take these arguments by position."""
    return _checked(flag, text, _named(flag, text), arguments, "a function")


def function_named(flag: str, text: str) -> Callable[..., Any]:
    """The function that `package.module:function` names, whatever it takes."""
    named = _named(flag, text)
    if not callable(named):
        raise ConfigError(flag, text, f"must name a function, not an object of type {type(named).__name__}")
    function: Callable[..., Any] = named
    return function


def _named(flag: str, text: str) -> Any:
    module_name, _, name = text.partition(":")
    if "/" in module_name or os.sep in module_name or module_name.endswith(".py"):
        advice = f"{PurePath(module_name).name.removesuffix('.py')}:{name}"
        raise ConfigError(
            flag, text, f"must be package.module:function, not a path; give {advice} from the folder of that file"
        )
    if not module_name or module_name.startswith(".") or not name:
        raise ConfigError(flag, text, "must be package.module:function")
    if "" not in sys.path:
        # A user's own module lies where the command runs, which a console script does not search.
        sys.path.insert(0, "")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(flag, text, f"must name a module that can be imported from {Path.cwd()} ({error})") from error
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise ConfigError(flag, text, f"must name a function of that module ({error})") from error


def _checked(flag: str, text: str, named: Any, arguments: tuple[str, ...], expected: str) -> Callable[..., Any]:
    if not callable(named):
        raise ConfigError(flag, text, f"must name {expected}, not an object of type {type(named).__name__}")
    function: Callable[..., Any] = named
    try:
        inspect.signature(function).bind(*arguments)
    except ValueError:  # some functions written in C do not tell their signature
        return function
    except TypeError as error:
        takes = f"that takes {', '.join(arguments)}" if arguments else "without arguments"
        raise ConfigError(flag, text, f"must name a function {takes} ({error})") from error
    return function
