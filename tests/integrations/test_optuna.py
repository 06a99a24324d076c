"""The recipe for Optuna in docs/guides/sweeps.md, as it stands."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from pdiff_plugin import SnapshotStore

optuna = pytest.importorskip("optuna")

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "sweeps.md"


def test_every_trial_of_a_study_is_a_trajectory_and_pruned_ones_are_told(toolbox, tmp_path, monkeypatch):
    batches = toolbox.Job(tmp_path, num_batches=40).batches()

    def train_one_epoch(model, optimizer):
        for x, y in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        return loss.item()

    def new_model(seed):
        return toolbox.make_net(), None

    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "new_model": new_model, "train_loader": batches, "train_one_epoch": train_one_epoch}
    (code,) = re.findall(r"## Optuna.*?^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    seeded = code.replace("create_study(", "create_study(sampler=optuna.samplers.RandomSampler(0), ")
    exec(compile(seeded, "sweeps.md", "exec"), names)

    store = SnapshotStore.open("runs/optuna")
    trials = {f"trial-{trial.number:03d}": trial for trial in names["study"].trials}
    assert len(trials) == 6
    pruned = {name for name, trial in trials.items() if trial.state.name == "PRUNED"}
    assert 0 < len(pruned) < 6
    assert set(store.stopped_early) == pruned
    # What was pruned before its window is left out beside runs that got to theirs.
    assert store.conditions == {name: trial.params for name, trial in trials.items() if name not in pruned}
