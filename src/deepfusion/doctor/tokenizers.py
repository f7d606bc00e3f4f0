"""How each teacher will be heard, and how much of it, where it and the student have different tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random

from deepfusion.config import Recipe
from deepfusion.data.coverage import SPANS, coverage
from deepfusion.data.documents import Document
from deepfusion.data.segmentation import segmentation
from deepfusion.doctor.diagnosis import Check
from deepfusion.doctor.models import BASE, Start

SAMPLE = 200  # documents that are looked at


def checks(starts: Mapping[str, Start], documents: Sequence[Document], recipe: Recipe) -> Iterator[Check]:
    """For each teacher, whether it speaks to the student token by token or by what both tokenise alike."""
    sample = Random(0).sample(list(documents), min(SAMPLE, len(documents)))
    student, asked = starts[BASE].tokenizer, recipe.distill.objective.across
    if asked == "auto" and recipe.distill.shifted:
        asked = SPANS
    for start in starts.values():
        subject = f"{start.name} → base"
        if start.key == BASE:
            continue
        teacher = start.tokenizer
        if teacher.fingerprint == student.fingerprint or segmentation(teacher.raw) == segmentation(student.raw):
            yield Check("tokenizers", subject, "ok", "one tokenizer: probabilities are taught token by token")
            continue
        shared = coverage(teacher, student, [document.text for document in sample])
        if shared is None:
            yield Check("tokenizers", subject, "problem", "there is no text that both can spell",
                        "choose another ancestor, or another base")  # fmt: skip
            continue
        across = shared.chosen(asked)
        fact = (
            f"different tokenizers, taught by {across}: {shared.chunks:.2f} shared chunks a token of the base, "
            f"{shared.starts:.0%} of its tokens begin where the teacher's do, {shared.known:.0%} of the teacher's "
            "tokens are the base's too"
        )
        few = shared.is_little(across)
        yield Check("tokenizers", subject, "warning" if few else "ok", fact,
                    "a base with a tokenizer closer to the ancestor's learns more of it" if few else "")  # fmt: skip
