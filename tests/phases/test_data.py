import json
from pathlib import Path
from typing import Any

import pytest

from deepfusion.artifacts import Corpus
from deepfusion.config import Data
from deepfusion.data.documents import Document, Question, read_jsonl
from deepfusion.phases.data import build_corpus

SMALL = {"kind": "synthetic", "domains": 2, "private_facts": 8, "public_facts": 4, "values": 4, "filler_documents": 6}


def build(into: Path, source: dict[str, Any], seed: int = 0, **partition: Any) -> Corpus:
    into.mkdir(exist_ok=True)
    config = Data.model_validate({"source": source, "partition": {"devices": 4, **partition}})
    return build_corpus(config, seed=seed, into=into)


def documents(path: Path) -> list[Document]:
    return list(read_jsonl(path, Document))


def texts(path: Path) -> set[str]:
    return {document.text for document in documents(path)}


def file_source(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"kind": "files", "sources": [{"path": str(path), **fields}], "heldout_share": 0.0}


def row(name: str, split: str, group: str | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "id": name,
        "domain": "law",
        "question": f"{name}?",
        "answer": f"{name}!",
        "split": split,
        "group": group,
    } | fields


def test_synthetic_corpus(tmp_path: Path) -> None:
    corpus = build(tmp_path / "c", SMALL, holders=2)
    assert corpus.domains == ("medicine", "finance")
    assert [device.id for device in corpus.devices] == ["device-00", "device-01", "device-02", "device-03"]
    assert sum(device.documents for device in corpus.devices) == 16 * 2 * 10 == corpus.counts["private_held"]
    for device in corpus.devices:
        held = documents(corpus.private(device.id))
        assert device.documents == len(held) == sum(device.domains.values())
        assert device.bytes == sum(len(document.text.encode()) for document in held)
        assert all(document.private for document in held)
    assert len(documents(corpus.public)) == 2 * (4 * 10 + 6) == corpus.counts["public"]
    assert all(document.answer == "" for document in documents(corpus.questions))
    assert len(list(read_jsonl(corpus.test, Question))) == 24
    assert Corpus.load(corpus.folder) == corpus


def test_facts_file_names_the_holders(tmp_path: Path) -> None:
    corpus = build(tmp_path / "c", SMALL, holders=3)
    facts = json.loads((corpus.folder / "facts.json").read_text(encoding="utf-8"))
    assert sorted(facts[0]) == ["domain", "entity", "holders", "id", "public", "relation", "value"]
    held = {device.id: {d.group for d in documents(corpus.private(device.id))} for device in corpus.devices}
    for fact in facts:
        assert len(fact["holders"]) == (0 if fact["public"] else 3)
        assert fact["holders"] == [device for device in held if fact["id"] in held[device]]


def test_holders_tell_a_fact_in_their_own_order(tmp_path: Path) -> None:
    corpus = build(tmp_path / "c", SMALL, devices=2, holders=2)
    first, second = (documents(corpus.private(device.id)) for device in corpus.devices)
    assert [document.group for document in first] == [document.group for document in second]
    assert [document.id for document in first] != [document.id for document in second]


def test_no_test_question_stands_in_any_text(tmp_path: Path) -> None:
    corpus = build(tmp_path / "c", SMALL)
    paths = [corpus.public, corpus.questions, corpus.heldout, *(corpus.private(device.id) for device in corpus.devices)]
    prompts = {document.prompt for path in paths for document in documents(path)}
    assert not prompts & {question.prompt for question in read_jsonl(corpus.test, Question)}


def test_bytes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    first, again, other = (build(tmp_path / name, SMALL, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first.digest == again.digest != other.digest


def test_files_go_to_holders_in_whole_groups(tmp_path: Path) -> None:
    rows = [row("p", "public"), row("t", "test", "g0", private_group=True)]
    rows += [row(f"r{g}-{n}", "private", f"g{g}", private_group=True) for g in range(6) for n in range(3)]
    corpus = build(tmp_path / "c", file_source(tmp_path, rows), holders=2)
    holders = {f"g{g}": 0 for g in range(6)}
    for device in corpus.devices:
        held = [document.group for document in documents(corpus.private(device.id))]
        for group in set(held):
            assert held.count(group) == 3
            holders[str(group)] += 1
    assert set(holders.values()) == {2}
    (question,) = documents(corpus.questions)
    assert question == Document(id="p/asked", domain="law", prompt="p?\n", answer="", group="p")
    assert corpus.counts["private"] == 18
    assert corpus.counts["test_private"] == 1
    again = build(tmp_path / "d", file_source(tmp_path, rows), holders=2)
    assert again.digest == corpus.digest


def test_given_devices(tmp_path: Path) -> None:
    rows = [
        row("p", "public"),
        row("t", "test"),
        row("a", "private", device="north"),
        row("b", "private", device="east"),
    ]
    corpus = build(tmp_path / "c", file_source(tmp_path, rows), mode="given")
    assert [(device.id, device.documents, device.bytes) for device in corpus.devices] == [
        ("east", 1, 5),
        ("north", 1, 5),
    ]
    assert texts(corpus.private("north")) == {"a?\na!"}


@pytest.mark.parametrize(
    ("device", "message"),
    [(None, "line 3 names no device: partition.mode: given"), ("../x", r"line 3: device '../x' cannot name a file")],
)
def test_given_needs_usable_names(tmp_path: Path, device: str | None, message: str) -> None:
    rows = [row("p", "public"), row("t", "test"), row("a", "private", device=device)]
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "c", file_source(tmp_path, rows), mode="given")


def test_contradictions_are_refused(tmp_path: Path) -> None:
    rows = [row("p", "public"), row("t", "test"), row("a", "private")]
    with pytest.raises(ValueError, match=r"rows.jsonl: `device` 'x' needs partition.mode: given"):
        build(tmp_path / "c", file_source(tmp_path, rows, device="x"))
    with pytest.raises(
        ValueError, match=r"device-0\d holds no text; 1 private groups with 1 holders each do not fill 4"
    ):
        build(tmp_path / "c", file_source(tmp_path, rows), holders=1, seed=3)
    with pytest.raises(ValueError, match="given needs rows with a `device`"):
        build(tmp_path / "c", SMALL, mode="given")
    with pytest.raises(ValueError, match="no public text: raise"):
        build(tmp_path / "c", {**SMALL, "filler_documents": 0, "public_facts": 0})
