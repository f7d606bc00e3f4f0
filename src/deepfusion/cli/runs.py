"""Commands about recipes and runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from deepfusion.cli import options
from deepfusion.cli.app import STDERR, STDOUT, command, emit
from deepfusion.cli.options import (
    Accelerator,
    AsJson,
    OnAccelerator,
    Out,
    Overrides,
    Quiet,
    RecipeName,
    RunFolder,
    Seconds,
    Threads,
    Workers,
)
from deepfusion.config import Recipe, Runtime


@command
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
    folder: Out = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run the embedded demo: sixteen tiny devices of several architectures become one MoE, beside its controls.

    Needs no network, no data and no accelerator.

    Example: `deepfusion demo --seed 1`
    """
    _run(Recipe.load("demo", [f"seed={seed}"]), folder, Runtime(), quiet, as_json)


@command
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    folder: Out = None,
    workers: Workers = None,
    threads: Threads = 1,
    accelerator: OnAccelerator = Accelerator.cpu,
    checkpoint_seconds: Seconds = 60.0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe from its devices to its report. What is done already is not done again, and Ctrl-C loses little.

    Example: `deepfusion run recipes/demo.yaml --set cluster.k=8 --set seed=1 --out runs/eight`
    """
    runtime = options.runtime(workers, threads, accelerator).model_copy(
        update={"checkpoint_seconds": checkpoint_seconds}
    )
    _run(Recipe.load(recipe, overrides or ()), folder, runtime, quiet, as_json)


def _run(recipe: Recipe, folder: Path | None, runtime: Runtime, quiet: bool, as_json: bool) -> None:
    from deepfusion import pipeline, summary
    from deepfusion.display import Display

    folder = folder or Path("runs") / recipe.name
    with Display(quiet=quiet) as display:
        report = pipeline.run(recipe, folder, runtime, display)
    if as_json:
        facts = {"run": str(folder), "model": str(folder / "moe"), "report": str(folder / "report.html")}
        emit(facts | {"headline": report.headline})
    elif not quiet:
        STDOUT.print(*summary.overview(summary.read_results(folder)), sep="\n")
        STDOUT.print(f"\nmodel   {folder / 'moe'}\nreport  {folder / 'report.html'}", markup=False, soft_wrap=True)


@command
def plan(recipe: RecipeName, overrides: Overrides = None, folder: Out = None, as_json: AsJson = False) -> None:
    """List what a run would do, step by step, and why. Runs nothing.

    It opens no model and reads no text: whether these can be used is for `deepfusion doctor` to say.

    Example: `deepfusion plan recipes/demo.yaml --set distill.objective.beta=10`
    """
    from deepfusion import pipeline, summary
    from deepfusion.judging import check

    chosen = Recipe.load(recipe, overrides or ())
    if chosen.judge is not None:
        check(chosen.judge)
    steps = pipeline.plan(chosen, folder or Path("runs") / chosen.name)
    if as_json:
        emit([asdict(step) for step in steps])
    else:
        STDOUT.print(*summary.plan(steps), sep="\n")


@command
def doctor(
    recipe: RecipeName,
    overrides: Overrides = None,
    folder: Out = None,
    workers: Workers = None,
    threads: Threads = 1,
    accelerator: OnAccelerator = Accelerator.cpu,
    no_timing: Annotated[bool, typer.Option("--no-timing", help="Do not measure how fast this machine is.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at text, models, tokenizers and machine before anything runs, and estimate what each phase will cost.

    Trains nothing. Ends with status 2 if there is a problem that would stop the run, and 0 otherwise.

    Example: `deepfusion doctor recipes/demo.yaml --workers 4`
    """
    from deepfusion.doctor import examine, tables

    chosen = Recipe.load(recipe, overrides or ())
    runtime = options.runtime(workers, threads, accelerator)
    with STDERR.status("looking at text, models and machine"):
        found = examine(chosen, folder or Path("runs") / chosen.name, runtime, timed=not no_timing)
    if as_json:
        emit({"state": found.state, **asdict(found)})
    else:
        for part in tables.tables(found, runtime.workers):
            STDOUT.print(part)
    if found.state == "problem":
        raise typer.Exit(2)


@command
def show(folder: RunFolder, as_json: AsJson = False) -> None:
    """Print what a finished run found: the headline table, compute and where the time went.

    Example: `deepfusion show runs/demo`
    """
    from deepfusion import summary

    results = summary.read_results(folder)
    if as_json:
        emit(results)
    else:
        STDOUT.print(*summary.overview(results), sep="\n")


@command
def inspect(folder: RunFolder, as_json: AsJson = False) -> None:
    """Print what happened inside a finished run: clusters, lineages, who taught what, bytes, rejections, routing.

    Example: `deepfusion inspect runs/demo --json`
    """
    from deepfusion import summary

    results = summary.read_results(folder)
    if as_json:
        emit(summary.inside(results))
    else:
        STDOUT.print(*summary.inspection(results), sep="\n")
