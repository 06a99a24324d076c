import subprocess
import sys
from pathlib import Path

import torch

from pdiff_plugin import SnapshotStore

EXAMPLE = Path(__file__).parents[2] / "examples" / "timm_train.py"


def test_the_example_records_a_timm_model_and_its_averaged_copy(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), "--smoke", "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    model, ema = (SnapshotStore.open(tmp_path / name) for name in ("model", "ema"))
    assert model.steps.tolist() == ema.steps.tolist() == [5, 6, 7, 8]
    assert model.layout == ema.layout
    assert model.layout.num_values == 4096
    assert not torch.equal(model.rows(), ema.rows())
    assert all(metrics["loss"] > 0 for metrics in ema.metrics)
