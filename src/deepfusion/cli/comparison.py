"""The command about many runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from deepfusion.cli import options
from deepfusion.cli.app import STDOUT, command, emit
from deepfusion.cli.options import (
    Accelerator,
    AsJson,
    OnAccelerator,
    Overrides,
    Quiet,
    Threads,
    Workers,
)

if TYPE_CHECKING:
    from deepfusion.comparison.grid import Variant


@command
def compare(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe or a study: a file, or the name of an embedded one.")
    ],
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="How many, from the recipe's on; or which, as in 3,4,5.", show_default="the study's, or 3"
        ),
    ] = None,
    systems: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="What to compare with: evaluate.references.", show_default="the recipe's"),
    ] = None,
    devices: Annotated[str | None, typer.Option(metavar="N,N", help="Numbers of devices to run with.")] = None,
    vary: Annotated[
        list[str] | None, typer.Option("--vary", metavar="KEY=[A, B]", help="Values of a key to run with, one by one.")
    ] = None,
    overrides: Overrides = None,
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where.", show_default="runs/<name>-compared")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Seeds run side by side, each with its workers.")] = 1,
    workers: Workers = None,
    threads: Threads = 1,
    accelerator: OnAccelerator = Accelerator.cpu,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe over seeds, and over values of its keys, and compare all systems: intervals, paired tests, costs.

    Every run is resumed where it was stopped. Writes tables as HTML, Markdown, LaTeX and CSV. A study is a file of what
    the options say.

    Example: `deepfusion compare demo --seeds 5 --systems dense_kd,ofa_kd,fedmkt,centralized --devices 16,32`
    """
    from deepfusion.comparison.collect import Plan, collect
    from deepfusion.comparison.grid import DEVICES
    from deepfusion.comparison.grid import seeds as read
    from deepfusion.comparison.sections import quality
    from deepfusion.comparison.studies import StudyFile, find
    from deepfusion.comparison.writing import write
    from deepfusion.config import Recipe
    from deepfusion.display import Display

    file = find(recipe)
    of = file or StudyFile(recipe=recipe)
    seeds = seeds or of.seeds
    settings = [*of.settings, *(overrides or ())]
    asked = ["deepfusion", "compare", recipe, "--seeds", seeds]
    if systems is not None:
        settings.append(f"evaluate.references=[{systems}]")
        asked += ["--systems", systems]
    asked += ["--devices", devices] if devices is not None else []
    asked += [part for setting in vary or () for part in ("--vary", setting)]
    asked += [part for setting in overrides or () for part in ("--set", setting)]
    first = Recipe.load(of.recipe, settings)
    axes = [*([f"{DEVICES}=[{devices}]"] if devices is not None else []), *(vary or ())]
    plan = Plan(of.recipe, settings, of.grid(axes), read(seeds, first.seed))
    _refuse_idle(overrides or (), plan.variants)
    into = folder or Path("runs") / f"{Path(recipe).stem if file else first.name}-compared"
    runtime = options.runtime(workers, threads, accelerator)
    if workers is None and jobs > 1:
        runtime = runtime.model_copy(update={"workers": max(1, runtime.workers // jobs)})
    with Display(quiet=quiet) as display:
        study = collect(plan, into, runtime, display, jobs)
    files = write(study, shlex.join(asked), into)
    if as_json:
        emit(study.tree() | {"report": str(files[0])})
    elif not quiet:
        questions = study.questions()
        for question in questions:
            if question.subset == questions[0].subset:
                STDOUT.print(_printed(quality(study, question)))
        STDOUT.print(*map(str, files), sep="\n", markup=False, soft_wrap=True)
    if study.failed:
        raise typer.Exit(1)


def _refuse_idle(overrides: Sequence[str], variants: Sequence[Variant]) -> None:
    """What `--set` would say of a key that varies, the variants would say otherwise."""
    from deepfusion.comparison.grid import key_of, overlap
    from deepfusion.errors import InputError

    varied = {key_of(setting) for variant in variants for setting in variant.settings}
    for key in map(key_of, overrides):
        for other in sorted(varied):
            if overlap(key, other):
                raise InputError(f"--set {key} has no say, for {other} varies: give --vary '{other}=[…]' instead")


def _printed(table: object) -> Table:
    from rich.markup import escape

    from deepfusion.page.parts import Table as Cells

    assert isinstance(table, Cells)
    heads = [Column(escape(head), justify="left" if n < table.texts else "right") for n, head in enumerate(table.heads)]
    printed = Table(*heads, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, row in enumerate(table.rows):
        cells = [
            ("[bold]{}[/bold]" if (number, place) in table.best else "{}").format(escape(cell))
            + ("†" if (number, place) in table.sure else "")
            for place, cell in enumerate(row)
        ]
        printed.add_row(*cells)
    return printed
