"""What the commands tell of stores, generators and results: documents for ``--json``, tables for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdiff_plugin import console

if TYPE_CHECKING:
    from torch import nn

    from pdiff_plugin.evaluation.condition_result import ConditionEvaluation
    from pdiff_plugin.evaluation.result import Evaluation
    from pdiff_plugin.generator.generator import WeightGenerator
    from pdiff_plugin.snapshots.merge import MergeReport

_MAX_LINES = 10


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(document, indent=2))


def store(path: Path) -> dict[str, Any]:
    """What a snapshot store holds, as plain JSON."""
    from pdiff_plugin.evaluation.condition_map import summary
    from pdiff_plugin.snapshots.movement import movement_in
    from pdiff_plugin.snapshots.store import SnapshotStore

    opened = SnapshotStore.open(path)
    trajectories = []
    for index, name in enumerate(opened.trajectories):
        steps = opened.steps[opened.trajectory_index == index]
        header = opened.base_header(name)
        drift = header.get("rest_drift")
        window = opened.sparse.get(name)
        trajectories.append(
            {
                "id": name,
                "snapshots": len(steps),
                "first_step": int(steps[0]),
                "last_step": int(steps[-1]),
                "sparse": int((steps < window.first_step).sum()) if window else 0,
                "window_first_step": window.first_step if window else None,
                "total_steps": window.total_steps if window else None,
                "stopped_early": name in opened.stopped_early,
                "planned_last_step": opened.stopped_early.get(name),
                "base": "yes" if header else "no",
                "rest_drift": f"{float(drift):.2%}" if drift else "-",
                "condition": opened.conditions.get(name),
            }
        )
    found = movement_in(opened)
    return {
        "store": str(path),
        "num_snapshots": len(opened),
        "num_values": opened.layout.num_values,
        "row_dtype": str(opened.row_dtype).removeprefix("torch."),
        "tensors": opened.layout.to_json(),
        "trajectories": trajectories,
        "conditions": summary(list(opened.conditions.values())),
        "movement": found.to_json() if found else None,
        "left_out": opened.left_out,
        "problems": opened.problems,
    }


def show_refinement(report: dict[str, Any]) -> None:
    """Print what refining measured."""
    before, after, steps = report["heldout_loss_before"], report["heldout_loss"], report["best_step"]
    rows = [["as it was fitted", "0", _text(before)], ["refined", str(steps), _text(after)]]
    what = report.get("learned_at", "conditions")
    note = f"{report['num_heldout']} of {report['num_conditions']} {what} held out; {report['seconds']:.0f} s."
    console.table(f"loss of {what} held out", ["generator", "steps", "loss"], rows, note=note)
    if not steps:
        console.say("Nothing was gained there: the generator is as it was.")


def show_store(document: dict[str, Any]) -> None:
    """Print what :func:`store` tells."""
    from pdiff_plugin.snapshots.movement import Movement

    conditions = [t["condition"] for t in document["trajectories"]]
    names = _names_in(conditions)
    rows = [
        [t["id"], str(t["snapshots"]), _steps(t), t["base"], t["rest_drift"], *values]
        for t, values in zip(document["trajectories"], _values_of(conditions, names), strict=True)
    ]
    headers = ["trajectory", "snapshots", "steps", "base", "drift of the rest", *names]
    title = f"store {document['store']}: {document['num_snapshots']} snapshots"
    note = _tensors(document)
    found = Movement(**document["movement"]) if document["movement"] else None
    if found:
        note += f"\n{found.num_directions:.1f} directions carry the movement within a run: {found.text}."
    console.table(title, headers, rows, note=note)
    if found and found.warning:
        console.say(f"! {found.warning}")
    for t in document["trajectories"]:
        if t["sparse"]:
            console.say(
                f"! {t['id']} has snapshots up to step {t['last_step']} of {t['total_steps']}, and its window begins "
                f"at step {t['window_first_step']}: {t['sparse']} of them were taken sparsely before that."
            )
    for sentence in document["left_out"]:
        console.say(f"! {sentence}.")
    _show_summary(document["conditions"], [condition for condition in conditions if condition])
    for problem in document["problems"]:
        console.say(f"! {problem}")


def _show_summary(about: Sequence[dict[str, Any]], conditions: Sequence[dict[str, Any]]) -> None:
    """Print what there is under each name of the conditions, and where one or two numbers lie."""
    from pdiff_plugin.evaluation.condition_map import axes_of, draw_text

    if not about:
        return
    rows = [[one["name"], one["kind"], str(one["num_values"]), _range(one)] for one in about]
    headers = ["condition", "kind", "values", "range"]
    console.table(f"conditions of {len(conditions)} runs", headers, rows, numeric=False)
    names = axes_of(about)
    if len(names) in (1, 2):
        console.say(draw_text(conditions, names))


def show_merge(report: MergeReport) -> None:
    """Print what a merge did."""
    console.say(
        f"{report.path}: added {len(report.added)} trajectories with {report.num_snapshots} snapshots, from "
        f"{report.num_stores} stores; {_size(report.linked_bytes)} linked and {_size(report.copied_bytes)} copied. "
        f"{len(report.duplicates)} were there already."
    )
    for name, source in report.extended.items():
        console.say(f"{source} has gone on: it replaces what was there of it, as {name}")
    renamed = [(name, source) for name, source in report.added.items() if source.rpartition("/")[2] != name]
    for name, source in renamed[:_MAX_LINES]:
        console.say(f"{source} is {name} there")
    _say_how_many_more(len(renamed))
    for source, name in [*report.duplicates.items()][:_MAX_LINES]:
        console.say(f"{source} is there already, as {name}")
    _say_how_many_more(len(report.duplicates))
    for sentence in report.left_out:
        console.say(f"! {sentence}")


def _say_how_many_more(num_lines: int) -> None:
    if num_lines > _MAX_LINES:
        console.say(f"... and {num_lines - _MAX_LINES} more, which --json lists")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def conditions(path: Path) -> dict[str, Any]:
    """At which condition each trajectory of a store was recorded, null for those without one, as plain JSON."""
    from pdiff_plugin.snapshots.store import SnapshotStore

    opened = SnapshotStore.open(path)
    found = {name: opened.conditions.get(name) for name in opened.trajectories}
    return {"store": str(path), "conditions": found, "problems": opened.problems}


def show_conditions(document: dict[str, Any]) -> None:
    """Print what :func:`conditions` tells."""
    found = document["conditions"]
    names = _names_in(found.values())
    rows = [[run, *values] for run, values in zip(found, _values_of(found.values(), names), strict=True)]
    note = "" if names else f"No run has a condition: pdiff condition {document['store']} --set RUN NAME=VALUE ..."
    console.table(f"conditions in {document['store']}", ["trajectory", *names], rows, note=note)
    for problem in document["problems"]:
        console.say(f"! {problem}")


def generator(path: str, fitted: WeightGenerator) -> dict[str, Any]:
    """What a generator makes and what its fit measured, as plain JSON."""
    from pdiff_plugin.evaluation.condition_map import summary

    kinds = {variable.name: variable.kind for variable in fitted.variables.variables} if fitted.variables else {}
    return {
        "generator": path,
        "num_values": fitted.layout.num_values,
        "tensors": fitted.layout.to_json(),
        "trajectories": fitted.trajectories,
        "conditions": [{**one, "kind": kinds[one["name"]]} for one in summary(fitted.conditions)],
        "config": fitted.config.to_json(),
        "report": fitted.report,
        "provenance": fitted.provenance,
    }


def show_generator(document: dict[str, Any]) -> None:
    """Print what :func:`generator` tells."""
    report = dict(document["report"])
    found = report.pop("condition", {})
    num_read, num_stored = report.pop("bytes_read", None), report.pop("bytes_in_store", 0)
    rows = [[name, _text(value)] for name, value in report.items()]
    if num_read is not None:
        rows.append(["read from the bucket", f"{_size(num_read)} of a store of {_size(num_stored)}"])
    console.table(f"generator {document['generator']}", ["measured by the fit", ""], rows, numeric=False)
    if found:
        rows = [[name, _text(value)] for name, value in found.items()]
        console.table("at conditions held out", ["measured by the fit", ""], rows, numeric=False)
        about = [[one["name"], one["kind"], str(one["num_values"]), _range(one)] for one in document["conditions"]]
        console.table("made for", ["condition", "kind", "values", "range"], about, numeric=False)
    console.say(_tensors(document))


def layers(name: str, model: nn.Module, chosen: str) -> dict[str, Any]:
    """What would be recorded of a model, as plain JSON."""
    from pdiff_plugin.recording.selection import select

    selection = select(model, chosen)
    return {
        "model": name,
        "layers": chosen,
        "tensors": selection.layout.to_json(),
        "num_values": selection.layout.num_values,
        "num_model_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "frozen": list(selection.frozen),
    }


def show_layers(document: dict[str, Any]) -> None:
    """Print what :func:`layers` tells."""
    from pdiff_plugin.snapshots.layout import Layout

    layout, total = Layout.from_json(document["tensors"]), document["num_model_parameters"]
    rows = [[s.name, s.kind, s.dtype, " x ".join(map(str, s.shape)), f"{s.numel:,}"] for s in layout]
    share = sum(s.numel for s in layout if s.kind == "parameter") / max(total, 1)
    note = (
        f"{layout.num_values:,} values in {len(layout.tensors)} tensors; {share:.3%} of the model's {total:,} "
        f"parameters. 300 snapshots take {300 * 4 * layout.num_values / 2**20:,.1f} MiB."
    )
    if document["frozen"]:
        note += f"\nLeft out because frozen: {', '.join(document['frozen'])}."
    title = f"{document['model']}, layers={document['layers']}"
    console.table(title, ["tensor", "kind", "dtype", "shape", "values"], rows, note=note)


def show_trials(folder: Path, document: dict[str, Any]) -> None:
    """Print the trials of a search, the best first."""
    from pdiff_plugin.cluster.tune import SPACE

    columns = ["score", *SPACE, "max_steps", "copy_ratio"]
    rows = [
        ["default" if trial["is_default"] else str(number), *(_text(trial.get(column, "-")) for column in columns)]
        for number, trial in enumerate(document["trials"], start=1)
    ]
    console.table(f"tuned {folder}", ["trial", *columns], rows, note=f"score: {document['score']}; lower is better")


def show_evaluation(result: Evaluation, *budgets: float) -> None:
    """Print the table of an evaluation, its verdict and the best choices: for one pass, eight, and any ``budgets``."""
    console.table(result.title, *result.table(), note=result.footnote, lead=result.lead)
    console.say("\n".join(["", result.verdict.sentence, "", *result.told_choices(*budgets)]).rstrip())


def show_condition_evaluation(result: ConditionEvaluation) -> None:
    """Print the tables of an evaluation over conditions, its headline, what was left out, and its sentence."""
    for group in result.verdicts:
        num = result.verdicts[group].num_conditions
        title = f"{result.task}: {num} condition{'' if num == 1 else 's'} {group} what was fitted"
        headers, rows = result.table(group)
        console.table(title, headers, rows, note=result.footnote, lead=headers[2:4])
        console.say(result.recovery_text(group))
    console.say("\n".join(["", *result.notes, result.sentence]))


def _steps(trajectory: dict[str, Any]) -> str:
    """First and last step, and the one that the last was planned for where training ended before."""
    text = f"{trajectory['first_step']}..{trajectory['last_step']}"
    return f"{text} of {trajectory['planned_last_step']}" if trajectory["stopped_early"] else text


def _names_in(conditions: Iterable[dict[str, Any] | None]) -> list[str]:
    return list(dict.fromkeys(name for condition in conditions for name in condition or {}))


def _values_of(conditions: Iterable[dict[str, Any] | None], names: Sequence[str]) -> list[list[str]]:
    """Cells of a row for each condition."""
    known = [condition or {} for condition in conditions]
    return [[_value(values[name]) if name in values else "-" for name in names] for values in known]


def _value(value: Any) -> str:
    """A value of a condition, whole but for long lists: a figure that is rounded is another setting."""
    if isinstance(value, list):
        shown = ",".join(map(str, value[:6]))
        return f"{shown},... ({len(value)})" if len(value) > 6 else shown
    return str(value).lower() if isinstance(value, bool) else str(value)


def _range(about: dict[str, Any]) -> str:
    """What there is under one name of the conditions."""
    if "values" not in about:
        return f"{about['low']:g} to {about['high']:g}"
    return ", ".join(map(_value, about["values"][:8])) + (", ..." if len(about["values"]) > 8 else "")


def _tensors(document: dict[str, Any]) -> str:
    tensors = document["tensors"]
    names = ", ".join(t["name"] for t in tensors[:6]) + (", ..." if len(tensors) > 6 else "")
    return f"{document['num_values']:,} values in {len(tensors)} tensors: {names}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(_text(v) for v in value)
    return str(value)
