"""The search: its score against closed forms, its trials, and that an interrupted one goes on."""

import json
import shutil
import threading
from dataclasses import replace

import pytest
import torch

from pdiff_plugin import ConditionConfig, DiffusionConfig, FitConfig, WeightGenerator, fit
from pdiff_plugin.config import TuneConfig
from pdiff_plugin.errors import ConfigError, FitExistsError, FormatError

pytest.importorskip("ray")
from pdiff_plugin.cluster.tune import SPACE, HeldoutScore, _configured, _key, _open, _reports_of, energy_distance, tune
from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.split import heldout_blocks

# Starting Ray and its workers leaves sockets and files of Ray's own to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

QUICK = FitConfig(diffusion=DiffusionConfig(width=16, num_blocks=1, max_steps=90, batch_size=16, eval_every_n_steps=10))


def distance_of(samples, others):
    points = torch.cat([samples, others])
    return energy_distance(torch.cdist(points, points), len(samples))


def test_the_energy_distance_of_normal_samples_meets_its_closed_form():
    rng = torch.Generator().manual_seed(0)
    others = torch.randn(2000, 1, generator=rng, dtype=torch.float64)
    samples = torch.randn(2000, 1, generator=rng, dtype=torch.float64)
    assert abs(distance_of(samples, others)) < 0.01
    # E|x - y| of N(0, 1) against N(m, 1), with d = N(m, sqrt(2)): s sqrt(2/pi) exp(-m^2/2s^2) + m erf(m / s sqrt(2))
    m, s = torch.tensor(1.5, dtype=torch.float64), 2**0.5
    between = s * (2 / torch.pi) ** 0.5 * (-(m**2) / (2 * s**2)).exp() + m * torch.erf(m / (s * 2**0.5))
    among = 2 / torch.pi**0.5
    expected = float((2 * between - 2 * among) / among)
    assert distance_of(samples + m, others) == pytest.approx(expected, rel=0.1)


def test_the_score_tells_a_wrong_centre_and_a_wrong_spread(make_store):
    store = make_store(num_snapshots=200)
    generator = fit(store, FitConfig(diffusion=DiffusionConfig(width=64, max_steps=600)))
    score = HeldoutScore(store.path, heldout_blocks(200, 0.1).nonzero().squeeze(1))
    fair = score(generator, 1.0)
    assert score(generator, 0.0) > fair
    assert score(generator, 4.0) > fair
    generator.autoencoder.mean += 1.0
    assert score(generator, 1.0) > fair


def test_a_search_ends_with_its_best_fit_and_is_returned_when_asked_again(local_ray, make_store, tmp_path):
    store = make_store(num_snapshots=60)
    seen = []
    lock = threading.Lock()  # as a progress bar has one: what holds it cannot be pickled

    def listen(report):
        with lock:
            seen.append(report)

    document = tune(store, QUICK, TuneConfig(num_trials=3), out=tmp_path / "tuned", on_progress=listen)

    scores = [trial["score"] for trial in document["trials"]]
    assert len(scores) == 3
    assert scores == sorted(scores)
    (default,) = (trial for trial in document["trials"] if trial["is_default"])
    assert default["max_steps"] == 90
    assert scores[0] <= default["score"]
    assert sorted(p.name for p in (tmp_path / "tuned").iterdir()) == ["fit.json", "generator.safetensors", "tune.json"]
    generator = WeightGenerator.load(tmp_path / "tuned")
    assert generator.config.diffusion.lr == document["trials"][0]["lr"]
    assert [(p.step, p.total_steps) for p in seen if p.stage == "tune"] == [(1, 3), (2, 3), (3, 3)]
    assert tune(store, QUICK, TuneConfig(num_trials=3), out=tmp_path / "tuned") == document
    with pytest.raises(FitExistsError, match="a search with another search"):
        tune(store, QUICK, TuneConfig(num_trials=4), out=tmp_path / "tuned")
    shutil.rmtree(store.path)
    recorded_anew = make_store(2.0 * torch.rand(60, 40))
    with pytest.raises(FitExistsError, match="a search on other snapshots"):
        tune(recorded_anew, QUICK, TuneConfig(num_trials=3), out=tmp_path / "tuned")


