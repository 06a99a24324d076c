"""Computing once per batch what all members of an ensemble, or all branches of a training, share.

A sub-module without a member's own (generated) tensor is *clean*; the *trunk* is what runs before the first operation
on a generated tensor, the *tail* the rest. The first member of a batch is recorded: outputs of outermost clean modules
are kept until the trunk ends. For the other members those modules are replayed, and only the tail is computed. It may
be differentiated: what is kept needs no gradient.

Replaying is exact because the recording watches every operation (below autograd, so custom functions and tied or
borrowed weights are seen too) for four things:

- the first use of a generated tensor: nothing is kept from there on;
- a random draw (dropout in train mode): likewise, since every member would have drawn its own;
- a write, by code that will run again, into an output that is kept (``x += shortcut``): a copy is made just before
  the write, and every later member gets its own copy of that;
- a write by a kept module into an earlier output (an in-place ReLU): the written value is the one to replay, unless
  code that will run again has read the older one, or makes that memory itself; then the trunk ends there.

What escapes: Python state that a clean module changes and the tail reads, and random numbers that are not torch's.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from pdiff_plugin.errors import ConcurrentUseError
from pdiff_plugin.modules.names import named_modules, named_tensors

Run = Callable[[tuple[Any, ...], dict[str, Any]], Tensor]

_running: set[int] = set()
_running_guard = threading.Lock()


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Refuse a second ensemble over ``model`` while this block runs: members take turns inside the live model.

    Raises:
        ConcurrentUseError: another thread, or an outer call of this one, is in such a block.
    """
    with _running_guard:
        if id(model) in _running:
            raise ConcurrentUseError(type(model).__name__)
        _running.add(id(model))
    try:
        yield
    finally:
        with _running_guard:
            _running.discard(id(model))


