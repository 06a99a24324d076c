"""Files of every format as earlier releases wrote them: ``tests/data`` is never regenerated.

Stores, ensembles and evaluations of format version 1 are read in the tests of their own rooms.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pdiff_plugin import FitConfig, SnapshotStore, WeightGenerator, fit
from pdiff_plugin.config import TuneConfig

DATA = Path(__file__).parent / "data"
FITS = ["fit-v1", "fit-v1-conv", "fit-v1-aligned"]


@pytest.mark.parametrize("name", FITS)
def test_a_generator_samples_what_it_did(name: str) -> None:
    expected = load_file(DATA / name / "expected.safetensors")
    generator = WeightGenerator.load(DATA / name)

    latents = generator.sample_latents(3, rng=torch.Generator().manual_seed(0))
    members = generator.decode(latents)

    torch.testing.assert_close(latents, expected["latents"], rtol=1e-5, atol=1e-5)
    assert {f"members/{tensor}" for tensor in members} == expected.keys() - {"latents"}
    for tensor, values in members.items():
        torch.testing.assert_close(values, expected[f"members/{tensor}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FITS)
def test_a_generator_that_is_saved_again_is_the_same(name: str, tmp_path: Path) -> None:
    generator = WeightGenerator.load(DATA / name)
    again = WeightGenerator.load(generator.save(tmp_path))
    assert again.config == generator.config
    assert again.layout == generator.layout
    latents = [g.sample_latents(3, rng=torch.Generator().manual_seed(0)) for g in (generator, again)]
    assert torch.equal(*latents)


@pytest.mark.parametrize("name", ["fit-v1", "fit-v1-conv"])
def test_a_finished_fit_is_not_fitted_again(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "fit"
    shutil.copytree(DATA / name, folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    document = json.loads((folder / "fit.json").read_text())

    generator = fit(DATA / "store-v1-fitted", FitConfig.from_json(document["config"]), out=folder)

    assert generator.report == document["report"]
    assert (folder / "generator.safetensors").read_bytes() == before[folder / "generator.safetensors"]
    assert {path.name for path in folder.iterdir()} == {path.name for path in before}


def test_a_finished_search_is_not_searched_again(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from pdiff_plugin.cluster.tune import tune

    folder, store = tmp_path / "search", tmp_path / "store"
    shutil.copytree(DATA / "tune-v1", folder)
    shutil.copytree(DATA / "store-v1-fitted", store)
    document = json.loads((folder / "tune.json").read_text())
    document["store"] = str(store.resolve())  # where it lay is all that differs
    (folder / "tune.json").write_text(json.dumps(document))
    before = {path: path.read_bytes() for path in folder.iterdir()}

    found = tune(store, FitConfig.from_json(document["config"]), TuneConfig(num_trials=2, seed=0), out=folder)

    assert found["status"] == "finished"
    assert found["trials"] == document["trials"]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert WeightGenerator.load(folder).layout == SnapshotStore.open(store).layout


def test_members_are_state_dicts() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.head = nn.Linear(8, 3)

    layout = SnapshotStore.open(DATA / "store-v1-fitted").layout
    for path in sorted((DATA / "members-v0").iterdir()):
        state, model = load_file(path), Net()
        assert state.keys() == set(layout.names)
        assert model.load_state_dict(state, strict=False).unexpected_keys == []
        layout.check_model(model)
        assert torch.equal(model.head.weight, state["head.weight"])
