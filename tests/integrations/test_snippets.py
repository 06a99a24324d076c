"""The snippets of docs/trainers, as they stand."""

import re
from pathlib import Path

import pytest
import torch

from pdiff_plugin import SnapshotStore

PAGES = Path(__file__).parents[2] / "docs" / "trainers"
DATA = "_data"  # included by the others
STEPS = list(range(30, 59))  # the second of two epochs of 29 batches

pytestmark = [
    # The trainers' own, about themselves.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'mode.chained_assignment' option is deprecated"),
    pytest.mark.filterwarnings("ignore:.*(is deprecated|will be deprecated).*:DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore:Cannot split tensor of length:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]


def run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for name in (DATA, page):
        for code in re.findall(
            r"(?<!-->\n)^```python\n(.*?)^```", (PAGES / f"{name}.md").read_text(), re.DOTALL | re.MULTILINE
        ):
            exec(compile(code, f"{name}.md", "exec"), namespace)
    return namespace


CASES = [
    ("lightning", "lightning", "lightning_logs/version_0/pdiff-snapshots", STEPS),
    ("transformers", "transformers", "output/pdiff-snapshots", STEPS),
    ("accelerate", "accelerate", "pdiff-snapshots", list(range(1, 59))),
    ("ignite", "ignite", "pdiff-snapshots", STEPS),
    ("fastai", "fastai", "pdiff-snapshots", STEPS),
    ("keras", "keras", "pdiff-snapshots", STEPS),
    pytest.param("composer", "composer", "pdiff-snapshots", STEPS, id="composer"),
    ("pytorch", "torch", "pdiff-snapshots", list(range(1, 59))),
]


@pytest.mark.parametrize(("page", "package", "store", "steps"), CASES)
def test_a_snippet_runs_as_it_stands_and_records(page, package, store, steps, tmp_path, monkeypatch):
    pytest.importorskip(package)
    run(page, tmp_path, monkeypatch)
    found = SnapshotStore.open(tmp_path / store)
    assert found.steps.tolist() == steps
    assert len(torch.unique(found.rows(), dim=0)) == len(steps)


def test_the_snippet_of_ray_train_records_once_for_two_workers(local_ray, tmp_path, monkeypatch):
    namespace = run("ray-train", tmp_path, monkeypatch)
    assert namespace["result"].error is None
    store = SnapshotStore.open(tmp_path / "results" / "digits" / "pdiff-snapshots")
    assert store.trajectories == ["run-001"]
    assert store.steps.tolist() == list(range(1, 31))  # 15 batches a worker and epoch


def test_the_snippet_of_ray_tune_records_each_trial(local_ray, tmp_path, monkeypatch):
    namespace = run("ray-tune", tmp_path, monkeypatch)
    assert namespace["results"].num_errors == 0
    for result in namespace["results"]:
        store = SnapshotStore.open(f"{result.path}/pdiff-snapshots")
        (name,) = store.trajectories
        assert name == result.metrics["trial_id"]
        assert store.conditions == {name: {"lr": result.config["lr"]}}
        assert (name in store.stopped_early) == (result.metrics["training_iteration"] < 4)
    assert namespace["ended"].trajectories


def test_every_trainer_has_a_page_and_every_page_a_case():
    of_cases = {getattr(case, "values", case)[0] for case in CASES} | {"ray-train", "ray-tune"}
    assert of_cases == {page.stem for page in PAGES.glob("*.md")} - {DATA, "index", "timm"}  # timm: test_timm.py
