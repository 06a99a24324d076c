"""Work on members as tasks of a cluster: the same results as in one process, in the order of the members."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file

from pdiff_plugin import DiffusionConfig, FitConfig, fit
from pdiff_plugin.cli import main
from pdiff_plugin.cluster.connection import map_in_order
from pdiff_plugin.config import DistributedConfig
from pdiff_plugin.errors import ConfigError

# Starting Ray and its workers leaves sockets and files of Ray's own to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

QUICK = FitConfig(diffusion=DiffusionConfig(width=16, num_blocks=1, max_steps=20, batch_size=16, eval_every_n_steps=20))


def test_results_come_in_the_order_of_the_items_whatever_ends_first(local_ray):
    def late_first(shared, item):
        time.sleep(0.4 if item == 0 else 0.0)
        return shared + item

    seen = []
    results = map_in_order(late_first, 100, list(range(6)), DistributedConfig(), seen.append)

    assert results == [100, 101, 102, 103, 104, 105]
    assert seen == [1, 2, 3, 4, 5, 6]


def test_our_errors_come_home_from_a_task_as_they_were(local_ray):
    def refuse(shared, item):
        raise ConfigError("item", item, "must be another")

    with pytest.raises(ConfigError) as caught:
        map_in_order(refuse, None, [1], DistributedConfig())
    assert str(caught.value) == "item = 1: it must be another."


def test_members_made_on_two_workers_are_those_of_one_process(local_ray, make_store, tmp_path, capsys):
    fit(make_store(), QUICK, out=tmp_path / "fit")
    command = ["generate", str(tmp_path / "fit"), "--num-members", "20", "--json", "--out"]
    assert main([*command, str(tmp_path / "alone")]) == 0
    capsys.readouterr()

    assert main([*command, str(tmp_path / "together"), "--num-workers", "2"]) == 0

    files = json.loads(capsys.readouterr().out)["members"]
    assert files == [str(tmp_path / "together" / f"member-{number:04d}.safetensors") for number in range(20)]
    for path in sorted((tmp_path / "alone").iterdir()):
        one, other = load_file(path), load_file(tmp_path / "together" / path.name)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(list((tmp_path / "together").iterdir())) == 20
