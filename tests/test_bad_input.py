"""Each mistake ends in exit code 2 and one line that names it, and leaves nothing that a later run could trip over."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from deepfusion import checkpoints, cli
from deepfusion.weights import Part, tensors, write
from pico import pico
from tiny import TREE

ROWS = [
    {
        "id": f"{split}-{n}",
        "domain": "law" if n % 2 else "food",
        "split": split,
        "question": f"Who {n}?",
        "answer": "Ann.",
    }
    for split in ("private", "public", "test")
    for n in range(4)
]
Fail = Callable[..., str]


@pytest.fixture
def fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Run a recipe that cannot be run; gives the one line that says why."""
    monkeypatch.setenv(cli.DEBUG, "0")
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str, tree: dict[str, Any] = TREE, recipe: str = "tiny.yaml") -> str:
        if recipe == "tiny.yaml":
            Path(recipe).write_text(yaml.safe_dump(tree))
        settings = [part for override in overrides for part in ("--set", override)]
        command = ["run", recipe, *settings, "--quiet", "--workers", "0", "--out", "out"]
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        [line] = result.stderr.splitlines()
        assert line.startswith("deepfusion: error: ")
        return line.removeprefix("deepfusion: error: ")

    return run


def left() -> list[str]:
    """The phases of all step folders, and those that are half-written by name."""
    return sorted(
        {path.name if path.suffix == ".partial" else path.parent.name for path in Path("out").glob("steps/*/*")}
    )


def rows(*changed: dict[str, Any], name: str = "rows.jsonl") -> dict[str, Any]:
    """A recipe whose text is `ROWS`, of which some are changed."""
    by_id = {row["id"]: row for row in ROWS} | {row["id"]: row for row in changed}
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in by_id.values()))
    return files({"path": name})


def files(*sources: dict[str, Any]) -> dict[str, Any]:
    source = {"kind": "files", "sources": list(sources), "heldout_share": 0.0}
    made = {"hidden": 16, "ffn": 16, "layers": 1, "heads": 2, "vocab": 300, "context": 64, "tokens": 0}
    models = {"base": {"make": made | {"type": "llama"}}, "ancestors": {"a": {"make": made | {"type": "gpt2"}}}}
    return TREE | {"data": {"source": source, "partition": {"devices": 2}}, "models": models}


# ── the recipe ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("clutser.k=2", "tiny.yaml: unknown key 'clutser'"),
        ("cluster.kk=2", "tiny.yaml: unknown key 'cluster.kk'"),
        ("device.training.lr=1", "tiny.yaml: unknown key 'device.training.lr'"),
        ("cluster.k=9", "cluster.k is 9 but there are only 4 devices (data.partition.devices): lower k or add devices"),
        ("cluster.k=two", "tiny.yaml: cluster.k: must be an integer ≥ 1, not 'two'"),
        ("distill.shares.joint=0.5", "joint + branch + tune must be 1"),
        ("models.base.make.type=mamba", "tiny.yaml: models.base.make.type: must be gpt2, llama, mistral, "),
        ("models.base.make.hidden=18", "tiny.yaml: models.base.make: hidden 18 and 2 heads do not fit: "),
        ("cluster", "--set takes key=value, not 'cluster'"),
    ],
)
def test_a_wrong_setting_is_named(override: str, message: str, fail: Fail) -> None:
    assert message in fail(override)
    assert not Path("out").exists()


