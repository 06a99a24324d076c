"""Which tensors of a model a snapshot holds: every form of ``layers``, in one function."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from pdiff_plugin.config import Layers, RecorderConfig, layers_name
from pdiff_plugin.errors import SelectionError
from pdiff_plugin.modules.names import named_modules, named_tensors, unwrap
from pdiff_plugin.snapshots.layout import Kind, Layout

KEYWORDS = ("last-norms:2", "norms", "head", "lora", "all")
_NORM_CLASSES: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._BatchNorm,  # instance norms derive from _NormBase beside it
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
# transformers and timm have norms of their own (LlamaRMSNorm, T5LayerNorm), which share no base class.
_NORM_NAME = re.compile(r"(Batch|Layer|Group|Instance|RMS)Norm")
# The second names of each are those that Keras gives.
_NORM_WEIGHTS = ("weight", "gamma", "scale")
STATISTICS = ("running_mean", "running_var", "moving_mean", "moving_variance")


@dataclass(frozen=True)
class Selection:
    """The tensors that ``layers`` picked from a model.

    Attributes:
        tensors: name -> live tensor, in ``state_dict`` order.
        frozen: names that match but are left out, because they are not trained.
    """

    tensors: dict[str, Tensor]
    frozen: tuple[str, ...]

    @property
    def kinds(self) -> dict[str, Kind]:
        """Name -> whether it is a parameter or a buffer."""
        return {name: "parameter" if isinstance(t, nn.Parameter) else "buffer" for name, t in self.tensors.items()}

    @property
    def layout(self) -> Layout:
        return Layout.from_tensors(self.tensors, self.kinds)


def select(model: nn.Module, layers: Layers = RecorderConfig.layers, *, averaged: bool = False) -> Selection:
    """Pick the tensors that a snapshot of ``model`` holds.

    Args:
        model: any module; DataParallel, DistributedDataParallel and ``torch.compile`` wrappers are looked through.
        layers: one of

            - ``"last-norms:N"``: the last N normalization layers in the order in which the model defines them,
            - ``"norms"``: all of them,
            - ``"head"``: the classifier that timm names, else the last ``nn.Linear``,
            - ``"lora"``: the low-rank matrices that PEFT adds,
            - ``"all"``: every parameter,
            - a glob of module names (``"layer4.*"``, everything inside the modules that match), or of tensor names
              (``"*.bias"``) when no module matches,
            - a list of these, or a function ``(name, tensor) -> bool``, asked for every parameter and float buffer.
        averaged: the model is an averaged copy (EMA, SWA), whose parameters are not trained themselves.

    Returns:
        The trained tensors among them. Running statistics go with the BatchNorm whose parameters were picked; integer
        buffers are never part of a snapshot.

    Raises:
        SelectionError: nothing matches, or nothing that is trained; it lists the nearest names.
    """
    model = unwrap(model)
    tensors = {name: tensor for name, tensor in named_tensors(model).items() if tensor.is_floating_point()}
    matched: set[str] = set()
    if callable(layers):
        matched = {name for name, tensor in tensors.items() if layers(name, tensor)}
        matched |= _statistics(model, matched, modules=())
        if not matched:
            raise SelectionError(_text(layers), "picks no tensor", tuple(list(tensors)[-5:]))
    else:
        specs = [layers] if isinstance(layers, str) else list(layers)
        if not specs:
            raise SelectionError("[]", "is empty", KEYWORDS)
        for spec in specs:
            matched |= _match(model, spec, tensors)

    def is_trained(name: str) -> bool:
        tensor = tensors[name]
        return averaged or not isinstance(tensor, nn.Parameter) or tensor.requires_grad

    frozen = {name for name in matched if not is_trained(name)}
    # The statistics of a BatchNorm whose own parameters are frozen stay out with them.
    orphans = _statistics(model, frozen, modules=()) - _statistics(model, matched - frozen, modules=())
    chosen = matched - frozen - orphans
    if not any(isinstance(tensors[name], nn.Parameter) for name in chosen):
        trained = [name for name, t in tensors.items() if isinstance(t, nn.Parameter) and is_trained(name)]
        raise SelectionError(
            _text(layers),
            f"picks only tensors that are not trained ({', '.join(sorted(frozen or matched)[:3])}, ...)",
            tuple(trained[-5:]),
            "Unfreeze them (requires_grad_()) before recording, or choose layers that train.",
        )
    return Selection(
        {name: tensor for name, tensor in tensors.items() if name in chosen},
        tuple(name for name in tensors if name in frozen),
    )


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalization layer with a weight of its own."""
    known = isinstance(module, _NORM_CLASSES) or _NORM_NAME.search(type(module).__name__)
    return bool(known) and any(module._parameters.get(leaf) is not None for leaf in _NORM_WEIGHTS)


