# %% [markdown]
# # Judge an ensemble that you already have
#
# A training that is over has left checkpoints, and somebody proposes to use them as an ensemble. Is that worth its
# forward passes? Make a snapshot store of the files, and compare: no generator is needed. Ten seconds on one core.

# %%
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pdiff_plugin import Task, evaluate, import_checkpoints

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# Two trainings from different seeds, which know nothing of pdiff-plugin and save a checkpoint after every epoch of
# the last thirty. They stand for the files that you have.

# %%
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
train_data, test_data = TensorDataset(x[:300], y[:300]), TensorDataset(x[300:], y[300:])
folder = Path("checkpoints")
folder.mkdir(exist_ok=True)


def build_model():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


for seed in (0, 1):
    torch.manual_seed(seed)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for epoch in range(60):
        for inputs, targets in DataLoader(train_data, batch_size=50, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs + 0.3 * torch.randn_like(inputs)), targets).backward()
            optimizer.step()
        if epoch >= 30:
            torch.save({"model": model.state_dict(), "epoch": epoch}, folder / f"seed{seed}-epoch{epoch}.pt")

# %% [markdown]
# ## Import
#
# One snapshot a file, one trajectory a run, in the order that the files themselves tell. Files are opened without
# running code from them. In the shell: `pdiff import checkpoints/seed0-*.pt --store runs/mine --layers all`.

# %%
for seed in (0, 1):
    files = sorted(folder.glob(f"seed{seed}-*.pt"))
    store = import_checkpoints(files, store="runs/mine", layers="all", trajectory=f"seed-{seed}")
print(store)

# %% [markdown]
# ## Judge
#
# Without a generator the table has everything that the checkpoints give by themselves. `snapshots` is the ensemble
# that was proposed; `last` are the two final models; `average-per-run` averages the weights of each run, and
# `average` those of both, which is no model: two trainings end with their hidden units in different orders.

# %%
task = Task(model.eval(), DataLoader(test_data, batch_size=500), name="digits")
result = evaluate(task, store, num_members=16)
print(result)

# %% [markdown]
# ## Take the best
#
# For one forward pass and for two, chosen on one half of the test data and judged on the other.

# %%
for num_passes in (1, 2, 8):
    print(f"{num_passes}: {result.best(num_passes).text}")

result.best(num_passes=1).save("best")
