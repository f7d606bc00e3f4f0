"""The text of a run, read as its data step reads it, and looked at before any model sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deepfusion.artifacts import Corpus
from deepfusion.config import FileData, Recipe
from deepfusion.data.corpora import read_text
from deepfusion.data.documents import Document, Question, read_jsonl
from deepfusion.doctor.diagnosis import Check
from deepfusion.elsewhere import devices_elsewhere
from deepfusion.labels import counted, joined
from deepfusion.phases.data import build_corpus, build_public

LITTLE = 1000  # bytes of private text from which a model learns next to nothing


@dataclass(frozen=True)
class Reading:
    """Who holds what, what is public, what is asked."""

    corpus: Corpus
    private: dict[str, list[Document]]  # device → what it holds
    public: list[Document]
    questions: list[Document]
    heldout: list[Document]
    test: list[Question]
    origins: dict[str, str] = field(default_factory=dict[str, str])  # id → file and line, where there is one
    elsewhere: bool = False  # what devices hold is on machines of their own, and not known here

    def place(self, document: Document) -> str:
        """Where a document stands, for people."""
        return self.origins.get(document.id, f"document {document.id!r}")

    @property
    def everyones(self) -> list[Document]:
        """What devices hold, each document once."""
        return list({document.text: document for held in self.private.values() for document in held}.values())

    @property
    def learned(self) -> list[Document]:
        """What stands for texts of the kind that devices learn from and write: theirs, or where these are not known,
        the public ones.
        """
        return self.public if self.elsewhere else self.everyones


def read(recipe: Recipe, into: Path) -> Reading:
    """Run the data step in a folder of its own, and open what it made: that of a federation's server, where only its
    devices have private text.

    Raises:
        InputError: a source or a row cannot be used, a private group is public, or a device would hold no text.
    """
    source = recipe.data.source
    if devices := devices_elsewhere(recipe):
        corpus = build_public(recipe.data, devices=devices, seed=recipe.seed, into=into)
    else:
        corpus = build_corpus(recipe.data, seed=recipe.seed, into=into)
    origins: dict[str, str] = {}
    if isinstance(source, FileData):
        text = read_text(source, recipe.seed, private_elsewhere=bool(devices))
        origins = {row.id: row.origin for rows in (text.private, text.heldout, text.public, text.test) for row in rows}
    held = {device.id: corpus.private(device.id) for device in corpus.devices}
    return Reading(
        corpus,
        {device: [] if devices else list(read_jsonl(path, Document)) for device, path in held.items()},
        list(read_jsonl(corpus.public, Document)),
        list(read_jsonl(corpus.questions, Document)),
        list(read_jsonl(corpus.heldout, Document)),
        list(read_jsonl(corpus.test, Question)),
        origins,
        elsewhere=bool(devices),
    )


def checks(text: Reading, recipe: Recipe) -> Iterator[Check]:
    """What is to be said of the text alone."""
    private = text.everyones
    held = f"private text on {counted(len(text.private), 'device')} elsewhere"
    if not text.elsewhere:
        held = f"{len(private)} private documents on {len(text.private)} devices"
    yield Check(
        "text", "data", "ok",
        f"{held}, {len(text.public)} public, {len(text.heldout)} held out, {len(text.test)} test questions; "
        f"{_domains(private, text.test, text.elsewhere)}",
    )  # fmt: skip
    if recipe.federation is not None:
        yield _federation(text, recipe)
    for name, count in text.corpus.counts.items():
        if name.startswith("left_out") and count:
            yield Check("text", "data.source", "ok", f"{count} {name.replace('_', ' ')}")
    marked = sum(question.private for question in text.test)
    if not marked:
        yield Check(
            "text", "private_group", "warning",
            "no test question is about a private group: the report cannot tell what only devices know from the rest",
            "say private_group: true in the rows of such groups, and ask test questions about them",
        )  # fmt: skip
    yield from _given_away(text)
    for domain in sorted({d.domain for d in private} - {q.domain for q in text.test}):
        yield Check(
            "text", f"domain {domain}", "warning", "devices know of it, but no test question asks",
            "add test rows of this domain",
        )  # fmt: skip
    for device in text.corpus.devices:
        if device.bytes < LITTLE and not text.elsewhere:
            yield Check(
                "text", device.id, "warning",
                f"holds {device.documents} documents of {device.bytes} bytes in all: too little to learn from",
                "lower data.partition.devices, raise data.partition.holders, or add text",
            )  # fmt: skip
    if recipe.cluster.k > len(text.private):
        yield Check(
            "text", "cluster.k", "problem",
            f"{recipe.cluster.k} clusters cannot be made of {len(text.private)} devices",
            f"set cluster.k to {len(text.private)} or less",
        )  # fmt: skip


def _federation(text: Reading, recipe: Recipe) -> Check:
    """Whose text is where, and what of it is not known before devices have sent."""
    assert recipe.federation is not None
    names = recipe.federation.devices
    if text.elsewhere:
        return Check(
            "text", "federation", "ok",
            f"{joined(list(names))} have text of their own: how much, in which domains and of what length is known to "
            "them alone, so what they do costs nothing here and is not told, and what they will write is taken to be "
            "as long as public text",
        )  # fmt: skip
    return Check(
        "text", "federation", "ok",
        "looked at as a run on this machine, for the recipe has private text of its own: "
        f"{counted(len(text.private), 'device')} of data.partition; in a federation, {joined(list(names))} bring their "
        "own",
    )  # fmt: skip


def _given_away(text: Reading) -> Iterator[Check]:
    """Questions about what only devices should know that the public text asks and answers in the same words."""
    public = {_words(document.prompt): document for document in text.public if document.prompt}
    told = [(q, public[_words(q.prompt)]) for q in text.test if q.private and _words(q.prompt) in public]
    if told:
        question, document = told[0]
        yield Check(
            "text", "private_group", "warning",
            f"{len(told)} private test questions stand in the public text too, the first as {text.place(document)} "
            f"({question.prompt.strip()[:40]!r})",
            "give both rows one group, or leave the public ones out: what is public needs no devices",
        )  # fmt: skip


def _words(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def _domains(private: Sequence[Document], test: Sequence[Document], elsewhere: bool) -> str:
    held, asked = Counter(d.domain for d in private), Counter(d.domain for d in test)
    names = sorted(held.keys() | asked.keys())
    return "; ".join(
        f"{name}: " + f"{held[name]} private, " * (not elsewhere) + f"{asked[name]} test" for name in names
    )
