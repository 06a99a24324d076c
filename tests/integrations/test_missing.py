"""Adapters in an environment without any trainer."""

import subprocess
import sys

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
