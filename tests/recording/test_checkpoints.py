import argparse
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pdiff_plugin import SnapshotStore, import_checkpoints
from pdiff_plugin.errors import CheckpointError, FormatError, LayoutMismatchError, SelectionError


class NotPlain:
    pass


def states(net, num):
    """State dicts whose values name their number."""
    found = []
    for number in range(num):
        net.fc.bias.data.fill_(number)
        found.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
    return found


def assert_numbers(store, numbers):
    assert [store.state_dict(i)["fc.bias"][0].item() for i in range(len(store))] == numbers


def test_bare_state_dicts_come_in_natural_name_order(net, tmp_path):
    files = []
    for number, state in enumerate(states(net, 12)):
        files.append(tmp_path / f"w{number}.pth")
        torch.save(state, files[-1])
    store = import_checkpoints(sorted(files), store=tmp_path / "s", layers="head")
    assert store.layout.names == ["fc.weight", "fc.bias"]
    assert store.steps.tolist() == list(range(1, 13))
    assert_numbers(store, list(range(12)))
    assert set(store.base()) == set(net.state_dict())
    assert store.base()["fc.bias"][0] == 11


def test_the_files_own_counters_give_order_and_steps(net, tmp_path):
    for state, name, step in zip(states(net, 3), "cab", (10, 30, 20), strict=True):
        torch.save({"state_dict": state, "global_step": step, "epoch": step / 10}, tmp_path / f"{name}.ckpt")
    store = import_checkpoints(tmp_path, store=tmp_path / "s", layers=["head"])
    assert store.steps.tolist() == [10, 20, 30]
    assert store.epochs == [1.0, 2.0, 3.0]
    assert_numbers(store, [0, 2, 1])


def test_a_checkpoint_that_comes_twice_is_taken_once(net, tmp_path, caplog):
    for state, name in zip(states(net, 2), ("epoch=1", "last"), strict=True):
        torch.save({"model": state, "step": 5}, tmp_path / f"{name}.pt")
    store = import_checkpoints(tmp_path, store=tmp_path / "s", layers="head")
    assert store.steps.tolist() == [5]
    assert f"{tmp_path / 'last.pt'} is left out: it is of step 5, as {tmp_path / 'epoch=1.pt'} is" in caplog.text


def test_a_counter_that_starts_anew_in_each_epoch_gives_way_to_the_epoch(net, tmp_path, caplog):
    for number, state in enumerate(states(net, 3)):
        torch.save({"model": state, "epoch": number + 1, "step": 390}, tmp_path / f"{number}.pt")
    store = import_checkpoints(tmp_path, store=tmp_path / "s", layers="head")
    assert store.steps.tolist() == [1, 2, 3]
    assert_numbers(store, [0, 1, 2])
    assert caplog.text == ""


@pytest.mark.parametrize(
    "counters",
    [[{"epoch": 40}, {}, {}], [{"epoch": 1, "step": 1}, {"epoch": 1, "step": 2}, {"epoch": 2, "step": 1}]],
    ids=["not in all", "not distinct"],
)
def test_checkpoints_that_no_counter_tells_apart_are_numbered_by_name_and_all_taken(net, tmp_path, caplog, counters):
    for number, (state, counter) in enumerate(zip(states(net, 3), counters, strict=True)):
        torch.save({"model": state, **counter}, tmp_path / f"{number}.pt")
    store = import_checkpoints(tmp_path, store=tmp_path / "s", layers="head")
    assert store.steps.tolist() == [1, 2, 3]
    assert_numbers(store, [0, 1, 2])
    assert "the checkpoints are numbered in the order of their names" in caplog.text


def test_a_tensor_beside_the_state_dict_is_not_taken_for_a_weight(net, tmp_path):
    document = {"state_dict": net.state_dict(), "best_acc1": torch.tensor(51.2), "epoch": 3}
    torch.save(document, tmp_path / "checkpoint.pth.tar")
    store = import_checkpoints([tmp_path / "checkpoint.pth.tar"], store=tmp_path / "s", layers="head")
    assert store.steps.tolist() == [3]
    assert set(store.base()) == set(net.state_dict())


def test_averaged_weights_of_timm_are_taken_on_request(net, tmp_path):
    trained, averaged = states(net, 2)
    document = {"epoch": 3, "arch": "net", "state_dict": trained, "args": argparse.Namespace(lr=0.1)}
    torch.save({**document, "state_dict_ema": averaged}, tmp_path / "checkpoint-3.pth.tar")
    for ema in (False, True):
        path = tmp_path / "checkpoint-3.pth.tar"
        store = import_checkpoints([path], store=tmp_path / str(ema), layers="head", ema=ema)
        assert store.steps.tolist() == [3]
        assert_numbers(store, [int(ema)])
    torch.save(document, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="it has no averaged weights under any of state_dict_ema, model_ema"):
        import_checkpoints(tmp_path / "x.pt", store=tmp_path / "s", ema=True)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model._orig_mod."])
