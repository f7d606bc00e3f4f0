"""What `federation init` makes, and what a federation refuses before anything is sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from deepfusion import pipeline
from deepfusion.artifacts import file_digest
from deepfusion.cli import app
from deepfusion.config import Recipe
from deepfusion.errors import InputError
from deepfusion.federation.project import Project, node_keys
from deepfusion.phases.data import build_corpus, build_public
from pages import DOCS
from tiny import TREE

FEDERATION = {"federation": {"devices": ["north", "south"], "quorum": 2}}


def made(folder: Path, *options: str) -> str:
    done = CliRunner().invoke(app, ["federation", "init", str(folder), *options])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_folder_is_ready_for_plain_flower_commands(tmp_path: Path) -> None:
    said = made(tmp_path / "clinic", "--host", "fusion.example.org", "--port", "8123")
    assert "deepfusion-superlink --host 0.0.0.0 --port 8123" in said
    assert "flower-supernode --superlink fusion.example.org:8123" in said
    project = Project(tmp_path / "clinic")
    recipe = Recipe.load(project.recipe)
    assert recipe == Recipe.load("federation")
    assert recipe.federation is not None
    names = recipe.federation.devices
    assert sorted(node_keys(project.keys, names).values()) == sorted(names)
    for secret in (*project.root.glob("devices/*/node.key"), *project.root.glob("server/*.key")):
        assert secret.stat().st_mode & 0o077 == 0
    certificate = x509.load_pem_x509_certificate((project.root / "server" / "server.crt").read_bytes())
    authority = x509.load_pem_x509_certificate((project.root / "server" / "ca.crt").read_bytes())
    certificate.verify_directly_issued_by(authority)
    known = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert known.get_values_for_type(x509.DNSName) == ["fusion.example.org", "localhost"]
    assert sorted(path.name for path in project.device(names[0]).iterdir()) == ["ca.crt", "device.yaml", "node.key"]


def test_the_walk_through_of_the_docs_is_what_is_printed(tmp_path: Path) -> None:
    said = made(tmp_path / "clinic", "--set", "federation.devices=[north, south]", "--set", "federation.quorum=2")
    page = (DOCS / "federation.md").read_text(encoding="utf-8").replace(" \\\n       ", "")
    commands = [line.strip() for line in said.splitlines() if line.startswith("  ")]
    assert len(commands) == 10
    for command in commands:
        assert f"\n    {command.replace(str(tmp_path), '/fusion')}\n" in page, command


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("evaluate.references=[fedavg_dense]", "evaluate.references names fedavg_dense, which trains on devices'"),
        ("device.encoder=models", "device.encoder is "),
        ("models.ancestors.gpt2={path: nowhere}", "models.ancestors.gpt2.path: "),
        ("federation=null", "has no `federation` section"),
    ],
)
def test_what_the_server_would_refuse_makes_no_folder(tmp_path: Path, setting: str, words: str) -> None:
    done = CliRunner().invoke(app, ["federation", "init", str(tmp_path / "clinic"), "--set", setting])
    assert done.exit_code == 2
    assert f"deepfusion: error: {words}" in done.stderr or words in done.stderr
    assert not (tmp_path / "clinic").exists()


def test_private_rows_in_the_servers_files_make_no_folder(tmp_path: Path) -> None:
    splits = ("public", "test", "private")
    rows = [{"split": s, "domain": "law", "question": f"Who {s}?", "answer": "Ann."} for s in splits]
    (tmp_path / "server.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = json.dumps({"kind": "files", "sources": [{"path": str(tmp_path / "server.jsonl")}]})
    done = CliRunner().invoke(app, ["federation", "init", str(tmp_path / "x"), "--set", f"data.source={source}"])
    assert done.exit_code == 2
    assert "line 3 is private: in a federation private text is on the devices" in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    done = CliRunner().invoke(app, ["federation", "init", str(tmp_path)])
    assert done.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_as_json(tmp_path: Path) -> None:
    told = json.loads(made(tmp_path / "x", "--json", "--set", "federation={devices: [a, b], quorum: 2}"))
    assert told["devices"] == ["a", "b"]


def test_references_that_need_private_text_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"evaluate\.references names centralized, which trains on devices' private"):
        pipeline.prepare(Recipe.parse(TREE | FEDERATION), tmp_path)
    with pytest.raises(InputError, match="has no `federation` section"):
        pipeline.prepare(Recipe.parse(TREE), tmp_path)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"devices": ["a", "b"], "quorum": 3}, "quorum is 3, but there are only 2"),
        ({"devices": ["a", "a"], "quorum": 2}, "a name twice"),
        ({"devices": ["../a", "b"], "quorum": 2}, "cannot name a file"),
        ({"devices": ["a", "b"], "quorum": 1}, "cluster.k is 2 but federation.quorum is 1"),
    ],
)
def test_federations_that_cannot_be(section: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as told:
        Recipe.parse(TREE | {"federation": section})
    assert words in str(told.value)


def test_the_servers_text_is_that_of_a_run_on_one_machine(tmp_path: Path) -> None:
    data = Recipe.parse(TREE).data
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    here = build_corpus(data, seed=3, into=tmp_path / "here")
    there = build_public(data, devices=["north", "south"], seed=3, into=tmp_path / "there")
    for one, other in ((here.public, there.public), (here.questions, there.questions), (here.test, there.test)):
        assert file_digest(one) == file_digest(other)
    assert [device.id for device in there.devices] == ["north", "south"]
    assert not (tmp_path / "there" / "private").exists()
    assert not there.heldout.read_text()
