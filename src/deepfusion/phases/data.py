"""The corpus of a run: who holds which private text, what is public, what is asked in the end."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

from deepfusion.artifacts import Corpus, DeviceInfo
from deepfusion.config import Data, FileData, Partition, SyntheticData
from deepfusion.data.corpora import Row, read_text
from deepfusion.data.documents import Document, write_jsonl
from deepfusion.data.options import with_options
from deepfusion.data.partition import assign, device_ids
from deepfusion.data.synthetic import Fact, fact_documents, world
from deepfusion.errors import InputError

FACTS = "facts.json"


def build_corpus(config: Data, *, seed: int, into: Path) -> Corpus:
    """Make or read the text, hand private groups to their holders, and write the files of a `Corpus`.

    A synthetic corpus has `facts.json` besides: every fact and the devices that hold it. Each holder of a synthetic
    fact writes about it in its own order; each holder of a real group has the same documents. In files, the public
    questions are the prompts of the public rows without their answers.

    Raises:
        InputError: a row cannot be used, nothing is public, or a device would hold no text.
    """
    if isinstance(config.source, SyntheticData):
        return _synthetic(config.source, config.partition, seed, into)
    return _files(config.source, config.partition, seed, into)


def build_public(config: Data, *, devices: Sequence[str], seed: int, into: Path) -> Corpus:
    """The part of the corpus that a server has whose devices are elsewhere: public text, questions and test.

    Of each of the `devices` only the name is known. These files are, byte for byte, those of `build_corpus`, as far as
    the same rows are given.

    Raises:
        InputError: a row cannot be used, is private, or nothing is public.
    """
    source = config.source
    if isinstance(source, SyntheticData):
        made = world(source, seed)
        public, questions, test, domains = made.public, made.questions, made.test, made.domains
        if not public:
            raise InputError("no public text: raise data.source.filler_documents or public_facts")
    else:
        text = read_text(source, seed, private_elsewhere=True)
        asked = text.test if source.made_options is None else with_options(text.test, source.made_options, seed)
        public, questions = [row.document for row in text.public], _asked(text.public)
        test, domains = [row.question for row in asked], text.domains
    counts = {
        "public": write_jsonl(into / "public.jsonl", public),
        "questions": write_jsonl(into / "questions.jsonl", questions),
        "heldout": write_jsonl(into / "heldout.jsonl", []),
        "test": write_jsonl(into / "test.jsonl", test),
    }
    infos = tuple(DeviceInfo(id=device, domains={}, documents=0, bytes=0) for device in devices)
    return _sealed(into, tuple(domains), infos, counts)


def _synthetic(source: SyntheticData, partition: Partition, seed: int, into: Path) -> Corpus:
    if partition.mode == "given":
        raise InputError("partition.mode: given needs rows with a `device`; synthetic text takes by_domain or uneven")
    made = world(source, seed)
    if not made.public:
        raise InputError("no public text: raise data.source.filler_documents or public_facts")
    private = [fact for fact in made.facts if not fact.public]
    groups = {domain: [fact.id for fact in private if fact.domain == domain] for domain in made.domains}
    holders = assign(groups, partition, seed)
    texts: dict[str, list[Document]] = {device: [] for device in device_ids(partition.devices)}
    for fact in private:
        for device in holders[fact.id]:
            order = Random(f"{seed}-{device}-{fact.id}")
            texts[device] += fact_documents(fact, source.private_documents_per_fact, order)
    devices = _write_private(texts, partition, len(private), into)
    counts = {
        "private_facts": len(private),
        "public_facts": len(made.facts) - len(private),
        "public": write_jsonl(into / "public.jsonl", made.public),
        "questions": write_jsonl(into / "questions.jsonl", made.questions),
        "heldout": write_jsonl(into / "heldout.jsonl", made.heldout),
        "test": write_jsonl(into / "test.jsonl", made.test),
        "test_private": len(private),
    }
    _write_facts(made.facts, holders, into / FACTS)
    return _sealed(into, made.domains, devices, counts)


def _files(source: FileData, partition: Partition, seed: int, into: Path) -> Corpus:
    text = read_text(source, seed)
    test = text.test if source.made_options is None else with_options(text.test, source.made_options, seed)
    given = partition.mode == "given"
    if not given and (named := next((s for s in source.sources if s.device is not None), None)):
        raise InputError(f"{named.path or named.dataset}: `device` {named.device!r} needs partition.mode: given")
    texts = _given(text.private) if given else _assigned(text.private, partition, seed)
    devices = _write_private(texts, partition, len({row.group for row in text.private}), into)
    counts = {
        **text.counts,
        "private": len(text.private),
        "public": write_jsonl(into / "public.jsonl", (row.document for row in text.public)),
        "questions": write_jsonl(into / "questions.jsonl", _asked(text.public)),
        "heldout": write_jsonl(into / "heldout.jsonl", (row.document for row in text.heldout)),
        "test": write_jsonl(into / "test.jsonl", (row.question for row in test)),
        "test_private": sum(row.private for row in text.test),
    }
    return _sealed(into, text.domains, devices, counts)


def _asked(rows: Sequence[Row]) -> list[Document]:
    """The prompts of public rows, without their answers."""
    return [
        Document(id=f"{row.id}/asked", domain=row.domain, prompt=row.prompt, answer="", group=row.group)
        for row in rows
        if row.prompt
    ]


def _assigned(rows: Sequence[Row], partition: Partition, seed: int) -> dict[str, list[Document]]:
    """Hand out whole groups; a group that stands in several domains counts for that of its first row."""
    groups: dict[str, dict[str, None]] = {domain: {} for domain in sorted({row.domain for row in rows})}
    domain_of: dict[str, str] = {}
    for row in rows:
        groups[domain_of.setdefault(row.group, row.domain)][row.group] = None
    # A domain all of whose groups belong to another domain gets no devices of its own.
    holders = assign({domain: list(names) for domain, names in groups.items() if names}, partition, seed)
    texts: dict[str, list[Document]] = {device: [] for device in device_ids(partition.devices)}
    for row in rows:
        for device in holders[row.group]:
            texts[device].append(row.document)
    return texts


def _given(rows: Sequence[Row]) -> dict[str, list[Document]]:
    """Each row to the device that it names; there are as many devices as names, whatever `partition.devices` says."""
    texts: dict[str, list[Document]] = {}
    for row in rows:
        if not row.device:
            raise InputError(f"{row.origin} names no device: partition.mode: given needs one for each private row")
        if not re.fullmatch(r"\w[\w.-]*", str(row.device)):
            raise InputError(
                f"{row.origin}: device {row.device!r} cannot name a file: use letters, digits, '-', '_', '.'"
            )
        texts.setdefault(str(row.device), []).append(row.document)
    return dict(sorted(texts.items()))


def _write_private(
    texts: Mapping[str, Sequence[Document]], partition: Partition, groups: int, into: Path
) -> tuple[DeviceInfo, ...]:
    infos: list[DeviceInfo] = []
    for device, documents in texts.items():
        if not documents:
            raise InputError(
                f"{device} holds no text; {groups} private groups with {min(partition.holders, partition.devices)} "
                f"holders each do not fill {partition.devices} devices: lower partition.devices or raise "
                f"partition.holders"
            )
        write_jsonl(into / "private" / f"{device}.jsonl", documents)
        domains = Counter(document.domain for document in documents)
        size = sum(len(document.text.encode()) for document in documents)
        infos.append(DeviceInfo(id=device, domains=dict(sorted(domains.items())), documents=len(documents), bytes=size))
    return tuple(infos)


def _write_facts(facts: Sequence[Fact], holders: Mapping[str, Sequence[str]], path: Path) -> None:
    names = ("id", "domain", "entity", "relation", "value", "public")
    entries = [
        {**{name: getattr(fact, name) for name in names}, "holders": list(holders.get(fact.id, ()))} for fact in facts
    ]
    path.write_text(json.dumps(entries, indent=1, ensure_ascii=False), encoding="utf-8")


def _sealed(into: Path, domains: tuple[str, ...], devices: tuple[DeviceInfo, ...], counts: dict[str, int]) -> Corpus:
    counts = {**counts, "private_held": sum(device.documents for device in devices)}
    return Corpus(folder=into, domains=domains, devices=devices, counts=dict(sorted(counts.items()))).sealed()
