"""Which classes are positive, as ten bits: the claim that a generator follows a binary code, with the rows it lacks.

A trunk is trained without class labels, to tell by how many quarters an image is turned. On its cached features a small
head answers, for one code, whether an image's class is among those whose bit is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workload_data import Split, augmented, loader
from workloads import SmallResNet

from pdiff_plugin import SnapshotStore, Task, WeightGenerator, WeightSet

from .sweep import Condition, ExtraRow, Recipe, Sweep, Variant, run_name

NUM_CLASSES = 10


class Codes(Sweep):
    """A head 256-32-2 (8,290 values) per code: 250 fitted, and held out 30 next to one of these and 30 further away."""

    name = "codes"
    recipe = Recipe(
        num_steps=300,
        batch_size=256,
        lr=3e-3,
        final_lr=3e-4,
        last_steps=50,
        every_n_steps=10,
        joint_steps=0,
        fine_tune_steps=(),
    )

    def __init__(self, folder: Any, train: Split, test: Split, seed: int, smoke: bool = False) -> None:
        super().__init__(folder, train, test, seed, smoke)
        self._images = self.train_split, self.test_split
        self._trunk: SmallResNet | None = None
        self._fitted, self._near, self._far = split_codes(seed, *((12, 2, 2) if smoke else (250, 30, 30)))
        self._ten: nn.Module | None = None

    def build(self) -> nn.Module:
        return head(2)

    def train_base(self, model: nn.Module) -> None:
        """The trunk, then the head's hidden layer on its features, for the same question; its answers start at zero."""
        torch.manual_seed(self.seed)
        trunk = SmallResNet()
        trunk.head = nn.Linear(512, 4)
        train_rotations(trunk, self._images[0], num_epochs=1 if self.smoke else 2)
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(features_of(trunk, self._images[0][0]).half(), self.folder / "train-features.pt")
        torch.save(features_of(trunk, self._images[1][0]).half(), self.folder / "test-features.pt")
        self._load_features()
        turned = torch.cat([features_of(trunk, self._images[0][0][:5000].rot90(k, (2, 3))) for k in range(4)])
        turned = (turned - self._mean) / self._std
        quarters = torch.arange(4).repeat_interleave(len(turned) // 4)
        hidden = head(4)
        optimizer = torch.optim.AdamW(hidden.parameters(), lr=3e-3)
        for _ in range(30 if self.smoke else 300):
            rows = torch.randint(len(turned), (256,))
            optimizer.zero_grad()
            F.cross_entropy(hidden(turned[rows]), quarters[rows]).backward()
            optimizer.step()
        model[0].load_state_dict(hidden[0].state_dict())
        nn.init.zeros_(model[2].weight)
        nn.init.zeros_(model[2].bias)

    def _load_features(self) -> None:
        train = torch.load(self.folder / "train-features.pt", weights_only=True).float()
        self._mean, self._std = train.mean(dim=0), train.std(dim=0) + 1e-6
        test = torch.load(self.folder / "test-features.pt", weights_only=True).float()
        self.train_split = (train - self._mean) / self._std, self._images[0][1]
        self.test_split = (test - self._mean) / self._std, self._images[1][1]

    def base(self) -> nn.Module:
        is_new = self._base is None
        model = super().base()
        if is_new:
            self._load_features()
        return model

    def conditions(self) -> list[Condition]:
        return [{"code": bits(code)} for code in (*self._fitted, *self._near, *self._far)]

    def variants(self) -> list[Variant]:
        """Both groups are left out of the fit, and judged apart."""
        first, second, count = len(self._fitted), len(self._fitted) + len(self._near), len(self.conditions())
        near = [run_name(number) for number in range(first, second)]
        far = [run_name(number) for number in range(second, count)]
        return [
            Variant("one bit from a fitted code", near, self.store, far),
            Variant("two bits or more", far, self.store, near),
        ]

    def drawn(self, variant: Variant) -> list[Condition]:
        """All codes but those of the sweep, and the two that all classes share."""
        own = {*self._fitted, *self._near, *self._far}
        return [{"code": bits(code)} for code in range(1, 2**NUM_CLASSES - 1) if code not in own]

    def loss(self, model: nn.Module, condition: Condition, rng: torch.Generator) -> Tensor:
        x, y = self.batch(rng)
        found: Tensor = F.cross_entropy(model(x), torch.tensor(condition["code"])[y].long())
        return found

    def task(self, **condition: Any) -> Task:
        base = self.base()  # reads the features, too
        x, y = self.test_split
        return Task(base, loader((x, torch.tensor(condition["code"])[y].long()), 1000), name=self.name)

    def extra(self, variant: Variant, generator: WeightGenerator) -> dict[str, ExtraRow]:
        """A vote of the nearest fitted codes, and one head of ten classes whose probabilities are summed."""
        store = SnapshotStore.open(self.store).only(generator.trajectories)
        codes = torch.tensor([store.conditions[run]["code"] for run in store.trajectories])
        means = torch.stack(
            [store.rows(indices=store.trajectory_index == i).mean(dim=0) for i in range(len(store.trajectories))]
        )

        def vote(condition: Condition) -> WeightSet:
            distance = (codes - torch.tensor(condition["code"])).abs().sum(dim=1)
            return WeightSet.from_flat(means[distance == distance.min()], store.layout)

        def summed(condition: Condition) -> Task:
            task = self.task(**condition)
            return Task(SummedClasses(self.ten_classes(), condition["code"]), task.eval_loader, name=self.name)

        return {"vote of nearest codes": vote, "ten classes, summed": summed}

    def ten_classes(self) -> nn.Module:
        """A head 256-32-10 trained on class labels, for ten times the steps of one code."""
        if self._ten is None:
            self.base()
            torch.manual_seed(self.seed)
            model, rng = head(NUM_CLASSES), torch.Generator().manual_seed(self.seed)
            num_steps = 10 * self.recipe.num_steps
            optimizer = torch.optim.AdamW(model.parameters(), lr=self.recipe.lr)
            for step in range(num_steps):
                optimizer.param_groups[0]["lr"] = self.rate(step / num_steps)
                x, y = self.batch(rng)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            self._ten = model.eval()
        return self._ten


class SummedClasses(nn.Module):
    """Two answers, (B, 2) log-probabilities, from one network of ten classes."""

    def __init__(self, model: nn.Module, code: list[float]) -> None:
        super().__init__()
        self.model = model
        self.is_positive = torch.tensor(code) > 0.5

    def forward(self, x: Tensor) -> Tensor:
        log_p = self.model(x).log_softmax(dim=1)
        return torch.stack([log_p[:, ~self.is_positive].logsumexp(1), log_p[:, self.is_positive].logsumexp(1)], dim=1)


def head(num_answers: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, num_answers))


