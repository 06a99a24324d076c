"""The base file of a trajectory: the whole model at the end of its recording window.

base.safetensors   the tensors of its ``state_dict``; the header holds ``aliases``, a JSON object of name -> stored
                   name, and, where they are known, ``step``, ``total_steps``, ``rest_drift``, ``rest_drift_from_step``
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pdiff_plugin.errors import FormatError
from pdiff_plugin.snapshots.layout import FORMAT, FORMAT_VERSION
from pdiff_plugin.snapshots.tensor_files import from_json, load_header, load_tensors, save_tensors

BASE_NAME = "base.safetensors"
_NUMBERS = {"step": int, "total_steps": int, "rest_drift": float, "rest_drift_from_step": int}


def write_base(folder: Path, state: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write the whole model; tensors that share memory are stored once and their other names in the header."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            unique[name] = tensor
    save_tensors(folder / BASE_NAME, unique, FORMAT, FORMAT_VERSION, {"aliases": json.dumps(aliases), **header})


def read_base(folder: Path) -> dict[str, Tensor] | None:
    """The whole model, mapped from the base file of a trajectory, or None without one.

    Raises:
        FormatError: it cannot be read.
        FormatVersionError: from a newer release.
    """
    path = folder / BASE_NAME
    if not path.is_file():
        return None
    tensors, header = load_tensors(path, FORMAT, FORMAT_VERSION)
    aliases = from_json(path, {"aliases": "{}", **header}, "aliases")
    if not (isinstance(aliases, dict) and all(isinstance(a, str) and a in tensors for a in aliases.values())):
        raise FormatError(str(path), f"aliases {header['aliases']}", "names of stored tensors")
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}


def read_base_header(folder: Path) -> dict[str, str]:
    """What the base file of a trajectory says of itself, empty without one. Errors are those of :func:`read_base`."""
    path = folder / BASE_NAME
    if not path.is_file():
        return {}
    header = load_header(path, FORMAT, FORMAT_VERSION)
    for key, kind in _NUMBERS.items():
        try:
            kind(header.get(key, "0"))
        except ValueError as error:
            raise FormatError(str(path), f"{key} {header[key]!r}", "a number") from error
    return header
