# %% [markdown]
# # A sweep as a dial
#
# A small network is trained further at twelve rotations of its images, from one start. A generator of these runs
# makes weights for rotations that nobody trained at. It is judged there beside training, the nearest run, and
# regressions on the same weights. Half a minute on one core.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pdiff_plugin import (
    ConditionConfig,
    Cycle,
    Dial,
    DiffusionConfig,
    FitConfig,
    Task,
    collect,
    evaluate_conditions,
    fit,
)

torch.manual_seed(0)
torch.set_num_threads(1)

# %%
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
train_x, train_y, test_x, test_y = x[:900], y[:900], x[900:], y[900:]


def rotated(images, degrees):
    angle = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float32)).expand(len(images))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(len(images))
    turns = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    return F.grid_sample(images, F.affine_grid(turns, list(images.shape), align_corners=False), align_corners=False)


# %% [markdown]
# ## One start
#
# Weights of independent starts cannot be interpolated. So one network is trained on all rotations mixed, and every
# run of the sweep starts from it.

# %%
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(600):
    rows = torch.randint(len(train_x), (64,))
    optimizer.zero_grad()
    F.cross_entropy(model(rotated(train_x[rows], 360 * torch.rand(64))), train_y[rows]).backward()
    optimizer.step()


# %% [markdown]
# ## Record the sweep
#
# `collect` trains the chosen layers (here all of them) at each condition, with a rate that falls, and records the
# last steps of each run. Every other one is then held out of the fit, to be judged at.


# %%
def train_loader(angle):
    images = rotated(train_x, angle)
    return DataLoader(TensorDataset(images, train_y), batch_size=64, shuffle=True)


angles = [float(angle) for angle in range(0, 360, 15)]
store = collect(
    model, loss_fn=nn.CrossEntropyLoss(), store="dial/store", layers="all", lr=1e-2, num_snapshots=10,
    restart=Cycle(warmup_steps=90), conditions=[{"angle": angle} for angle in angles], data=train_loader,
)  # fmt: skip
print(store)

# %% [markdown]
# ## Fit
#
# Angles come round, which no number tells of itself: `angle:cyclic=360`. The fit chooses the regression that predicts
# conditions held out best, and learns what is left around it.

# %%
held_out = ",".join(f"{angle:g}" for angle in angles[1::2])
condition = ConditionConfig(kinds=("angle:cyclic=360",), hold_out=(f"angle={held_out}",))
generator = fit(store, FitConfig(condition=condition, diffusion=DiffusionConfig(max_steps=150)), out="dial/fit")
print("fitted at", [one["angle"] for one in generator.conditions])
print("centre:", generator.report["condition"]["centre"])

# %% [markdown]
# ## Turn it
#
# A dial makes the ensemble of a setting when it is asked for, and keeps it.

# %%
dial = Dial(model.eval(), generator)


def accuracy(logits):
    return float((logits.argmax(1) == test_y).float().mean())


around = [15.0 * number for number in range(25)]
turned = [accuracy(dial(rotated(test_x, angle), angle=angle % 360)) for angle in around]
start = [accuracy(model(rotated(test_x, angle))) for angle in around]

figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
axes.plot(around, turned, label="dial")
axes.plot(around, start, label="the start, trained on all rotations mixed")
axes.plot([one["angle"] for one in generator.conditions], [min(start)] * 12, "k|", label="fitted angles")
axes.set(xlabel="angle", ylabel="accuracy", xticks=range(0, 361, 60))
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Judge
#
# At the twelve angles that the fit has not seen, beside everything else that one could do there. `trained` are the
# runs that were recorded at them, the best that can be hoped for.


# %%
def task(angle):
    return Task(model, DataLoader(TensorDataset(rotated(test_x, angle), test_y), batch_size=900), name="rotated digits")


result = evaluate_conditions(task, store, generator, num_members=8)
print(result)

# %% [markdown]
# Read the rows `ridge`, `gp`, `neighbours` and `network` before the row `generated`: they are regressions on the same
# recorded weights and cost nothing. Where the sentence says that one of them is enough, it is. To go beyond what
# weights alone tell, teach the generator the task: see `refine`.
