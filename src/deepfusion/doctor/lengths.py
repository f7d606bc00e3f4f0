"""How long the text is in each tokenizer's tokens, and what of it does not fit or cannot be spelt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from deepfusion.config import Recipe, Training
from deepfusion.data.documents import Document
from deepfusion.data.tokens import Tokenizer
from deepfusion.doctor.diagnosis import Check
from deepfusion.doctor.models import BASE, Start
from deepfusion.doctor.text import Reading
from deepfusion.roles import starting_points

EDGES = 2  # the start and the end token of a lesson


class Length(NamedTuple):
    """Tokens of a document, without start and end."""

    whole: int
    answer: int


TESTED = "context of the models"


@dataclass
class Lengths:
    """The documents that a tokenizer was asked about; each is looked at once."""

    tokenizer: Tokenizer
    of: dict[tuple[str, str], Length | str] = field(default_factory=dict[tuple[str, str], Length | str])

    def find(self, document: Document) -> Length | str:
        """Its length, or why it cannot be spelt."""
        key = (document.prompt, document.answer)
        if key not in self.of:
            try:
                ids, ends = self.tokenizer.encode(document.text)
                start = len(document.prompt.encode())
                self.of[key] = Length(len(ids), sum(end > start for end in ends))
            except ValueError as error:
                self.of[key] = str(error)
        return self.of[key]

    def measure(self, documents: Iterable[Document]) -> list[Length]:
        """The lengths of those documents that can be spelt."""
        return [length for length in map(self.find, documents) if isinstance(length, Length)]

    def tokens(self, documents: Iterable[Document]) -> int:
        """Tokens of lessons of these documents, start and end tokens included."""
        return sum(length.whole + EDGES for length in self.measure(documents))


class Use(NamedTuple):
    """Documents that a model is given, in one place of the recipe."""

    start: Start
    documents: Sequence[Document]
    where: str  # the key that says how long a text may be
    room: int  # tokens of an answer


def uses(text: Reading, starts: Mapping[str, Start], recipe: Recipe) -> Iterator[Use]:
    """Everything that a run gives to a model and that is not left out when it does not fit, as written text is."""
    base = starts[BASE]
    ancestors = {start.name: start for start in starts.values() if start is not base}
    of = starting_points(list(text.private), recipe.models, recipe.seed)
    for start in starts.values():
        if start.made:
            yield _learning(start, text.public, f"{start.key}.make.training.context", start.made.training)
    for name, start in ancestors.items():
        held = [document for device, documents in text.private.items() if of[device] == name for document in documents]
        yield _learning(start, [*held, *text.public], "device.training.context", recipe.device.training)
    if "public" in recipe.transfer.kinds:
        yield _learning(base, text.public, "distill.training.context", recipe.distill.training)
        yield _learning(base, text.public, "tune.training.context", recipe.tune.training)
    if "centralized" in recipe.evaluate.references:
        everything = [*text.everyones, *text.public, *text.heldout]
        yield _learning(base, everything, "distill.training.context", recipe.distill.training)
    for start in starts.values():
        yield Use(start, text.test, TESTED, start.context or 10**9)


def _learning(start: Start, documents: Sequence[Document], where: str, training: Training) -> Use:
    return Use(start, documents, where, min(training.context, start.context or training.context) - EDGES)


def checks(
    text: Reading, starts: Mapping[str, Start], lengths: Mapping[str, Lengths], recipe: Recipe
) -> Iterator[Check]:
    """Answers that are too long, text that cannot be spelt, and text that models are not given the room to write."""
    found = [(use, lengths[use.start.tokenizer.fingerprint]) for use in uses(text, starts, recipe)]
    for start in starts.values():
        yield from _unspelt(start, [(use, known) for use, known in found if use.start is start], text)
    for where in dict.fromkeys(use.where for use, _ in found):
        yield from _too_long(where, [(use, known) for use, known in found if use.where == where], text)
    yield from _cut_off(text, starts, lengths, recipe)


def _unspelt(start: Start, found: Sequence[tuple[Use, Lengths]], text: Reading) -> Iterator[Check]:
    """Text that a model's tokens do not spell byte for byte."""
    broken = [
        (document, why)
        for use, known in found
        for document in use.documents
        if isinstance(why := known.find(document), str)
    ]
    if broken:
        document, why = broken[0]
        count = _several([document for document, _ in broken])
        yield Check(
            "text", start.key, "problem",
            f"its tokenizer cannot spell {count}, the first {text.place(document)}: {why}",
            "normalise the text, leave the rows out, or choose a model with a byte-level tokenizer",
        )  # fmt: skip


def _too_long(where: str, found: Sequence[tuple[Use, Lengths]], text: Reading) -> Iterator[Check]:
    """Answers that do not fit in one place; prompts are cut, and so is plain text that is learned from."""
    long = [
        (length.answer, document, use)
        for use, known in found
        for document in use.documents
        if isinstance(length := known.find(document), Length)
        and (document.prompt or where == TESTED)
        and length.answer > use.room
    ]
    if not long:
        return
    most, document, use = max(long, key=lambda one: one[0])
    fits = use.start.context is None or most + EDGES <= use.start.context
    raised = f"raise it to {most + EDGES}, or " if fits and "." in where else ""
    over = _several([document for _, document, _ in long])
    yield Check(
        "text", where, "problem",
        f"holds {use.room} tokens of an answer; too long for it: {over}, the longest {text.place(document)} with "
        f"{most} tokens of {use.start.key}",
        f"{raised}leave such rows out by data.source.max_answer_bytes" if document.prompt else "cut it into paragraphs",
    )  # fmt: skip


def _cut_off(
    text: Reading, starts: Mapping[str, Start], lengths: Mapping[str, Lengths], recipe: Recipe
) -> Iterator[Check]:
    """Models write texts like those that they were trained on; what is longer than they may write is dropped."""
    limit = recipe.transfer.max_new_tokens
    of = starting_points(list(text.private), recipe.models, recipe.seed)
    held = {  # a text that several devices hold counts once for each ancestor
        (of[device], document.text): document for device, documents in text.private.items() for document in documents
    }
    whole = sorted(
        length.whole + 1  # the end, which they write themselves
        for (name, _), document in held.items()
        if isinstance(
            length := lengths[starts[f"models.ancestors.{name}"].tokenizer.fingerprint].find(document), Length
        )
    )
    over = sum(length > limit for length in whole)
    if "sampled" in recipe.transfer.kinds and 2 * over > len(whole):
        yield Check(
            "text", "transfer.max_new_tokens", "warning",
            f"{over} of {len(whole)} private texts are longer than {limit} tokens: texts like them are dropped when "
            "devices' models write, and teach nothing",
            f"raise it to about {whole[int(0.9 * (len(whole) - 1))]}",
        )  # fmt: skip


def _several(documents: Sequence[Document]) -> str:
    count = len({document.id for document in documents})
    return "one document" if count == 1 else f"{count} documents"
