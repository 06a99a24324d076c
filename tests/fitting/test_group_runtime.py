"""A group of two processes, set up without Ray: what ranks share, and that rank 0 speaks for all."""

import json
import subprocess
import sys

import pytest
import torch

from pdiff_plugin import DiffusionConfig, FitConfig, fit
from pdiff_plugin.config import ConvConfig

RANK = """
import json, sys
from pathlib import Path
import torch
from torch import distributed
from pdiff_plugin.fitting.runtime import GroupRuntime

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
runtime = GroupRuntime(folder)
found = {"share": [runtime.share(7).start, runtime.share(7).stop]}
found["sum"] = runtime.all_reduce(torch.tensor([1.0, rank])).tolist()

weight = torch.zeros(2, 2, requires_grad=True)
weight.grad = torch.full((2, 2), 1.0 + rank)
found["loss"] = float(runtime.sum_gradients([weight], torch.tensor(0.5)))
found["gradient"] = weight.grad.tolist()

whole = torch.arange(14.0).bfloat16().reshape(2, 7)
joined = runtime.join_columns(whole[:, runtime.share(7)], lambda width: torch.empty(2, width, dtype=whole.dtype))
found["joined"] = joined.tolist()

runtime.save_checkpoint("stage", {"a": torch.full((3,), float(rank))}, {"step": 4 + rank})
tensors, state = runtime.load_checkpoint("stage")
found["checkpoint"] = [tensors["a"].tolist(), state]
# Rank 0 at work alone may use its checkpoints: nothing of that is a message to the others.
found["alone"] = runtime.on_rank_0(lambda: runtime.load_checkpoint("stage")[1]["step"])
try:
    runtime.on_rank_0(lambda: 1 / 0)
except ZeroDivisionError as error:
    found["error"] = str(error)
print(json.dumps(found))
distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two ranks found."""
    folder = tmp_path_factory.mktemp("group")
    command = [sys.executable, "-c", RANK]
    started = [
        subprocess.Popen([*command, str(rank), str(folder)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    found = []
    try:
        for process in started:
            out, _ = process.communicate(timeout=120)
            assert process.returncode == 0
            found.append(json.loads(out))
    finally:
        for process in started:  # one that waits for another that has died would wait for ever
            process.kill()
    return found


def test_shares_are_contiguous_and_cover_everything(ranks):
    assert [rank["share"] for rank in ranks] == [[0, 3], [3, 7]]


def test_sums_and_gradients_are_those_of_all_ranks(ranks):
    for rank in ranks:
        assert rank["sum"] == [2.0, 1.0]
        assert rank["loss"] == 1.0
        assert rank["gradient"] == [[3.0, 3.0], [3.0, 3.0]]


def test_rank_0_gets_all_columns_and_the_others_keep_theirs(ranks):
    assert ranks[0]["joined"] == [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13]]
    assert ranks[1]["joined"] == [[3, 4, 5, 6], [10, 11, 12, 13]]


def test_rank_0_keeps_the_checkpoint_that_all_ranks_load(ranks):
    for rank in ranks:
        assert rank["checkpoint"] == [[0.0, 0.0, 0.0], {"step": 4}]
        assert rank["alone"] == 4


def test_an_error_on_rank_0_is_an_error_on_every_rank(ranks):
    assert [rank["error"] for rank in ranks] == ["division by zero"] * 2


CONV = FitConfig(
    autoencoder=ConvConfig(latent_dim=16, channels=(4, 4), max_steps=30, lr=1e-3),
    diffusion=DiffusionConfig(
        network="conv", conv_channels=(4, 8, 4), precondition=False, max_steps=40, eval_every_n_steps=20
    ),
)


def test_a_trained_autoencoder_and_a_denoiser_with_batchnorm_are_those_of_one_process(
    make_store, fit_in_a_group, tmp_path
):
    store = make_store()
    alone = fit(store, CONV, out=tmp_path / "alone")

    together = fit_in_a_group(store, CONV)

    for name, tensor in alone.autoencoder.state_dict().items():
        torch.testing.assert_close(together.autoencoder.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    for name, tensor in alone.denoiser.state_dict().items():
        torch.testing.assert_close(together.denoiser.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
