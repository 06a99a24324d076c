"""What a fitted generator is made of, and the one file that holds it.

    generator.safetensors    tensors ``autoencoder.*``, ``frames.*``, ``denoiser.*`` and, if distilled, ``one_step.*``,
                             if aligned, ``alignment.*``; the header holds, as JSON text, ``config``, ``layout``,
                             ``trajectories``, ``report`` (what the fit measured) and ``provenance``; version 2, of a
                             generator with conditions, also ``variables``, ``conditions`` and ``centre``; version 3 is
                             one whose ``frames.*`` hold what a task taught (``frames.refinement.*``)

Shapes: R trajectories, K latent width, U hidden units of an alignment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from pdiff_plugin.config import FitConfig
from pdiff_plugin.errors import FormatError, GeneratorNotFoundError
from pdiff_plugin.generator.alignment import Alignment
from pdiff_plugin.generator.autoencoder import Autoencoder
from pdiff_plugin.generator.condition_frames import ConditionFrames
from pdiff_plugin.generator.conv import ConvAutoencoder
from pdiff_plugin.generator.denoiser import new_denoiser, new_one_step
from pdiff_plugin.generator.frames import Frames
from pdiff_plugin.generator.state import StateError, check_shapes, rebuilt, under
from pdiff_plugin.generator.subspace import SubspaceAutoencoder
from pdiff_plugin.generator.variables import Variables
from pdiff_plugin.snapshots.conditions import Value, parse_condition
from pdiff_plugin.snapshots.files import is_number, reading
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.tensor_files import LateTensors, from_json, load_tensors, save_tensors

T = TypeVar("T")
P = TypeVar("P", bound="GeneratorParts")

FORMAT = "pdiff-generator"
FORMAT_VERSION = 3
# Generators that need no more are as they were, and older releases read them.
_VERSION_WITHOUT_CONDITIONS, _VERSION_WITHOUT_REFINEMENT = 1, 2
FILE_NAME = "generator.safetensors"
# By the `kind` of their settings.
AUTOENCODERS: dict[str, type[Autoencoder]] = {"subspace": SubspaceAutoencoder, "conv": ConvAutoencoder}


@dataclass(kw_only=True, eq=False)
class GeneratorParts:
    """What the file holds.

    Attributes:
        layout: the tensors it makes.
        config: the settings it was fitted with.
        autoencoder: latents <-> flat vectors.
        frames: each trajectory's own coordinates, in which the denoiser works.
        denoiser: the averaged network that the samplers ask.
        trajectories: ids of the runs it was fitted on, in the order of its condition.
        variables: how a condition becomes features; None where runs are only numbered.
        conditions: at which each of the trajectories was recorded; empty where runs are only numbered.
        report: what the fit measured, plain numbers by name.
        provenance: store, counts and versions.
        one_step: map from noise to clean coordinates, or None.
        alignment: orders of hidden units in which its trajectories were read, or None. Members have them in the order
            of the first trajectory.
        path: file or folder that it was loaded from, or None.
        warned: what it has warned of, once each.
    """

    layout: Layout
    config: FitConfig
    autoencoder: Autoencoder
    frames: Frames | ConditionFrames
    denoiser: nn.Module
    trajectories: list[str]
    variables: Variables | None = None
    conditions: list[dict[str, Value]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    one_step: nn.Module | None = None
    alignment: Alignment | None = None
    path: Path | None = None
    warned: set[str] = field(default_factory=set, init=False, repr=False)

    def save(self, path: str | os.PathLike[str], late: LateTensors | None = None) -> Path:
        """Write one safetensors file and return its path; a folder gets ``generator.safetensors``.

        Tensors that are not there yet, on the device ``meta``, are left to ``late``.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            path.mkdir(parents=True, exist_ok=True)
            path = path / FILE_NAME
        states = {
            "autoencoder": self.autoencoder.state_dict(),
            "frames": self.frames.state_dict(),
            "denoiser": self.denoiser.state_dict(),
            "one_step": {} if self.one_step is None else self.one_step.state_dict(),
        }
        tensors = {f"{part}.{name}": tensor for part, state in states.items() for name, tensor in state.items()}
        if self.alignment is not None:
            tensors |= self.alignment.state_dict()
        header = {
            "config": self.config.to_json(),
            "layout": self.layout.to_json(),
            "trajectories": self.trajectories,
            "report": self.report,
            "provenance": self.provenance,
        }
        version = _VERSION_WITHOUT_CONDITIONS
        if self.variables is not None and isinstance(self.frames, ConditionFrames):
            version = _VERSION_WITHOUT_REFINEMENT
            header |= {"variables": self.variables.to_json(), "conditions": self.conditions}
            header |= {"centre": self.frames.centre.to_json()}
        if self.frames.refinement is not None:
            version = FORMAT_VERSION
        save_tensors(path, tensors, FORMAT, version, {name: json.dumps(part) for name, part in header.items()}, late)
        return path

    @classmethod
    def load(cls: type[P], path: str | os.PathLike[str]) -> P:
        """Read what :meth:`save` wrote, from the file or its folder. The basis stays on disk until it is used.

        Raises:
            GeneratorNotFoundError: nothing there.
            FormatError: not a generator file, or one whose parts do not fit together.
            FormatVersionError: written by a newer release.
        """
        given = path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        if not path.is_file():
            raise GeneratorNotFoundError(str(path.parent if path.name == FILE_NAME else path))
        with reading(str(path), f"a {FORMAT} file"):
            return cls(**_read_parts(_File(path)), path=given)


