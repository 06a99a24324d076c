"""The user's own code that a flag names as `package.module:function`: tasks, models and training functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
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
    """Import `package.module:function`, call it, and check what it returns."""
    made = find_function(flag, text)()
    if not isinstance(made, kind):
        raise ConfigError(flag, text, f"must return a {kind.__name__}, not a {type(made).__name__}")
    return made


def find_function(flag: str, text: str) -> Callable[..., Any]:
    """The function that `package.module:function` names."""
    module_name, _, function_name = text.partition(":")
    if not function_name:
        raise ConfigError(flag, text, "must be package.module:function")
    if "" not in sys.path:
        # A user's own module lies where the command runs, which a console script does not search.
        sys.path.insert(0, "")
    try:
        function: Callable[..., Any] = getattr(import_module(module_name), function_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(flag, text, f"must name a module that can be imported from {Path.cwd()} ({error})") from error
    except AttributeError as error:
        raise ConfigError(flag, text, f"must name a function of that module ({error})") from error
    return function
