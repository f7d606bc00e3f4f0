"""SuperLink and six SuperNodes on this machine: who may send, who is left out and why, and what is made of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

import tiny
from deepfusion import pipeline
from deepfusion.config import Recipe, Runtime
from deepfusion.federation import project as projects
from deepfusion.federation import server
from deepfusion.federation.device import Device, DeviceFile
from deepfusion.federation.project import Project
from federation.fleet import Fleet, free_port, until

pytestmark = pytest.mark.federation
DEVICES = [f"device-{number:02d}" for number in range(6)]
GOOD, BROKEN, MISSHAPEN, STRANGER = DEVICES[:3], DEVICES[3], DEVICES[4], DEVICES[5]


def tree() -> dict[str, Any]:
    """Six devices of three architectures."""
    made = deepcopy(tiny.TREE)
    made["data"]["source"]["private_facts"] = 6
    made["data"]["partition"] = {"devices": len(DEVICES), "mode": "uneven"}
    made["models"]["ancestors"]["opt"] = {"make": tiny.SHAPE | {"type": "opt", "vocab": 300, "training": tiny.QUICK}}
    made["evaluate"] = {"references": []}
    made["federation"] = {
        "devices": DEVICES, "quorum": len(GOOD), "deadline_s": 900, "grace_s": 45, "patience_s": 25,
        "piece_bytes": 2**15,
    }  # fmt: skip
    return made


def weights(moe: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in moe.glob("*.safetensors")}


def tamper(device: str, project: Project, recipe: Recipe) -> None:
    """Let a device finish its training here, and spoil what it has made without changing its size."""
    collecting = server.collector(None, project, recipe, pipeline.prepare(recipe, project.run), print)  # pyright: ignore
    texts = dict(collecting.texts)
    upload = Device(DeviceFile.load(project.device(device) / "device.yaml")).trained(collecting.orders[device], texts)
    file = upload.model / "model.safetensors"
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    if device == BROKEN:
        content[-4:] = np.float32("nan").tobytes()
    else:
        header = json.loads(content[8 : 8 + length])
        name = next(n for n, one in header.items() if len(one.get("shape", ())) == 2 and len(set(one["shape"])) == 2)
        header[name]["shape"].reverse()
        content[8 : 8 + length] = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    file.write_bytes(content)


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def test_a_fleet_with_all_that_can_go_wrong(tmp_path: Path) -> None:
    recipe = Recipe.parse(tree())
    alone = recipe.model_copy(update={"federation": None})
    pipeline.run(alone, tmp_path / "here", Runtime(workers=2), only=GOOD)
    [corpus] = (tmp_path / "here" / "steps" / "data").iterdir()

    port = free_port()
    project = projects.init(tmp_path / "there", recipe, tree(), ["127.0.0.1"], port)
    for device in DEVICES:
        folder = project.device(device)
        shutil.copy(corpus / "private" / f"{device}.jsonl", folder / "documents.jsonl")
        (folder / "device.yaml").write_text(yaml.safe_dump({"name": device, "documents": "documents.jsonl"}))
    for device in (BROKEN, MISSHAPEN):
        tamper(device, project, recipe)
    foreign = ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    (project.device(STRANGER) / "node.key").write_bytes(foreign)

    home = {"FLWR_HOME": str(project.root)}
    with Fleet(tmp_path / "fleet") as fleet:

        def serve() -> None:
            fleet.start("superlink", projects.superlink(port), project.root, **home)
            until(lambda: listens(port), "the SuperLink listens")

        def join(device: str) -> None:
            command = [*projects.supernode("127.0.0.1", port), "--port", str(free_port())]
            fleet.start(device, command, project.device(device))

        def sent(device: str) -> int:
            return sum(p.stat().st_size for p in (project.inbox / "incoming" / device).rglob("model/*"))

        def accepted(device: str) -> bool:
            return (project.inbox / "uploads" / device).is_dir()

        serve()
        for device in DEVICES[:-1]:
            fleet.call(["flwr", "supernode", "register", f"keys/{device}.pub", "federation"], project.root, **home)
        fleet.call(["flwr", "run", "app", "federation"], project.root, **home)
        for device in DEVICES:
            join(device)

        until(lambda: sent(GOOD[0]), "the first device sends")
        fleet.kill(GOOD[0])  # in the middle of its upload
        assert not accepted(GOOD[0])
        until(lambda: any(map(accepted, GOOD)), "an upload is accepted")
        fleet.kill("superlink")
        serve()
        fleet.call(["flwr", "run", "app", "federation"], project.root, **home)
        join(GOOD[0])

        def back() -> bool:
            """A node that was killed is refused until the SuperLink has missed it, a minute after it was last there."""
            if fleet.ended(GOOD[0]):
                join(GOOD[0])
            return accepted(GOOD[0])

        until(back, "the first device is back")
        assert fleet.ended(STRANGER)
        until(lambda: (project.run / "results.json").is_file(), "the run ends", 420)

        until(lambda: all((project.device(device) / "store" / "verdict.json").is_file() for device in GOOD), "all know")
        trained = [project.device(device) / "store" / "steps" / "device" for device in GOOD]
        assert [len(list(folder.iterdir())) for folder in trained] == [1, 1, 1]
        assert "Failed to activate SuperNode" in fleet.log(STRANGER)

    results = json.loads((project.run / "results.json").read_text())
    rejected = {one["device"]: one["reason"] for one in results["rejected"]}
    assert set(rejected) == {BROKEN, MISSHAPEN, STRANGER}
    assert "NaN or infinity" in rejected[BROKEN]
    assert "shape" in rejected[MISSHAPEN]
    assert "sent nothing" in rejected[STRANGER]
    assert [reason.count(device) for device, reason in rejected.items()] == [1, 1, 1]
    assert str(tmp_path) not in json.dumps(results)
    counted, wire = results["bytes"]["per_device"], results["bytes"]["wire"]["per_device"]
    assert all(counted[device]["up"] < wire[device]["up"] < 2 * counted[device]["up"] for device in GOOD)
    assert wire[BROKEN]["up"] > wire[BROKEN]["down"] > 0
    assert wire[STRANGER] == {"up": 0, "down": 0}
    told = json.loads((project.device(BROKEN) / "store" / "verdict.json").read_text())
    assert told["state"] == "rejected"
    assert "NaN" in told["reason"]
    assert weights(project.run / "moe") == weights(tmp_path / "here" / "moe") != {}