def _read_parts(file: _File) -> dict[str, Any]:
    """What :class:`GeneratorParts` is made of, each part checked against the others."""
    config = file.header("config", FitConfig.from_json)
    layout = file.header("layout", partial(Layout.from_json, path=str(file.path)))
    trajectories = file.header("trajectories", _names)
    report = file.header("report", _report)
    with file.part("autoencoder.") as state:
        autoencoder = AUTOENCODERS[config.autoencoder.kind].from_state(layout, config.autoencoder, state)
    variables, conditions = None, []
    frames: Frames | ConditionFrames
    if file.has("variables"):
        variables = file.header("variables", Variables.from_json)
        conditions = file.header("conditions", partial(_conditions, variables, len(trajectories)))
        with file.part("frames.") as state:
            check_shapes(state, {"centre.features": ("R", variables.num_features)})
            frames = file.header("centre", partial(ConditionFrames.from_state, state=state))
            num_recorded = autoencoder.latent_dim - frames.latent_dim + frames.width
            check_shapes(state, {"centre.means": ("R", num_recorded)})
    else:
        with file.part("frames.") as state:
            check_shapes(state, {"centre": (len(trajectories), "K")})
            frames = Frames.from_state(state)
            num_recorded = autoencoder.latent_dim - frames.latent_dim + frames.centre.shape[1]
            check_shapes(state, {"centre": (len(trajectories), num_recorded)})
    with file.part("denoiser.") as state:
        denoiser = _network(new_denoiser, config, frames, state)
    with file.part("one_step.") as state:
        one_step = _network(new_one_step, config, frames, state) if state else None
    alignment = None
    if config.align != "none":
        with file.part("alignment."):
            alignment = Alignment.from_state(layout, file.tensors, report.get("alignment", {}))
    return {
        "layout": layout,
        "config": config,
        "autoencoder": autoencoder,
        "frames": frames,
        "denoiser": denoiser,
        "trajectories": trajectories,
        "variables": variables,
        "conditions": conditions,
        "report": report,
        "provenance": file.header("provenance", _mapping),
        "one_step": one_step,
        "alignment": alignment,
    }


class _File:
    """An opened generator file, which says of itself what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors, self._header = load_tensors(path, FORMAT, FORMAT_VERSION)

    def has(self, name: str) -> bool:
        """Whether the header has an entry of this name."""
        return name in self._header

    def header(self, name: str, read: Callable[[Any], T]) -> T:
        """What ``read`` makes of the JSON in the header under ``name``."""
        document = from_json(self.path, self._header, name)
        try:
            return read(document)
        except (FormatError, StateError):
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            found = f"{name} in the header that cannot be read ({type(error).__name__}: {error})"
            raise FormatError(str(self.path), found, "what a fit wrote there") from error

    @contextmanager
    def part(self, prefix: str) -> Iterator[dict[str, Tensor]]:
        """The tensors under a prefix; while it is open, errors about them name the file."""
        try:
            yield under(self.tensors, prefix)
        except StateError as error:
            found = f"tensor {prefix + error.name!r} {error.found}"
            raise FormatError(str(self.path), found, error.expected) from error


def _network(
    make: Callable[[FitConfig, Frames | ConditionFrames], nn.Module],
    config: FitConfig,
    frames: Frames | ConditionFrames,
    state: Mapping[str, Tensor],
) -> nn.Module:
    settings = config.diffusion
    num_layers = len(settings.conv_channels) if settings.network == "conv" else settings.num_blocks
    if num_layers > len(state):
        raise StateError("network", f"of {len(state)} tensors", f"those of {num_layers} layers")
    return rebuilt(partial(make, config, frames), state)


def _names(document: Any) -> list[str]:
    if not (isinstance(document, list) and document and all(isinstance(n, str) and n.isprintable() for n in document)):
        raise TypeError("no list of names")
    return document


def _mapping(document: Any) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise TypeError(f"a {type(document).__name__}, no object")
    return document


def _report(document: Any) -> dict[str, Any]:
    """What the fit measured, with what is worked with checked: the rest is shown."""
    report = _mapping(document)
    for point in report.get("diversity_curve", []):
        if not (is_number(point["spread_ratio"]) and is_number(point["temperature"])):
            raise ValueError("a diversity curve of other things than numbers")
    _mapping(report.get("alignment", {}))
    _mapping(report.get("condition", {}))
    return report


def _conditions(variables: Variables, num_trajectories: int, document: Any) -> list[dict[str, Value]]:
    conditions: list[dict[str, Value]] = [parse_condition(one, "the header") for one in document]
    if len(conditions) != num_trajectories:
        raise ValueError(f"{len(conditions)} conditions of {num_trajectories} trajectories")
    for condition in conditions:
        variables.check(condition)
    return conditions
