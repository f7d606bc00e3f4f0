"""A device that carries out an order sends what a run in one place would have made, however it is packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import Message

import tiny
from deepfusion import pipeline
from deepfusion.artifacts import Checkpoint, Corpus, DeviceInfo, Upload
from deepfusion.config import Recipe
from deepfusion.data.documents import write_jsonl
from deepfusion.federation import messages
from deepfusion.federation.device import Device, DeviceFile
from deepfusion.federation.project import init
from deepfusion.federation.server import collector
from deepfusion.phases.device import train_device
from deepfusion.phases.upload import materialise, receive
from deepfusion.steps import sent_by
from federation.test_server import Net, in_a_run
from pico import pico

__all__ = ["in_a_run"]
ROWS = [
    {"split": "public", "domain": "d", "question": "Is soup eaten at noon?", "answer": "yes"},
    {"split": "public", "domain": "d", "question": "Is rye good?", "answer": "very"},
    {"split": "test", "domain": "d", "question": "Is a deed signed?", "answer": "yes"},
]
LORA = {"method": "lora", "upload": "adapter"}
SENDS: dict[str, dict[str, Any]] = {
    "model": {},
    "int8": {"codec": {"numbers": "int8"}},
    "nf4": {"codec": {"numbers": "nf4"}},
    "int8 delta": {"codec": {"numbers": "int8", "delta": True}},
    "nf4 delta": {"codec": {"numbers": "nf4", "delta": True}},
    "int8 delta rank 4": {"codec": {"numbers": "int8", "delta": True, "rank": 4}},
    "adapter": LORA,
    "adapter in int8": LORA | {"codec": {"numbers": "int8"}},
    "adapter, merged": {"method": "lora", "upload": "merged"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two public models, of which the server and the device have copies."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "gpt2"):
        pico(name, folder / name)
    return folder


@pytest.mark.parametrize("sends", SENDS)
def test_what_is_received_is_what_a_run_in_one_place_makes(sends: str, models: Path, tmp_path: Path) -> None:
    tree = recipe(tmp_path, models, SENDS[sends])
    parsed = Recipe.parse(tree)
    project = init(tmp_path / "there", parsed, tree, ["localhost"], 8000)
    fleet = pipeline.prepare(parsed, project.run, tiny.HERE)
    private = tiny.documents(tiny.PRIVATE["d-law"], "law")
    folder = project.device("north")
    write_jsonl(folder / "documents.jsonl", private)
    file = {"name": "north", "documents": "documents.jsonl", "ancestors": {"own": str(models / "gpt2")}}
    (folder / "device.yaml").write_text(yaml.safe_dump(file))
    device = Device(DeviceFile.load(folder / "device.yaml"))

    def answer(kind: str, message: Message) -> Any:
        if kind == messages.ORDER:
            return messages.reply(*device.carry_out(*messages.read_order(message)))
        if kind == messages.PIECE:
            return messages.reply(None, device.piece(*messages.read_ask(message)))
        return messages.reply(None, None)

    net = Net(answer, {}, [])
    collecting = collector(net, project, parsed, fleet, lambda line: None)
    collecting.devices_of = {b"north": "north"}
    for now in range(1000):
        if not collecting.step(now):
            break
    received = collecting.received()
    assert list(received.uploads) == ["north"], received.failures
    assert net.kinds.count(messages.PIECE) > 0

    order = collecting.orders["north"]
    corpus = on_one_machine(tmp_path / "corpus", fleet.corpus, private)
    [ancestor] = [one.ancestor for one in fleet.orders if one.device == "north"]
    here = train_device(
        "north", ancestor, "own", corpus, parsed.device, seed=order.seed, into=tiny.folder(tmp_path / "here"),
        runtime=tiny.HERE,
    )  # fmt: skip
    there = received.uploads["north"]
    assert (there.digest, there.bytes) == (here.digest, here.bytes)
    assert whole(there, ancestor, parsed, tmp_path / "of there") == whole(here, ancestor, parsed, tmp_path / "of here")

    intake = receive(
        [there], {}, embedding_bytes=parsed.device.embedding_bytes, ancestors={"own": ancestor},
        into=tiny.folder(tmp_path / "intake"), **sent_by(parsed.device),
    )  # fmt: skip
    files = sum(path.stat().st_size for path in there.sent.iterdir())
    assert intake.bytes == {"north": files + parsed.device.embedding_bytes}
    wire = received.wire["north"]
    assert wire == net.wire
    said = len((project.inbox / "uploads" / "north" / ".manifest.json").read_bytes())
    assert 0 < wire.up - files - said < 2000 * len(net.kinds)  # e_n is in the manifest


def recipe(root: Path, models: Path, device: dict[str, Any]) -> dict[str, Any]:
    """A federation of two devices that start from a given model, of whom one takes part."""
    (root / "server.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "name": "codecs",
        "data": {"source": {"kind": "files", "sources": [{"path": str(root / "server.jsonl")}]}},
        "models": {
            "base": {"path": str(models / "llama")},
            "ancestors": {"own": {"path": str(models / "gpt2")}},
        },
        "cluster": {"k": 2},
        "device": {"epochs": 3, "training": tiny.QUICK, **device},
        "evaluate": {"references": []},
        "federation": {"devices": ["north", "south"], "quorum": 2, "piece_bytes": 2**12},
    }


def on_one_machine(folder: Path, server: Corpus, private: list[Any]) -> Corpus:
    """The server's own text, and a device's beside it."""
    tiny.folder(folder)
    for path in (server.public, server.questions, server.heldout, server.test):
        (folder / path.name).write_bytes(path.read_bytes() if path.is_file() else b"")
    write_jsonl(folder / "private" / "north.jsonl", private)
    info = DeviceInfo(id="north", domains={}, documents=len(private), bytes=1)
    return Corpus(folder=folder, domains=(), devices=(info,)).sealed()


def whole(upload: Upload, ancestor: Checkpoint, recipe: Recipe, into: Path) -> dict[str, bytes]:
    """The weights of an upload, once it is unpacked."""
    if recipe.device.sends == "model":
        return tiny.weights(upload.model)
    made = {"lora": None, "codec": None} | sent_by(recipe.device)
    return tiny.weights(materialise(upload, ancestor, **made, into=tiny.folder(into)).model)
