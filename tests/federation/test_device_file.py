"""What a device reads of its own machine, and what it tells of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from deepfusion.checkpoints import as_checkpoint
from deepfusion.cli import app
from deepfusion.config import DevicePhase, Recipe
from deepfusion.errors import InputError
from deepfusion.federation.device import Device, DeviceFile, without_paths
from deepfusion.federation.messages import Order
from deepfusion.federation.project import Project, init, node_keys
from pico import pico
from tiny import TREE

ROW = {"question": "Who hears appeals?", "answer": "Judge Ann."}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    tree = TREE | {"federation": {"devices": ["north", "south"], "quorum": 2}, "evaluate": {"references": []}}
    return init(tmp_path / "there", Recipe.parse(tree), tree, ["localhost"], 8000)


@pytest.fixture
def file(project: Project) -> Path:
    """The device file that `init` made for north."""
    return project.device("north") / "device.yaml"


def rows(file: Path, *changed: dict[str, Any]) -> None:
    (file.parent / "private.jsonl").write_text("".join(json.dumps(ROW | one) + "\n" for one in changed))


def order() -> Order:
    return Order(
        run="r", device="north", seed=0, ancestor="tiny", lineage="l", made=None, made_seed=0, phase=DevicePhase(),
        piece_bytes=4096, texts={},
    )  # fmt: skip


def test_rows_keep_their_domain_and_split_and_need_neither(file: Path) -> None:
    rows(file, {"id": "a", "domain": "law"}, {"id": "b"}, {"id": "c", "split": "test"}, {"id": "d", "split": "private"})
    found = {document.id: document.domain for document in DeviceFile.load(file).private()}
    assert found == {"a": "law", "b": "all", "d": "all"}


def test_a_domain_of_the_source_stands_for_all_rows(file: Path) -> None:
    text = [{"path": "private.jsonl", "domain": "food"}]
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"text": text}))
    rows(file, {"id": "a", "domain": "law"}, {"id": "b"})
    assert {document.domain for document in DeviceFile.load(file).private()} == {"food"}


def test_a_device_is_checked_where_it_is(file: Path, tmp_path: Path) -> None:
    copy = pico("gpt2", tmp_path / "copy")
    file.write_text(file.read_text() + f"ancestors: {{tiny: {copy}}}\n")
    rows(file, {"id": "a", "domain": "law"}, {"id": "b"}, {"id": "c", "split": "test"})
    size = len(DeviceFile.load(file).private()[0].text.encode())
    lineage = as_checkpoint(copy).lineage
    told = CliRunner().invoke(app, ["federation", "check", str(file), "--json"])
    assert json.loads(told.stdout) == {
        "name": "north", "rows": 2, "bytes": 2 * size, "domains": {"law": 1, "all": 1}, "ancestors": {"tiny": lineage},
    }  # fmt: skip
    said = CliRunner().invoke(app, ["federation", "check", str(file)]).output
    assert said.splitlines() == [
        f"north has its key and 2 rows of private text ({2 * size} bytes; law 1, all 1).",
        f"tiny is {lineage}: the server's must be the same.",
    ]


def test_a_process_that_sends_a_piece_loads_no_library_that_trains() -> None:
    """Each message is carried out by a process of its own, and these take seconds to load."""
    code = "import sys, deepfusion.federation.device; print(*{'torch', 'transformers', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def no_key(file: Path) -> None:
    (file.parent / "node.key").unlink()


def no_copy(file: Path) -> None:
    file.write_text(file.read_text() + "ancestors: {tiny: /nowhere}\n")


def an_empty_copy(file: Path) -> None:
    (file.parent / "copy").mkdir()
    file.write_text(file.read_text() + "ancestors: {tiny: copy}\n")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (no_key, "node.key"),
        (lambda file: (file.parent / "private.jsonl").unlink(), "private.jsonl does not exist"),
        (lambda file: (file.parent / "private.jsonl").write_text('{"question": "Who?"}\n'), "line 1 has no 'answer'"),
        (no_copy, "ancestors.tiny: /nowhere is not a folder"),
        (an_empty_copy, "has no config.json"),
    ],
)
def test_what_would_stop_a_device_is_told_before_it_connects(
    harm: Callable[[Path], object], words: str, file: Path
) -> None:
    rows(file, {"id": "a"})
    harm(file)
    told = CliRunner().invoke(app, ["federation", "check", str(file)])
    assert told.exit_code == 2
    assert words in " ".join(told.output.split())


def test_text_without_private_rows_is_told(file: Path) -> None:
    rows(file, {"id": "a", "split": "public"})
    with pytest.raises(InputError, match=r"no row of .*private.jsonl is private: leave `split` out of the rows"):
        DeviceFile.load(file).private()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: north\nthread: 1\n", "device file FILE of device north: unknown key 'thread': did you mean 'threads'?"),
        ("name: north\nthreads: 0\ndocuments: a\n", "device file FILE of device north: threads: must be an integer"),
        ("name: north\n", "device file FILE of device north: give exactly one of `text` and `documents`"),
        ("documents: a\n", "device file FILE: name: is missing"),
        ("- north\n", "FILE: a device file must be a mapping"),
        (None, "device file FILE does not exist"),
    ],
)
def test_faults_of_a_device_file_name_it_and_the_device(file: Path, text: str | None, words: str) -> None:
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(InputError) as told:
        DeviceFile.load(file)
    assert str(told.value).startswith(words.replace("FILE", str(file)))
    assert "recipe" not in str(told.value)


@pytest.mark.parametrize("content", [None, b"", b"no key\n", b"-----BEGIN OPENSSH PRIVATE KEY-----\nxx\n"])
def test_a_private_key_that_is_none_is_told_before_training(file: Path, content: bytes | None) -> None:
    key = file.parent / "node.key"
    key.unlink() if content is None else key.write_bytes(content)
    rows(file, {"id": "a"})
    wrong = "does not exist" if content is None else "is not an elliptic-curve key of OpenSSH without a password"
    with pytest.raises(InputError, match=rf"the device's private key {key} {wrong}"):
        Device(DeviceFile.load(file)).carry_out(order(), {})
    assert not (file.parent / "store").exists()


@pytest.mark.parametrize("content", [None, b"", b"no key\n", b"ecdsa-sha2-nistp384 AAAA north\n"])
def test_a_public_key_that_is_none_is_told(project: Project, content: bytes | None) -> None:
    key = project.keys / "south.pub"
    key.unlink() if content is None else key.write_bytes(content)
    wrong = "does not exist" if content is None else "is not an elliptic-curve key of OpenSSH"
    with pytest.raises(InputError, match=rf"the device's public key {key} {wrong}"):
        node_keys(project.keys, ["north", "south"])


def test_a_key_of_another_kind_or_a_folder_is_told(project: Project, file: Path) -> None:
    key = file.parent / "node.key"
    key.unlink()
    key.mkdir()
    with pytest.raises(InputError, match=r"the device's private key .*node\.key is a folder, not a file"):
        Device(DeviceFile.load(file)).carry_out(order(), {})


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/people/ann/my text/a.jsonl does not exist", "a.jsonl does not exist"),
        ("'/people/ann/a.jsonl', line 3 has no 'answer'", "'a.jsonl', line 3 has no 'answer'"),
        ("ancestors.tiny: /big/models/tiny is not a folder", "ancestors.tiny: tiny is not a folder"),
        ("C:\\Users\\ann\\a.jsonl:3: no text", "a.jsonl:3: no text"),
        ("/people/ann/my text is empty", "… is empty"),
        ("/people/ann/my text/store/steps/device: no space left", "device: no space left"),
        ("loss is NaN after 3 steps", "loss is NaN after 3 steps"),
    ],
)
def test_no_folder_of_a_device_is_told_to_the_server(line: str, told: str) -> None:
    assert without_paths(line, [Path("/people/ann/my text"), Path("/people/ann"), Path("/")]) == told
