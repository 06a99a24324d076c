"""Record sweeps on CIFAR-10, fit a dial to each, and judge it at conditions that were never trained.

    trial      rotation x noise; norms and head of a small ResNet; 48 points fitted, 16 held out
    angle      rotation; a whole MLP; gaps of 30, 45, 60 degrees and a missing quarter of the circle
    codes      which of ten classes are positive; a small head on a trunk trained without labels
    domains    blur, noise, brightness, contrast, saturation, or 64 unlabelled images; norms and head of the ResNet
    lora       rotation; LoRA matrices of a tiny vision transformer, as trained and in a canonical form
    tradeoff   a weight between two losses; a control, where a mixture of the two ends should do

    python examples/dials.py record trial --seed 0 --data ~/data     # one run per condition, all from one base
    python examples/dials.py judge trial --seed 0 --data ~/data      # fit without the held-out ones, and compare
    python examples/dials.py refine trial --seed 0 --data ~/data     # teach what was fitted by the task, and compare
    python examples/dials.py table trial                             # over all seeds that were judged
    python examples/dials.py record judge table angle --smoke        # synthetic images; figures mean nothing

Recording one seed takes two to eight minutes of one CPU core, judging it about as long. `--data` is as for
workloads.py.
What was interrupted goes on from what is in the folder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from dial_workloads import WORKLOADS, Condition, Sweep, Variant
from dial_workloads.from_base import map_from_base
from torch import nn
from workload_data import cifar10, synthetic

from pdiff_plugin import (
    ConditionEvaluation,
    DiffusionConfig,
    FitConfig,
    RefineConfig,
    SubspaceConfig,
    WeightGenerator,
    evaluate_conditions,
    fit,
    refine,
)
from pdiff_plugin.config import ConditionConfig

COMMANDS = ("record", "judge", "refine", "table")

# Of refining: steps, conditions in each, images at each of them; less of what has many layers.
BUDGETS = {"trial": (300, 4, 32), "domains": (300, 4, 32), "lora": (300, 4, 32)}
BUDGET = (1000, 8, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="COMMAND or WORKLOAD", help=", ".join([*COMMANDS, *WORKLOADS]))
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("pdiff-dials"), help="folder for stores, fits, tables")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-threads", type=int, help="CPU threads; PyTorch's choice unless given")
    parser.add_argument("--smoke", action="store_true", help="synthetic images, everything but brief")
    options = parser.parse_args()
    commands, names = ([w for w in known if w in options.words] for known in (COMMANDS, list(WORKLOADS)))
    if unknown := set(options.words) - {*commands, *names}:
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join([*COMMANDS, *WORKLOADS])}")
    if not commands or not names:
        parser.error("a command and a workload are needed")
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    if options.data is None and not options.smoke and commands != ["table"]:
        parser.error("--data or --smoke is needed")
    for name in names:
        if commands != ["table"]:
            train, test = synthetic() if options.smoke else cifar10(options.data)
            folder = options.out / f"{name}-{options.seed}"
            sweep = WORKLOADS[name](folder, train, test, options.seed, options.smoke)
            if "record" in commands:
                sweep.record()
            if "judge" in commands:
                judge(sweep)
            if "refine" in commands:
                refine_all(sweep)
        if "table" in commands:
            table(name, options.out)


def folder_of(sweep: Sweep, what: str, variant: Variant) -> Path:
    """Where the comparison of a variant lies."""
    return sweep.folder / f"{what} {variant.name}".strip().replace(" ", "-")


def judge(sweep: Sweep) -> None:
    """Fit each variant of a sweep without what it holds out, and leave the comparison in its folder."""
    # Variants of the same runs share their joint model.
    joint: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    for variant in sweep.variants():
        folder = folder_of(sweep, "judged", variant)
        if (folder / "conditions.json").exists():
            continue
        config = FitConfig(
            seed=sweep.seed,
            autoencoder=SubspaceConfig(latent_dim=sweep.latent_dim),
            diffusion=DiffusionConfig(max_steps=50) if sweep.smoke else DiffusionConfig(),
            condition=ConditionConfig(kinds=sweep.kinds, hold_out=(*variant.held_out, *variant.ignored)),
        )
        started = time.perf_counter()
        generator = fit(variant.store, config, out=folder / "fit")
        print(f"{sweep.name} {variant.name} fitted in {time.perf_counter() - started:.1f} s", flush=True)

        def task(variant: Variant = variant, **condition: Any) -> Any:
            return sweep.task(**variant.original(condition))

        def train(model: nn.Module, conditions: Sequence[Any], num_steps: int, variant: Variant = variant) -> None:
            key = (*sorted(variant.held_out), *sorted(variant.ignored))
            if len(conditions) > 1 and key in joint:
                model.load_state_dict(joint[key])
                return
            sweep.train(model, [variant.original(condition) for condition in conditions], num_steps)
            if len(conditions) > 1:
                joint[key] = model.state_dict()

        started = time.perf_counter()
        found = evaluate_conditions(
            task,
            variant.store,
            generator,
            conditions=variant.held_out,
            train=train,
            extra=sweep.extra(variant, generator),
            num_members=4 if sweep.smoke else 8,
            seed=sweep.seed,
            joint_steps=sweep.recipe.joint_steps,
            fine_tune_steps=sweep.recipe.fine_tune_steps,
        )
        print(f"{found}\njudged in {time.perf_counter() - started:.0f} s\n", flush=True)
        found.save(folder)
        if not isinstance(next(iter(sweep.conditions()[0].values())), list):
            found.save_picture(folder / "conditions.png")


def refine_all(sweep: Sweep) -> None:
    """Refine what was fitted to each variant by the loss of the task, and compare at what it holds out.

    At the recorded conditions, and where the task can make others at those. Beside it stands the same map trained from
    the base model, without recordings: for as many steps, and for as many images as the recording took, too.
    """
    num_steps, num_conditions, num_images = (20, 2, 16) if sweep.smoke else BUDGETS.get(sweep.name, BUDGET)
    recipe = sweep.recipe
    for variant in sweep.variants():
        generator = WeightGenerator.load(folder_of(sweep, "judged", variant) / "fit")
        for where, conditions in (("recorded", generator.conditions), ("any", sweep.drawn(variant))):
            folder = folder_of(sweep, f"refined at {where}", variant)
            if not conditions or (folder / "conditions.json").exists():
                continue
            sweep.recipe = replace(recipe, batch_size=num_images)

            def loss(model: Any, condition: Condition, variant: Variant = variant) -> torch.Tensor:
                rng = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
                return sweep.loss(model, variant.original(condition), rng)

            settings = RefineConfig(num_steps=num_steps, conditions_per_step=num_conditions, seed=sweep.seed)
            refined = refine(generator, sweep.base(), loss, settings, conditions=conditions, out=folder / "refined")
            extra = sweep.extra(variant, generator)
            if where == "any":
                recorded = len(generator.conditions) * recipe.num_steps * recipe.batch_size
                more = recorded // (num_conditions * num_images)
                for name, steps in (("from the base", num_steps), ("from the base, sweep's images", num_steps + more)):
                    extra[name] = map_from_base(
                        sweep,
                        conditions,
                        refined.variables.encode,
                        steps,
                        conditions_per_step=num_conditions,
                        num_directions=settings.num_directions,
                        lr=settings.lr,
                    )
            sweep.recipe = recipe
            found = evaluate_conditions(
                lambda variant=variant, **condition: sweep.task(**variant.original(condition)),
                variant.store,
                refined,
                conditions=variant.held_out,
                extra=extra,
                num_members=4 if sweep.smoke else 8,
                seed=sweep.seed,
            )
            print(f"{sweep.name} {variant.name}, refined at {where} conditions\n{found}\n", flush=True)
            found.save(folder)


def table(name: str, folder: Path) -> None:
    """Print what was found for a workload over all of its seeds, their conditions taken together."""
    variants: dict[str, list[ConditionEvaluation]] = {}
    for path in sorted(folder.glob(f"{name}-*/*/conditions.json")):
        variants.setdefault(path.parent.name, []).append(ConditionEvaluation.load(path))
    for variant, found in variants.items():
        pooled = ConditionEvaluation.pooled(found)
        print(f"\n== {name} {variant.removeprefix('judged').replace('-', ' ').strip()}, {len(found)} seeds\n{pooled}")


if __name__ == "__main__":
    main()
