"""What is read out of a user's batches and of a model's outputs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pdiff_plugin.errors import ConfigError, DataError
from pdiff_plugin.modules.batches import LABELS, arguments_of, logits_of, num_batches_in

CPU = torch.device("cpu")
X = torch.randn(2, 3)


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, torch.zeros(2)), (X,), {}),
        ([X], (X,), {}),
        (((X, X), torch.zeros(2)), (X, X), {}),
        ({"x": X, **dict.fromkeys(LABELS, torch.zeros(2))}, (), {"x": X}),
    ],
)
def test_a_batch_becomes_the_arguments_of_a_model_without_its_labels(batch, args, kwargs):
    found_args, found_kwargs = arguments_of(batch, CPU)
    assert len(found_args) == len(args)
    assert all(found is expected for found, expected in zip(found_args, args, strict=True))
    assert found_kwargs == kwargs


def test_own_inputs_replace_the_rules():
    assert arguments_of("any batch", CPU, lambda batch: {"text": batch}) == ((), {"text": "any batch"})


def test_a_batch_of_another_form_is_wrong_data():
    with pytest.raises(DataError, match=r"loader = 'batches of int': it must give \(inputs, targets\)"):
        arguments_of(3, CPU)
    with pytest.raises(ConfigError):  # as callers have caught it
        arguments_of((X, X, X), CPU)


@pytest.mark.parametrize("output", [X, {"logits": X, "loss": 0}, SimpleNamespace(logits=X), (X, "hidden"), [X]])
def test_logits_are_found_in_what_models_return(output):
    assert logits_of(output) is X


@pytest.mark.parametrize(("output", "kind"), [({"loss": X}, "dict"), ((), "tuple")])
def test_an_output_without_logits_is_wrong_data(output, kind):
    with pytest.raises(DataError) as caught:
        logits_of(output)
    assert str(caught.value) == f"output of the model = {kind!r}: it must be logits or hold them as `logits`."


def test_a_loader_without_a_length_has_no_number_of_batches():
    assert num_batches_in([1, 2]) == 2
    assert num_batches_in(iter([1, 2])) == 0
