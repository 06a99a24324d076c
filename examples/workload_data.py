"""The images that the workloads train on: CIFAR-10, or synthetic ones for a quick run."""

from __future__ import annotations

import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

Split = tuple[Tensor, Tensor]  # images and labels


def loader(split: Split, batch_size: int, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*split), batch_size, shuffle=shuffle, drop_last=shuffle)


def augmented(x: Tensor) -> Tensor:
    """Mirror half of the batches, and shift each batch by up to two pixels."""
    shift = torch.randint(-2, 3, (2,)).tolist()
    return (x.flip(3) if torch.rand(()) < 0.5 else x).roll(shift, dims=(2, 3))


def grey(split: Split) -> Split:
    """Flat grey images, (N, 1024)."""
    weights = torch.tensor([0.299, 0.587, 0.114])
    return (split[0] * weights[:, None, None]).sum(dim=1).flatten(1), split[1]


def normalised(images: Tensor) -> Tensor:
    """Bytes (N, 32, 32, 3) as float32 (N, 3, 32, 32) of about unit variance."""
    return ((images.float() / 255 - 0.47) / 0.25).permute(0, 3, 1, 2).contiguous()


def cifar10(folder: Path) -> tuple[Split, Split]:
    splits = []
    for name in ("train", "test"):
        if (folder / f"{name}.parquet").is_file():
            images, labels = read_parquet(folder / f"{name}.parquet")
        else:
            from torchvision.datasets import CIFAR10

            data = CIFAR10(str(folder), train=name == "train", download=True)
            images, labels = torch.from_numpy(data.data), torch.tensor(data.targets)
        splits.append((normalised(images), labels))
    return splits[0], splits[1]


def read_parquet(path: Path) -> Split:
    import numpy as np
    import pyarrow.parquet
    from PIL import Image

    table = pyarrow.parquet.read_table(path)
    images = []
    for cell in table["image"].to_pylist():
        data = cell["bytes"] if isinstance(cell, dict) else cell
        images.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    return torch.from_numpy(np.stack(images)), torch.tensor(table["label"].to_pylist())


def synthetic() -> tuple[Split, Split]:
    """Ten blurred patterns under noise, 300 images to train on and 200 to test."""
    rng = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(10, 3, 4, 4, generator=rng), size=32, mode="bilinear")
    labels = torch.randint(10, (500,), generator=rng)
    images = patterns[labels] + 3.0 * torch.randn(500, 3, 32, 32, generator=rng)
    return (images[:300], labels[:300]), (images[300:], labels[300:])
