"""Adapters in an environment without any trainer, or with broken ones."""

import subprocess
import sys

import pytest

from pdiff_plugin import PDiffRecorder as CoreRecorder
from pdiff_plugin import RecorderConfig
from pdiff_plugin.errors import MissingDependencyError
from pdiff_plugin.integrations._adapter import Adapter, Requires

SCRIPT = """
import sys
for name in ("lightning", "pytorch_lightning", "transformers", "accelerate", "ignite", "fastai", "keras", "composer"):
    sys.modules[name] = None
from importlib import import_module
for adapter in ("lightning", "huggingface", "accelerate", "ignite", "fastai", "keras", "composer"):
    module = import_module(f"pdiff_plugin.integrations.{adapter}")
    try:
        module.PDiffRecorder()
    except ImportError as error:
        print(type(error).__name__, error)
"""


def test_adapters_import_without_their_trainers_and_name_the_install_line_on_use():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        f'MissingDependencyError {package} is not installed. Install it with: pip install "pdiff-plugin[{extra}]"'
        for package, extra in (
            ("lightning", "lightning"),
            ("transformers", "huggingface"),
            ("accelerate", "accelerate"),
            ("pytorch-ignite", "ignite"),
            ("fastai", "fastai"),
            ("keras", "keras"),
            ("mosaicml", "composer"),
        )
    ]


BROKEN = """
import sys, types
for name in ("lightning", "lightning.pytorch", "lightning.pytorch.callbacks"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["pytorch_lightning"] = None
from pdiff_plugin.integrations.lightning import PDiffRecorder
try:
    PDiffRecorder()
except ImportError as error:
    print(type(error).__name__, error)
"""


def test_a_trainer_that_is_installed_but_broken_is_not_called_missing():
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.startswith("ImportError cannot import name 'Callback' from 'lightning.pytorch.callbacks'")


def test_the_error_of_the_import_is_kept():
    class NoTrainer(Adapter):
        requires = Requires("flax", ModuleNotFoundError("No module named 'flax.training'", name="flax.training"))

    class NoneOfItsOwn(Adapter):
        requires = Requires("flax", ModuleNotFoundError("No module named 'jax'", name="jax"))

    with pytest.raises(MissingDependencyError, match="flax is not installed") as caught:
        NoTrainer()
    assert caught.value.__cause__ is NoTrainer.requires.error
    with pytest.raises(ModuleNotFoundError, match="No module named 'jax'"):
        NoneOfItsOwn()


class Any(Adapter):
    requires = Requires("torch")


def test_an_adapter_takes_one_object_or_fields_or_a_ready_recorder():
    config = RecorderConfig(layers="head", last_steps=5)
    expected = CoreRecorder("a", config).settings()
    assert Any("a", config).recorder.settings() == expected
    assert Any("a", layers="head", last_steps=5).recorder.settings() == expected
    ready = CoreRecorder("a", config)
    assert Any(recorder=ready).recorder is ready
    with pytest.raises(TypeError, match="give it, or them"):
        Any(recorder=ready, layers="head")
