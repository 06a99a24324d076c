"""Settings that cannot work are refused before anything is read."""

import json
from typing import get_args

import pytest

from pdiff_plugin import DiffusionConfig, FitConfig, SubspaceConfig
from pdiff_plugin.config import AUTOENCODER_CONFIGS, AutoencoderConfig, AutoencoderName, ConvConfig, SamplingConfig
from pdiff_plugin.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (DiffusionConfig, {"prediction_type": "v"}, "prediction_type = 'v'.*one of epsilon, v_prediction, flow"),
        (DiffusionConfig, {"network": "conf"}, "network = 'conf'.*one of residual, conv"),
        (DiffusionConfig, {"lr_schedule": "linear"}, "lr_schedule = 'linear'.*one of constant, cosine"),
        (DiffusionConfig, {"sampler": "euler"}, "sampler = 'euler'.*one of ddpm"),
        (DiffusionConfig, {"sampler": "ddim"}, "sampler = 'ddim'.*'flow', 'heun' or 'dpm-solver\\+\\+'"),
        (DiffusionConfig, {"sampler": "flow", "prediction_type": "epsilon"}, "sampler = 'flow'.*'ddim', 'ddpm'"),
        (DiffusionConfig, {"sampler": "one-step"}, "sampler = 'one-step'.*distill_steps above 0"),
        (DiffusionConfig, {"num_sampling_steps": 0}, "num_sampling_steps = 0.*must be from 1 to"),
        (DiffusionConfig, {"num_sampling_steps": 1001, "prediction_type": "epsilon"}, "from 1 to 1000"),
        (DiffusionConfig, {"beta_start": 0.0}, "beta_start = 0.0.*above 0"),
        (DiffusionConfig, {"width": 65}, "width = 65.*even"),
        (SamplingConfig, {"eta": -0.1}, "eta = -0.1.*from 0 to 1"),
        (SubspaceConfig, {"basis_dtype": "float16"}, "basis_dtype = 'float16'.*one of auto, float32, bfloat16"),
        (ConvConfig, {"standardise": "row"}, "standardise = 'row'.*one of tensor, coordinate"),
        (FitConfig, {"precision": "bf16"}, "precision = 'bf16'.*one of float32, bfloat16"),
        (FitConfig, {"align": "yes"}, "align = 'yes'.*one of none, rebasin"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_what_can(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        kind(**settings)


@pytest.mark.parametrize("autoencoder", [SubspaceConfig(latent_dim=3), ConvConfig(latent_dim=3, channels=(4, 8))])
def test_settings_come_back_from_json_with_or_without_the_kind_of_the_autoencoder(autoencoder):
    config = FitConfig(autoencoder=autoencoder)
    document = json.loads(json.dumps(config.to_json()))

    assert document["autoencoder"]["kind"] == autoencoder.kind
    assert FitConfig.from_json(document) == config
    del document["autoencoder"]["kind"]
    assert FitConfig.from_json(document) == config


def test_every_autoencoder_is_known_by_its_own_kind():
    assert tuple(AUTOENCODER_CONFIGS) == get_args(AutoencoderName)
    assert tuple(AUTOENCODER_CONFIGS.values()) == get_args(AutoencoderConfig)
    for name, config in AUTOENCODER_CONFIGS.items():
        assert config().kind == name
