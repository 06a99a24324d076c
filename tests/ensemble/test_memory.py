"""Memory of members that stay in their files, and of one that is drawn into a model: in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, threading, time
from pathlib import Path
import torch
from torch import nn
from pdiff_plugin import DiffusionEnsemble, WeightGenerator, WeightSet, swap_
from pdiff_plugin.config import DiffusionConfig, FitConfig
from pdiff_plugin.generator.denoiser import new_denoiser
from pdiff_plugin.generator.frames import Frames
from pdiff_plugin.generator.members import write_members
from pdiff_plugin.generator.subspace import SubspaceAutoencoder
from pdiff_plugin.snapshots.layout import Layout

folder = Path(sys.argv[1])
model = nn.Sequential(*(nn.Linear(1600, 1600, bias=False) for _ in range(8))).bfloat16().eval()  # 41 MB
layout = Layout.from_tensors(dict(model.named_parameters()))
config = FitConfig(diffusion=DiffusionConfig(width=16, num_blocks=1))
frames = Frames(torch.zeros(1, 2), torch.eye(2)[None], torch.ones(1, 2), 1.0)
autoencoder = SubspaceAutoencoder(
    layout, torch.zeros(layout.num_values), torch.randn(2, layout.num_values).bfloat16(), 0.02 * torch.ones(8), 1.0
)
WeightGenerator(
    layout=layout, config=config, autoencoder=autoencoder, frames=frames, trajectories=["run-001"],
    denoiser=new_denoiser(config, frames).eval(),
).save(folder)
del autoencoder
generator, x = WeightGenerator.load(folder), torch.randn(4, 1600).bfloat16()
write_members(generator, folder / "members", num_members=4, seed=0)

def anonymous_mb():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024

def peak_of(call):
    done, start = threading.Event(), anonymous_mb()
    peak = [start]

    def watch():
        while not done.is_set():
            peak.append(max(peak.pop(), anonymous_mb()))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    answer = call()
    done.set()
    watcher.join()
    return peak[0] - start, answer

model(x)
from_files, found = peak_of(lambda: DiffusionEnsemble(model, WeightSet.from_files(folder / "members"))(x))
weights = generator.sample(4, rng=torch.Generator().manual_seed(0))
in_memory, expected = peak_of(lambda: DiffusionEnsemble(model, weights, strategy="loop")(x))
del weights
drawn, _ = peak_of(lambda: generator.sample_into(model, rng=torch.Generator().manual_seed(1)))
same = torch.equal(found, expected)
print(json.dumps({"from_files": from_files, "in_memory": in_memory, "drawn": drawn, "same": same}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon, which Linux alone has")
def test_members_in_files_and_one_drawn_into_a_model_are_never_whole_in_memory(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same"]
    assert found["in_memory"] > 100  # it is measured at all: four members have 164
    assert found["from_files"] < 20  # one has 41, which lie in its file
    assert found["drawn"] < 30  # a tensor has 5, what is made of a block at a time 2
