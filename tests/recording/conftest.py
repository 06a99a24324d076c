"""A small network with BatchNorm, its data, and a plain training loop."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.bn2 = nn.BatchNorm2d(6)
        self.bn3 = nn.BatchNorm1d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu().mean(dim=(2, 3))
        return self.fc(nn.functional.dropout(self.bn3(x), 0.1, self.training))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 1, 8, 8, generator=rng), torch.randint(0, 3, (8,), generator=rng)) for _ in range(4)]


@pytest.fixture
def train(batches: list[tuple[Tensor, Tensor]]) -> Callable[..., list[dict[str, Tensor]]]:
    def train(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        num_steps: int,
        first_step: int = 1,
        after_step: Callable[[], None] | None = None,
    ) -> list[dict[str, Tensor]]:
        """Train, and return a copy of the state dict after each step."""
        history = []
        for step in range(first_step, first_step + num_steps):
            inputs, targets = batches[step % len(batches)]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            if after_step is not None:
                after_step()
            history.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return history

    return train


SERVER = """
import atexit, json, os, sys, traceback
import torch, torch._dynamo  # which any optimizer imports
from pdiff_plugin import PDiffRecorder

for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    out = os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["script", *job["args"]]
    code = 0
    try:
        exec(compile(job["script"], "script", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # to take torch down takes a second
"""


class Started:
    """A script that runs in a process of its own."""

    def __init__(self, server: subprocess.Popen[str], pid: int, out: Path) -> None:
        self._server, self.pid, self._out = server, pid, out

    @property
    def output(self) -> str:
        """What it has printed and logged so far."""
        return self._out.read_text()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in self.output:
            assert time.monotonic() < deadline, self.output
            time.sleep(0.001)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, once it has ended; that of a signal is negative."""
        return int(ask(self._server, {"wait": self.pid}))


def ask(server: subprocess.Popen[str], job: dict[str, Any]) -> str:
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    return server.stdout.readline()


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Started]]:
    """``start(script, *args)`` runs a script in a process that has imported torch already, which takes seconds."""
    folder = tmp_path_factory.mktemp("started")
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    numbers = itertools.count()

    def start(script: str, *args: object) -> Started:
        out = folder / f"{next(numbers)}.txt"
        out.touch()
        job = {"script": textwrap.dedent(script), "args": [str(arg) for arg in args], "out": str(out)}
        return Started(server, int(ask(server, job)), out)

    yield start
    server.stdin.close()
    server.wait()
    server.stdout.close()


COUNTING = """
import os, signal, sys, time, torch
from pdiff_plugin import PDiffRecorder
model = torch.nn.Linear(40, 25)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
{before}
recorder = PDiffRecorder(sys.argv[1], layers="all", max_snapshots=10**6).attach(model, optimizer)
{after}
for step in range(10**6):
    with torch.no_grad():
        model.weight.fill_(step + 1.0)
    optimizer.step()
    print(step + 1, flush=True)
    time.sleep(0.0005)
"""


@pytest.fixture
def start_counting(start: Callable[..., Started]) -> Callable[..., Started]:
    """``start_counting(store)`` records a training without end, whose weights are the number of the step it prints.

    It has taken its first step. ``before`` and ``after`` are lines to run before and after the recorder is attached.
    """

    def start_counting(store: Path, before: str = "", after: str = "") -> Started:
        started = start(COUNTING.format(before=before, after=after), store)
        started.wait_for("1\n")
        return started

    return start_counting
