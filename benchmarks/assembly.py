"""Assemble an MoE of industrial size, average proxies of that size, and copy the same bytes on the same disk beside it.

    python benchmarks/assembly.py [--layers N] [--folder runs/assembly] [--report benchmarks/NAME.md]

Makes one student of Qwen1.5-1.8B's shape with random weights, links it fifteen times, and assembles them by the preset
`qwen1.5-moe-a2.7b`: 14.3 billion parameters, 28.6 GB. Then averages four such models, of different weights. Each thing
is done in a process of its own, whose peak memory (VmHWM) is told, after a sync, with the files that it reads dropped
from the page cache; and it is over when what it wrote is synced. Copying is reading and writing 16 MiB at a time, so
that no file system can merely link; of the copies, the last four files stay, removing the others is not counted. Needs
about 38 GB of disk, and leaves nothing there. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from seeds import commit, machine

PRESET, CLUSTERS, PROXIES = "qwen1.5-moe-a2.7b", 15, 4
BUFFER, KEPT = 2**24, 4


def main() -> None:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="fewer for a smaller disk")
    parser.add_argument("--folder", type=Path, default=Path("runs/assembly"), help="on the disk to measure")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)  # in the processes that are measured
    arguments = parser.parse_args()
    if arguments.only:
        function, *paths = arguments.only
        print(json.dumps(MEASURED[function](*map(Path, paths)) | {"peak": peak(), "processor": processor()}))
        return
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    load = os.getloadavg()[0]
    try:
        text = report(arguments.layers, measured(arguments.folder, arguments.layers), load)
    finally:
        shutil.rmtree(arguments.folder)
    print(text)
    if arguments.report:
        arguments.report.write_text(text, encoding="utf-8")


def measured(folder: Path, layers: int) -> dict[str, dict[str, Any]]:
    """All measurements; at most the students, an MoE and some of its copy are on disk together."""
    models = [folder / f"model-{number}" for number in range(PROXIES)]
    students = [folder / f"student-{number}" for number in range(CLUSTERS)]
    moe, mean, copy = folder / "moe", folder / "mean", folder / "copy"
    alone("make", models[0], str(layers), "0")
    for student in students:
        shutil.copytree(models[0], student, copy_function=os.link)
    found = {"assemble": alone("assemble", moe, *students)}
    found["seal"] = alone("seal", moe)
    found["copy the MoE"] = alone("copy", copy, moe)
    for each in (*students, moe, copy):
        shutil.rmtree(each)
    for number, model in enumerate(models[1:], start=1):
        alone("make", model, str(layers), str(number))
    found["average"] = alone("average", mean, *models)
    found["copy one, read all"] = alone("copy", copy, *models)
    return found


def alone(function: str, *arguments: Path | str) -> dict[str, Any]:
    """Call one of `MEASURED` in a process of its own."""
    os.sync()
    command = [sys.executable, __file__, "--only", function, *map(str, arguments)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(ran.stdout)
    print(function, {key: round(value, 2) for key, value in found.items()}, file=sys.stderr, flush=True)
    return found


# ── in a process of its own ───────────────────────────────────────────────────────────────────────────────────────────


def make(folder: Path, layers: Path, seed: Path) -> dict[str, Any]:
    """A model of Qwen1.5-1.8B's shape."""
    import numpy as np
    import torch
    from torch import Tensor
    from transformers import Qwen2Config

    from deepfusion.checkpoints import as_checkpoint, make_tokenizer
    from deepfusion.families.family import skeleton
    from deepfusion.weights import BLOCK, Part, write

    tokenizer = make_tokenizer(["a small tokenizer will do"], 300)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=int(str(layers)),
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        dtype=torch.bfloat16,
    )
    random = np.random.default_rng(int(str(seed)))

    def made(shape: tuple[int, ...]) -> Iterator[Tensor]:
        rows = max(1, BLOCK // max(1, int(np.prod(shape[1:]))))
        for first in range(0, shape[0], rows):
            size = (min(rows, shape[0] - first), *shape[1:])
            # Of 16 random bits, the sign and the lowest eight: numbers between 2⁻⁷ and 2⁻⁵ and their negatives.
            bits = random.integers(0, 2**16, size=size, dtype=np.uint16) & 0x80FF | 0x3C00
            yield torch.from_numpy(bits).view(torch.bfloat16)

    folder.mkdir()
    state = skeleton(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in sorted(state.items())}
    write(folder, [Part(name, torch.bfloat16, shape, partial(made, shape)) for name, shape in shapes.items()])
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"parameters": as_checkpoint(folder).parameters}


