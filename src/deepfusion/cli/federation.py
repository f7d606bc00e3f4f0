"""Commands about federations of devices elsewhere."""

from __future__ import annotations

import shlex
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from deepfusion.cli import options
from deepfusion.cli.app import STDOUT, app, emit, guarded
from deepfusion.cli.options import Accelerator, AsJson, Out, Overrides, RecipeName, Threads, Workers
from deepfusion.config import Recipe, tree
from deepfusion.labels import counted

federation = typer.Typer(
    name="federation", no_args_is_help=True, rich_markup_mode="markdown",
    help="Devices on machines of their own, by Flower.",
)  # fmt: skip
app.add_typer(federation)


@federation.command()
@guarded
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    recipe: Annotated[
        str, typer.Option("--recipe", help="A recipe file, or an embedded recipe's name.")
    ] = "federation",
    overrides: Overrides = None,
    hosts: Annotated[
        list[str] | None, typer.Option("--host", help="A name or address that devices know the server by; repeatable.")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Of the server.")] = 8000,
    as_json: AsJson = False,
) -> None:
    """Make a federation's folder: recipe, certificates, a key for each device, and Flower's app and config.

    Needs Flower: `pip install 'deepfusion-moe[federation]'`.

    Example: `deepfusion federation init clinic --host fusion.example.org --set federation.devices='[north, south]'`
    """
    with _extra("federation"):
        from deepfusion.federation import project
    chosen, fields = _read(recipe, overrides or ())
    names = hosts or ["127.0.0.1", "localhost"]
    made = project.init(folder, chosen, fields, names, port)
    server, device = shlex.join(project.superlink(port)), shlex.join(project.supernode(names[0], port))
    devices = list(chosen.federation.devices) if chosen.federation else []
    if as_json:
        emit({"folder": str(folder), "devices": devices, "server": server, "device": device})
        return
    there = f"  cd {shlex.quote(str(made.root.absolute()))} && {project.HOME}"
    lines = [
        f"{made.root} is ready. Carry devices/NAME to each device, over a channel you trust: it holds its private key.",
        "",
        "server, in a terminal of its own:",
        there,
        f"  {server}",
        "and in a second terminal, once:",
        there,
        f"  until flwr supernode list {project.CONNECTION} > /dev/null 2>&1; do sleep 1; done  # the server is up",
        f'  for key in keys/*.pub; do flwr supernode register "$key" {project.CONNECTION}; done',
        f"  flwr run app {project.CONNECTION} --stream",
        f"  flwr list {project.CONNECTION} --format json",
        "",
        f"each device, in its own folder, once its rows are in private.jsonl, or {project.DEVICE} says where they are:",
        f"  {project.HOME}",
        f"  deepfusion federation check {project.DEVICE}",
        f"  {device}",
        "",
        "A second device on the same machine needs --port 9095 at the end of its command.",
    ]
    STDOUT.print("\n".join(lines), markup=False, soft_wrap=True)


@federation.command()
@guarded
def check(
    file: Annotated[Path, typer.Argument(metavar="DEVICE.YAML", help="A device's own file.")] = Path("device.yaml"),
    as_json: AsJson = False,
) -> None:
    """On a device: see that its key, its text and its copies of public models are there and can be used.

    Reads what a training would read, and sends nothing. Whether a copy is the server's own is for the server to say.

    Example: `deepfusion federation check devices/north/device.yaml`
    """
    with _extra("federation"):
        from deepfusion.federation.device import DeviceFile
    device = DeviceFile.load(file)
    found = device.check()
    if as_json:
        emit(found)
        return
    STDOUT.print(
        f"{found['name']} has its key and {counted(found['rows'], 'row')} of private text ({found['bytes']:,} bytes; "
        f"{', '.join(f'{domain} {rows}' for domain, rows in found['domains'].items())}).",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    for name, lineage in found["ancestors"].items():
        STDOUT.print(f"{name} is {lineage}: the server's must be the same.", markup=False, soft_wrap=True)


@federation.command()
@guarded
def simulate(
    recipe: RecipeName,
    devices: Annotated[int | None, typer.Option("--devices", min=1, help="In place of data.partition.devices.")] = None,
    overrides: Overrides = None,
    folder: Out = None,
    workers: Workers = None,
    threads: Threads = 1,
) -> None:
    """Run a recipe as a federation of all its devices on this machine, under Flower's simulation engine (Ray).

    Each device gets a folder with its part of the recipe's own text, and a key. Needs Flower and Ray:
    `pip install 'deepfusion-moe[simulation]'`.

    Example: `deepfusion federation simulate federation --devices 16 --out runs/sixteen`
    """
    with _extra("simulation"):
        from deepfusion.federation import simulation
    number = [] if devices is None else [f"data.partition.devices={devices}"]
    chosen, fields = _read(recipe, [*(overrides or ()), *number])
    runtime = options.runtime(workers, threads, Accelerator.cpu)
    simulation.simulate(folder or Path("runs") / chosen.name, chosen, fields, runtime)


@contextmanager
def _extra(name: str) -> Generator[None]:
    """Import what only an extra brings, or say which."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"a {name} needs {error.name}: pip install 'deepfusion-moe[{name}]'") from None


def _read(recipe: str, overrides: Sequence[str]) -> tuple[Recipe, dict[str, Any]]:
    """A recipe, and how it is written down."""
    fields = tree.chosen(recipe, overrides)
    return Recipe.parse(fields, origin=recipe), fields