class TrunkCache:
    """What is known of a model and a choice of generated tensors, from one batch to the next.

    Args:
        model: in eval mode, without wrappers.
        names: of the generated tensors, as in :func:`named_tensors`.

    Attributes:
        copy_always: hand out copies only; set when a member wrote into an output where the recorded one had not.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model = model
        self.copy_always = False
        live = named_tensors(model)
        generated = {id(live[name]) for name in names}
        # By identity, so that a module that borrows a generated tensor under another name is not clean.
        self.clean = {
            name: module
            for name, module in named_modules(model)
            if not isinstance(module, torch.jit.ScriptModule)
            and not any(id(tensor) in generated for tensor in [*module.parameters(), *module.buffers()])
        }

    @contextmanager
    def batch(self, generated: Iterable[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Trunk]:
        """Route the clean modules' calls through a new :class:`Trunk`, for one batch of inputs.

        Args:
            generated: the stacked tensors whose slices the members use.
            args: positional inputs of the model.
            kwargs: keyword inputs of the model.
        """
        trunk = Trunk(self, generated, args, kwargs)
        before = {name: module.__dict__.get("forward") for name, module in self.clean.items()}
        patched: dict[str, nn.Module] = {}
        try:
            for name, module in list(self.clean.items()):
                module.forward = trunk.wrap(name, module.forward)
                patched[name] = module
            yield trunk
        finally:
            for name, module in patched.items():
                del module.forward
                if (own := before[name]) is not None:  # set on the object by another library
                    module.forward = own
            trunk.forget()


class Trunk:
    """The kept outputs of one batch.

    Attributes:
        is_recorded: a member has been recorded, others can be replayed.
        is_sound: False when replaying cannot be exact; members must then be computed whole.
        draws: a random draw ended the trunk.
        largest_tail_bytes: size of the largest tensor that the recorded tail made.
    """

    def __init__(
        self, cache: TrunkCache, generated: Iterable[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._cache = cache
        self._generated = {_storage_key(tensor) for tensor in generated}
        self._inputs = (args, kwargs)
        self._thread = threading.get_ident()
        self._is_routing = False
        self.largest_tail_bytes = 0
        self.forget()

    def forget(self) -> None:
        """Drop every kept output."""
        self.is_recorded = self.is_sound = self.draws = False
        self._kept: dict[tuple[str, int], _Kept] = {}
        self._memory: dict[int, _Memory] = {}
        self._calls: Counter[str] = Counter()
        self._depth = 0
        self._in_tail = False
        self._is_recording = False
        self._forget_call()
        self._kept_inputs: _Kept | None = None

    def _forget_call(self) -> None:
        """Start a new call of an outermost clean module."""
        self._wrote = False  # into memory of the trunk
        self._call_memory: set[_Memory] = set()
        self._made_in_call: set[int] = set()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept: all would be computed again for every member."""
        return not self._kept

    def record(self, run: Run, before: Callable[[], object] = lambda: None) -> Tensor:
        """Compute one member with ``run(args, kwargs)`` and keep what its trunk gives.

        ``run`` must hold the member's tensors ready: a slice taken inside it would count as their first use.
        ``before`` is called before each attempt; more than one is needed when a model shows what cannot be kept.
        """
        while True:
            self.forget()
            before()
            self.is_sound = self._is_recording = True
            # The caller's own tensors stay out of reach: some models write into their inputs.
            args, kwargs = copied_inputs(self._inputs)
            self._kept_inputs = self._keep(*tree_flatten((args, kwargs)))
            known = len(self._cache.clean)
            with _Watch(self):
                output = self._route(run, args, kwargs)
            self._is_recording = False
            # A module that returned something that cannot be kept is no longer among the clean ones, but its parts are.
            if len(self._cache.clean) == known:
                break
        for memory in self._memory.values():
            if self._cache.copy_always:
                memory.protect()
            memory.seal()
        self.is_recorded = True
        return output

    def replay(self, run: Run) -> Tensor | None:
        """Compute further members with ``run(args, kwargs)``, their trunk replayed.

        Returns:
            What ``run`` gives, or None when it wrote into a kept output that the recorded member had left alone. All is
            forgotten then, and a member must be recorded anew.
        """
        self._calls.clear()
        self._depth = 0
        for memory in self._memory.values():
            memory.renew()
        assert self._kept_inputs is not None  # the caller has recorded a member
        output = self._route(run, *self._kept_inputs.hand_out())
        if any(memory.was_written for memory in self._memory.values()):
            self._cache.copy_always = True
            self.forget()
            return None
        return output

    def wrap(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The ``forward`` that stands in for that of the clean module ``name`` during a batch."""

        def routed(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                raise ConcurrentUseError(type(self._cache.model).__name__)
            if self._depth or not self._is_routing or name not in self._cache.clean:
                return forward(*args, **kwargs)
            key = (name, self._calls[name])
            self._calls[name] += 1
            if not self._is_recording and key in self._kept:
                return self._kept[key].hand_out()
            self._depth += 1
            try:
                output = forward(*args, **kwargs)
            finally:
                self._depth -= 1
            if self._is_recording:
                self._record_call(key, output)
                self._forget_call()
            return output

        return routed

    def watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
        """Called before each operation ``func`` while recording; returns the storages it uses."""
        schema = getattr(func, "_schema", None)
        if schema is None:  # a higher-order operator
            self._end()
            return set()
        uses = list(_tensors_with_access(schema, args, kwargs))
        if not self._in_tail and any(key in self._generated for key, _ in uses):
            self._end()
        if not self._in_tail and _draws(func, args, kwargs):
            self.draws = True
            self._end()
        for key, is_write in uses:
            memory = self._memory.get(key)
            if is_write and self._is_inside_kept and self._is_visible_again(key, memory):
                self._end()
            if memory is None:
                continue
            if self._is_inside_kept:
                self._call_memory.add(memory)
                self._wrote |= is_write
            else:
                memory.was_read = True
                if is_write:
                    memory.protect()
        return {key for key, _ in uses}

    def note_output(self, output: Any, used: set[int]) -> None:
        """Called after each operation while recording, with the storages it used."""
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if not isinstance(tensor, Tensor):
                continue
            if self._in_tail:
                self.largest_tail_bytes = max(self.largest_tail_bytes, tensor.numel() * tensor.element_size())
            elif self._depth and tensor.layout == torch.strided and _storage_key(tensor) not in used:
                self._made_in_call.add(_storage_key(tensor))

    @property
    def _is_inside_kept(self) -> bool:
        """Whether the present operation will not run again when its call is replayed."""
        return self._depth > 0 and not self._in_tail

    def _is_visible_again(self, key: int, memory: _Memory | None) -> bool:
        """Whether a kept call's write would be missed: code that runs again has read the memory, or makes it anew."""
        return key not in self._made_in_call if memory is None else memory.was_read

    def _end(self) -> None:
        """End the trunk here. The present call will run again, on memory that it may already have written into."""
        self.is_sound &= not self._wrote
        self._in_tail = True

    def _route(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        self._is_routing = True
        try:
            return run(args, kwargs)
        finally:
            self._is_routing = False

    def _record_call(self, key: tuple[str, int], output: Any) -> None:
        if self._in_tail:
            return
        leaves, spec = tree_flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if any(tensor.requires_grad for tensor in tensors):
            self._end()  # its graph serves one member only
        elif not all(_is_plain_tensor(leaf) if isinstance(leaf, Tensor) else _is_constant(leaf) for leaf in leaves):
            self._end()
            self._cache.clean.pop(key[0], None)
        elif all(k in self._memory or k in self._made_in_call for k in map(_storage_key, tensors)):
            self._kept[key] = self._keep(leaves, spec)
        else:
            # It returns memory that is not of the trunk, as dropout in eval mode does: it runs again every time.
            self.is_sound &= not self._wrote
            for memory in self._call_memory:
                memory.was_read = True

    def _keep(self, leaves: list[Any], spec: TreeSpec) -> _Kept:
        views: list[Any] = []
        for leaf in leaves:
            if _is_plain_tensor(leaf):
                memory = self._memory.setdefault(_storage_key(leaf), _Memory(leaf))
                views.append(_View(memory, leaf))
            else:
                views.append(leaf)
        return _Kept(spec, views)


class _Memory:
    """One storage on which kept outputs lie, and so shared by all that are views of each other."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._version = 0
        self._pristine: Tensor | None = None
        self._copy: Tensor | None = None
        self.was_read = False

    @property
    def is_protected(self) -> bool:
        return self._pristine is not None

    @property
    def was_written(self) -> bool:
        return not self.is_protected and self._tensor._version != self._version

    def protect(self) -> None:
        """Set the present value aside; from here on everyone gets a copy of it."""
        if self._pristine is None:
            flat = torch.empty(0, dtype=torch.uint8, device=self._tensor.device)
            self._pristine = flat.set_(self._tensor.untyped_storage()).clone()

    def seal(self) -> None:
        """End of the recording: writes are unexpected from here on."""
        self._version = self._tensor._version
        self.renew()

    def renew(self) -> None:
        """Before each replay."""
        self._copy = None

    def writable(self) -> Tensor:
        """The bytes of this replay, one copy for all views of it."""
        assert self._pristine is not None
        if self._copy is None:
            self._copy = self._pristine.clone()
        return self._copy


class _View:
    """One tensor of a kept output."""

    def __init__(self, memory: _Memory, tensor: Tensor) -> None:
        self._memory, self._tensor = memory, tensor
        self._dtype = tensor.dtype
        self._geometry = (tensor.shape, tensor.stride(), tensor.storage_offset())

    def hand_out(self) -> Tensor:
        if not self._memory.is_protected:
            return self._tensor
        flat = self._memory.writable()
        whole = flat[: flat.numel() // self._dtype.itemsize * self._dtype.itemsize]
        return whole.view(self._dtype).as_strided(*self._geometry)


class _Kept:
    """A kept output: tensors inside any containers."""

    def __init__(self, spec: TreeSpec, leaves: list[_View | Any]) -> None:
        self._spec, self._leaves = spec, leaves

    def hand_out(self) -> Any:
        """The output in new containers, since the tail may append to a list or pop from a dictionary."""
        leaves = [leaf.hand_out() if isinstance(leaf, _View) else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._spec)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its __init_subclass__ untyped
    """Shows a trunk every operation of the recorded member."""

    supports_higher_order_operators = True

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self._trunk = trunk

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        used = self._trunk.watch(func, args, kwargs)
        output = func(*args, **kwargs)
        self._trunk.note_output(output, used)
        return output


def copied_inputs(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``inputs`` with their tensors copied, and so free of inference mode; other objects are the same."""
    copied: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(Tensor, lambda tensor: tensor.clone(), inputs)
    return copied


def _tensors_with_access(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[int, bool]]:
    """Storage and "is written" of every tensor among the arguments of an operation."""
    for index, argument in enumerate(schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        is_write = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                yield _storage_key(tensor), is_write


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation draws random numbers: its like may also be called to draw none, as attention is."""
    arguments = func._schema.arguments
    if torch.Tag.nondeterministic_seeded not in func.tags and not any(a.name == "generator" for a in arguments):
        return False
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    values = {argument.name: given.get(argument.name, argument.default_value) for argument in arguments}
    return all(values.get(name, 1.0) != 0.0 for name in ("dropout_p", "dropout")) and all(
        values.get(name) is not False for name in ("train", "training")
    )


def _storage_key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_constant(value: Any) -> bool:
    return isinstance(value, (type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device))


def _is_plain_tensor(value: Any) -> bool:
    """Whether a tensor can be rebuilt from its memory, shape and strides, and its writes counted."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_conj() or value.is_neg() or value.is_inference() or value.is_nested)
    )
