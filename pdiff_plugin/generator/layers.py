"""Layers of float32, whatever the global default dtype is: one seed gives one network, and files hold one dtype."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

Linear = partial(nn.Linear, dtype=torch.float32)
Embedding = partial(nn.Embedding, dtype=torch.float32)
LayerNorm = partial(nn.LayerNorm, dtype=torch.float32)
Conv1d = partial(nn.Conv1d, dtype=torch.float32)
ConvTranspose1d = partial(nn.ConvTranspose1d, dtype=torch.float32)
BatchNorm1d = partial(nn.BatchNorm1d, dtype=torch.float32)
