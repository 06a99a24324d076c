"""The snippets of integrations/README.md, as they stand."""

import re
from pathlib import Path

import pytest
import torch

from pdiff_plugin import SnapshotStore

README = Path(__file__).parents[2] / "integrations" / "README.md"
SECTIONS = {
    title: re.findall(r"```python\n(.*?)```", body, flags=re.DOTALL)
    for title, body in re.findall(r"^#+ (.*?)\n(.*?)(?=^#|\Z)", README.read_text(), flags=re.DOTALL | re.MULTILINE)
}
SETUP = SECTIONS["PDiffRecorder in your trainer"][0]
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


def run(section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for code in (SETUP, *SECTIONS[section]):
        exec(compile(code, f"{README.name}: {section}", "exec"), namespace)
    return namespace


@pytest.mark.parametrize(
    ("section", "package", "store", "steps"),
    [
        ("Lightning", "lightning", "lightning_logs/version_0/pdiff-snapshots", STEPS),
        ("transformers", "transformers", "output/pdiff-snapshots", STEPS),
        ("Accelerate", "accelerate", "pdiff-snapshots", list(range(1, 59))),
        ("Ignite", "ignite", "pdiff-snapshots", STEPS),
        ("fastai", "fastai", "pdiff-snapshots", STEPS),
        ("Keras", "keras", "pdiff-snapshots", STEPS),
        pytest.param("Composer", "composer", "pdiff-snapshots", STEPS, id="composer"),
        ("timm, and loops of your own", "torch", "pdiff-snapshots", list(range(1, 59))),
    ],
)
def test_a_snippet_runs_as_it_stands_and_records(section, package, store, steps, tmp_path, monkeypatch):
    pytest.importorskip(package)
    run(section, tmp_path, monkeypatch)
    found = SnapshotStore.open(tmp_path / store)
    assert found.steps.tolist() == steps
    assert len(torch.unique(found.rows(), dim=0)) == len(steps)


def test_the_snippet_of_ray_train_records_once_for_two_workers(local_ray, tmp_path, monkeypatch):
    namespace = run("Ray Train", tmp_path, monkeypatch)
    assert namespace["result"].error is None
    store = SnapshotStore.open(tmp_path / "results" / "digits" / "pdiff-snapshots")
    assert store.trajectories == ["run-001"]
    assert store.steps.tolist() == list(range(1, 31))  # 15 batches a worker and epoch
