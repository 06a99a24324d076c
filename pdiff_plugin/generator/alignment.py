"""Weight matching: permute the hidden units of independent runs so that their weights become comparable.

The units of a hidden layer can change places, if the next layer's inputs do as well, without changing the network.
Independent runs end in unrelated orders. Weight matching (Git Re-Basin, Ainsworth et al. 2022, arXiv 2209.04836,
section 3.2 and algorithm 1) looks for the orders in which the weights of one network agree best with those of another:
one linear assignment per hidden layer, with all others held fixed, until nothing moves.

Which tensors share their units is read off a layout alone: a plain stack of linear layers and convolutions, each
followed by norms of its own width. Names and shapes cannot show everything (see :func:`recognise`).

What a fit measures, and what ``evaluate()`` does with its generator, is then in the order of the first trajectory, and
so are sampled members: other weights than were recorded, of networks that compute the same.

Shapes: D values in a row, n training rows, R trajectories, U hidden units of all layers, w of one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin.errors import ConfigError
from pdiff_plugin.generator.state import StateError, check_shapes, under
from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.statistics import ColumnReader, NonFiniteRowsError, column_blocks, transform
from pdiff_plugin.snapshots.store import SnapshotStore

# Reads columns [lo, hi) of snapshots at some places of a store: (lo, hi, indices) -> (len(indices), hi - lo).
RowReader = Callable[..., Tensor]

_SUPPORTED = (
    "takes a whole plain stack: linear layers and convolutions that feed one another, with BatchNorm, or LayerNorm "
    "between linear layers, and no shortcuts"
)
_STATISTICS = ("running_mean", "running_var")
_NORM_LEAVES = ("weight", "bias", *_STATISTICS)
_SHORTCUT = re.compile(r"shortcut|downsample|skip|resid", re.IGNORECASE)
_MAX_SWEEPS = 100
_PREFIX = "alignment."


@dataclass(frozen=True)
class Role:
    """Where a tensor's units are: its values are viewed as ``shape`` (rows, columns, rest).

    Attributes:
        shape: of the view.
        rows: number of the hidden layer whose units the rows are, or None if they stay.
        columns: the same of the columns.
    """

    shape: tuple[int, int, int]
    rows: int | None
    columns: int | None = None


@dataclass(frozen=True)
class Stack:
    """The hidden layers of a plain stack.

    Attributes:
        layers: name of the weight that makes each layer, and its width w.
        roles: of every tensor of the layout, in its order.
    """

    layers: tuple[tuple[str, int], ...]
    roles: tuple[Role, ...]

    def split(self, permutation: Tensor) -> tuple[Tensor, ...]:
        """Cut (U,) into the (w,) of each layer."""
        return torch.split(permutation, [width for _, width in self.layers])


def recognise(layout: Layout) -> Stack:
    """Read a plain stack off names and shapes.

    Taken for one although it is not, and for the caller to rule out (:func:`pdiff_plugin.check_alignment` does): a
    shortcut between layers of one width, a transposed convolution or an embedding that is square, a GroupNorm after a
    linear layer, modules that run in another order than they are defined in, channels flattened in another order than
    ``nn.Flatten``'s.

    Raises:
        ConfigError: it is none; the first tensor that does not fit is named.
    """
    layers: list[tuple[str, int]] = []
    roles: list[Role] = []
    before: TensorSpec | None = None  # the weight of the layer that the next module follows
    for module, group in groupby(layout, key=lambda spec: spec.name.rpartition(".")[0]):
        specs = list(group)
        leaves = [spec.name.rpartition(".")[2] for spec in specs]
        _check_names(module, specs, leaves)
        weight = specs[0]
        if leaves[0] == "weight" and 2 <= len(weight.shape) <= 5:
            roles.append(_role_of_weight(weight, before, len(layers)))
            layers.append((weight.name, weight.shape[0]))
            before, specs, leaves = weight, specs[1:], leaves[1:]
            if specs and leaves != ["bias"]:
                raise _refusal(specs[leaves[0] == "bias"], "is no weight or bias of a linear layer or a convolution")
        elif before is None:
            raise _refusal(weight, "comes first, where the weight of a linear layer or a convolution should")
        elif len(before.shape) > 2 and not set(_STATISTICS) <= set(leaves):
            raise _refusal(weight, "follows a convolution without running statistics, as GroupNorm does")
        for spec in specs:
            if spec.shape != (layers[-1][1],):
                raise _refusal(spec, f"should have shape ({layers[-1][1]},), one value per unit of {layers[-1][0]!r}")
            roles.append(Role((spec.shape[0], 1, 1), len(layers) - 1))
    if len(layers) < 2:
        raise _refusal(layout.tensors[0], "is of the only layer in the store, which leaves no hidden one")
    last = len(layers) - 1  # its units are the network's outputs
    roles = [Role(role.shape, None, role.columns) if role.rows == last else role for role in roles]
    return Stack(tuple(layers[:-1]), tuple(roles))


def check_whole(layout: Layout, base: Iterable[str]) -> None:
    """Raise :class:`ConfigError` if a network has floating-point tensors, named in ``base``, beside those recorded."""
    missing = sorted(set(base) - set(layout.names))
    if missing:
        raise ConfigError("align", "rebasin", f"{_SUPPORTED}, and the store lacks tensor {missing[0]!r} of the network")


def _refusal(spec: TensorSpec, reason: str) -> ConfigError:
    return ConfigError("align", "rebasin", f"{_SUPPORTED}. Tensor {spec.name!r} of shape {spec.shape} {reason}")


def _check_names(module: str, specs: Sequence[TensorSpec], leaves: Sequence[str]) -> None:
    for spec, leaf in zip(specs, leaves, strict=True):
        if leaf not in _NORM_LEAVES:
            raise _refusal(spec, "belongs to no linear layer, convolution or norm")
    steps = module.split(".")
    in_block = any(a.isdigit() and not b.isdigit() for a, b in pairwise(steps))
    if in_block or _SHORTCUT.search(module):
        raise _refusal(
            specs[0], "lies in a repeated block, which may have a shortcut that names and shapes do not show"
        )


def _role_of_weight(weight: TensorSpec, before: TensorSpec | None, number: int) -> Role:
    out, inside, rest = weight.shape[0], weight.shape[1], prod(weight.shape[2:])
    if before is None:
        return Role((out, inside, rest), 0)
    width = before.shape[0]
    flattens = len(weight.shape) == 2 < len(before.shape)
    if len(weight.shape) != len(before.shape) and not flattens:
        raise _refusal(weight, f"does not follow on {before.name!r} of shape {before.shape}")
    if flattens and inside % width == 0:
        # nn.Flatten keeps the positions of one channel together.
        return Role((out, width, inside // width), number, number - 1)
    if inside != width:
        raise _refusal(weight, f"takes {inside} inputs, but {before.name!r} before it has {width} outputs")
    return Role((out, width, rest), number, number - 1)


@dataclass(frozen=True)
class Alignment:
    """Orders in which the hidden units of trajectories are read.

    Attributes:
        layout: of the rows.
        permutations: trajectory id -> (U,) int64: for each layer in turn, the recorded units in the order in which they
            are read. Trajectories without an entry are read as recorded.
        report: what was measured on the way.
    """

    layout: Layout
    permutations: Mapping[str, Tensor]
    report: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def stack(self) -> Stack:
        return recognise(self.layout)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that rebuild this alignment together with its layout and report."""
        return {f"{_PREFIX}{name}": permutation for name, permutation in self.permutations.items()}

    @classmethod
    def from_state(cls, layout: Layout, state: Mapping[str, Tensor], report: dict[str, Any]) -> Alignment:
        """What :meth:`state_dict` gave, under the prefix that it has there.

        Raises:
            StateError: a tensor that is no order of the units of each layer.
        """
        found = cls(layout, under(state, _PREFIX), report)
        num_units = sum(width for _, width in found.stack.layers)
        check_shapes(found.permutations, dict.fromkeys(found.permutations, (num_units,)), (torch.int64,))
        for name, permutation in found.permutations.items():
            for order in found.stack.split(permutation):
                if not torch.equal(order.sort().values, torch.arange(len(order))):
                    raise StateError(name, "with other numbers", "the units of each layer, each once")
        return found

    def columns(self, trajectory: str, lo: int, hi: int) -> Tensor:
        """Columns of a recorded row that are read at [lo, hi), (hi - lo,) int64."""
        orders = self.stack.split(self.permutations[trajectory])
        parts = [torch.empty(0, dtype=torch.int64)]
        for spec, role in zip(self.layout, self.stack.roles, strict=True):
            place = self.layout.slices[spec.name]
            first, last = max(lo, place.start), min(hi, place.stop)
            if first < last:
                _, width, rest = role.shape
                values = torch.arange(first - place.start, last - place.start)
                row, column, inside = values // (width * rest), values // rest % width, values % rest
                row = row if role.rows is None else orders[role.rows][row]
                column = column if role.columns is None else orders[role.columns][column]
                parts.append(place.start + (row * width + column) * rest + inside)
        return torch.cat(parts)

    def rows(
        self, store: SnapshotStore, lo: int = 0, hi: int | None = None, indices: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """As :meth:`SnapshotStore.rows`, with hidden units in the order of the first trajectory."""
        hi = self.layout.num_values if hi is None else hi
        wanted = torch.arange(len(store)) if indices is None else torch.as_tensor(indices, dtype=torch.int64)
        number = {name: place for place, name in enumerate(store.trajectories)}
        moved = [name for name in self.permutations if name in number]
        owner = store.trajectory_index[wanted]
        as_recorded = ~torch.isin(owner, torch.tensor([number[name] for name in moved], dtype=torch.int64))
        some = store.rows(lo, hi, wanted[as_recorded])
        out = torch.empty(len(wanted), hi - lo, dtype=some.dtype)
        out[as_recorded] = some
        for name in moved:
            mine = owner == number[name]
            if bool(mine.any()):
                out[mine] = store.gather(self.columns(name, lo, hi), wanted[mine])
        return out


def reader(store: SnapshotStore, alignment: Alignment | None) -> RowReader:
    """Reads rows of a store as :meth:`SnapshotStore.rows` does, aligned where there is an alignment."""
    return store.rows if alignment is None else partial(alignment.rows, store)


def align(store: SnapshotStore, rows: Tensor, train: Tensor, *, block_values: int, seed: int = 0) -> Alignment:
    """Match the mean snapshot of every trajectory to that of the first.

    Args:
        store: trajectories of one plain stack. Where a trajectory has a base, it is asked whether all was recorded.
        rows: (N,) int64, places of the snapshots to read.
        train: (N,) bool, those among them to take the means of.
        block_values: columns held at a time.
        seed: of the order in which layers are visited.

    Raises:
        ConfigError: the store does not hold a whole plain stack.
        NonFiniteRowsError: rows with NaN or Inf, by their places among ``rows``.
    """
    layout = store.layout
    stack = recognise(layout)
    for name in store.trajectories:
        check_whole(layout, [key for key, t in (store.base(name) or {}).items() if t.is_floating_point()])
    # A trajectory may have lost all its snapshots to NaN.
    present, runs = torch.unique(store.trajectory_index[rows[train]], return_inverse=True)
    means, movement = _summarise(partial(store.rows, indices=rows), layout, runs, train, block_values)
    shares = torch.bincount(runs).double() / len(runs)
    report: dict[str, Any] = {"separation_before": _separation(layout, means, movement, shares)}
    permutations: dict[str, Tensor] = {}
    for number, name in enumerate([store.trajectories[t] for t in present.tolist()][1:], start=1):
        rng = torch.Generator().manual_seed(seed)
        permutations[name] = match(layout, stack, means[0], means[number], rng)
        alignment = Alignment(layout, permutations)
        means[number] = means[number][alignment.columns(name, 0, layout.num_values)]
    report["separation_after"] = _separation(layout, means, movement, shares)
    report["units_moved"] = {
        layer: [int((stack.split(p)[k] != torch.arange(width)).sum()) for p in permutations.values()]
        for k, (layer, width) in enumerate(stack.layers)
    }
    return Alignment(layout, permutations, report)


def match(layout: Layout, stack: Stack, reference: Tensor, other: Tensor, rng: torch.Generator) -> Tensor:
    """Orders of the hidden units of ``other`` in which its weights have the largest inner product with a reference.

    Running statistics take no part: they follow from the weights, and their scale is that of the data.

    Args:
        layout: of both rows.
        stack: of the layout.
        reference: (D,).
        other: (D,).
        rng: for the order in which layers are visited.

    Returns:
        (U,) int64.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, and of no use to other fits

    weights: list[tuple[Role, Tensor, Tensor]] = []
    for spec, role in zip(layout, stack.roles, strict=True):
        if not spec.name.endswith(_STATISTICS):
            place = layout.slices[spec.name]
            weights.append((role, reference[place].view(role.shape), other[place].view(role.shape)))
    orders = [torch.arange(width) for _, width in stack.layers]
    for _ in range(_MAX_SWEEPS):
        changed = False
        for layer in torch.randperm(len(orders), generator=rng).tolist():
            w = len(orders[layer])
            gain = torch.zeros(w, w, dtype=torch.float64)  # of putting unit j of the other in place i
            for role, mine, theirs in weights:
                if role.rows == layer:
                    there = theirs if role.columns is None else theirs[:, orders[role.columns]]
                    gain += (mine.flatten(1) @ there.flatten(1).T).double()
                if role.columns == layer:
                    there = theirs if role.rows is None else theirs[orders[role.rows]]
                    gain += (mine.transpose(0, 1).flatten(1) @ there.transpose(0, 1).flatten(1).T).double()
            best = torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])
            places = torch.arange(w)
            found, current = gain[places, best].sum(), gain[places, orders[layer]].sum()
            # Clearly better, or rounding could go round in circles between orders that are as good.
            if found > current + 1e-6 * current.abs():
                orders[layer], changed = best, True
        if not changed:
            break
    return torch.cat(orders)


def _summarise(
    read: ColumnReader, layout: Layout, runs: Tensor, train: Tensor, block_values: int
) -> tuple[Tensor, Tensor]:
    """Mean row of each trajectory, (R, D) float32, and each tensor's movement about it, (number of tensors,) float64.

    Movement is the mean over rows of their squared distance to the mean of their own trajectory.
    """
    member = torch.nn.functional.one_hot(runs).double()  # (n, R)
    average = (member / member.sum(dim=0)).T
    means = torch.empty(len(average), layout.num_values, dtype=torch.float32)
    movement = torch.zeros(len(layout.tensors), dtype=torch.float64)
    for number, lo, hi in column_blocks(layout, block_values):
        rows = read(lo, hi)
        bad = (~torch.isfinite(rows).all(dim=1)).nonzero().squeeze(1)
        if len(bad):
            raise NonFiniteRowsError(bad.tolist())
        values = transform(rows[train], layout.tensors[number].name).double()
        mean = average @ values
        movement[number] += (values - member @ mean).square().sum() / len(runs)
        means[:, lo:hi] = mean.float()
    return means, movement


def _separation(layout: Layout, means: Tensor, movement: Tensor, shares: Tensor) -> float:
    """Median distance between the means of two trajectories over the spread of snapshots about their own mean.

    Args:
        layout: of the rows.
        means: (R, D).
        movement: (number of tensors,), of snapshots about the mean of their own trajectory.
        shares: (R,), of each trajectory in the snapshots.
    """
    R = len(means)
    squares, spread = torch.zeros(R, R, dtype=torch.float64), 0.0
    for number, spec in enumerate(layout):
        own = means[:, layout.slices[spec.name]].double()
        between = (shares[:, None] * (own - shares @ own).square()).sum()
        variance = float(movement[number] + between)  # as the autoencoder standardises
        if variance > 0:
            squares += (
                torch.cdist(own, own, compute_mode="donot_use_mm_for_euclid_dist").square() / variance * spec.numel
            )
            spread += float(movement[number]) / variance * spec.numel
    pairs = squares[torch.triu(torch.ones(R, R, dtype=torch.bool), diagonal=1)].sqrt()
    return round(float(pairs.median()) / max(spread**0.5, 1e-12), 3) if R > 1 else 0.0
