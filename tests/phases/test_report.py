"""The three files of a report, and what the model card says."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from deepfusion.artifacts import Checkpoint
from deepfusion.checkpoints import as_checkpoint, open_config, save_model
from deepfusion.findings import Findings, Measured
from deepfusion.phases.report import model_card, parameter_split, report
from found import DEVICES, EVIL, SYSTEMS, findings
from pico import pico, pico_checkpoint, pico_tokenizer


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return pico_checkpoint("mixtral", tmp_path_factory.mktemp("moe"), experts=4, top_k=2)


def table(card: str, head: str) -> list[list[str]]:
    """The cells of the Markdown table whose head begins like this."""
    lines = card[card.index(f"| {head}") :].split("\n\n")[0].splitlines()
    return [[cell.strip(" *") for cell in line.strip("|").split(" | ")] for line in lines if not line.startswith("|--")]


def test_both_files_are_written_and_the_headline_is_the_same(tmp_path: Path) -> None:
    done = report(findings(tmp_path, DEVICES), into=tmp_path)
    tree = json.loads(done.results.read_text(encoding="utf-8"))
    assert done.headline == tree["headline"]
    assert done.page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_model_card(tmp_path: Path, moe: Checkpoint) -> None:
    path = model_card(findings(tmp_path, [EVIL, *DEVICES[1:]]), moe, into=tmp_path)
    assert path == tmp_path / "README.md"
    _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert {"moe", "deepfusion"} <= set(yaml.safe_load(front)["tags"])
    assert "word for word" in body
    assert 'AutoModelForCausalLM.from_pretrained("path/to/this/folder")' in body
    head, *systems = table(body, "system")
    assert head == ["system", "token accuracy", "log-perplexity", "choice accuracy", "server compute"]
    assert len(systems) == len(SYSTEMS)
    assert {row[0]: row[4] for row in systems}["centralised training"] == "1.99"
    assert all(len(row) == 5 for row in systems)


def test_the_parts_of_a_model_add_up(tmp_path: Path, moe: Checkpoint) -> None:
    """320 words, width 32, 2 layers, 4 experts of width 64, of which a token uses 2; head and embedding are one."""
    body = model_card(findings(tmp_path, DEVICES), moe, into=tmp_path).read_text(encoding="utf-8")
    _, *parts, total = table(body, "parameters")
    assert parts == [
        ["token embeddings, which are the output head too", "10,240", "10,240"],
        ["attention", "8,192", "8,192"],
        ["routers", "256", "256"],
        ["feed-forward layers: 4 experts each, of which 2 are used", "49,152", "24,576"],
        ["norms", "160", "160"],
    ]
    sums = [sum(int(part[column].replace(",", "")) for part in parts) for column in (1, 2)]
    assert total == ["all", *(f"{number:,}" for number in sums)]
    assert sums[0] == moe.parameters
    assert sums[1] - 160 == moe.active_parameters
    assert f"those that a token uses: {moe.active_parameters:,} parameters" in body


def test_a_look_up_uses_one_row(tmp_path: Path) -> None:
    config = open_config(pico("llama", tmp_path / "tied"))
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    save_model(AutoModelForCausalLM.from_config(config), pico_tokenizer(), tmp_path / "untied")
    parts = parameter_split(tmp_path / "untied")
    assert parts[0] == ("token embeddings, of which one row is used", 10_240, 32)
    assert parts[-1] == ("output head", 10_240, 10_240)
    assert sum(part.parameters for part in parts) == as_checkpoint(tmp_path / "untied").parameters


def test_one_is_one_in_the_card(tmp_path: Path, moe: Checkpoint) -> None:
    many = findings(tmp_path, DEVICES)
    assert many.clusters is not None
    assert many.transfer is not None
    few = findings(
        tmp_path,
        DEVICES,
        uploads=many.uploads[:1],
        proxies=many.proxies[:1],
        clusters=many.clusters.model_copy(update={"devices": ("d00",), "k": 1}),
        transfer=many.transfer.model_copy(update={"per_cluster": (1,)}),
    )
    body = model_card(few, moe, into=tmp_path).read_text(encoding="utf-8")
    assert "1 device trained a small model of its own (gpt2)" in body
    assert "- 1 device in 1 cluster by" in body
    assert "- 1 proxy: " in body
    assert "- 1 document of the text that it learned from was written" in body


def test_a_system_without_a_question_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty has no scored question"):
        report(Findings("empty", 0, {}, "", [Measured("empty", [])]), into=tmp_path)
