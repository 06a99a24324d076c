"""The documentation site: ``sphinx-build -W --keep-going -n docs site``."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "extensions")]

os.environ.setdefault("KERAS_BACKEND", "torch")  # the adapter is for no other

from pdiff_plugin import __version__  # noqa: E402

project = "pdiff-plugin"
author = "the pdiff-plugin contributors"
copyright = author
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",  # MyST pages, and notebooks with the output that they hold
    "sphinx_copybutton",
    "sphinx_design",
    "commands",
    "docstrings",
    "mathml",
    "names",
]
exclude_patterns = ["extensions", "**/_*.md"]
html_theme = "furo"
html_title = "pdiff-plugin"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_math_renderer = "mathml"
pygments_dark_style = "monokai"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests execute the scripts that the notebooks are made from
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

default_role = "code"
nitpicky = True
# Other projects' objects: their inventories are on the network, which building this site does not need.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|np|numpy|lightning|transformers|ignite|fastai|keras|composer|accelerate|ray)\..*"),
    (r"py:.*", r"(collections|pathlib|os|typing|types|enum|abc|builtins)\..*"),
    (r"py:.*", r"pdiff_plugin\.evaluation\.(kind|scores)\..*"),  # between modules of ours, for nobody to call
]

nitpick_ignore = [
    ("py:class", "Tensor"),
    ("py:class", "Path"),
    ("py:func", "score_sets"),  # what a Scorer stands in for
    ("py:class", "JudgeAll"),  # likewise, as in the next line
    ("py:func", "judge_here"),
    ("py:class", "Recorder"),  # what the adapters call the PDiffRecorder that they hold
    ("py:class", "GeneratorParts"),  # the arguments of WeightGenerator, which lists them itself
]

linkcheck_timeout = 20
linkcheck_anchors = False


def setup(app: Sphinx) -> None:
    """Bring the notebooks of the examples under the site's own folder, where Sphinx looks for pages."""
    pages = ROOT / "docs" / "notebooks"
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir()
    for notebook in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")):
        shutil.copy(notebook, pages)
