"""Memory of recording a large model: measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import json, sys, threading, time
from pathlib import Path
import torch
from torch import nn
from pdiff_plugin import PDiffRecorder, SnapshotStore
from pdiff_plugin.recording import session

session._LARGE_BASE_BYTES = 1 << 20
D, total_steps = 20_000_000, int(sys.argv[2]) or None
model = nn.ParameterList([torch.randn(D // 2, dtype=torch.bfloat16), torch.randn(D // 4, 2, dtype=torch.bfloat16).T])

def anonymous_mb():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024

def watch():
    while not done.is_set():
        peak.append(max(peak.pop(), anonymous_mb()))
        time.sleep(0.002)

recorder = PDiffRecorder(sys.argv[1], layers="all", dtype="bfloat16", last_steps=6, keep_newest=total_steps is None)
recorder.attach(model, total_steps=total_steps)
done, start = threading.Event(), anonymous_mb()
peak = [start]
watcher = threading.Thread(target=watch)
watcher.start()
with torch.no_grad():
    for _ in range(6):
        model[0][0] += 1
        recorder.step()
    if total_steps:
        model[0].zero_()  # as soon as the last step is recorded
    recorder.close()
done.set()
watcher.join()
store = SnapshotStore.open(sys.argv[1])
same = all(torch.equal(store.base()[name], tensor) for name, tensor in store.state_dict(-1).items())
print(json.dumps({"rows_mb": (peak[0] - start), "num_rows": len(store), "base_is_last": same}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon, which Linux alone has")
@pytest.mark.parametrize("total_steps", [6, 0], ids=["known end", "unknown end"])
def test_a_large_model_is_recorded_with_two_rows_beside_it(tmp_path, total_steps):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "store"), str(total_steps)]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["num_rows"], found["base_is_last"]) == (6, True)
    assert found["rows_mb"] < 2.6 * 20_000_000 * torch.bfloat16.itemsize / 1e6  # a tensor that is not contiguous: half