def _match(model: nn.Module, spec: str, tensors: dict[str, Tensor]) -> set[str]:
    modules = list(named_modules(model))
    if spec == "norms" or spec.startswith("last-norms"):
        norms = [(name, module) for name, module in modules if is_norm(module)]
        if not norms:
            raise SelectionError(repr(spec), "finds no normalization layer", (), "Choose layers='head' or a name.")
        if spec != "norms":
            number = re.fullmatch(r"last-norms:([1-9]\d*)", spec)
            if not number:
                raise SelectionError(repr(spec), "needs a whole number from 1", ("last-norms:2",))
            norms = norms[-int(number[1]) :]
        return _inside(model, norms, tensors)
    if spec == "head":
        return _inside(model, _head(model, modules), tensors)
    if spec == "lora":
        found = {name for name in tensors if any(part.startswith("lora_") for part in name.split("."))}
        if not found:
            raise SelectionError(
                "'lora'", "finds no LoRA matrices", (), "Wrap the model with PEFT's get_peft_model first."
            )
        return found
    if spec == "all":
        return _inside(model, modules[:1], tensors)
    found = _inside(model, [(name, module) for name, module in modules if name and fnmatchcase(name, spec)], tensors)
    found = found or {name for name in tensors if fnmatchcase(name, spec)}
    if not found:
        raise SelectionError(repr(spec), "matches no module and no tensor", _nearest(spec, modules, tensors))
    return found | _statistics(model, found, modules=())


def _head(model: nn.Module, modules: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    heads: list[nn.Module] = []
    if callable(get_classifier := getattr(model, "get_classifier", None)):
        found = get_classifier()  # a distilled timm model returns two
        heads = [h for h in (found if isinstance(found, Iterable) else [found]) if isinstance(h, nn.Module)]
        heads = [head for head in heads if next(head.parameters(), None) is not None]
    if not heads:
        heads += [module for _, module in modules if isinstance(module, nn.Linear)][-1:]
    if not heads:
        raise SelectionError("'head'", "finds no linear layer", tuple(name for name, _ in modules[-5:]))
    return [(name, module) for name, module in modules if any(module is head for head in heads)]


def _inside(model: nn.Module, modules: list[tuple[str, nn.Module]], tensors: dict[str, Tensor]) -> set[str]:
    """Parameters in ``modules``, at any depth, with the running statistics that belong to them."""
    identities = {id(parameter) for _, module in modules for parameter in module.parameters()}
    names = {name for name, tensor in tensors.items() if id(tensor) in identities}
    return names | _statistics(model, names, [m for _, top in modules for m in top.modules()])


def _statistics(model: nn.Module, names: set[str], modules: Iterable[nn.Module]) -> set[str]:
    """Running statistics beside the parameters ``names``, and those of ``modules`` that have no parameters."""
    bare = {id(module) for module in modules if next(module.parameters(), None) is None}
    found = set()
    for prefix, module in named_modules(model):
        beside = any(f"{prefix}.{leaf}".lstrip(".") in names for leaf in module._parameters)
        if beside or id(module) in bare:
            statistics = (leaf for leaf in STATISTICS if module._buffers.get(leaf) is not None)
            found |= {f"{prefix}.{leaf}".lstrip(".") for leaf in statistics}
    return found


def _nearest(spec: str, modules: list[tuple[str, nn.Module]], tensors: dict[str, Tensor]) -> tuple[str, ...]:
    names = [
        *(name for name, module in modules if name and next(module.parameters(), None) is not None),
        *tensors,
        *KEYWORDS,
    ]
    close = difflib.get_close_matches(spec.strip("*."), names, n=5, cutoff=0.4)
    return tuple(close or [name for name, _ in modules if name][-5:])


def _text(layers: Layers) -> str:
    return layers_name(layers) if callable(layers) else repr(layers if isinstance(layers, str) else list(layers))
