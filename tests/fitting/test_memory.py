"""Memory of a fit on snapshots that are large: measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, threading, time
from pathlib import Path
import torch
from pdiff_plugin import DiffusionConfig, FitConfig, Layout, SnapshotStore, SubspaceConfig, fit
from pdiff_plugin.snapshots.layout import TensorSpec
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

folder, N, D = Path(sys.argv[1]), 300, 1_000_000
layout = Layout((TensorSpec("w", (900, 1000), "float32", "parameter"), TensorSpec("b", (D - 900_000,), "float32",
    "parameter")))

def write():
    rng = torch.Generator().manual_seed(0)
    writer, row = TrajectoryWriter(folder / "store", layout), 0.1 * torch.randn(D, generator=rng)
    for first in range(0, N, 20):
        rows = []
        for _ in range(20):
            row = row + 0.003 * torch.randn(D, generator=rng)
            rows.append(row)
        writer.write_chunk(torch.stack(rows), list(range(first + 1, first + 21)))

def anonymous_mb():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024

def watch():
    while not done.is_set():
        peak.append(max(peak.pop(), anonymous_mb()))
        time.sleep(0.005)

write()
peak, done = [0.0], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
config = FitConfig(
    autoencoder=SubspaceConfig(latent_dim=N, explained_variance=1.0),
    diffusion=DiffusionConfig(max_steps=10),
    heldout_fraction=0.0,
)
generator = fit(folder / "store", config, out=folder / "fit" if sys.argv[2] == "out" else None)
store, error = SnapshotStore.open(folder / "store"), 0.0
for first in range(0, N, 10):
    rows = store.rows(indices=list(range(first, first + 10)))
    decoded = generator.autoencoder.decode(generator.autoencoder.encode(rows))
    error = max(error, float(((decoded - rows).norm(dim=1) / rows.norm(dim=1)).max()))
done.set()
watcher.join()
print(json.dumps({"peak_mb": peak[0], "error": error, "latent_dim": generator.autoencoder.latent_dim}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon, which Linux alone has")
@pytest.mark.parametrize("out", ["out", "no out"])
def test_a_million_values_at_full_rank_fit_and_decode_in_nine_hundred_megabytes(tmp_path, out):
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path, out], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["latent_dim"] == 299
    assert found["error"] < 1e-4
    assert found["peak_mb"] < 900  # the basis alone is 1196
