"""A model's tensors and sub-modules by the names they have before any wrapping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from pdiff_plugin.errors import LayoutMismatchError


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Live parameters and buffers of ``model`` by the names it has before any wrapping, in ``state_dict`` order.

    The wrappers' own steps in a name (``module.`` of DataParallel and DistributedDataParallel, ``_orig_mod.`` of
    ``torch.compile``) are left out, wherever they are; a user's own sub-module called ``module`` keeps its name. Tied
    tensors appear once, under their first name.
    """
    return {clean: tensor for clean, _, tensor in _walk_tensors(model)}


def wrapped_names(model: nn.Module) -> dict[str, str]:
    """Name as in :func:`named_tensors` -> name inside ``unwrap(model)``, which keeps the steps of inner wrappers."""
    return {clean: raw for clean, raw, _ in _walk_tensors(model)}


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Sub-modules of ``model``, itself first, with the names they have before any wrapping. Shared ones come once."""
    for clean, _, module in _walk_modules(unwrap(model)):
        yield clean, module


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_fits(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: str,
    found_in: str = "this model",
) -> None:
    """Check that every tensor of ``expected`` is among those ``found``, in the same shape. More may be found.

    Args:
        expected: name -> shape.
        found: name -> shape.
        where: what recorded the expected shapes, as an error says it.
        found_in: what the other ones are of.

    Raises:
        LayoutMismatchError: naming the first tensor that is missing or of another shape.
    """
    for name, shape in expected.items():
        if found.get(name) != shape:
            text = str(found[name]) if name in found else f"no such tensor in {found_in}"
            raise LayoutMismatchError(name, str(shape), text, where)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module under DataParallel, DistributedDataParallel and ``torch.compile``, in any order."""
    while (inner := _wrapped(model)) is not None:
        model = inner[1]
    return model


def _walk_tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    seen: set[int] = set()
    for clean, raw, module in _walk_modules(unwrap(model)):
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield _join(clean, name), _join(raw, name), tensor


def _walk_modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    seen: set[int] = set()

    def walk(clean: str, raw: str, module: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        inner = _wrapped(module)
        if inner is not None:
            yield from walk(clean, _join(raw, inner[0]), inner[1])
        elif id(module) not in seen:
            seen.add(id(module))
            yield clean, raw, module
            for name, child in module.named_children():
                yield from walk(_join(clean, name), _join(raw, name), child)

    yield from walk("", "", model)


def _wrapped(module: nn.Module) -> tuple[str, nn.Module] | None:
    # torch.compile's OptimizedModule is private; the attribute that gives it away is not.
    name = "module" if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) else "_orig_mod"
    inner = module._modules.get(name)
    return (name, inner) if inner is not None else None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
