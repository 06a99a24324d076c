"""What the sweeps in examples/ stand on: the canonical form of LoRA, the split of codes, what interruptions leave."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pdiff_plugin import SnapshotStore

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def workloads(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("dial_workloads")


@pytest.fixture
def lora(workloads: ModuleType) -> ModuleType:
    return importlib.import_module("dial_workloads.lora")


def factors(seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    A, B = torch.randn(4, 12, generator=rng), torch.randn(9, 4, generator=rng)
    return {"block.q.lora_A.default.weight": A, "block.q.lora_B.default.weight": B, "other": torch.ones(2)}


def product(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return state["block.q.lora_B.default.weight"] @ state["block.q.lora_A.default.weight"]


def test_canonical_lora_factors_have_the_same_product(lora: ModuleType) -> None:
    state = factors()
    found = lora.canonical(state)
    torch.testing.assert_close(product(found), product(state))
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in state.items()}
    assert found["other"] is state["other"]


def test_equal_products_have_equal_canonical_factors(lora: ModuleType) -> None:
    state, rng = factors(), torch.Generator().manual_seed(1)
    mix = torch.randn(4, 4, generator=rng)
    other = dict(state)
    other["block.q.lora_A.default.weight"] = torch.linalg.inv(mix) @ state["block.q.lora_A.default.weight"]
    other["block.q.lora_B.default.weight"] = state["block.q.lora_B.default.weight"] @ mix
    ours, theirs = lora.canonical(state), lora.canonical(other)
    for name in state:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-4)


def test_canonical_factors_share_the_singular_values_evenly(lora: ModuleType) -> None:
    found = lora.canonical(factors())
    A, B = found["block.q.lora_A.default.weight"], found["block.q.lora_B.default.weight"]
    torch.testing.assert_close(A @ A.T, B.T @ B, atol=1e-5, rtol=1e-5)
    expected = torch.linalg.svdvals(product(factors()))[:4]
    torch.testing.assert_close(A @ A.T, torch.diag(expected), atol=1e-5, rtol=1e-5)
    assert (A.sum(dim=1) >= 0).all()


def test_factors_without_effect_stay_without(lora: ModuleType) -> None:
    state = factors()
    state["block.q.lora_B.default.weight"] = torch.zeros(9, 4)
    found = lora.canonical(state)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert not product(found).any()


def test_far_codes_are_two_bits_from_every_fitted_one_and_near_ones_one(workloads: ModuleType) -> None:
    codes = importlib.import_module("dial_workloads.codes")
    fitted, near, far = codes.split_codes(3, 250, 30, 30)
    assert [len(part) for part in (fitted, near, far)] == [250, 30, 30]
    assert len({*fitted, *near, *far} - {0, 1023}) == 310

    def distance(code: int) -> int:
        return min(bin(code ^ other).count("1") for other in fitted)

    assert {distance(code) for code in near} == {1}
    assert min(distance(code) for code in far) == 2


def test_a_killed_recording_records_again_what_is_not_complete(workloads: ModuleType, tmp_path: Path) -> None:
    data = importlib.import_module("workload_data")

    def sweep(folder: Path) -> Any:
        return workloads.WORKLOADS["angle"](folder, *data.synthetic(), 0, True)

    sweep(tmp_path / "whole").record()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    trajectories = tmp_path / "cut" / "store" / "trajectories"
    shutil.rmtree(trajectories / "cond-011")
    for chunk in (trajectories / "cond-010").glob("chunk-*"):
        chunk.unlink()
    (trajectories / "cond-009" / "condition.json").unlink()

    sweep(tmp_path / "cut").record()

    whole, cut = (SnapshotStore.open(tmp_path / name / "store") for name in ("whole", "cut"))
    assert cut.conditions == whole.conditions
    assert torch.equal(cut.rows(), whole.rows())
