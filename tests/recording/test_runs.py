"""Checkpoints of a sweep: which are of one run, and the condition of each, by table, by name and by function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pdiff_plugin import SnapshotStore, import_checkpoints
from pdiff_plugin.errors import ConditionError, ConfigError, FormatError, TrajectoryExistsError
from pdiff_plugin.recording.runs import conditions_in_names, read_table, runs_of


@pytest.fixture
def files(tmp_path):
    """Makes empty files, whose names alone count; their paths in the given order."""

    def files(*names):
        paths = [tmp_path / name for name in names]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return paths

    return files


@pytest.fixture
def checkpoints(files, net):
    """Makes checkpoints whose head's bias is their number."""

    def checkpoints(*names):
        paths = files(*names)
        for number, path in enumerate(paths):
            net.fc.bias.data.fill_(number)
            torch.save(net.state_dict(), path)
        return paths

    return checkpoints


@pytest.fixture
def table(tmp_path):
    def table(*lines):
        (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
        return tmp_path / "table.csv"

    return table


def names_of(runs):
    return [[path.name for path in run.files] for run in runs]


def grouped(paths, conditions, tmp_path):
    runs = runs_of(paths, conditions, tmp_path / "store")
    return {str(run.condition): [path.name for path in run.files] for run in runs}


def numbers_of(store, name):
    part = store.only([name])
    return [part.state_dict(index)["fc.bias"][0].item() for index in range(len(part))]


def test_a_sweep_becomes_a_trajectory_for_each_run_with_its_condition(checkpoints, tmp_path):
    paths = checkpoints("a-step2.pt", "b-step1.pt", "a-step10.pt", "b-step2.pt")
    store = import_checkpoints(
        paths, store=tmp_path / "s", layers="head", conditions={"a": {"lr": 0.1}, "b": {"lr": 0.2}}
    )
    assert store.conditions == {"run-001": {"lr": 0.1}, "run-002": {"lr": 0.2}}
    assert numbers_of(store, "run-001") == [0, 2]
    assert numbers_of(store, "run-002") == [1, 3]
    assert store.base("run-001")["fc.bias"][0] == 2
    assert store.problems == []


def test_a_function_gives_the_condition_of_each_path(checkpoints, tmp_path):
    paths = checkpoints("1/w.pt", "2/w.pt")
    conditions = []

    def condition(path):
        conditions.append(path)
        return {"seed": torch.tensor(int(path.parent.name))}

    store = import_checkpoints(paths, store=tmp_path / "s", layers="head", trajectory="x", conditions=condition)
    assert conditions == paths
    assert store.conditions == {"x-1": {"seed": 1}, "x-2": {"seed": 2}}


def test_a_path_is_a_table(checkpoints, table, tmp_path):
    paths = checkpoints("a.pt", "b.pt")
    store = import_checkpoints(
        paths, store=tmp_path / "s", layers="head", conditions=str(table("run,lr", "a,1", "b,2"))
    )
    assert list(store.conditions.values()) == [{"lr": 1}, {"lr": 2}]


def test_more_is_added_to_a_store_of_the_same_names_only(checkpoints, tmp_path):
    paths = checkpoints("a.pt", "b.pt")
    for path in paths:
        import_checkpoints(path, store=tmp_path / "s", layers="head", conditions=lambda path: {"lr": 1})
    with pytest.raises(
        ConditionError, match=r"a\.pt: found 'lr' in run-001 alone, expected the same names as in run-001"
    ):
        import_checkpoints(paths[0], store=tmp_path / "s", conditions=lambda path: {"tilt": 1})
    assert len(SnapshotStore.open(tmp_path / "s")) == 2


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a-step1.pt", "a-step2.pt", "b-step1.pt"], [["a-step1.pt", "a-step2.pt"], ["b-step1.pt"]]),
        (["epoch=1-step=9.ckpt", "epoch=2-step=18.ckpt", "last.ckpt"], None),
        (["epoch=1-val_loss=0.25.ckpt", "epoch=2-val_loss=0.125.ckpt"], None),
        (["x/checkpoint-3.pth.tar", "x/model_best.pth.tar", "x/last.pth.tar"], None),
        (["t/checkpoint_000001/model.pt", "t/checkpoint_000002/model.pt"], None),
        (["000100.pt", "000200.pt"], None),
        (["a/final.pt", "b/final.pt"], [["final.pt"], ["final.pt"]]),
        (["seed1.pt", "seed2.pt"], [["seed1.pt"], ["seed2.pt"]]),
        (["run-001.pt", "run-002.pt"], [["run-001.pt"], ["run-002.pt"]]),
        (["footsteps1.pt", "footsteps2.pt"], [["footsteps1.pt"], ["footsteps2.pt"]]),
    ],
)
def test_checkpoints_of_one_condition_are_one_run_if_their_places_differ_in_the_step_alone(
    files, tmp_path, names, expected
):
    runs = runs_of(files(*names), lambda path: {"lr": 1}, tmp_path / "s")
    assert names_of(runs) == (expected or [[Path(name).name for name in names]])


