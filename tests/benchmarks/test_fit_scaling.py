"""Doubling the number of values doubles the time that grows with it; plain ``pytest`` runs it small, as a test.

    OMP_NUM_THREADS=1 pytest tests/benchmarks/test_fit_scaling.py --benchmark-enable -s

compares 1 M and 2 M values (3.6 GB in pytest's temporary folder). The whole curve is that of fit_scaling.py.
"""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture
def scaling(request, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)  # as of a script that is run
    spec = importlib.util.spec_from_file_location("fit_scaling", Path(__file__).with_name("fit_scaling.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not request.config.getoption("benchmark_enable"):
        monkeypatch.setattr(module, "NUM_SNAPSHOTS", 30)
    return module


def test_doubling_the_values_doubles_the_time_of_the_passes(scaling, request, tmp_path):
    is_measured = request.config.getoption("benchmark_enable")
    sizes = (1_000_000, 2_000_000) if is_measured else (500, 1000)

    one, two = (scaling.measure("default", D, tmp_path, rounds=3 if is_measured else 1) for D in sizes)

    print(one, two, sep="\n")
    assert 0 < one["passes_cpu_s"] < one["cpu_s"]
    assert 0 < one["peak_gb"] < 4 or sys.platform != "linux"
    assert not list(tmp_path.iterdir())
    if is_measured:
        assert 1.6 < two["passes_cpu_s"] / one["passes_cpu_s"] < 2.4


def test_the_picture_is_drawn_from_the_committed_figures(scaling, tmp_path):
    pytest.importorskip("matplotlib")

    scaling.main(["draw", "--out", str(tmp_path / "a.svg")])

    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert (scaling.FIGURES / "scaling.svg").is_file()
