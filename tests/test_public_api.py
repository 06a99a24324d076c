"""What `import pdiff_plugin` offers and what it must not cost."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import metadata

import pytest
from packaging.requirements import Requirement

import pdiff_plugin

HEAVY = ("torch", "ray", "rich", "timm", "torchvision", "sklearn", "tyro", "lightning", "transformers", "accelerate")


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_every_public_name_loads_and_is_listed() -> None:
    for name in pdiff_plugin.__all__:
        assert getattr(pdiff_plugin, name) is not None
    assert set(pdiff_plugin.__all__) <= set(dir(pdiff_plugin))


def test_the_names_that_the_documentation_promises_are_public() -> None:
    promised = {
        "PDiffRecorder", "collect", "SnapshotStore", "Layout", "ConditionConfig", "set_conditions", "FitConfig", "fit",
        "WeightGenerator", "WeightSet", "swapped", "swap_", "ensemble_from_diffusion", "DiffusionEnsemble", "Dial",
        "Task", "evaluate", "PDiffError", "RecorderConfig", "CollectConfig", "Perturb", "Reinit", "Cycle",
        "SamplingConfig", "EvaluateConfig", "evaluate_conditions", "ConditionEvaluation",
        "EvaluateConditionsConfig",
    }  # fmt: skip
    assert promised <= set(pdiff_plugin.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pdiff_plugin.nonsense  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import pdiff_plugin") & set(HEAVY)


def test_importing_the_command_line_loads_neither_torch_nor_ray() -> None:
    assert not loaded_by("import pdiff_plugin.cli") & {"torch", "ray", "timm", "sklearn"}


def test_fitting_sampling_and_judging_load_neither_ray_nor_what_talks_to_hubs_and_loggers() -> None:
    names = "PDiffRecorder, fit, WeightGenerator, DiffusionEnsemble, evaluate, collect"
    unwanted = {"ray", "huggingface_hub", "tensorboard", "wandb", "mlflow"}
    assert not loaded_by(f"from pdiff_plugin import {names}") & unwanted


def test_the_extra_all_but_composer_brings_every_extra_that_goes_into_one_environment() -> None:
    found = metadata("pdiff-plugin")
    extras = set(found.get_all("Provides-Extra") or ())
    brought = next(
        requirement.extras
        for requirement in map(Requirement, found.get_all("Requires-Dist") or ())
        if requirement.name == "pdiff-plugin" and 'extra == "all-but-composer"' in str(requirement.marker)
    )
    assert brought == extras - {"composer", "all-but-composer", "docs", "dev"}


def test_the_version_is_that_of_the_installed_package() -> None:
    assert pdiff_plugin.__version__ == metadata("pdiff-plugin")["Version"]