def test_a_missing_recipe_is_named(fail: Fail) -> None:
    assert fail(recipe="none.yaml") == "recipe none.yaml does not exist"
    assert fail(recipe="none").startswith("recipe 'none' is neither a file nor an embedded recipe (embedded: ")
    Path("broken.yaml").write_text("a: [")
    assert fail(recipe="broken.yaml").startswith("broken.yaml, line 1, column 5 is not YAML: ")


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_folder_that_cannot_be_one_is_named(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for out in ("file", "file/below"):
        result = CliRunner().invoke(cli.app, [command, "smoke", "--out", out])
        assert result.exit_code == 2
        assert result.output == (
            f"deepfusion: error: --out {out} cannot be a folder, for file is a file: give another one\n"
        )


# ── the text ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_file_is_named(fail: Fail) -> None:
    missing = Path("none.jsonl").resolve()
    assert fail(tree=rows() | {"data": files({"path": "rows.jsonl"}, {"path": "none.jsonl"})["data"]}) == (
        f"data.source.sources.1.path: {missing} does not exist: set it, as with --set data.source.sources.1.path=FILE"
    )
    assert not Path("out").exists()


@pytest.mark.parametrize("command", ["run", "plan"])
def test_what_an_embedded_recipe_lacks_is_named_at_once(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the current directory, and not beside the installed package."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = CliRunner().invoke(cli.app, [command, "medical_finance"])
    missing = tmp_path / "shared" / "data" / "medical_open.jsonl"
    assert (result.exit_code, result.output) == (
        2,
        f"deepfusion: error: data.source.sources.0.path: {missing} does not exist: "
        "set it, as with --set data.source.sources.0.path=FILE\n",
    )
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty.jsonl is empty"),
        (b"\n \n", "empty.jsonl is empty"),
        (b'{"split": "other"}\n', "empty.jsonl, line 1 has split 'other': it must be one of private, public, test"),
        (b'{"id": "\xff"}\n', "empty.jsonl, line 1 is not UTF-8 (byte 8)"),
        (b'{"id": "a", "domain": "law", "split": "test", "question": "?"}\n', "empty.jsonl, line 1 has no 'answer'"),
        (b"no json\n", "empty.jsonl, line 1 is not JSON"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(content: bytes, message: str, fail: Fail) -> None:
    tree = rows()
    tree["data"]["source"]["sources"].append({"path": "empty.jsonl"})
    Path("empty.jsonl").write_bytes(content)
    assert message in fail(tree=tree)
    assert left() == []


def test_a_domain_that_no_row_has_is_named(fail: Fail) -> None:
    rows()
    message = fail(tree=files({"path": "rows.jsonl", "where": {"domain": "medicine"}}))
    assert "rows.jsonl: none of 12 rows is kept: check `where` and max_answer_bytes" in message
    assert left() == []


def test_an_unknown_domain_is_named(fail: Fail) -> None:
    rows()
    tree = files({"path": "rows.jsonl"})
    tree["data"]["source"]["domains"] = ["medicine"]
    message = fail(tree=tree)
    assert "data.source.domains names 'medicine', but the text of" in message
    assert left() == []


@pytest.mark.parametrize("split", ["private", "public"])
def test_an_answer_longer_than_the_context_is_named(split: str, fail: Fail) -> None:
    long = ROWS[0] | {"id": f"{split}-long", "split": split, "answer": "Ann " * 99}
    message = fail(tree=rows(long))
    assert f"the answer of document '{split}-long' takes " in message
    assert "tokens and the context holds 62: raise the phase's training.context" in message
    assert not {"device", "device.partial"} & set(left())
    assert not [name for name in left() if name.endswith(".partial")]


def test_more_clusters_than_named_devices(fail: Fail) -> None:
    """Which the recipe alone cannot tell."""
    tree = rows(*({**row, "device": "a"} for row in ROWS if row["split"] == "private"))
    tree["data"]["partition"] = {"mode": "given"}
    assert "cluster.k is 2 but there are only 1 accepted devices" in fail("device.epochs=1", tree=tree)
    assert {"cluster", "cluster.partial"} & set(left()) == set()


# ── models ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def harmed(harm: str, folder: Path) -> str:
    """A checkpoint with something wrong; gives what must be named."""
    pico("llama" if "base" in folder.name else "gpt2", folder, hidden=16, layers=1, heads=2)
    held = {name: tensor.clone() for name, tensor in tensors(folder)}
    name = next(name for name in held if "mlp" in name and name.endswith("weight"))
    if harm == "architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
        return "mamba"
    if harm == "no weights":
        (folder / "model.safetensors").unlink()
        return folder.name
    if harm == "missing tensor":
        del held[name]
    elif harm == "other shape":
        held[name] = held[name][:1].clone()
    else:
        held[name].view(-1)[0] = torch.nan
    write(folder, [Part.of(*item) for item in held.items()])
    return name


@pytest.mark.parametrize("harm", ["architecture", "missing tensor", "NaN", "other shape", "no weights"])
@pytest.mark.parametrize("where", ["models.base", "models.ancestors.gpt2"])
def test_a_broken_checkpoint_is_named(harm: str, where: str, fail: Fail, tmp_path: Path) -> None:
    folder = tmp_path / where.replace(".", "-")
    culprit = harmed(harm, folder)
    message = fail(f"{where}={{path: {folder}}}")
    assert culprit in message
    assert str(folder) in message
    assert not {"take", "device"} & set(left())
    assert not [name for name in left() if name.endswith(".partial")]


def test_a_base_that_no_moe_is_made_of_is_named(fail: Fail, tmp_path: Path) -> None:
    folder = pico("gpt2", tmp_path / "gpt2")
    message = fail(f"models.base={{path: {folder}}}")
    assert "models.base: no MoE is assembled from gpt2 models: choose a base of type llama, mistral, qwen2" in message
    assert "device" not in left()


def test_a_missing_checkpoint_is_named(fail: Fail) -> None:
    assert fail("models.base={path: none}") == (
        f"models.base.path: {Path('none').resolve()} does not exist: set it, as with --set models.base.path=FOLDER"
    )


def test_a_broken_encoder_is_named_once(fail: Fail) -> None:
    """And not once for each device that cannot use it."""
    Path("encoder").mkdir()
    message = fail("device.encoder=encoder")
    assert message == (
        f"device device-00: encoder {Path('encoder').resolve()} is not a checkpoint folder: it has no config.json"
    )
    assert not {"device", "upload"} & set(left())


def test_an_accelerator_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["run", "smoke", "--workers", "0", "--accelerator", "cuda", "--quiet"])
    words = "data: there is no cuda accelerator on this machine: leave --accelerator out"
    assert (result.exit_code, result.output) == (2, f"deepfusion: error: {words}\n")


def test_types_of_several_ancestors_are_named(fail: Fail) -> None:
    gpt2 = json.dumps(TREE["models"]["ancestors"]["gpt2"])
    changes = (
        "cluster.mode=by_type",
        "cluster.k=1",
        "assemble.top_k=1",
        f"models.ancestors.neox={gpt2}",
        "device.epochs=1",
    )
    message = fail(*changes)
    assert "cluster.k is 1 but the devices have 2 lineages (gpt2-h16-l1-" in message
    assert "set cluster.mode: by_domain" in message
    assert not {"cluster", "proxy"} & set(left())


# ── the disk ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_full_disk_is_named(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_model: object, _tokenizer: object, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "model.safetensors"))

    monkeypatch.setattr(checkpoints, "save_model", refuse)
    message = fail()
    assert message.startswith("disk full while writing make ")
    assert "model.safetensors" in message
    assert left() == ["data"]


# ── as people call it ─────────────────────────────────────────────────────────────────────────────────────────────────


def called(arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deepfusion.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_worker_says_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(rows({**ROWS[0], "options": ["only one"]})))
    done = called(["run", "tiny.yaml", "--quiet", "--workers", "1"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("deepfusion: error: data: ")
    assert line.endswith("rows.jsonl, line 1: options must be a list of two or more")
    assert list(tmp_path.glob("runs/tiny/steps/*/*")) == []


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    """Also where steps are shown as they come and go."""
    (tmp_path / "empty.jsonl").touch()
    source = "data.source={kind: files, sources: [{path: empty.jsonl}]}"
    done = called(["run", "smoke", "--set", source, "--workers", "0"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "start   data",
        f"deepfusion: error: data: {tmp_path / 'empty.jsonl'} is empty",
    ]


def test_a_mistake_costs_no_time(tmp_path: Path) -> None:
    """Nothing heavy is imported to find it."""
    done = called(["run", "none.yaml"], tmp_path)
    assert (done.returncode, done.stderr) == (2, "deepfusion: error: recipe none.yaml does not exist\n")
