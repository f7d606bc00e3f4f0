"""How much of what a teacher says a student hears, where the two have different tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random

from deepfusion.data.documents import Document
from deepfusion.data.tokens import Tokenizer, chunk_spans, spelt
from deepfusion.doctor.diagnosis import Check
from deepfusion.doctor.models import BASE, Start

SAMPLE = 200  # documents that are looked at
COARSE = 0.4  # chunks a student token, below which much is said of each chunk and little of each token


def coverage(teacher: Tokenizer, student: Tokenizer, texts: Sequence[str]) -> float | None:
    """Chunks of bytes that both tokenizers share, per student token; none where no text can be spelt by both."""
    chunks = tokens = 0
    for text in texts:
        try:
            ids, ends = spelt(text, student)
            _, teacher_ends = spelt(text, teacher)
        except ValueError:
            continue
        chunks += len(chunk_spans(ends, teacher_ends)) - 1
        tokens += len(ids) - 2
    return chunks / tokens if tokens else None


def checks(starts: Mapping[str, Start], documents: Sequence[Document]) -> Iterator[Check]:
    """For each teacher, whether it speaks to the student token by token or by what both tokenise alike."""
    sample = Random(0).sample(list(documents), min(SAMPLE, len(documents)))
    student = starts[BASE].tokenizer
    for start in starts.values():
        subject = f"{start.name} → base"
        if start.key == BASE:
            continue
        if start.tokenizer.fingerprint == student.fingerprint:
            yield Check("tokenizers", subject, "ok", "one tokenizer: probabilities are taught token by token")
            continue
        shared = coverage(start.tokenizer, student, [document.text for document in sample])
        if shared is None:
            yield Check("tokenizers", subject, "problem", "there is no text that both can spell",
                        "choose another ancestor, or another base")  # fmt: skip
            continue
        fact = f"different tokenizers: {shared:.2f} shared chunks a token of the base, taught by their likelihood"
        few = shared < COARSE
        yield Check("tokenizers", subject, "warning" if few else "ok", fact,
                    "a base with a tokenizer closer to the ancestor's learns more of it" if few else "")  # fmt: skip
