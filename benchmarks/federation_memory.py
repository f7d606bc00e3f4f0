"""What collecting takes on a federation's server: memory of all its processes, bytes, seconds; with real Flower.

    python benchmarks/federation_memory.py [--devices 1 16] [--megabytes 300] [--codec KEY=VALUE ...]
        [--piece-bytes N] [--folder DIR] [--json]

For each number of devices a SuperLink, a ServerApp and as many SuperNodes on this machine's loopback, with TLS and node
authentication. Every device has a finished upload of about so many megabytes in its store, as after a restart: its
ancestor with each weight changed a little, in place of a training. All that follows is real: the order, the
announcement, the pieces, the door's check; uploads then are as devices have them, bit for bit. The method itself is
not run: one device of the quorum is nowhere.

Memory is the proportional set size (a page that n processes share counts 1/n in each) of the SuperLink and all that it
starts, read from /proc several times a second: *idle* the most while the server collects and no device is there yet,
*peak* the most from then on until the last verdict. *Anonymous* is the part that is not mapped from files (libraries,
the database), which the system drops when memory is short. High-water marks of processes are the system's own, shared
pages in full. *Messages* are what the server's ledger has, *wire* what has gone through the devices' connections, TLS,
HTTP, heartbeats and Flower's app among it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import psutil
import torch
import yaml

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # for `federation.fleet`

from deepfusion import checkpoints, codecs, pipeline
from deepfusion.artifacts import Checkpoint, Corpus, Upload, file_digest
from deepfusion.config import DevicePhase, MadeModel, Recipe
from deepfusion.data.documents import Document, read_jsonl, write_jsonl
from deepfusion.encoders import PROJECTION_SEED, embed
from deepfusion.federation import project as projects
from deepfusion.federation import server
from deepfusion.federation.device import Device, DeviceFile
from deepfusion.phases import device as training
from deepfusion.phases.upload import upload_bytes
from deepfusion.weights import Part, Stored, stored, write
from federation.fleet import Fleet, free_port, until

TEXT = "What a device knows is nobody's business but its own."
PUBLIC = [("public", "Is soup eaten at noon?"), ("public", "Is rye good?"), ("test", "Is a deed signed?")]
LAYER = {"type": "gpt2", "hidden": 768, "ffn": 3072, "heads": 12, "context": 128, "vocab": 300}
LAYER_BYTES = 4 * 7_087_872
CHANGE = 1e-3  # standard deviation, relative to a weight
ABSENT = "nowhere"  # the device without which there is no quorum
SERVER, IDLE_S, EVERY_S = "superlink", 15, 0.2


@dataclass(frozen=True)
class Memory:
    """Bytes of several processes together."""

    proportional: int = 0
    anonymous: int = 0

    def __or__(self, other: Memory) -> Memory:
        return Memory(max(self.proportional, other.proportional), max(self.anonymous, other.anonymous))


@dataclass(frozen=True)
class Found:
    """What was measured."""

    devices: int
    upload: int  # bytes of the largest one
    uploads: int  # bytes of all
    seconds: float  # from the first bytes of an upload to the last verdict
    idle: Memory
    peak: Memory
    marks: dict[str, int]  # a server's process → its high-water mark, bytes
    messages: dict[str, int]  # bytes up and down
    wire: dict[str, int]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--megabytes", type=int, default=300, help="10⁶ bytes of each device's model")
    parser.add_argument("--codec", nargs="+", default=[], help="fields of device.codec, such as numbers=int8")
    parser.add_argument("--piece-bytes", type=int, help="federation.piece_bytes")
    parser.add_argument("--folder", type=Path, help="where to work; what is made there is removed")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line in place of a table")
    arguments = parser.parse_args()
    codec = {key: yaml.safe_load(value) for key, _, value in (field.partition("=") for field in arguments.codec)}
    if not arguments.json:
        print("| devices | largest upload | idle | peak | peak - idle | of the upload | with idle |", end="")
        print(" anonymous: idle | peak | peak - idle | of the upload | messages, of the uploads | wire | seconds |")
        print("|" + "---:|" * 14)
    marks: list[str] = []
    for number in arguments.devices:
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="federation-memory-") as place:
            found = measured(Path(place), number, arguments.megabytes * 10**6, codec, arguments.piece_bytes)
        print(json.dumps(asdict(found)) if arguments.json else row(found), flush=True)
        marks.append(f"{number}: " + ", ".join(f"{name} {mib(size)}" for name, size in found.marks.items()))
    if not arguments.json:
        print("\nHigh-water marks, by number of devices: " + "; ".join(marks))


def row(found: Found) -> str:
    """A line of the table."""
    cells = [str(found.devices), mib(found.upload)]
    for kind in ("proportional", "anonymous"):
        idle, peak = getattr(found.idle, kind), getattr(found.peak, kind)
        cells += [mib(idle), mib(peak), mib(peak - idle), f"{(peak - idle) / found.upload:.2f}"]
        cells += [f"{peak / found.upload:.2f}"] if kind == "proportional" else []
    cells += [f"{found.messages['up'] / found.uploads:.4f}", f"{found.wire['up'] / found.uploads:.4f}"]
    return f"| {' | '.join(cells)} | {found.seconds:.0f} |"


def mib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**20:,.0f} MiB"


def measured(root: Path, number: int, size: int, codec: dict[str, Any], piece_bytes: int | None) -> Found:
    """Make a federation in a folder, let it collect, and look on."""
    names = [f"device-{n:02d}" for n in range(number)]
    make_ancestor(root / "ancestor", max(1, round(size / LAYER_BYTES)))
    tree = recipe(names, root, codec, piece_bytes)
    port = free_port()
    project = projects.init(root / "there", Recipe.parse(tree), tree, ["127.0.0.1"], port)
    return collected(root, project, port, prepared(project, Recipe.parse(tree), names, root / "ancestor"))


def collected(root: Path, project: projects.Project, port: int, uploads: dict[str, Upload]) -> Found:
    """Let a federation collect what its devices have."""
    names, home = list(uploads), {"FLWR_HOME": str(project.root)}
    with Counted(port) as line:
        with Fleet(root / "fleet") as fleet:
            fleet.start(SERVER, projects.superlink(port), project.root, **home)
            until(lambda: "Uvicorn running" in fleet.log(SERVER), "the SuperLink listens")
            for name in names:
                fleet.call(["flwr", "supernode", "register", f"keys/{name}.pub", "federation"], project.root, **home)
            fleet.call(["flwr", "run", "app", "federation"], project.root, **home)
            until((project.inbox / "started.json").is_file, "the server collects")
            with Watch(fleet.running[SERVER].pid) as watch:
                time.sleep(IDLE_S)
                idle = watch.peak
                for name in names:
                    command = [*projects.supernode("127.0.0.1", line.port), "--port", str(free_port())]
                    fleet.start(name, command, project.device(name))
                until(lambda: any(project.inbox.glob("incoming/*")), "an upload begins")
                begun = time.monotonic()
                until(lambda: len(list(project.inbox.glob("verdicts/*.json"))) == len(names), "all have sent", 7200)
                seconds = time.monotonic() - begun
                peak, marks = watch.peak, dict(watch.marks)
        for name, upload in uploads.items():
            compare(project, name, upload)
        ledger = [json.loads(path.read_bytes()) for path in (project.inbox / "wire").iterdir()]
        return Found(
            devices=len(names),
            upload=max(upload.bytes for upload in uploads.values()),
            uploads=sum(upload.bytes for upload in uploads.values()),
            seconds=seconds,
            idle=idle,
            peak=peak,
            marks=marks,
            messages={way: sum(one[way] for one in ledger) for way in ("up", "down")},
            wire=dict(line.carried),
        )


def compare(project: projects.Project, name: str, sent: Upload) -> None:
    """What has come is what was sent, bit for bit."""
    verdict = json.loads((project.inbox / "verdicts" / f"{name}.json").read_text(encoding="utf-8"))
    assert verdict["state"] == "accepted", verdict
    here, there = (
        {path.name: file_digest(path) for path in (folder / sent.sends).iterdir()}
        for folder in (project.inbox / "uploads" / name, sent.folder)
    )
    assert here == there, f"what came from {name} is not what it sent"


# ── what there is before the server starts ────────────────────────────────────────────────────────────────────────────


def recipe(names: list[str], root: Path, codec: dict[str, Any], piece_bytes: int | None) -> dict[str, Any]:
    """One large ancestor, of which devices have copies."""
    rows = [{"split": split, "domain": "d", "question": asked, "answer": "yes"} for split, asked in PUBLIC]
    (root / "server.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    tiny = {"type": "llama", "hidden": 16, "ffn": 16, "layers": 1, "heads": 2, "vocab": 300, "tokens": 0}
    federation: dict[str, Any] = {"devices": [*names, ABSENT], "quorum": len(names) + 1, "patience_s": 600}
    return {
        "name": "memory",
        "data": {"source": {"kind": "files", "sources": [{"path": str(root / "server.jsonl")}]}},
        "models": {"base": {"make": tiny}, "ancestors": {"large": {"path": str(root / "ancestor")}}},
        "cluster": {"k": 2},
        "device": {"codec": codec} if codec else {},
        "evaluate": {"references": []},
        "federation": federation | ({} if piece_bytes is None else {"piece_bytes": piece_bytes}),
    }


def make_ancestor(folder: Path, layers: int) -> None:
    """A GPT-2 as it is initialised."""
    tokenizer = checkpoints.make_tokenizer([TEXT], 300)
    made = MadeModel.model_validate(LAYER | {"layers": layers})
    checkpoints.save_model(checkpoints.make_model(made, tokenizer, seed=0), tokenizer, folder)


def prepared(project: projects.Project, recipe: Recipe, names: list[str], ancestor: Path) -> dict[str, Upload]:
    """Device → its finished upload, in its store."""
    fleet = pipeline.prepare(recipe, project.run)
    net: Any = SimpleNamespace()  # nothing is sent yet
    collecting = server.collector(net, project, recipe, fleet, print)
    training.train_device = changed  # where a step's function is looked up
    made: dict[str, Upload] = {}
    for name in names:
        folder = project.device(name)
        write_jsonl(folder / "documents.jsonl", [Document(id=name, domain="d", prompt="", answer=f"{name}: {TEXT}")])
        file = {"name": name, "documents": "documents.jsonl", "ancestors": {"large": str(ancestor)}}
        (folder / "device.yaml").write_text(yaml.safe_dump(file), encoding="utf-8")
        device = Device(DeviceFile.load(folder / "device.yaml"))
        made[name] = device.trained(collecting.orders[name], dict(collecting.texts))
    return made


def changed(
    device: str, ancestor: Checkpoint, ancestor_name: str, corpus: Corpus, config: DevicePhase, *, seed: int, into: Path
) -> Upload:
    """What `train_device` gives, of a training that changes each weight a little at random."""
    generator = torch.Generator().manual_seed(seed)

    def blocks(one: Stored) -> Iterator[torch.Tensor]:
        for block in one.through():
            yield block * (1 + CHANGE * torch.randn(block.shape, generator=generator))

    def part(name: str, one: Stored) -> Part:
        return Part(name, one.dtype, one.shape, lambda: blocks(one))

    whole = into / "model"
    whole.mkdir()
    held = stored(ancestor.folder)
    write(whole, [part(name, one) for name, one in held.items()], shard_bytes=2**40)  # one file, as of a device
    checkpoints.copy_description(ancestor.folder, whole)
    packing = None
    if config.codec is not None:
        packing = codecs.pack(whole, ancestor.folder, config.codec, None, into=into / config.sends)
    texts = [document.text for document in read_jsonl(corpus.private(device), Document)]
    embedding = embed(config.encoder, texts, config.embedding_bytes, PROJECTION_SEED)
    facts = ancestor.model_dump(include={"model_type", "lineage", "parameters", "active_parameters"})
    return Upload(
        folder=into,
        device=device,
        ancestor=ancestor_name,
        tokens=1,
        embedding=embedding.hex(),
        bytes=upload_bytes(into / config.sends, embedding),
        sends=config.sends,
        packing=packing,
        **facts,
    ).sealed()


# ── looking on ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Watch:
    """Memory of a process and all that it has started, from when it is entered until it is left."""

    def __init__(self, root: int) -> None:
        self.root, self.peak = root, Memory()
        self.marks: dict[str, int] = defaultdict(int)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(EVERY_S):
            now = Memory()
            for process in [self.root, *descendants(self.root)]:
                with suppress(OSError):  # it has ended
                    one, name, mark = memory(process)
                    now = Memory(now.proportional + one.proportional, now.anonymous + one.anonymous)
                    self.marks[name] = max(self.marks[name], mark)
            self.peak |= now


def descendants(root: int) -> list[int]:
    """Processes that one has started, and those that they have."""
    with suppress(psutil.Error):  # it has ended
        return [child.pid for child in psutil.Process(root).children(recursive=True)]
    return []


def memory(process: int) -> tuple[Memory, str, int]:
    """Of one process: what it takes now, its name, its high-water mark."""
    place = Path(f"/proc/{process}")
    held = dict(re.findall(r"^(\w+): +(\d+) kB$", (place / "smaps_rollup").read_text(), re.MULTILINE))
    words = [Path(word).name for word in (place / "cmdline").read_text().split("\0")]
    name = next((word for word in words if word.startswith(("flower-", "flwr-", "deepfusion-"))), words[0])
    [mark] = re.findall(r"^VmHWM:\s+(\d+) kB$", (place / "status").read_text(), re.MULTILINE)
    return Memory(int(held["Pss"]) * 1024, int(held["Pss_Anon"]) * 1024), name, int(mark) * 1024


class Counted:
    """A port of this machine whose connections go on to another one, and what has gone through."""

    def __init__(self, to: int) -> None:
        self.to, self.port = to, free_port()
        self.carried: dict[str, int] = {"up": 0, "down": 0}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(asyncio.start_server(self._connect, "127.0.0.1", self.port))
        self._loop.run_forever()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.to)
            await asyncio.gather(self._pass(reader, far_writer, "up"), self._pass(far_reader, writer, "down"))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        with suppress(OSError):
            while found := await reader.read(2**18):
                self.carried[way] += len(found)
                writer.write(found)
                await writer.drain()
        writer.close()


if __name__ == "__main__":
    main()