def test_prefixes_are_stripped_when_that_makes_the_layouts_meet(net, tmp_path, prefix):
    first, second = states(net, 2)
    torch.save(first, tmp_path / "1.pt")
    torch.save({prefix + name: tensor for name, tensor in second.items()}, tmp_path / "2.pt")
    store = import_checkpoints([tmp_path / "1.pt", tmp_path / "2.pt"], store=tmp_path / "s", layers="fc", model=net)
    assert store.layout.names == ["fc.weight", "fc.bias"]
    assert_numbers(store, [0, 1])


def test_without_a_model_the_prefixes_that_only_wrappers_give_are_stripped(net, tmp_path):
    torch.save({f"module._orig_mod.model.{name}": t for name, t in states(net, 1)[0].items()}, tmp_path / "1.pt")
    store = import_checkpoints(tmp_path / "1.pt", store=tmp_path / "s", layers="head")
    assert store.layout.names == ["model.fc.weight", "model.fc.bias"]


@pytest.mark.parametrize("layers", ["last-norms:2", "norms", "head", "all", "bn*", "*.bias"])
def test_layers_mean_the_same_with_and_without_the_model(net, tmp_path, layers):
    torch.save(net.state_dict(), tmp_path / "1.pt")
    with_model = import_checkpoints(tmp_path / "1.pt", store=tmp_path / "a", layers=layers, model=net)
    without = import_checkpoints(tmp_path / "1.pt", store=tmp_path / "b", layers=layers)
    assert with_model.layout == without.layout


def test_safetensors_and_a_sharded_index_are_read(net, tmp_path):
    first, second = states(net, 2)
    save_file(first, tmp_path / "one.safetensors")
    names = list(second)
    folder = tmp_path / "checkpoint-40"
    folder.mkdir()
    parts = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for part, inside in parts.items():
        save_file({name: second[name] for name in inside}, folder / part)
    index = {"weight_map": {name: part for part, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 40, "epoch": 2.5}))
    store = import_checkpoints(tmp_path / "one.safetensors", store=tmp_path / "s", layers="head")
    store = import_checkpoints(folder, store=tmp_path / "s", layers="head")
    assert store.trajectories == ["run-001", "run-002"]
    assert store.steps.tolist() == [1, 40]
    assert store.epochs == [None, 2.5]
    assert_numbers(store, [0, 1])


def test_a_folder_of_numbered_checkpoints_is_taken_in_order(net, tmp_path):
    for number, state in enumerate(states(net, 11)):
        (tmp_path / f"checkpoint-{number + 1}").mkdir()
        save_file(state, tmp_path / f"checkpoint-{number + 1}" / "model.safetensors")
    store = import_checkpoints(tmp_path, store=tmp_path / "s", layers="head")
    assert store.steps.tolist() == list(range(1, 12))
    assert_numbers(store, list(range(11)))


def test_the_final_model_of_transformers_does_not_hide_the_checkpoints_beside_it(net, tmp_path):
    for number, state in enumerate(states(net, 3), start=1):
        (tmp_path / f"checkpoint-{number}").mkdir()
        save_file(state, tmp_path / f"checkpoint-{number}" / "model.safetensors")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "checkpoint-4").mkdir()  # without weights of its own
    store = import_checkpoints(tmp_path, store=tmp_path / "s", layers="head")
    assert store.steps.tolist() == [1, 2, 3]
    assert_numbers(store, [0, 1, 2])


def test_a_model_that_the_checkpoints_are_not_of_is_named_by_its_first_difference(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "1.pt")
    for other, text in (
        (nn.ModuleDict({"fc": nn.Linear(6, 4)}), r"recorded \(3, 6\), found \(4, 6\) in the given model"),
        (nn.ModuleDict({"out": nn.Linear(6, 3)}), "recorded no tensor of this name, found .* in the given model"),
    ):
        with pytest.raises(LayoutMismatchError, match=text):
            import_checkpoints(tmp_path / "1.pt", store=tmp_path / "s", layers="head", model=other)
    assert not (tmp_path / "s").exists()


