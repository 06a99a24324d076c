# %% [markdown]
# # Quickstart
#
# Record the last steps of a training, fit a generator to them, make an ensemble of generated members, and judge it
# beside everything that the same snapshots give for nothing. Half a minute on one core.

# %%
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pdiff_plugin import PDiffRecorder, SnapshotStore, Task, ensemble_from_diffusion, evaluate, fit

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# Scikit-learn's digits, few of them to train on, so that errors are left to count, and a small network with two
# BatchNorms.

# %%
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
train_loader = DataLoader(TensorDataset(x[:300], y[:300]), batch_size=50, shuffle=True)
eval_loader = DataLoader(TensorDataset(x[300:], y[300:]), batch_size=500)

model = nn.Sequential(
    *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    nn.Linear(16, 10),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

# %% [markdown]
# ## Record
#
# The training loop stays as it is, inside one `with`. All of the small network is recorded, over the last 300 steps.

# %%
num_epochs = 100
with PDiffRecorder("quickstart/store", layers="all").attach(
    model, optimizer, total_steps=num_epochs * len(train_loader)
):
    for _ in range(num_epochs):
        for images, labels in train_loader:
            optimizer.zero_grad()
            # Noise on the images keeps the loss, and so the weights, from standing still.
            nn.functional.cross_entropy(model(images + 0.3 * torch.randn_like(images)), labels).backward()
            optimizer.step()

store = SnapshotStore.open("quickstart/store")
print(store)

# %% [markdown]
# ## Fit
#
# An interrupted fit goes on where it was. `fidelity` is the share of the movement of held-out snapshots that the
# latents keep.

# %%
generator = fit(store, out="quickstart/fit")
print(generator)
print("fidelity", round(generator.report["fidelity"], 3))

# %% [markdown]
# ## An ensemble
#
# It works like the model: its output goes into any loss function and into `argmax`.

# %%
rng = torch.Generator().manual_seed(0)
ensemble = ensemble_from_diffusion(model.eval(), generator, num_members=32, rng=rng)
with torch.no_grad():
    one = (model(x[300:]).argmax(1) == y[300:]).float().mean()
    many = (ensemble(x[300:]).argmax(1) == y[300:]).float().mean()
print(f"the model {one:.1%}, the ensemble {many:.1%}")

# %% [markdown]
# ## Judge
#
# That the ensemble is better than the last snapshot proves nothing: so are averages of snapshots, and the snapshots
# themselves as an ensemble. The table has them all, and the sentence below it says what came out.

# %%
task = Task(model, eval_loader)
result = evaluate(task, store, generator)
print(result)

# %% [markdown]
# Whatever the sentence, the best model for one forward pass is there to be used. It was chosen on one half of the
# test images, and is judged on the other.

# %%
best = result.best(num_passes=1)
print(best.text)
best.save("quickstart/best")
