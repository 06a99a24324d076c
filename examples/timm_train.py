"""Record a timm model, and its averaged copy, in a training loop made of timm's own parts.

    python examples/timm_train.py --out runs/timm          # a few minutes on two CPU cores
    python examples/timm_train.py --out runs/timm --smoke  # a few seconds

The handwritten digits of scikit-learn stand in for your images. Afterwards:

    pdiff inspect runs/timm/model
    pdiff fit runs/timm/model --out runs/timm/fit
"""

from __future__ import annotations

import argparse

import timm
import timm.optim
import timm.scheduler
import timm.utils
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pdiff_plugin import PDiffRecorder, SnapshotStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/timm", help="folder for the two stores")
    parser.add_argument("--smoke", action="store_true", help="a tiny run that only shows that everything works")
    options = parser.parse_args()
    num_epochs, num_images = (2, 256) if options.smoke else (15, 1500)

    digits = load_digits()
    images = torch.tensor(digits.images[:num_images], dtype=torch.float32)[:, None] / 16  # (B, 1, 8, 8)
    images = nn.functional.interpolate(images, size=32)
    loader = DataLoader(TensorDataset(images, torch.tensor(digits.target[:num_images])), batch_size=64, shuffle=True)

    model = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    scheduler = timm.scheduler.CosineLRScheduler(optimizer, t_initial=num_epochs, lr_min=2e-4)
    ema = timm.utils.ModelEmaV3(model, decay=0.99)

    length = {"total_steps": num_epochs * len(loader), "steps_per_epoch": len(loader)}
    # The trained weights are recorded by the optimizer's own steps; the averaged ones when we say that they have moved.
    recorder = PDiffRecorder(f"{options.out}/model").attach(model, optimizer, **length)
    ema_recorder = PDiffRecorder(f"{options.out}/ema").attach(ema.module, averaged=True, **length)
    with recorder, ema_recorder:
        for epoch in range(num_epochs):
            model.train()
            for inputs, targets in loader:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(inputs), targets)
                loss.backward()
                optimizer.step()
                ema.update(model)
                ema_recorder.step(metrics={"loss": loss})
            scheduler.step(epoch + 1)
            print(f"epoch {epoch + 1}/{num_epochs}: loss {loss.item():.3f}")

    for name in ("model", "ema"):
        print(SnapshotStore.open(f"{options.out}/{name}"))
    print(f"next: pdiff fit {options.out}/model --out {options.out}/fit")


if __name__ == "__main__":
    main()