def test_lora_files_of_peft_meet_the_live_model(net, tmp_path):
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})

    model = nn.ModuleDict({"fc": Lora()})
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {name.replace(".default", ""): tensor for name, tensor in model.state_dict().items()}
        save_file(state, tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors")
    store = import_checkpoints(tmp_path, store=tmp_path / "s", layers="lora", model=model)
    assert store.steps.tolist() == [1, 2]
    assert store.layout.names == ["fc.lora_A.default.weight", "fc.lora_B.default.weight"]


def test_a_pickle_that_needs_code_is_refused_with_the_reason(net, tmp_path):
    torch.save({"state_dict": net.state_dict(), "extra": NotPlain()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as caught:
        import_checkpoints(tmp_path / "x.pt", store=tmp_path / "s")
    assert f"it is a pickle that needs {NotPlain.__module__}.NotPlain" in str(caught.value)
    assert "building that can run code from the file. If you trust it, load it yourself" in str(caught.value)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_truncated_file_is_refused(net, tmp_path, name):
    if name.endswith("pt"):
        torch.save(net.state_dict(), tmp_path / name)
    else:
        save_file(net.state_dict(), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for size in (3, 200, len(whole) - 20):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=f"{name} cannot be imported: it is unreadable"):
            import_checkpoints(tmp_path / name, store=tmp_path / "s")


def test_what_is_not_there_is_named(net, tmp_path):
    with pytest.raises(CheckpointError, match="nothing cannot be imported: there is no such file or folder"):
        import_checkpoints(tmp_path / "nothing", store=tmp_path / "s")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        import_checkpoints(tmp_path / "empty", store=tmp_path / "s")
    torch.save({"optimizer": {}, "lr": 0.1}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"it has no weights under any of state_dict, .* \(found optimizer, lr\)"):
        import_checkpoints(tmp_path / "x.pt", store=tmp_path / "s")
    torch.save([1], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="it holds a list"):
        import_checkpoints(tmp_path / "x.pt", store=tmp_path / "s")


def test_a_checkpoint_of_another_network_is_named_by_its_first_difference(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "1.pt")
    torch.save({**net.state_dict(), "fc.bias": torch.zeros(7)}, tmp_path / "2.pt")
    with pytest.raises(LayoutMismatchError, match=r"tensor 'fc.bias': .* found \(7,\)"):
        import_checkpoints(tmp_path, store=tmp_path / "s", layers="head")


def test_layers_that_are_not_there_are_refused(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "1.pt")
    with pytest.raises(SelectionError, match="Nearest names in this model: bn"):
        import_checkpoints(tmp_path, store=tmp_path / "s", layers="bn9")


def test_a_store_with_snapshots_decides_which_tensors_are_taken(net, tmp_path):
    torch.save(states(net, 1)[0], tmp_path / "1.pt")
    import_checkpoints(tmp_path / "1.pt", store=tmp_path / "s", layers="head")
    store = import_checkpoints(tmp_path / "1.pt", store=tmp_path / "s", layers="norms")
    assert store.layout.names == ["fc.weight", "fc.bias"]
    assert isinstance(store, SnapshotStore)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda t: t.to("meta"), "tensor 'fc.weight' is of no values"),
        (lambda t: t.to_sparse(), "tensor 'fc.weight' is torch.sparse_coo"),
        (lambda t: t[:1, :1].expand(2_000_000_000, 1), "has more values than a file of this size holds"),
        (lambda t: t[:1, :1].expand(50_000, 6), "has more values than a file of this size holds"),
    ],
)
def test_tensors_that_a_file_does_not_hold_are_refused_before_they_take_memory(net, tmp_path, make, text):
    state = net.state_dict()
    state["fc.weight"] = make(state["fc.weight"])
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        import_checkpoints(tmp_path / "a.pt", store=tmp_path / "s", layers="head")
    assert text in str(caught.value)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["", ".fc", "fc..weight", "fc.weight.weight", "training", "fc.__class__"])
def test_a_name_that_no_network_can_have_is_refused(net, tmp_path, name):
    torch.save({**net.state_dict(), name: torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="no network has a tensor of the name"):
        import_checkpoints(tmp_path / "a.pt", store=tmp_path / "s", layers="head")


@pytest.mark.parametrize("step", [-1, 2**63, 10**30, True, 1.5, "7"])
def test_a_counter_that_is_no_step_does_not_count(net, tmp_path, step):
    for number, state in enumerate(states(net, 2)):
        torch.save({"state_dict": state, "global_step": step, "epoch": 10**400}, tmp_path / f"w{number}.pt")
    store = import_checkpoints(tmp_path, store=tmp_path / "s", layers="head")
    assert store.steps.tolist() == [1, 2]
    assert store.epochs == [None, None]


def test_a_checkpoint_of_other_numbers_than_the_first_is_refused(net, tmp_path):
    for number, state in enumerate(states(net, 2)):
        state["fc.bias"] = state["fc.bias"].to((torch.float32, torch.complex64)[number])
        torch.save(state, tmp_path / f"w{number}.pt")
    with pytest.raises(LayoutMismatchError, match=r"complex64"):
        import_checkpoints(tmp_path, store=tmp_path / "s", layers="head")


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("model.safetensors.index.json", '{"weight_map": ["model.safetensors"]}', "it is unreadable"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1, "b": "c"}}', "it is unreadable"),
        ("trainer_state.json", "[]", "found a list, expected the state of a trainer"),
        ("trainer_state.json", '{"global_step": ', "found unreadable JSON"),
    ],
)
def test_a_folder_of_transformers_whose_documents_are_none_is_refused(net, tmp_path, name, text, found):
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    save_file(net.state_dict(), folder / "adapter_model.safetensors")
    (folder / name).write_text(text)
    with pytest.raises((CheckpointError, FormatError), match=found):
        import_checkpoints(folder, store=tmp_path / "s", layers="head")


@pytest.mark.parametrize("step", ["1e308", "-1", '"last"', "null"])
def test_a_trainer_that_names_no_step_leaves_the_order_of_names(net, tmp_path, step):
    for number in (1, 2):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        save_file(net.state_dict(), folder / "model.safetensors")
        (folder / "trainer_state.json").write_text(f'{{"global_step": {step}, "epoch": "first"}}')
    assert import_checkpoints(tmp_path, store=tmp_path / "s", layers="head").steps.tolist() == [1, 2]
