"""Time of 32 members against one forward pass: timm resnet18, last two BatchNorms generated, batch of 64 32x32 images.

Run with

    OMP_NUM_THREADS=1 pytest tests/benchmarks/test_ensemble_speed.py --benchmark-enable
"""

import pytest
import torch

from pdiff_plugin import DiffusionEnsemble, WeightSet
from pdiff_plugin.modules.names import named_tensors

NUM_MEMBERS = 32


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return pytest.importorskip("timm").create_model("resnet18", num_classes=10).eval()


@pytest.fixture(scope="module")
def weights(model):
    rng = torch.Generator().manual_seed(1)
    live = named_tensors(model)
    names = [f"layer4.1.bn{i}.{key}" for i in (1, 2) for key in ("weight", "bias", "running_mean", "running_var")]
    return WeightSet({n: live[n] + 0.1 * torch.rand(NUM_MEMBERS, *live[n].shape, generator=rng) for n in names})


@pytest.fixture
def images(request):
    # Without --benchmark-enable this is a test of the answer, not of the time.
    batch_size = 64 if request.config.getoption("benchmark_enable") else 2
    return torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.benchmark(group="32 members, last two BatchNorms", warmup=True, min_rounds=5)
@pytest.mark.parametrize("what", ["one forward", "trunk", "loop"])
def test_time_of_an_ensemble(benchmark, model, weights, images, what):
    run = model if what == "one forward" else DiffusionEnsemble(model, weights, strategy=what)

    with torch.no_grad():
        output = benchmark(run, images)
        members = torch.stack([torch.func.functional_call(model, state, (images,)) for state in weights.members()])

    expected = model(images) if what == "one forward" else members.softmax(-1).mean(0).log()
    torch.testing.assert_close(output, expected.detach(), rtol=1e-4, atol=1e-4)