def test_checkpoints_of_one_place_and_other_conditions_are_other_runs(files, tmp_path):
    paths = files("m-step1.pt", "m-step2.pt")
    runs = runs_of(paths, {"m-step1": {"lr": 1}, "m-step2": {"lr": 2}}, tmp_path / "s")
    assert names_of(runs) == [["m-step1.pt"], ["m-step2.pt"]]


@pytest.mark.parametrize(
    "key",
    ["m-step5.pt", "m-step5", "m", "r7", "r7/", "sweep/r7", "r7/m-step5.pt", "sweep/r7/m", "sweep", "{tmp}/sweep/r7"],
)
def test_a_row_may_name_the_file_the_run_or_a_folder(files, tmp_path, key):
    (path,) = files("sweep/r7/m-step5.pt")
    (run,) = runs_of([path], {key.format(tmp=tmp_path): {"lr": 1}, "r8": {"lr": 2}}, tmp_path / "s")
    assert run.condition == {"lr": 1}


def test_the_row_that_is_nearest_to_the_file_counts(files, tmp_path):
    paths = files("a/x.pt", "a/y.pt")
    found = grouped(paths, {"a": {"lr": 1}, "y": {"lr": 2}}, tmp_path)
    assert found == {"{'lr': 1}": ["x.pt"], "{'lr': 2}": ["y.pt"]}


def test_all_files_of_the_row_of_a_run_are_one_run(files, tmp_path):
    runs = runs_of(files("a/x.pt", "a/y.pt", "b/x.pt"), {"a": {"lr": 1}, "b": {"lr": 1}}, tmp_path / "s")
    assert names_of(runs) == [["x.pt", "y.pt"], ["x.pt"]]


def test_a_table_of_plain_columns(table):
    found = read_table(table("Run,angle,style,on,user", 'a,45,ink,true,"0.5,1"', 'b,-1e-3,"7",False,"[0.5, -1]"'))
    assert found == {
        "a": {"angle": 45, "style": "ink", "on": True, "user": [0.5, 1.0]},
        "b": {"angle": -0.001, "style": 7, "on": False, "user": [0.5, -1.0]},
    }


@pytest.mark.parametrize(
    ("lines", "columns", "expected"),
    [
        # Optuna's trials_dataframe(), Ray's get_dataframe(), an export of W&B's table
        (["run,number,value,params_lr,params_depth,state", "a,0,0.5,0.1,3,COMPLETE"], [], {"lr": 0.1, "depth": 3}),
        (["loss,logdir,config/lr,config/depth", "0.5,a,0.1,3"], [], {"lr": 0.1, "depth": 3}),
        (['"Name","State","Notes","lr","accuracy"', '"a","finished","-","0.1","0.9"'], ["lr"], {"lr": 0.1}),
        (["run,params_lr,params_depth", "a,0.1,3"], ["lr"], {"lr": 0.1}),
        (["run,params_lr,params_depth", "a,0.1,3"], ["params_depth"], {"depth": 3}),
        (["run,params_lr,lr", "a,0.1,3"], ["lr"], {"lr": 3}),
        (["run,name,lr", "a,b,1"], ["name", "lr"], {"name": "b", "lr": 1}),
        (["run,path,lr", "a,x/b,1"], [], {"lr": 1}),
        (["\ufeffrun;lr;name", "a;0.1;x"], [], {"lr": 0.1}),
        (["run\tlr", "a\t0.1"], [], {"lr": 0.1}),
        (["run,lr,nothing", "a,0.1,", ",7,8"], [], {"lr": 0.1}),
        (["run,lr,notes", 'a,0.1,"two\nlines"'], ["lr"], {"lr": 0.1}),
    ],
)
def test_exports_are_read_as_they_are(table, lines, columns, expected):
    assert read_table(table(*lines), columns) == {"a": expected}


