import pytest
import timm
import torch
from torch import nn

from pdiff_plugin.errors import SelectionError
from pdiff_plugin.recording.selection import select

LAST_TWO = [
    *("bn2.weight", "bn2.bias", "bn2.running_mean", "bn2.running_var"),
    *("bn3.weight", "bn3.bias", "bn3.running_mean", "bn3.running_var"),
]


class LlamaRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


def names(model, layers, **kwargs):
    return list(select(model, layers, **kwargs).tensors)


def test_the_default_is_the_last_two_norm_layers_with_their_statistics(net):
    selection = select(net)
    assert list(selection.tensors) == LAST_TWO
    assert selection.kinds["bn3.weight"] == "parameter"
    assert selection.kinds["bn3.running_var"] == "buffer"
    assert selection.layout.num_values == 8 * 6


def test_norms_head_and_all(net):
    assert names(net, "last-norms:1") == LAST_TWO[4:]
    assert (
        names(net, "norms") == [f"bn1.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")] + LAST_TWO
    )
    assert names(net, "head") == ["fc.weight", "fc.bias"]
    everything = [name for name in net.state_dict() if not name.endswith("num_batches_tracked")]
    assert sorted(names(net, "all")) == sorted(everything)


def test_a_glob_of_modules_takes_all_inside_and_a_glob_of_tensors_is_the_fallback(net):
    assert names(nn.Sequential(net, nn.Linear(3, 3)), "0.bn3") == [f"0.{name}" for name in LAST_TWO[4:]]
    assert names(nn.ModuleDict({"body": net}), "body") == [f"body.{name}" for name in names(net, "all")]
    assert names(net, "fc.*") == ["fc.weight", "fc.bias"]
    assert names(net, "*.bias") == ["conv1.bias", "bn1.bias", "bn1.running_mean", "bn1.running_var", "conv2.bias"] + [
        name for name in LAST_TWO if "weight" not in name
    ] + ["fc.bias"]


def test_a_list_is_a_union_in_the_order_of_the_model(net):
    assert names(net, ["head", "conv1", "fc"]) == ["conv1.weight", "conv1.bias", "fc.weight", "fc.bias"]


def test_a_function_is_asked_for_parameters_and_float_buffers(net):
    asked = []
    assert names(net, lambda name, tensor: asked.append(name) or name == "bn1.weight") == [
        "bn1.weight",
        "bn1.running_mean",
        "bn1.running_var",
    ]
    assert "bn1.running_mean" in asked
    assert "bn1.num_batches_tracked" not in asked


def test_norms_are_told_by_class_or_by_the_name_of_their_class():
    model = nn.Sequential(
        nn.GroupNorm(2, 4), LlamaRMSNorm(), nn.LayerNorm(4), nn.RMSNorm(4), nn.LayerNorm(4, bias=False)
    )
    assert names(model, "norms") == ["0.weight", "0.bias", "1.weight", "2.weight", "2.bias", "3.weight", "4.weight"]
    assert names(nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False)), "last-norms:1") == [
        "0.weight",
        "0.bias",
    ]


def test_the_head_is_the_one_that_timm_names():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, depth=1, img_size=32)
    assert names(model, "head") == ["head.weight", "head.bias"]
    without_head = timm.create_model("resnet10t", num_classes=0)
    with pytest.raises(SelectionError, match="finds no linear layer"):
        select(without_head, "head")


def test_lora_picks_what_peft_added():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), peft.LoraConfig(r=2, target_modules=["0"]))
    found = select(model, "lora")
    assert [tuple(tensor.shape) for tensor in found.tensors.values()] == [(2, 4), (4, 2)]
    assert all("lora_" in name for name in found.tensors)


def test_frozen_tensors_are_left_out_and_reported(net):
    net.bn3.requires_grad_(False)
    selection = select(net)
    assert list(selection.tensors) == LAST_TWO[:4]
    assert selection.frozen == ("bn3.weight", "bn3.bias")


def test_an_averaged_copy_needs_no_gradients(net):
    net.requires_grad_(False)
    assert names(net, "last-norms:2", averaged=True) == LAST_TWO


def test_wrappers_do_not_show_in_names(net):
    compiled = torch.compile(nn.Sequential(torch.compile(net, backend="eager"), nn.Linear(3, 3)), backend="eager")
    assert names(compiled, "last-norms:1") == [f"0.{name}" for name in LAST_TWO[4:]]


def test_a_tied_tensor_is_taken_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert names(model, "all") == ["0.weight"]
    assert names(model, "head") == ["0.weight"]


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ("convv1", "layers='convv1' matches no module and no tensor. Nearest names in this model: conv1, conv2"),
        ("fc.wieght", "Nearest names in this model: fc.weight"),
        (
            "last-norms:0",
            "layers='last-norms:0' needs a whole number from 1. Nearest names in this model: last-norms:2.",
        ),
        ("last-norms", "needs a whole number from 1"),
        ("last-norm:2", "Nearest names in this model: last-norms:2"),
        ("lora", "layers='lora' finds no LoRA matrices. Wrap the model with PEFT's get_peft_model first."),
        (["head", "nope*"], "layers='nope*' matches no module"),
        ([], "layers=[] is empty. Nearest names in this model: last-norms:2, norms, head, lora, all."),
        (
            lambda name, tensor: False,
            "layers=<function <lambda>> picks no tensor. Nearest names in this model: bn3.bias",
        ),
        (lambda name, tensor: name == "bn1.running_mean", "picks only tensors that are not trained (bn1.running_mean"),
    ],
)
def test_a_selection_of_nothing_says_what_there_is(net, layers, text):
    with pytest.raises(SelectionError) as caught:
        select(net, layers)
    assert text in str(caught.value)


def test_a_selection_of_frozen_tensors_only_says_so(net):
    net.bn2.requires_grad_(False)
    net.bn3.requires_grad_(False)
    with pytest.raises(SelectionError) as caught:
        select(net)
    assert str(caught.value) == (
        "layers='last-norms:2' picks only tensors that are not trained (bn2.bias, bn2.weight, bn3.bias, ...). "
        "Nearest names in this model: bn1.bias, conv2.weight, conv2.bias, fc.weight, fc.bias. "
        "Unfreeze them (requires_grad_()) before recording, or choose layers that train."
    )


def test_a_model_without_norms_is_pointed_to_the_head():
    with pytest.raises(SelectionError, match="finds no normalization layer"):
        select(nn.Linear(2, 2))
