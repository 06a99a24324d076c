"""Random programs of modules, views and in-place writes: replaying a trunk must never change what members compute."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from pdiff_plugin import DiffusionEnsemble

WIDTH = 4


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        return x * self.gain


class ScaleInPlace(Scale):
    def forward(self, x):
        return x.mul_(self.gain)


class View(nn.Module):
    def forward(self, x):
        return x.view(2, -1).view(-1, WIDTH)


class Half(nn.Module):
    """A view of some columns, doubled in place."""

    def forward(self, x):
        half = x[:, : WIDTH // 2]
        half.mul_(2.0)
        return x


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.ReLU(inplace=True), Scale())

    def forward(self, x):
        return [x, self.inner(x)]


class WriteBoth(nn.Module):
    def forward(self, x, y):
        x.mul_(0.7)
        return y.add_(0.3)


class PassAndRead(nn.Module):
    def forward(self, x, y):
        return [x, y.sigmoid()]


KINDS = [
    WriteBoth,
    PassAndRead,
    Scale,
    ScaleInPlace,
    View,
    Half,
    Pair,
    nn.Identity,
    lambda: nn.ReLU(inplace=True),
    nn.Sigmoid,
]
OPERATIONS = ["call", "add", "add_", "mul_", "slice_", "sigmoid", "alias"]

index = st.integers(0, 5)
steps = st.lists(
    st.tuples(st.sampled_from([*OPERATIONS, "call", "call"]), index, index, index), min_size=2, max_size=10
)


class Program(nn.Module):
    """Registers, and instructions on them that run in the root's own ``forward``."""

    def __init__(self, kinds, program):
        super().__init__()
        self.parts = nn.ModuleList(kind() for kind in kinds)
        self.program = program

    def forward(self, x):
        registers = [x, torch.sin(x)]
        for operation, a, b, c in self.program:
            left, right = registers[a % len(registers)], registers[b % len(registers)]
            if operation == "call":
                part = self.parts[c % len(self.parts)]
                out = part(left, right) if isinstance(part, WriteBoth | PassAndRead) else part(left)
                registers += out if isinstance(out, list) else [out]
            elif operation == "add":
                registers.append(left + right)
            elif operation == "add_":
                left.add_(right)
            elif operation == "mul_":
                left.mul_(0.5)
            elif operation == "slice_":
                left[:, 1:3].add_(right[:, :2])
            elif operation == "sigmoid":
                registers.append(left.sigmoid())
            else:
                registers.append(left.detach()[:, [0, 1, 2, 3]] if c % 2 else left.detach())
        return torch.stack(registers).sigmoid().sum(0)


@settings(max_examples=300, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=3, max_size=6),
    program=steps,
    chosen=index,
    vectorize=st.booleans(),
    num_batches=st.integers(1, 2),
)
@example(  # one kept call writes into the trunk, then into memory that the root makes anew
    kinds=[Scale, WriteBoth],
    program=[("call", 0, 0, 0), ("call", 2, 1, 1), ("call", 2, 0, 2)],
    chosen=1,
    vectorize=False,
    num_batches=1,
)
@example(  # a call that runs again has read what a kept call then overwrites
    kinds=[Scale, PassAndRead, ScaleInPlace],
    program=[("call", 0, 0, 0), ("call", 1, 2, 1), ("call", 2, 0, 2), ("call", 0, 0, 3)],
    chosen=2,
    vectorize=False,
    num_batches=1,
)
def test_any_program_gives_what_the_plain_loop_gives(kinds, program, chosen, vectorize, num_batches):
    torch.manual_seed(0)
    model = Program([*kinds, Scale], program).eval()
    names = [name for name, _ in model.named_parameters()]
    name = names[chosen % len(names)]
    weights = {name: torch.rand(3, WIDTH) + 0.5}
    expected_by = DiffusionEnsemble(model, weights, strategy="loop")
    # Not "auto", whose check against the plain loop would hide a mistake.
    found_by = DiffusionEnsemble(model, weights, strategy="trunk", vectorize=vectorize, member_chunk=2)

    for _ in range(num_batches):
        x = torch.randn(4, WIDTH)
        torch.testing.assert_close(found_by.members(x), expected_by.members(x), rtol=1e-5, atol=1e-6)
