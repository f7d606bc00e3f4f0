"""The last step: what it gathers, and what it keeps to itself."""

import random
from pathlib import Path
from typing import Any

import pytest

from deepfusion.artifacts import Checkpoint, Rejection, Scores, Work
from deepfusion.conclusion import _compute, conclude, portable, without_folders
from deepfusion.config import Recipe
from deepfusion.data.documents import write_jsonl
from found import DEVICES, findings, scored
from pico import pico_checkpoint


def recipe(folder: Path) -> Recipe:
    """Files and models that lie in a folder of this machine."""
    sources: list[dict[str, Any]] = [
        {"path": str(folder / "mine.jsonl")},
        {"dataset": "csv", "arguments": {"data_files": {"train": [str(folder / "more.csv")]}, "split": "train"}},
    ]
    return Recipe.parse(
        {
            "name": "mine",
            "data": {"source": {"kind": "files", "sources": sources, "prompt": "/{question}/"}},
            "models": {"base": {"path": str(folder / "base")}, "ancestors": {"a": {"make": {"type": "gpt2"}}}},
            "device": {"encoder": str(folder / "minilm")},
        }
    )


def test_a_recipe_keeps_the_names_of_files_alone(tmp_path: Path) -> None:
    tree = portable(recipe(tmp_path).model_dump(mode="json"))
    first, second = tree["data"]["source"]["sources"]
    assert first["path"] == "mine.jsonl"
    assert second["arguments"] == {"data_files": {"train": ["more.csv"]}, "split": "train"}
    assert tree["data"]["source"]["prompt"] == "/{question}/"
    assert (tree["models"]["base"]["path"], tree["device"]["encoder"]) == ("base", "minilm")
    assert str(tmp_path) not in str(tree)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("no such file: '/tmp/run/x.json'; see /var/log/x.log", "no such file: 'x.json'; see x.log"),
        ("in runs/demo/y, and/or 1/2 of https://a.org/b/c", "in runs/demo/y, and/or 1/2 of https://a.org/b/c"),
    ],
)
def test_sentences_keep_the_names_of_files_alone(text: str, kept: str) -> None:
    assert without_folders(text) == kept


def test_no_file_of_the_report_names_a_folder_of_this_machine(tmp_path: Path) -> None:
    found, generator = findings(tmp_path, DEVICES), random.Random(0)
    assert found.corpus is not None
    assert found.intake is not None
    assert found.clusters is not None
    assert found.transfer is not None
    moe = pico_checkpoint("mixtral", tmp_path / "moe").model_copy(update={"work": Work(tokens=1, forward=1.0)})
    scores: list[Scores] = []
    for system in ("base", "deepfusion"):
        (tmp_path / system).mkdir()
        write_jsonl(tmp_path / system / "rows.jsonl", scored(0.5, generator))
        scores.append(Scores(folder=tmp_path / system, system=system))
    reason = f"device d99: OSError: {tmp_path}/moe/config.json is missing"
    into = tmp_path / "report"
    into.mkdir()
    students: dict[str, Checkpoint] = {"joint_student": moe, "merged": moe, "deepfusion": moe}
    done = conclude(
        recipe(tmp_path),
        found.corpus,
        found.uploads,
        found.intake.model_copy(update={"rejected": (Rejection(device="d99", reason=reason),)}),
        found.clusters,
        found.proxies,
        found.transfer,
        [],
        students,
        [moe],
        scores,
        [],
        [f"read {tmp_path}/mine.jsonl"],
        into=into,
    )
    assert done.moe_digest == moe.digest
    text = {path.name: path.read_text(encoding="utf-8") for path in into.iterdir()}
    assert {"results.json", "report.html", "README.md"} <= set(text)
    assert [name for name, content in text.items() if str(tmp_path) in content] == []
    assert "mine.jsonl" in text["report.html"]
    assert "device d99: OSError: config.json is missing" in text["results.json"]


def test_shifting_is_charged_to_those_who_learn_from_it(tmp_path: Path) -> None:
    found = findings(tmp_path, DEVICES)
    assert found.transfer is not None
    student = pico_checkpoint("llama", tmp_path / "base").model_copy(update={"work": Work(tokens=1, forward=1.0)})
    names = ["joint_student", "merged", "deepfusion", "pooled_text", "dense_kd"]
    students: dict[str, Checkpoint] = dict.fromkeys(names, student)
    shifted = found.transfer.model_copy(update={"work": Work(tokens=5, forward=7.0)})
    parts = {
        given is not None: _compute(recipe(tmp_path), found.transfer, given, [], students, [], {})
        for given in (None, shifted)
    }
    added = [part for part in parts[True] if part not in parts[False]]
    assert [(part.system, part.part, part.work) for part in added] == [
        ("deepfusion", "shift", shifted.work), ("dense_kd", "shift", shifted.work),
    ]  # fmt: skip
    assert [part for part in parts[True] if part not in added] == parts[False]
