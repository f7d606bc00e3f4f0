"""How much of what a teacher says a student of another tokenizer can hear: the coverage audit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deepfusion.config import Across
from deepfusion.data.tokens import Tokenizer, chunk_spans, common_starts, spelt

SPANS: Across = "span_likelihood"
COARSE = 0.4  # chunks a student token, below which much is said of each chunk and little of each token
LARGE = 10_000  # tokens; of models with 512 spans teach as much as outcomes, of models with 49,152 they teach nothing
FOREIGN = 0.5  # share of the teacher's tokens that are the student's too, below which outcomes say little


@dataclass(frozen=True)
class Coverage:
    """Of the same texts in two tokenizations."""

    chunks: float
    """Smallest runs of bytes that both tokenize as a whole, per token of the student's."""
    starts: float
    """Share of the student's tokens before which the teacher begins one too."""
    known: float
    """Share of the teacher's tokens that the student has too, by their bytes."""
    vocabulary: int
    """Tokens of the smaller of the two."""

    def chosen(self, across: Across) -> Across:
        """What `auto` stands for: likelihoods of chunks, but outcomes where these say more: of large vocabularies, or
        where hardly a chunk is shared.
        """
        if across != "auto":
            return across
        more = self.vocabulary >= LARGE or self.is_little(SPANS)
        return "projected_kl" if more and not self.is_little("projected_kl") else SPANS

    def is_little(self, across: Across) -> bool:
        """Whether a teacher that is heard so says little."""
        return self.chunks < COARSE if across == SPANS else self.known < FOREIGN


def coverage(teacher: Tokenizer, student: Tokenizer, texts: Iterable[str]) -> Coverage | None:
    """None where no text can be spelt by both."""
    vocabulary = set(student.table)
    chunks = starts = known = tokens = teachers = 0
    for text in texts:
        try:
            ids, ends = spelt(text, student)
            others, their_ends = spelt(text, teacher)
        except ValueError:
            continue
        inner = others[1:-1]
        chunks += len(chunk_spans(ends, their_ends)) - 1
        starts += len(common_starts(ids, ends, student.table, others, their_ends, teacher.table)[0]) - 1  # not the end
        known += sum(teacher.table[token] in vocabulary for token in inner)
        tokens, teachers = tokens + len(ids) - 2, teachers + len(inner)
    if not tokens or not teachers:
        return None
    smaller = min(len(teacher.table), len(student.table))
    return Coverage(chunks / tokens, starts / tokens, known / teachers, smaller)
