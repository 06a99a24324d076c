"""Record, fit, sample, swap and judge, in one script that reads top to bottom.

A small network learns scikit-learn's digits; its last two BatchNorms are recorded, a generator is fitted to them, and
an ensemble of generated members is compared with cheap baselines from the same snapshots.

    python examples/quickstart.py            # about a minute on two CPU cores
    python examples/quickstart.py --smoke    # a few seconds, figures mean nothing
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pdiff_plugin import (
    DiffusionConfig,
    FitConfig,
    PDiffRecorder,
    Task,
    ensemble_from_diffusion,
    evaluate,
    fit,
    swapped,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="run everything, but briefly")
    smoke = parser.parse_args().smoke
    num_epochs, fit_config = 200, FitConfig()
    if smoke:
        num_epochs, fit_config = 20, FitConfig(diffusion=DiffusionConfig(max_steps=50, eval_every_n_steps=25))
    folder = Path(tempfile.mkdtemp(prefix="pdiff-quickstart-"))
    torch.manual_seed(0)

    # Your data, your model, your optimizer.
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    train_data, test_data = TensorDataset(x[:150], y[:150]), TensorDataset(x[150:], y[150:])
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(train_data, batch_size=50, shuffle=True)

    # Record: the training loop stays as it is, inside one `with`.
    recorder = PDiffRecorder(folder / "store", layers="last-norms:2", last_steps=300, freeze_rest=True)
    with recorder.attach(model, optimizer, total_steps=num_epochs * len(loader)):
        for _ in range(num_epochs):
            for batch, target in loader:
                optimizer.zero_grad()
                # Noise on the images keeps the loss, and so the weights, from standing still.
                F.cross_entropy(model(batch + 0.3 * torch.randn_like(batch)), target).backward()
                optimizer.step()
    model.eval()

    # Fit a generator of those layers, and sample new weights for them.
    generator = fit(folder / "store", fit_config, out=folder / "fit")
    weights = generator.sample(8, rng=torch.Generator().manual_seed(0))
    print(f"{generator}\n{weights}")

    # Swap one member into the model for a moment ...
    with swapped(model, weights.member(3)), torch.no_grad():
        accuracy = (model(test_data.tensors[0]).argmax(1) == test_data.tensors[1]).float().mean()
    print(f"member 3 alone: {accuracy:.1%}")

    # ... or use many as one model: its output works with any loss function and with argmax.
    ensemble = ensemble_from_diffusion(model, generator, num_members=32, rng=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ensemble(test_data.tensors[0])
    print(f"ensemble of 32: {(logits.argmax(1) == test_data.tensors[1]).float().mean():.1%}\n")

    # Was it worth it? Every set below comes from the same snapshots.
    print(evaluate(Task(model, DataLoader(test_data, 500)), folder / "store", generator))
    print(f"\nThe store and the generator are in {folder}")


if __name__ == "__main__":
    main()