def bits(code: int) -> list[float]:
    return [float(code >> place & 1) for place in range(NUM_CLASSES)]


def split_codes(seed: int, num_fitted: int, num_near: int, num_far: int) -> tuple[list[int], list[int], list[int]]:
    """Codes to fit, codes one bit from one of these, and codes with no fitted one within one bit; never 0 or 1,023."""
    rng = torch.Generator().manual_seed(seed)
    order = (1 + torch.randperm(2**NUM_CLASSES - 2, generator=rng)).tolist()
    far = order[:num_far]
    taken = set(far) | {neighbour for code in far for neighbour in neighbours(code)}
    free = [code for code in order if code not in taken]
    fitted = free[:num_fitted]
    near = [code for code in free[num_fitted:] if set(fitted) & set(neighbours(code))][:num_near]
    return fitted, near, far


def neighbours(code: int) -> Iterator[int]:
    return (code ^ 1 << place for place in range(NUM_CLASSES))


def train_rotations(model: SmallResNet, split: Split, *, num_epochs: int) -> None:
    """Train a network of four classes to tell by how many quarters each image is turned."""
    batches = loader(split, 16 if len(split[0]) < 1000 else 128, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=5e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num_epochs * len(batches))
    for _ in range(num_epochs):
        for x, _ in batches:
            quarters = torch.randint(4, (len(x),))
            x = augmented(x)
            for quarter in range(1, 4):
                x[quarters == quarter] = x[quarters == quarter].rot90(quarter, (2, 3))
            optimizer.zero_grad()
            F.cross_entropy(model(x), quarters).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def features_of(trunk: SmallResNet, images: Tensor) -> Tensor:
    """Mean and standard deviation over each channel of the third stage, (N, 256)."""
    trunk.eval()
    found = []
    for x in images.split(1000):
        maps = trunk.stages[2](trunk.stages[1](trunk.stages[0](trunk.stem(x))))
        std, mean = torch.std_mean(maps, dim=(2, 3))
        found.append(torch.cat([mean, std], dim=1))
    trunk.train()
    return torch.cat(found)
