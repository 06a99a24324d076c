"""Whether tensors fit, by name and shape; names themselves are tested with the layout that is made of them."""

from __future__ import annotations

import pytest
import torch

from pdiff_plugin.errors import LayoutMismatchError
from pdiff_plugin.modules.names import check_fits, shapes_of


def test_more_tensors_than_expected_fit() -> None:
    check_fits({"a": (2,)}, {"b": (1,), "a": (2,)}, "the store")


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ({"a": (2,), "b": (4,)}, "tensor 'b': the store recorded (3, 1), found (4,)."),
        ({"a": (2,)}, "tensor 'b': the store recorded (3, 1), found no such tensor in these weights."),
        ({}, "tensor 'a': the store recorded (2,), found no such tensor in these weights."),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_named(found: dict[str, tuple[int, ...]], text: str) -> None:
    with pytest.raises(LayoutMismatchError) as caught:
        check_fits({"a": (2,), "b": (3, 1)}, found, "the store", "these weights")
    assert text in str(caught.value)


def test_shapes_are_plain_tuples() -> None:
    shapes = shapes_of({"a": torch.zeros(2, 3), "b": torch.zeros(())})
    assert shapes == {"a": (2, 3), "b": ()}
    assert str(shapes["a"]) == "(2, 3)"