@pytest.mark.parametrize(
    ("lines", "columns", "text"),
    [
        (
            ["id,lr", "a,1"],
            [],
            "found columns id, lr, expected one that names the run or its files: trajectory, run, fi",
        ),
        ([""], [], "found columns none, expected one that names the run"),
        (["run", "a"], [], "found columns run, expected others that are the condition. Add them."),
        (["run,lr,config/a", "a,1,2"], ["tilt"], "found no column 'tilt', expected one of a, lr"),
        (
            ["run,lr", "a,1", "a,2"],
            [],
            "found two rows with other values for 'a' in column 'run', expected one row for ea",
        ),
    ],
)
def test_a_table_that_cannot_be_used_says_why(table, lines, columns, text):
    with pytest.raises(FormatError) as caught:
        read_table(table(*lines), columns)
    assert text in str(caught.value)
    assert "table.csv" in str(caught.value)


def test_a_table_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        FormatError, match=r"no\.csv: found .*No such file.*, expected a CSV file with a row for each run"
    ):
        read_table(tmp_path / "no.csv")
    (tmp_path / "x.csv").write_text("run,lr\na," + 200_000 * "9" + "\n")
    with pytest.raises(FormatError, match=r"x\.csv: found no table \(field larger than field limit"):
        read_table(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match=r"x\.csv: found .*decode"):
        read_table(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("path", "patterns", "expected"),
    [
        ("angle=45.pt", [r"angle=(\d+)"], {"angle": 45}),
        ("net_angle45_seed3.pt", [r"angle=(\d+)"], {"angle": 45}),
        ("angle_045-step100.pt", [r"angle=(\d+)"], {"angle": 45}),
        ("a/45.pt", [r"angle=(\d+)"], {"angle": 45}),
        ("a/net-45-step100.pth.tar", [r"angle=(\d+)"], {"angle": 45}),
        ("angle=45/checkpoint-100", [r"angle=(\d+)"], {"angle": 45}),
        ("angle=90/angle=45.pt", [r"angle=(\d+)"], {"angle": 45}),
        ("angle-sweep/net_45.pt", [r"angle=(\d+)"], {"angle": 45}),
        ("lr=0.1.pt", [r"lr=([\d.]+)"], {"lr": 0.1}),
        ("lr1e-3.safetensors", [r"lr=([\d.e-]+)"], {"lr": 0.001}),
        ("ctrl7-lr3.pt", [r"lr=(\d)"], {"lr": 3}),
        ("45-7.pt", [r"angle=^(\d+)"], {"angle": 45}),
        ("45-ink.pt", [r"angle=^(\d+)", "style=([a-z]+)"], {"angle": 45, "style": "ink"}),
        ("rot45_ink.pt", [r"rot(?P<angle>\d+)_(?P<style>\w+)"], {"angle": 45, "style": "ink"}),
        ("rot45/ink.pt", [r"rot(?P<angle>\d+)", r"^(?P<style>[a-z]+)$"], {"angle": 45, "style": "ink"}),
        ("steps=500.pt", [r"steps=(\d+)"], {"steps": 500}),
        ("45-45.pt", [r"angle=(\d+)"], {"angle": 45}),
    ],
)
def test_conditions_are_found_in_names(path, patterns, expected):
    assert conditions_in_names(patterns)(Path(path)) == expected