def assemble(into: Path, *students: Path) -> dict[str, Any]:
    """Fifteen students become an MoE; the time until it is on disk, without its digest."""
    from unittest.mock import patch

    from deepfusion.artifacts import Checkpoint
    from deepfusion.config import AssemblePhase
    from deepfusion.phases import assemble as phase

    into.mkdir()
    given = [Checkpoint.load(student, digest="not needed") for student in students]
    began = start(students)
    done: dict[str, float] = {}

    def sealed(folder: Path, **_: Any) -> Checkpoint:
        done.update(taken(began, [folder]))
        return given[0].model_copy(update={"folder": folder})

    with patch.object(phase, "as_checkpoint", sealed):
        phase.assemble(given, AssemblePhase(preset=PRESET, router="random"), None, seed=0, into=into)
    return done


def seal(folder: Path) -> dict[str, Any]:
    """The digest over an MoE's files, which a step takes twice: when it ends, and when the store takes it over."""
    from deepfusion.checkpoints import as_checkpoint

    began = start([folder])
    checkpoint = as_checkpoint(folder, lineage_of="benchmark")
    found = taken(began, [folder])
    return found | {"parameters": checkpoint.parameters, "active": checkpoint.active_parameters}


def average(into: Path, *models: Path) -> dict[str, Any]:
    """Four models' mean, and the distance of the farthest."""
    from deepfusion.phases.proxy import average_folders

    began = start(models)
    distance = average_folders(models, [1.0] * len(models), into=into)
    return taken(began, [into]) | {"distance": distance}


def copy(into: Path, first: Path, *others: Path) -> dict[str, Any]:
    """Copy the first checkpoint; read the others."""
    into.mkdir()
    began = start([first, *others])
    buffer, copied = memoryview(bytearray(BUFFER)), 0
    for file in weights([first, *others]):
        target = into / file.name if file.parent == first else Path(os.devnull)
        with file.open("rb", buffering=0) as source, target.open("wb", buffering=0) as sink:
            while count := source.readinto(buffer):
                sink.write(buffer[:count])
                copied += count if file.parent == first else 0
        for old in weights([into])[:-KEPT]:
            synced(old)
            paused = time.monotonic()
            old.unlink()
            began += time.monotonic() - paused
    return taken(began, [into]) | {"bytes": copied}


MEASURED = {"make": make, "assemble": assemble, "seal": seal, "average": average, "copy": copy}


def start(folders: Sequence[Path]) -> float:
    """Drop what is going to be read from the page cache, and look at the clock."""
    os.sync()
    for file in weights(folders):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return time.monotonic()


def taken(began: float, folders: Sequence[Path]) -> dict[str, float]:
    """Seconds until what was written is on disk, and its bytes."""
    files = weights(folders)
    for file in files:
        synced(file)
    return {"seconds": time.monotonic() - began, "bytes": sum(file.stat().st_size for file in files)}


def synced(file: Path) -> None:
    """Have it on disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def weights(folders: Sequence[Path]) -> list[Path]:
    """All files of weights."""
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def processor() -> float:
    """Seconds of processor time, the system's for this process included."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def report(layers: int, found: dict[str, dict[str, Any]], load: float) -> str:
    """The Markdown page."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors"))
    moe = found["seal"]
    lines = [
        "# Assembly and averaging at industrial size",
        "",
        f"    python benchmarks/assembly.py{'' if layers == 24 else f' --layers {layers}'}",
        "",
        f"{machine()} Load average when it began: {load:.1f}. Versions: python {sys.version.split()[0]}, {versions}.",
        f"Commit {commit()}.",
        "",
        f"{CLUSTERS} students of Qwen1.5-1.8B's shape, {layers} layers, bfloat16, hard links of one file, become an",
        f"MoE of the preset `{PRESET}`: {moe['parameters'] / 1e9:.2f} billion parameters, {moe['active'] / 1e9:.2f}",
        f"active. {PROXIES} models of that shape, of different weights, are averaged. Every line is a process of its",
        "own. Before it, what it reads is dropped from the page cache; its time ends when what it wrote is synced.",
        "Copying is reading and writing 16 MiB at a time.",
        "",
        "| | GB written | seconds | MB/s | processor, seconds | peak memory, GiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, facts in found.items():
        written = "none" if name == "seal" else f"{facts['bytes'] / 1e9:.2f}"
        speed, peaked = facts["bytes"] / 1e6 / facts["seconds"], facts["peak"] / 2**30
        lines.append(
            f"| {name} | {written} | {facts['seconds']:.1f} | {speed:.0f} | {facts['processor']:.1f} | {peaked:.2f} |"
        )
    lines.append("")
    for done, copied in (("assemble", "copy the MoE"), ("average", "copy one, read all")):
        ratio = found[copied]["seconds"] / found[done]["seconds"]
        lines.append(f"- Throughput of *{done}* relative to *{copied}*: **{ratio:.2f}**")
    lines += [
        "",
        "*seal* is the SHA-256 over all files that makes the result an artifact, and reads them once; a run takes it",
        "when the step ends and again when the store takes over. Processor time and memory include Python.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
