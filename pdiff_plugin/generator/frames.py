"""Each trajectory's own coordinates of the latent space, in which its snapshots are centred and uncorrelated.

Snapshots of independent runs lie in clouds far apart. The diffusion works inside one cloud at a time: it meets
coordinates of mean zero and known spread, and never spends its capacity on where the clouds are.

Shapes: N latents, n of them for training, B in a batch, K latent width, R trajectories, k local width,
r directions that a task added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pdiff_plugin.generator.condition import Condition
from pdiff_plugin.generator.refinement import Refinement, state_of
from pdiff_plugin.generator.state import check_finite, check_shapes

# Directions with less than this share of a trajectory's variance are noise of the arithmetic.
_LEAST_SHARE = 1e-9


@dataclass(frozen=True)
class Frames:
    """Centre, axes and spread of each trajectory's latents.

    Attributes:
        centre: (R, K), mean of each trajectory.
        axes: (R, K, k), orthonormal columns, principal axes by falling spread; None where local coordinates lie along
            those of the latents, k = K.
        std: (R, k), standard deviation of local coordinates along each axis; over all R and k their mean square is one.
        scale: what local coordinates are divided by, so that this holds.
        refinement: what is made of the latents in the end, from themselves, or None.
    """

    centre: Tensor
    axes: Tensor | None
    std: Tensor
    scale: float
    refinement: Refinement | None = None

    num_features = 0

    @property
    def width(self) -> int:
        """Local width k."""
        return self.std.shape[1]

    @property
    def latent_dim(self) -> int:
        """Width of the latents that come out, K or K + r."""
        return self.centre.shape[1] + (0 if self.refinement is None else self.refinement.num_directions)

    @property
    def num_trajectories(self) -> int:
        return len(self.centre)

    def to_local(self, latents: Tensor, condition: Condition) -> Tensor:
        """Local coordinates (B, k) of latents (B, K), before a refinement; what lies off the axes is dropped."""
        trajectory = condition.trajectory
        out = torch.empty(len(latents), self.width, dtype=latents.dtype, device=latents.device)
        for number in set(trajectory.tolist()):
            mine = trajectory == number
            moved = latents[mine] - self.centre[number].to(latents)
            out[mine] = (moved if self.axes is None else moved @ self.axes[number].to(latents)) / self.scale
        return out

    def to_latents(self, local: Tensor, condition: Condition) -> Tensor:
        """Latents (B, K), refined (B, K + r), of local coordinates (B, k)."""
        trajectory = condition.trajectory
        out = torch.empty(len(local), self.centre.shape[1], dtype=local.dtype, device=local.device)
        for number in set(trajectory.tolist()):
            mine = trajectory == number
            moved = self.scale * local[mine]
            out[mine] = self.centre[number].to(local) + (
                moved if self.axes is None else moved @ self.axes[number].to(local).T
            )
        if self.refinement is None:
            return out
        refined: Tensor = self.refinement(out, out)
        return refined

    def state_dict(self) -> dict[str, Tensor]:
        scale = torch.tensor(self.scale, dtype=torch.float64)
        axes = {} if self.axes is None else {"axes": self.axes}
        return {"centre": self.centre, **axes, "std": self.std, "scale": scale, **state_of(self.refinement)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Frames:
        k = "k" if "axes" in state else "K"
        axes = {"axes": ("R", "K", k)} if "axes" in state else {}
        check_shapes(state, {"centre": ("R", "K"), **axes, "std": ("R", k), "scale": ()})
        check_finite(state, ("centre", "axes", "std", "scale"))
        # In memory of their own: the last digit of a product depends on the alignment, which in a file is any.
        own = {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
        K = own["centre"].shape[1]
        refinement = Refinement.found_in(state, K, K)
        return cls(own["centre"], own.get("axes"), own["std"], float(state["scale"]), refinement)


def fit_frames(latents: Tensor, trajectory: Tensor, num_trajectories: int, width: int) -> Frames:
    """Principal axes of each trajectory.

    Args:
        latents: of the training snapshots, (n, K).
        trajectory: run of each, (n,) int64.
        num_trajectories: R.
        width: largest k; no more than there are directions that carry variance.
    """
    latents = latents.double()
    K = latents.shape[1]
    # No trajectory has more directions than snapshots: of long latents most are left out.
    count = min(K, int(torch.bincount(trajectory, minlength=1).max()))
    centre, axes, variance = torch.zeros(num_trajectories, K, dtype=torch.float64), [], []
    for number in range(num_trajectories):
        mine = latents[trajectory == number]
        if len(mine):
            centre[number] = mine.mean(dim=0)
        # The right singular vectors fill up with directions of no variance where there are fewer rows.
        deviations = torch.cat([mine - centre[number], torch.zeros(max(0, count - len(mine)), K, dtype=torch.float64)])
        _, singular, directions = torch.linalg.svd(deviations, full_matrices=False)
        # Signs are arbitrary: fix them, so that close inputs give close frames.
        signs = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
        axes.append((directions * signs).T)
        variance.append(singular.square() / max(1, len(mine)))
    spread = torch.stack(variance)  # (R, K)
    share = spread / spread.sum(dim=1, keepdim=True).clamp_min(1e-300)
    k = max(1, min(width, int((share > _LEAST_SHARE).sum(dim=1).max())))
    scale = float(spread[:, :k].mean().sqrt()) or 1.0
    return Frames(
        centre.float(), torch.stack(axes)[:, :, :k].float().contiguous(), spread[:, :k].sqrt().float() / scale, scale
    )


def plain_frames(latents: Tensor, num_trajectories: int, *, scaled: bool = True) -> Frames:
    """Coordinates that only centre all latents together and, if ``scaled``, give them unit overall variance.

    Args:
        latents: of the training snapshots, (n, K).
        num_trajectories: R, all of which get the same frame.
        scaled: without it local coordinates are the latents themselves.
    """
    latents = latents.double()
    R, K = num_trajectories, latents.shape[1]
    centre = latents.mean(dim=0) if scaled else torch.zeros(K, dtype=torch.float64)
    scale = (float((latents - centre).square().mean().sqrt()) or 1.0) if scaled else 1.0
    std = (latents - centre).square().mean(dim=0).sqrt() / scale
    return Frames(
        centre.float().expand(R, K).contiguous(),
        None,
        std.float().expand(R, K).contiguous(),
        scale,
    )
