"""What the report draws, collected while the sets pass by: one array per set and kind, as in ``accuracy/generated``.

Shapes: M members, R reference snapshots, N snapshots, P chosen coordinates, S ensemble sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pdiff_plugin.evaluation.baselines import rng_for
from pdiff_plugin.evaluation.kind import Measured, TaskKind
from pdiff_plugin.evaluation.rows import Block, Products, SnapshotRows, evenly_spaced
from pdiff_plugin.evaluation.scratch import decoded, on_disk
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.layout import Layout, TensorSpec

_NUM_COORDINATES = 6
_NUM_PATH_POINTS = 20


class Pictures:
    """The arrays of one report.

    Attributes:
        arrays: by name.
        coordinates: places in the flat vector of the few whose densities are drawn.
    """

    def __init__(self, rows: SnapshotRows) -> None:
        self.rows = rows
        self.coordinates = _chosen_coordinates(rows)
        self._path: tuple[WeightSet, Products] | None = None
        plane, share = rows.plane
        self.arrays: dict[str, Tensor] = {
            "plane_share": share,
            "snapshots_plane": rows.statistics.gram @ plane,
            "snapshots_run": rows.trajectory,
        }

    @property
    def coordinate_names(self) -> list[str]:
        """``conv.weight[3, 0, 1, 1]`` for each of the coordinates."""
        return [_coordinate_name(self.rows.layout, place) for place in self.coordinates]

    def values(self, members: WeightSet) -> Tensor:
        """Of members at the few coordinates, (M, P) float32."""
        return _values(self.rows.layout, members, self.coordinates)

    def add_references(self, numbers: Tensor, values: Tensor) -> None:
        """:meth:`values` of the reference snapshots of some ``numbers``, (r,); those of others keep theirs."""
        held = self.arrays.get("snapshots_values", values[:0])
        missing = int(numbers.max()) + 1 - len(held)
        held = torch.cat([held, values.new_zeros(max(0, missing), values.shape[1])])
        held[numbers] = values
        self.arrays["snapshots_values"] = held

    def add_set(self, kind: TaskKind, name: str, values: Tensor, products: Tensor, measured: Measured) -> None:
        """One draw of a set: its :meth:`values`, and its inner products with the snapshots, (M, N)."""
        plane, _ = self.rows.plane
        self.arrays |= {
            f"{kind.score.key}/{name}": measured.member_scores,
            f"closest/{name}": measured.closest,
            f"distance/{name}": measured.distance,
            f"plane/{name}": products @ plane,
            f"values/{name}": values,
            f"curve/{name}": _curve(kind, measured),
            **{f"{key}/{name}": array(measured.scores) for key, array in kind.arrays.items()},
        }

    def add_likeness(self, kind: TaskKind, errors: Sequence[Tensor]) -> None:
        """Likeness of all members of some sets, from their errors (M, n)."""
        if errors:
            self.arrays["overlap"] = kind.likeness.of(torch.cat(list(errors)), None)

    def follow(self, generator: WeightGenerator, seed: int) -> None:
        """Have one sample's way drawn, in the plane of the snapshots: the estimate of its clean weights at each step.

        It takes all blocks of the snapshots, which :meth:`see` is to be given.
        """
        estimates: list[Tensor] = []
        generator.sample_latents(1, rng=rng_for(seed, "path"), on_step=lambda x: estimates.append(x.cpu()))
        latents = torch.cat([estimates[index] for index in evenly_spaced(len(estimates), _NUM_PATH_POINTS).tolist()])
        self._path = decoded(generator, latents, on_disk), Products(len(latents), len(self.rows))

    def see(self, block: Block) -> None:
        """Take what is followed from one of the blocks of the snapshots."""
        if self._path is not None:
            members, products = self._path
            products.add(block, block.of(members))

    def end(self) -> None:
        """All blocks were seen."""
        if self._path is not None:
            plane, _ = self.rows.plane
            self.arrays["path"] = self._path[1].cross @ plane
            self._path = None


def _curve(kind: TaskKind, measured: Measured) -> Tensor:
    """Ensemble size, and the metrics of ``kind.curves`` at each, (1 + number of curves, S)."""
    sizes = measured.scores.sizes
    curves = [
        [kind.metric(key).of(replace(measured, place=place)) for place in range(len(sizes))] for key in kind.curves
    ]
    return torch.tensor([list(sizes), *curves], dtype=torch.float64)


def _chosen_coordinates(rows: SnapshotRows) -> list[int]:
    """Flat places of at most six coordinates, each the one that moves most at the start of its tensor."""
    tensors = [spec for spec in rows.layout if spec.numel]
    chosen = []
    for index in evenly_spaced(len(tensors), _NUM_COORDINATES).tolist():
        place = rows.layout.slices[tensors[index].name]
        values = rows.read(place.start, min(place.stop, place.start + 4096))
        chosen.append(place.start + int(values.double().var(dim=0).argmax()))
    return chosen


def _values(layout: Layout, members: WeightSet, places: Sequence[int]) -> Tensor:
    """Values of single coordinates, (M, P) float32."""
    columns = []
    for place in places:
        spec, rest = _owner(layout, place)
        columns.append(members[spec.name].reshape(members.num_members, -1)[:, rest].float().cpu())
    return torch.stack(columns, dim=1)


def _owner(layout: Layout, place: int) -> tuple[TensorSpec, int]:
    """The tensor that holds a place of the flat vector, and the place within it."""
    return next((s, place - layout.slices[s.name].start) for s in layout if place < layout.slices[s.name].stop)


def _coordinate_name(layout: Layout, place: int) -> str:
    spec, rest = _owner(layout, place)
    index = [int(i) for i in torch.unravel_index(torch.tensor(rest), spec.shape)] if spec.shape else []
    return f"{spec.name}{index}" if index else spec.name
