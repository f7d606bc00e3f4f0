"""Commands about checkpoints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from deepfusion.cli.app import STDERR, STDOUT, command, emit
from deepfusion.cli.options import Accelerator, AsJson, ModelFolder, OnAccelerator, Precision, Quiet, Threads
from deepfusion.config import Runtime


@command
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
        emit([row.model_dump(exclude={"seed", "system", "item"}) for row in rows])
    elif not quiet:
        STDOUT.print(summary.metrics(rows))


@command
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
        emit({"prompt": prompt, "text": text})
    else:
        STDOUT.print(text, markup=False, soft_wrap=True)


@command
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
        emit({**asdict(made), "folder": str(made.folder)})
    elif not quiet:
        STDOUT.print(f"{made.folder}  {made.model_type}, {made.parameters:,} parameters", markup=False, soft_wrap=True)
