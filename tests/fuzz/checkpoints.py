"""Checkpoints that a stranger may have made: odd tensors, odd counters, odd shapes."""

from __future__ import annotations

import io
import random
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

State = dict[Any, Any]

HUGE = torch.zeros(1).expand(2_000_000_000)

TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "sparse CSR": lambda t: torch.eye(3).to_sparse_csr(),
    "expanded from one value": lambda t: HUGE,
    "expanded to its shape": lambda t: torch.zeros(()).expand(t.shape),
    "complex": lambda t: t.to(torch.complex64),
    "quantised": lambda t: torch.quantize_per_tensor(torch.ones(3, 8), 0.1, 0, torch.qint8),
    "float8": lambda t: t.float().to(torch.float8_e4m3fn),
    "integer": lambda t: t.to(torch.int64),
    "bfloat16": lambda t: t.to(torch.bfloat16),
    "bool": lambda t: t > 0,
    "empty": lambda t: torch.empty(0),
    "a scalar": lambda t: torch.tensor(1.0),
    "NaN": lambda t: t * float("nan"),
    "no tensor": lambda t: [1, 2, 3],
    "a number": lambda t: 3,
    "nested": lambda t: {"weight": t},
    "a parameter": lambda t: nn.Parameter(t.float()),
    "transposed": lambda t: t.float().t(),
    "of 60 dimensions": lambda t: t.reshape(-1)[:1].reshape((1,) * 60),
}
NAMES = ("", ".", "a..b", "head.", ".head", "\x1b[2J", "head.weight.weight", "__class__", "training", "x" * 10_000)
COUNTERS = (-1, 0, 2**63, -(2**63), 10**30, True, 1.5, float("nan"), float("inf"), "7", None, [1], torch.tensor(3))


def spoil(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A checkpoint with another tensor, name, counter or shape of its own."""
    document = torch.load(io.BytesIO(data), weights_only=True)
    state: State = document.get("state_dict", document)
    name = rng.choice(list(state))
    how = rng.choice(("tensor", "tensor", "tensor", "name", "counter", "whole"))
    if how == "tensor":
        kind = rng.choice(list(TENSORS))
        state[name] = TENSORS[kind](state[name])
        told = f"{name} {kind}"
    elif how == "name":
        other = rng.choice((*NAMES, 3, ("a", 1)))
        state[other] = state[name] if rng.random() < 0.5 else state.pop(name)
        told = f"the name {other!r}"[:60]
    elif how == "counter":
        key, value = rng.choice(("global_step", "step", "epoch", "iteration")), rng.choice(COUNTERS)
        document[key] = value
        told = f"{key} = {value!r}"
    else:
        whole = [state, [state], {}, {"state_dict": {}}, {"state_dict": []}, {"model": {"state_dict": state}}, 3, None]
        whole += [HUGE, {"args": Namespace(lr=0.1), "model": state}, {"state_dict": {"w": torch.zeros(0)}}, _deep()]
        document = rng.choice(whole)
        told = f"a whole {type(document).__name__}"
    out = io.BytesIO()
    torch.save(document, out, _use_new_zipfile_serialization=rng.random() < 0.7)
    return out.getvalue(), told


def _deep() -> State:
    found: State = {"w": torch.zeros(1)}
    for _ in range(200):
        found = {"model": found}
    return found
