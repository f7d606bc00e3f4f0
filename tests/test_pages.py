"""What the documentation asks its readers to do works as it stands there."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

import pages
from deepfusion import cli
from deepfusion.config import Recipe
from deepfusion.summary import read_results

PAGES = ("data.md", "bring-your-own.md")


@pytest.mark.parametrize("page", PAGES)
def test_files_of_a_page_are_what_their_names_say(page: str) -> None:
    found = pages.files(page)
    assert {"mine.yaml"} < set(found)
    for name, content in found.items():
        if name.endswith(".yaml"):
            Recipe.parse(yaml.safe_load(content), name)
        elif name.endswith(".py"):
            ast.parse(content)
            assert max(map(len, content.splitlines())) <= 120


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_are_ours(page: str) -> None:
    known = get_command(cli.app).commands  # pyright: ignore[reportAttributeAccessIssue]
    called = [words for words in pages.commands(page) if words[0] == "deepfusion"]
    assert {"doctor", "run", "inspect"} <= {words[1] for words in called}
    for words in called:
        options = {option for parameter in known[words[1]].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options


def accuracies(run: Path) -> dict[str, float]:
    """System → share of private test questions whose right option it chooses."""
    rows = read_results(run)["rows"]
    wanted = {"domain": "all", "subset": "private_only", "metric": "choice_accuracy", "item": None}
    return {row["system"]: row["value"] for row in rows if wanted.items() <= row.items()}


@pytest.mark.slow
def test_the_example_of_your_own_text_teaches(tmp_path: Path) -> None:
    pages.save("data.md", tmp_path)
    for command in pages.commands("data.md"):
        said = pages.call(command, tmp_path)
        if command[1] == "doctor":
            assert "0 problems, 0 warnings: it can run" in said
    rows = (tmp_path / "port.jsonl").read_text().splitlines()
    assert len(rows) == 400
    shown = (pages.DOCS / "data.md").read_text()
    assert all(line in rows for line in shown.splitlines() if line.startswith('{"domain"'))
    found = accuracies(tmp_path / "runs" / "mine")
    assert found["base"] < 0.4
    assert found["deepfusion"] > max(0.8, found["pooled_text"] + 0.2)
    assert min(read_results(tmp_path / "runs" / "mine")["transfer"]["per_cluster"]) > 50


@pytest.mark.slow
def test_models_of_ones_own_become_one(tmp_path: Path) -> None:
    pages.save("data.md", tmp_path, "port.py")
    pages.save("bring-your-own.md", tmp_path)
    said = {" ".join(command): pages.call(command, tmp_path) for command in pages.commands("bring-your-own.md")}
    assert "0 problems, 0 warnings: it can run" in said["deepfusion doctor mine.yaml"]
    assert said["deepfusion plan mine.yaml"].count("take") == 3
    assert said["python serve.py"].startswith("Which line goes to Batek?\nThe ")
    found = accuracies(tmp_path / "runs" / "mine")
    assert found["base"] < 0.4 < found["pooled_text"] + 0.2 < found["deepfusion"]
    config = json.loads((tmp_path / "runs" / "mine" / "moe" / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"]) == ("mixtral", 2)
