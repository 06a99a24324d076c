"""Wall time of the statistics pass over 300 snapshots of 4 M values: threads of one process beside shards.

Plain ``pytest`` runs each measurement once on a small store, as a test of the result. To measure, on an idle machine
(it writes 4.8 GB into pytest's temporary folder):

    pytest tests/benchmarks/test_statistics_scaling.py --benchmark-enable --benchmark-columns=min,max,rounds

Shards are tasks of a local Ray with warm workers of one thread each; the start of Ray and its workers does not count.
"""

import pytest
import torch

from pdiff_plugin import SnapshotStore
from pdiff_plugin.config import DistributedConfig
from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.statistics import measure
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

# Starting Ray and its workers leaves sockets and files of Ray's own to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

NUM_SNAPSHOTS = 300
NUM_TENSORS = 4  # shards of one, two or four whole tensors, so that their Gram matrices just add up
BLOCK = 16384


@pytest.fixture(scope="module")
def store(request, tmp_path_factory):
    size = 1_000_000 if request.config.getoption("benchmark_enable") else 500
    layout = Layout(tuple(TensorSpec(f"t{i}", (size,), "float32", "parameter") for i in range(NUM_TENSORS)))
    path = tmp_path_factory.mktemp("scaling") / "store"
    writer = TrajectoryWriter(path, layout)
    rng = torch.Generator().manual_seed(0)
    for first in range(1, NUM_SNAPSHOTS + 1, 10):  # a chunk holds up to 64 MiB
        writer.write_chunk(torch.randn(10, layout.num_values, generator=rng), range(first, first + 10))
    return path


def gram_of(path, shard):
    number, num_shards, num_threads = shard
    torch.set_num_threads(num_threads)
    store = SnapshotStore.open(path)
    D = store.layout.num_values
    columns = slice(D * number // num_shards, D * (number + 1) // num_shards)
    rows = torch.arange(NUM_SNAPSHOTS)
    return measure(store.rows, store.layout, block_values=BLOCK, train_rows=rows, columns=columns).gram


@pytest.fixture(scope="module")
def expected(store):
    rows = torch.arange(NUM_SNAPSHOTS)
    opened = SnapshotStore.open(store)
    return measure(opened.rows, opened.layout, block_values=BLOCK, train_rows=rows).gram


def run(benchmark, function):
    return benchmark.pedantic(function, rounds=3 if benchmark.enabled else 1, warmup_rounds=0)


@pytest.mark.benchmark(group="statistics of 300 x 4 M")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_in_process(benchmark, store, expected, num_threads):
    before = torch.get_num_threads()
    gram = run(benchmark, lambda: gram_of(store, (0, 1, num_threads)))
    torch.set_num_threads(before)
    torch.testing.assert_close(gram, expected, rtol=1e-9, atol=1e-6)


@pytest.mark.benchmark(group="statistics of 300 x 4 M")
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_shards(benchmark, local_ray, store, expected, num_shards):
    from pdiff_plugin.cluster.connection import map_in_order

    def pass_over_columns():
        shards = [(number, num_shards, 1) for number in range(num_shards)]
        return sum(map_in_order(gram_of, store, shards, DistributedConfig()))

    map_in_order(lambda _, item: item, None, list(range(4)), DistributedConfig())  # workers are up
    gram = run(benchmark, pass_over_columns)
    torch.testing.assert_close(gram, expected, rtol=1e-9, atol=1e-6)
