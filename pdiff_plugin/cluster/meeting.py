"""Where workers on one machine find each other: at a file. PyTorch's own meeting place listens on all interfaces."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
import torch.distributed
from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig


@dataclass
class MeetAtFile(TorchConfig):
    """As Ray's own, for workers that all see ``folder``."""

    folder: str = ""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Meeting


class _Meeting(Backend):
    share_cuda_visible_devices = True  # as PyTorch's of Ray has it

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, MeetAtFile)
        # A new one for workers that replace others: the file names those that have come.
        url = (Path(backend_config.folder) / uuid4().hex).as_uri()
        W = len(worker_group)
        ray.get([worker_group.execute_single_async(rank, _come, url, rank, W, backend_config) for rank in range(W)])


def _come(url: str, rank: int, world_size: int, config: MeetAtFile) -> None:
    torch.distributed.init_process_group(
        config.backend, init_method=url, rank=rank, world_size=world_size, timeout=timedelta(seconds=config.timeout_s)
    )
