"""The command line: parses, calls, prints; no arithmetic. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import errno
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec

import click
import typer
from rich.console import Console
from typer.core import TyperGroup

from deepfusion.config import Recipe, Runtime

P = ParamSpec("P")
DEBUG = "DEEPFUSION_DEBUG"


class _Commands(TyperGroup):
    """Tells a mistake in the command line itself like every other: in one line."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run a command and exit."""
        try:
            status = super().main(*args, **extra | {"standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.UsageError as error:
            asked = error.ctx.command_path if error.ctx else self.name
            STDERR.print(
                f"deepfusion: error: {error.format_message()} (see {asked} --help)", markup=False, soft_wrap=True
            )
            sys.exit(error.exit_code)
        sys.exit(status if isinstance(status, int) else 0)


app = typer.Typer(
    name="deepfusion",
    cls=_Commands,
    no_args_is_help=True,
    suggest_commands=False,  # click does, and twice is once too often
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    epilog="Try it: `deepfusion demo`",
)
STDOUT = Console(highlight=False)
STDERR = Console(stderr=True, highlight=False)


class Accelerator(StrEnum):
    """Where tensors live."""

    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Precision(StrEnum):
    """How many bits a weight has."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of an embedded recipe.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")]
ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint folder, such as runs/demo/moe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one recipe key; data.source.sources.0.path is in a list."),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run's folder.", show_default="runs/<name>")]
Workers = Annotated[int | None, typer.Option(min=0, help="Steps run side by side; 0: in this process.")]
Threads = Annotated[int, typer.Option(min=1, help="Torch threads of each step.")]
OnAccelerator = Annotated[Accelerator, typer.Option("--accelerator", help="Where tensors live.")]
Seconds = Annotated[
    float, typer.Option("--checkpoint-seconds", min=0.01, help="Save what to go on from this often while training.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show nothing but errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")]


def main() -> None:
    """Entry point of the `deepfusion` command."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("deepfusion-moe"))
        raise typer.Exit


@app.callback()
def _options(  # pyright: ignore[reportUnusedFunction]
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", envvar=DEBUG)] = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train one Mixture-of-Experts language model out of many small, different ones that never share their data."""
    os.environ[DEBUG] = "1" if debug else "0"


@contextmanager
def _told_in_one_line() -> Generator[None]:
    """Turn what a command raises into one line on stderr and an exit code: 2 is the user's to mend, 1 ours."""
    try:
        yield
    except KeyboardInterrupt:
        _leave("stopped; the same command goes on from here", 130)
    except (typer.Exit, BrokenPipeError):  # typer's own to handle
        raise
    except ValueError as error:
        _leave(f"error: {error}", 2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            _leave(f"error: {error}", 1)
        _leave(f"error: disk full while writing {error.filename or error.strerror}", 2)
    except Exception as error:
        hint = "" if os.environ.get(DEBUG) == "1" else " (traceback: deepfusion --debug …)"
        _leave(f"internal error: {type(error).__name__}: {error}{hint}", 1)


def _leave(message: str, code: int) -> None:
    if os.environ.get(DEBUG) == "1":
        traceback.print_exc()
    STDERR.print(f"deepfusion: {' '.join(message.split())}", markup=False, soft_wrap=True)
    raise typer.Exit(code)


def _command(function: Callable[P, None]) -> Callable[P, None]:
    """Register a command whose errors are told in one line."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        with _told_in_one_line():
            function(*args, **kwargs)

    return app.command()(guarded)


def _emit(document: Any) -> None:
    sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=1) + "\n")


@_command
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


@_command
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
    runtime = _runtime(workers, threads, accelerator).model_copy(update={"checkpoint_seconds": checkpoint_seconds})
    _run(Recipe.load(recipe, overrides or ()), folder, runtime, quiet, as_json)


def _runtime(workers: int | None, threads: int, accelerator: Accelerator) -> Runtime:
    runtime = Runtime(threads=threads, accelerator=accelerator.value)
    return runtime if workers is None else runtime.model_copy(update={"workers": workers})


def _run(recipe: Recipe, folder: Path | None, runtime: Runtime, quiet: bool, as_json: bool) -> None:
    from deepfusion import pipeline, summary
    from deepfusion.display import Display

    folder = folder or Path("runs") / recipe.name
    with Display(quiet=quiet) as display:
        report = pipeline.run(recipe, folder, runtime, display)
    if as_json:
        facts = {"run": str(folder), "model": str(folder / "moe"), "report": str(folder / "report.html")}
        _emit(facts | {"headline": report.headline})
    elif not quiet:
        STDOUT.print(*summary.overview(summary.read_results(folder)), sep="\n")
        STDOUT.print(f"\nmodel   {folder / 'moe'}\nreport  {folder / 'report.html'}", markup=False, soft_wrap=True)


@_command
def plan(recipe: RecipeName, overrides: Overrides = None, folder: Out = None, as_json: AsJson = False) -> None:
    """List what a run would do, step by step, and why. Runs nothing.

    Example: `deepfusion plan recipes/demo.yaml --set distill.objective.beta=10`
    """
    from deepfusion import pipeline, summary

    chosen = Recipe.load(recipe, overrides or ())
    steps = pipeline.plan(chosen, folder or Path("runs") / chosen.name)
    if as_json:
        _emit([asdict(step) for step in steps])
    else:
        STDOUT.print(*summary.plan(steps), sep="\n")


@_command
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
    runtime = _runtime(workers, threads, accelerator)
    with STDERR.status("looking at text, models and machine"):
        found = examine(chosen, folder or Path("runs") / chosen.name, runtime, timed=not no_timing)
    if as_json:
        _emit({"state": found.state, **asdict(found)})
    else:
        for part in tables.tables(found, runtime.workers):
            STDOUT.print(part)
    if found.state == "problem":
        raise typer.Exit(2)


@_command
def import_gguf(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A model as llama.cpp keeps it.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint folder to make.")],
    dtype: Annotated[Precision, typer.Option("--dtype", help="Precision of the weights.")] = Precision.bfloat16,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Convert a GGUF file to a checkpoint folder that `models.base.path` or an ancestor's `path` can name.

    Quantised weights are unpacked. Needs the package gguf: `pip install 'deepfusion-moe[gguf]'`.

    Example: `deepfusion import-gguf SmolLM2-135M-Instruct-Q8_0.gguf models/smollm2-135m`
    """
    from deepfusion import import_gguf as importing

    with STDERR.status(f"converting {file.name}"):
        made = importing.import_gguf(file, folder, dtype.value, force=force)
    for note in made.notes:
        STDERR.print(f"note: {note}", markup=False, soft_wrap=True)
    if as_json:
        _emit({**asdict(made), "folder": str(made.folder)})
    elif not quiet:
        STDOUT.print(f"{made.folder}  {made.model_type}, {made.parameters:,} parameters", markup=False, soft_wrap=True)


@_command
def show(folder: RunFolder, as_json: AsJson = False) -> None:
    """Print what a finished run found: the headline table, compute, bytes and where the time went.

    Example: `deepfusion show runs/demo`
    """
    from deepfusion import summary

    results = summary.read_results(folder)
    if as_json:
        _emit(results)
    else:
        STDOUT.print(*summary.overview(results), sep="\n")


@_command
def inspect(folder: RunFolder, as_json: AsJson = False) -> None:
    """Print what happened inside a finished run: clusters, lineages, who taught what, bytes, rejections, routing.

    Example: `deepfusion inspect runs/demo --json`
    """
    from deepfusion import summary

    results = summary.read_results(folder)
    if as_json:
        _emit(summary.inside(results))
    else:
        STDOUT.print(*summary.inspection(results), sep="\n")


@_command
def evaluate(
    model: ModelFolder,
    data: Annotated[Path, typer.Option("--data", metavar="FILE.jsonl", help="Test questions, one JSON object a line.")],
    batch_tokens: Annotated[int, typer.Option(min=64, help="Tokens scored at a time.")] = 8192,
    threads: Threads = 1,
    accelerator: OnAccelerator = Accelerator.cpu,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Score a checkpoint on the questions of a file, per domain.

    A line is a question as runs write it (`id, domain, prompt, answer`, and `options, answer_idx` for a choice), or a
    row of real data (`id, domain, question, answer`, and `context, options, answer_idx, split`); of those with a split
    the test rows count.

    Example: `deepfusion evaluate runs/demo/moe --data questions.jsonl`
    """
    from deepfusion import inference, summary
    from deepfusion.display import Display

    runtime = Runtime(threads=threads, accelerator=accelerator.value)
    with Display(quiet=quiet) as display:
        rows = inference.score_file(model, data, batch_tokens, runtime, display)
    if as_json:
        _emit([row.model_dump(exclude={"seed", "system", "item"}) for row in rows])
    elif not quiet:
        STDOUT.print(summary.metrics(rows))


@_command
def generate(
    model: ModelFolder,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    threads: Threads = 1,
    accelerator: OnAccelerator = Accelerator.cpu,
    as_json: AsJson = False,
) -> None:
    """Let a checkpoint go on from a prompt.

    Example: `deepfusion generate runs/demo/moe "The drug of choice for" --temperature 0.8 --seed 3`
    """
    from deepfusion import inference

    runtime = Runtime(threads=threads, accelerator=accelerator.value)
    text = inference.complete(model, prompt, max_new_tokens, temperature, seed, runtime)
    if as_json:
        _emit({"prompt": prompt, "text": text})
    else:
        STDOUT.print(text, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
