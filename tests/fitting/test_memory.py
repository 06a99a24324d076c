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


BUCKET_SCRIPT = """
import json, sys, threading, time
from pathlib import Path
import torch
from torch import distributed
from pdiff_plugin import DiffusionConfig, FitConfig, Layout, SubspaceConfig
from pdiff_plugin.fitting.ranks import fit_on_ranks
from pdiff_plugin.snapshots.layout import TensorSpec
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

folder, memory_gb, cache_gb = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
N, D = 100, 400_000
config = FitConfig(memory_gb=memory_gb, autoencoder=SubspaceConfig(latent_dim=8), diffusion=DiffusionConfig(
    width=16, num_blocks=1, max_steps=20))

def write(name, num_values):
    rng = torch.Generator().manual_seed(0)
    directions = torch.randn(6, num_values, generator=rng)
    writer = TrajectoryWriter(folder / name, Layout((TensorSpec("w", (num_values,), "float32", "parameter"),)))
    for step in range(1, N + 1):  # a file of each, as of a large model
        writer.write_chunk(torch.randn(1, 6, generator=rng) @ directions, [step])

def fit(name):
    return fit_on_ranks(f"file://{folder}/{name}", config, out=folder / f"{name}-fit", cache_gb=cache_gb)

def anonymous_bytes():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

def cached_bytes():
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if "columns-" in line]
    return sum(int(stop, 16) - int(start, 16) for start, stop in ranges)

def watch():
    while not done.is_set():
        memory.append(max(memory.pop(), anonymous_bytes()))
        cache.append(max(cache.pop(), cached_bytes()))
        time.sleep(0.002)

distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
write("small", 1000)
write("large", D)
fit("small")
before, memory, cache, done = anonymous_bytes(), [0], [0], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
report = fit("large").report
done.set()
watcher.join()
distributed.destroy_process_group()
print(json.dumps({"memory": memory[0] - before, "cache": cache[0], "store": 4 * N * D, "read": report["bytes_read"]}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon, which Linux alone has")
def test_a_fit_from_a_bucket_stays_within_its_memory_and_its_cache(tmp_path):
    memory_gb, cache_gb = 0.1, 0.04
    command = [sys.executable, "-c", BUCKET_SCRIPT, tmp_path, str(memory_gb), str(cache_gb)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["memory"] < memory_gb * 1e9
    assert 0.9 * cache_gb * 1e9 < found["cache"] <= cache_gb * 1e9 + 4 * 4096  # whole pages
    # A cache of a quarter of the store: half of it is what passes, an eighth of the store stays.
    assert 1.8 * found["store"] < found["read"] < 1.95 * found["store"]