@pytest.mark.slow
def test_a_search_on_conditions_is_judged_at_those_held_out(local_ray, sweep_store, tmp_path):
    base = replace(QUICK, condition=ConditionConfig(kinds=("angle:cyclic=360",), hold_out=("angle=90",)))
    found = tune(sweep_store, base, TuneConfig(num_trials=2), out=tmp_path / "search")

    assert found["score"] == "error of samples at conditions held out"
    best = WeightGenerator.load(tmp_path / "search")
    assert found["trials"][0]["score"] == pytest.approx(best.report["condition"]["heldout_error"], abs=1e-5)
    assert len(best.trajectories) == 11


def test_what_is_searched_reaches_the_fit_and_the_base_keeps_the_rest():
    base = replace(QUICK, diffusion=replace(QUICK.diffusion, sampler="flow", num_sampling_steps=5))
    mine = {name: searched.value(name, base) for name, searched in SPACE.items()}
    assert mine == {"latent_dim": 64, "prediction_type": "flow", "lr": 1e-3, "patience": 6, "temperature": 1.0}
    assert _configured(base, mine, 90) == base

    other = _configured(base, mine | {"latent_dim": 16, "lr": 2e-3, "prediction_type": "epsilon"}, 30)

    assert other.autoencoder == replace(base.autoencoder, latent_dim=16)
    expected = replace(QUICK.diffusion, prediction_type="epsilon", lr=2e-3, max_steps=30)
    assert other.diffusion == expected  # a sampler of flows does not fit


def test_a_search_on_a_store_exchanged_in_its_later_columns_is_not_gone_on_with(make_store, tmp_path):
    layout = Layout((TensorSpec("w", (100,), "float32", "parameter"),))
    store, search = make_store(layout=layout), TuneConfig(num_trials=2)
    document = _open(store, QUICK, search, tmp_path / "tuned", None, fresh=False)
    assert _open(store, QUICK, search, tmp_path / "tuned", None, fresh=False) == document
    rows = store.rows()
    rows[:, 70:] += 1.0
    shutil.rmtree(store.path)
    exchanged = make_store(rows, layout=layout)

    with pytest.raises(FitExistsError, match="a search on other snapshots"):
        _open(exchanged, QUICK, search, tmp_path / "tuned", None, fresh=False)

    del document["fingerprint"]  # as before there was one
    (tmp_path / "tuned" / "tune.json").write_text(json.dumps(document))
    assert _open(exchanged, QUICK, search, tmp_path / "tuned", None, fresh=False)["snapshots"] == document["snapshots"]


@pytest.mark.parametrize("settings", [{"heldout_fraction": 0.0}, {}])
def test_a_search_with_less_than_two_snapshots_to_score_on_is_refused(make_store, tmp_path, settings):
    with pytest.raises(ConfigError, match="must hold out at least 2 snapshots"):
        tune(make_store(num_snapshots=12), replace(QUICK, **settings), out=tmp_path / "tuned")


def test_a_search_does_not_replace_a_fit(make_store, tmp_path):
    fit(make_store(), QUICK, out=tmp_path / "fit")
    before = (tmp_path / "fit" / "fit.json").read_text()
    with pytest.raises(FitExistsError, match="holds another fit"):
        tune(make_store(name="again"), QUICK, TuneConfig(), out=tmp_path / "fit")
    assert json.loads((tmp_path / "fit" / "fit.json").read_text()) == json.loads(before)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"config": {"autoencoder": {}}}, "KeyError: 'diffusion'"),
        ({"status": "paused"}, "the status 'paused'"),
        ({"trials": [[]]}, "TypeError"),
        ({"trials": [{"score": "low", "is_default": True}]}, "a trial without a score"),
        ({"trials": [{"score": 1.0}]}, "KeyError: 'is_default'"),
    ],
)
def test_a_document_of_something_else_is_refused_by_its_path(make_store, tmp_path, changes, text):
    store = make_store()
    arguments = store, FitConfig(), TuneConfig(), tmp_path / "tune", None
    _open(*arguments, fresh=False)
    path = tmp_path / "tune" / "tune.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(FormatError) as caught:
        _open(*arguments, fresh=False)
    assert str(caught.value).startswith(f"{path}: found ")
    assert text in str(caught.value)


def test_a_trial_whose_report_is_damaged_is_told_by_its_path(tmp_path):
    folder = tmp_path / f"{_key({'lr': 1})}-1"
    folder.mkdir()
    (folder / "trial.json").write_text('{"score": ')
    with pytest.raises(FormatError, match=r"trial\.json: found unreadable JSON"):
        _reports_of(tmp_path, {"lr": 1})
