"""The command about fleets that are only thought of."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

import typer

from deepfusion.cli.app import STDOUT, command, emit
from deepfusion.cli.options import AsJson


@command
def fleet(
    models: Annotated[
        str | None, typer.Option(metavar="A,B", help="What devices train: known by name, or folders with config.json.")
    ] = None,
    moe: Annotated[str | None, typer.Option(metavar="MODEL", help="What FedJETS would train parts of.")] = None,
    devices: Annotated[str, typer.Option(metavar="N,N", help="Numbers of devices.")] = "16,32,64,128",
    paper: Annotated[bool, typer.Option("--paper", help="Both studies of the paper, beside its figures.")] = False,
    method: Annotated[
        Literal["full", "lora", "qlora"], typer.Option(help="How devices train; FedJETS trains all weights.")
    ] = "qlora",
    rank: Annotated[int, typer.Option(min=1, help="Of an adapter on every matrix, in float32.")] = 64,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of weights in training, gradients and what layers keep.")
    ] = "bfloat16",
    states: Annotated[
        Literal["float32", "bfloat16", "int8"], typer.Option(help="Of the optimiser, where all weights are trained.")
    ] = "int8",
    upload: Annotated[
        Literal["float32", "bfloat16", "int8", "nf4"],
        typer.Option(help="How matrices travel; beside int8 and nf4, all else in bfloat16."),
    ] = "nf4",
    adapter: Annotated[
        Literal["beside", "merged", "alone"], typer.Option(help="How a trained adapter travels: with weights, or not.")
    ] = "beside",
    unquantised: Annotated[
        str, typer.Option(metavar="TYPE,TYPE", help="Model types that int8 and nf4 pass over, or none.")
    ] = "gpt2",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens that pass through a model at a time.")] = 1536,
    fixed_gb: Annotated[float, typer.Option(min=0, help="Memory of any training: context, kernels, slack.")] = 0.9,
    experts: Annotated[int, typer.Option(min=1, help="Experts that a device of FedJETS has.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of FedJETS, down and up.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Work out what a fleet would send, and what memory its devices need, from the shapes of models alone.

    Nothing is downloaded, and no weights are read. Devices' models are taken to be equally frequent. GB are 10⁹ bytes.

    Example: `deepfusion fleet --models gpt2,gpt2-medium,tinyllama-1.1b --moe qwen1.5-moe-a2.7b --devices 16,128`
    """
    from deepfusion.fleet import Assumptions, Model, known, planned, tables
    from deepfusion.fleet.paper import compared, sources, studied

    if paper == (models is not None):
        raise ValueError("say what devices train, as in --models gpt2,tinyllama-1.1b; or --paper, alone")
    of = Assumptions(
        method, rank, dtype, states, upload, adapter, () if unquantised == "none" else tuple(_split(unquantised)),
        batch_tokens, fixed_gb, experts, rounds,
    )  # fmt: skip
    counts = _counts(devices)
    if models is None:
        if moe is not None:
            raise ValueError("--paper has MoEs of its own: leave --moe out")
        plans, bars = list(studied(counts, of).values()), compared(of)
    else:
        trained = [Model.of(name, known(name)) for name in _split(models)]
        plans, bars = [planned("fleet", trained, Model.of(moe, known(moe)) if moe else None, counts, of)], []
    told = sources(of) if paper else {}
    if as_json:
        emit({
            "assumptions": asdict(of),
            "sources": told,
            "plans": [plan.tree() for plan in plans],
            "figures": [bar.tree() for bar in bars],
        })  # fmt: skip
        return
    for plan in plans:
        STDOUT.print(*([f"[bold]{plan.name}[/]"] if paper else []), *tables.plan(plan), "", sep="\n")
    if paper:
        STDOUT.print(tables.figures(bars), "", sep="\n")
    STDOUT.print(tables.assumptions(of, told), *([tables.INFERRED] if paper else []), sep="\n")


def _split(names: str) -> list[str]:
    found = [name.strip() for name in names.split(",") if name.strip()]
    if not found:
        raise ValueError(f"{names!r} names nothing")
    return found


def _counts(devices: str) -> list[int]:
    found = _split(devices)
    if not all(count.isdecimal() and int(count) for count in found):
        raise ValueError(f"--devices takes numbers of devices, as in 16,32, not {devices!r}")
    return [int(count) for count in found]
