"""LoRA of a tiny vision transformer at 24 angles, as trained and in a canonical form.

The two factors of a low-rank matrix are not unique: B A = (B R)(R⁻¹ A) for any invertible R. Two trainings may reach
the same change of the weights by different factors, whose mean is no mean of the changes. See :func:`canonical`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workload_data import loader
from workloads import train_all

from pdiff_plugin import PDiffRecorder, SnapshotStore, swap_

from .images import disc, rotated
from .sweep import Condition, Recipe, Sweep, Variant, run_name

RANK = 4


class Lora(Sweep):
    """4,096 values: matrices of rank 4 on the queries and values of four layers; every other angle is held out."""

    name = "lora"
    kinds = ("angle:cyclic=360",)
    layers = "lora"
    num_tests = 600
    recipe = Recipe(
        num_steps=60,
        batch_size=64,
        lr=1e-2,
        final_lr=1e-3,
        last_steps=10,
        every_n_steps=2,
        joint_steps=720,
        fine_tune_steps=(10,),
    )

    def build(self) -> nn.Module:
        from peft import LoraConfig, get_peft_model
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
            image_size=32, patch_size=4, num_labels=10,
        )  # fmt: skip
        queries_and_values = r".*\.(q_proj|v_proj|query|value)"  # the latter two before transformers 5
        settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=queries_and_values)
        return get_peft_model(ViTForImageClassification(config), settings)

    def train_base(self, model: nn.Module) -> None:
        """The transformer itself; the LoRA matrices stay as they begin, without effect."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" not in name)
        x, y = self.train_split
        batches = loader((x * disc(32), y), 16 if self.smoke else 128, shuffle=True)
        train_all(model, batches, num_epochs=1 if self.smoke else 3, logits=lambda outputs: outputs.logits)

    def trained(self, model: nn.Module) -> list[nn.Parameter]:
        return [parameter for name, parameter in model.named_parameters() if "lora_" in name]

    def conditions(self) -> list[Condition]:
        return [{"angle": float(angle)} for angle in range(0, 360, 30 if self.smoke else 15)]

    def variants(self) -> list[Variant]:
        held_out = [run_name(number) for number in range(1, len(self.conditions()), 2)]
        return [
            Variant("factors as trained", held_out, self.store),
            Variant("canonical factors", held_out, self.folder / "store-canonical"),
        ]

    def altered(self, x: Tensor, condition: Condition, rng: torch.Generator) -> Tensor:
        return rotated(x * disc(32), condition["angle"])

    def loss(self, model: nn.Module, condition: Condition, rng: torch.Generator) -> Tensor:
        x, y = self.batch(rng)
        return F.cross_entropy(model(self.altered(x, condition, rng)).logits, y)

    def record(self) -> None:
        """Also the same runs in the canonical form, in a store of their own."""
        super().record()
        recorded, folder = SnapshotStore.open(self.store), self.folder / "store-canonical"
        model = copy.deepcopy(self.base())
        for parameter in self.trained(model):
            parameter.requires_grad_(True)
        for place, run in enumerate(recorded.trajectories):
            if self.has_recorded(run, folder):
                continue
            rows = (recorded.trajectory_index == place).nonzero().squeeze(1).tolist()
            recorder = PDiffRecorder(
                folder, layers="lora", condition=recorded.conditions[run], trajectory=run,
                last_steps=len(rows), every_n_steps=1, save_base=False,
            )  # fmt: skip
            with recorder.attach(model, total_steps=len(rows)):
                for row in rows:
                    swap_(model, canonical(recorded.state_dict(row)))
                    recorder.step()


def canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LoRA factors of the same product, made unique: from the singular values of B A, shared evenly.

    With B A = U diag(s) Vᵀ, s falling, A becomes diag(√s) Vᵀ and B becomes U diag(√s). The sign of each pair of
    singular vectors is such that the entries of its row of A sum to no less than zero.

    Args:
        state: name -> tensor, pairs ``*.lora_A.*`` (r, in) and ``*.lora_B.*`` (out, r) among them; others are kept.

    Returns:
        The same names and shapes. Products agree to rounding; equal products give equal factors unless two singular
        values are equal or a row of A sums to zero.
    """
    found = dict(state)
    for name, A in state.items():
        if ".lora_A." not in name:
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        rank = A.shape[0]
        U, s, Vh = torch.linalg.svd(state[other].double() @ A.double(), full_matrices=False)
        U, s, Vh = U[:, :rank], s[:rank], Vh[:rank]
        sign = torch.where(Vh.sum(dim=1) < 0, -1.0, 1.0).double()
        root = s.sqrt()
        found[name] = ((sign * root)[:, None] * Vh).to(A.dtype)
        found[other] = (U * (sign * root)).to(A.dtype)
    return found