@pytest.mark.parametrize(
    ("path", "pattern", "text"),
    [
        (
            "ink.pt",
            r"angle=(\d+)",
            r"ink.pt: found nothing that 'angle=(\\d+)' fits, expected angle in its name or a fol",
        ),
        ("angle-x_45.pt", r"angle=(\d+)", "found nothing that"),
        ("run/checkpoint-100", r"angle=(\d+)", "found nothing that"),
        (
            "45-7.pt",
            r"angle=(\d+)",
            r"45-7.pt: found 45 and 7 for angle in '45-7', expected one: let 'angle=(\\d+)' say",
        ),
        ("a.pt", r"(?P<x>\d)(?P<y>\d)", r"expected x and y in its name or a folder's"),
        ("a1.pt", r"^[a-z](?P<x>\d)(?P<y>\d)?$", "found nothing that"),
    ],
)
def test_a_name_without_a_clear_condition_is_an_error_that_says_what_was_looked_for(path, pattern, text):
    with pytest.raises(ConditionError) as caught:
        conditions_in_names([pattern])(Path("/") / path)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("patterns", "text"),
    [
        (
            [r"(\d+)"],
            r"condition = '(\\d+)': it must be NAME=REGEX with one group, the value, as in angle=(\d+), or have",
        ),
        ([r"angle=\d+"], "must be NAME=REGEX with one group"),
        ([r"angle=(\d)(\d)"], "must be NAME=REGEX with one group"),
        ([r"an gle=(\d)"], "must be NAME=REGEX with one group"),
        ([r"angle=(\d"], "must be a regular expression (missing ), unterminated subpattern"),
        ([r"a=(\d)", r"b(?P<a>\d)"], r"condition = 'a=(\\d)': it must give names that no other expression gives"),
    ],
)
def test_an_expression_that_cannot_work_is_refused(patterns, text):
    with pytest.raises(ConfigError) as caught:
        conditions_in_names(patterns)
    assert text in str(caught.value)


def test_a_mark_of_the_step_is_not_taken_for_the_condition(files, tmp_path):
    paths = files("45-step1.pt", "45-step2.pt", "90-step1.pt")
    found = grouped(paths, conditions_in_names([r"angle=(\d+)"]), tmp_path)
    assert found == {"{'angle': 45}": ["45-step1.pt", "45-step2.pt"], "{'angle': 90}": ["90-step1.pt"]}


@pytest.mark.parametrize(
    ("conditions", "error", "text"),
    [
        ({"a": {"lr": 1}}, ConditionError, r"b\.pt: found no row for it, expected one named like the file .* are: a\."),
        ({}, ConditionError, "but they are: none"),
        (
            {"a": {"lr": 1}, "b": {}},
            ConditionError,
            r"b\.pt: found an empty mapping, expected a mapping of one or more",
        ),
        ({"a": {"lr": 1}, "b": {"lr": "x"}}, ConditionError, r"b\.pt: found text under 'lr', .* as in .*a\.pt"),
        ({"a": {"lr": 1, "d": 2}, "b": {"lr": 1}}, ConditionError, r"'d' in .*a\.pt alone.*; .*b\.pt lacks it"),
        (lambda path: {"lr": 1} if path.stem == "a" else None, ConditionError, r"b\.pt: found a NoneType"),
        (3, ConfigError, "conditions = 3: it must be a mapping, a function of the path, or the path of a table"),
    ],
)
def test_nothing_is_imported_unless_every_file_has_a_condition_that_fits(
    checkpoints, tmp_path, conditions, error, text
):
    paths = checkpoints("a.pt", "b.pt")
    with pytest.raises(error, match=text):
        import_checkpoints(paths, store=tmp_path / "s", layers="head", conditions=conditions)
    assert not (tmp_path / "s").exists()


def test_a_name_in_use_is_told_before_a_run_is_written(checkpoints, tmp_path):
    paths = checkpoints("a.pt", "b.pt")
    import_checkpoints(paths[0], store=tmp_path / "s", layers="head", trajectory="x-2")
    with pytest.raises(TrajectoryExistsError, match="x-2 already holds 1 snapshots"):
        import_checkpoints(paths, store=tmp_path / "s", trajectory="x", conditions={"a": {"lr": 1}, "b": {"lr": 2}})
    assert SnapshotStore.open(tmp_path / "s").trajectories == ["x-2"]
