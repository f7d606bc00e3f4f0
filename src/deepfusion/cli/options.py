"""Arguments and options that several commands take."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from deepfusion.config import Runtime


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


def runtime(workers: int | None, threads: int, accelerator: Accelerator) -> Runtime:
    """What these options come to; without a number of workers, as many as the machine has cores."""
    chosen = Runtime(threads=threads, accelerator=accelerator.value)
    return chosen if workers is None else chosen.model_copy(update={"workers": workers})
