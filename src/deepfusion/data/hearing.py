"""Teachers' signals as a student hears them: in its own tokens, or across tokenizers.

Signals are in their teacher's tokens, so its tokenizer is kept beside them, in a folder named by its fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deepfusion import checkpoints
from deepfusion.config import Across
from deepfusion.data.coverage import SPANS, coverage
from deepfusion.data.outcomes import Outcomes, outcomes
from deepfusion.data.segmentation import renaming, segmentation
from deepfusion.data.tokens import Tokenizer
from deepfusion.signals import Signal, Signals
from deepfusion.store import link

SAMPLE = 100  # texts by which `auto` is decided
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Heard:
    """One teacher's signals, and how they are heard."""

    signals: Signals
    """In the student's numbers, where its tokenizer cuts every text as the teacher's does."""
    across: Across | None = None
    """How they are heard where the tokenizers differ; none: token by token."""
    outcomes: Outcomes | None = None
    """What both vocabularies can tell apart, if `across` asks for it."""
    table: Sequence[bytes] | None = None
    """The bytes of the teacher's tokens, where the tokenizers differ."""


def keep_tokenizer(fingerprint: str, model: Path, into: Path) -> None:
    """Keep the tokenizer of a teacher's checkpoint folder among others in `into`."""
    for name in FILES:
        if (model / name).is_file():
            link(model / name, into / fingerprint / name)


def in_own_tokens(signals: Signals, tokenizers: Path, student: Tokenizer) -> Signals:
    """The signals in the student's numbers, if the two tokenizers cut every text alike; otherwise as they are."""
    if signals.tokenizer == student.fingerprint:
        return signals
    teacher = Tokenizer(checkpoints.open_tokenizer(tokenizers / signals.tokenizer))
    if segmentation(teacher.raw) != segmentation(student.raw):
        return signals
    return _renamed(signals, renaming(teacher, student), student.fingerprint)


def hear(told: Mapping[str, tuple[Signals, Path]], student: Tokenizer, across: Across) -> dict[str, Heard]:
    """Several teachers' signals, each with the folder of tokenizers beside it, as a student hears them.

    What is worked out of a tokenizer, is so once for all teachers that have it; for `auto` by texts of all of them.
    """
    own = {name: in_own_tokens(signals, folder, student) for name, (signals, folder) in told.items()}
    others = {signals.tokenizer: told[name][1] for name, signals in own.items()}
    others.pop(student.fingerprint, None)
    teachers = {
        fingerprint: Tokenizer(checkpoints.open_tokenizer(folder / fingerprint))
        for fingerprint, folder in others.items()
    }
    made: dict[str, Outcomes] = {}
    chosen: dict[str, Across] = {}
    for fingerprint, teacher in teachers.items():
        heard = [signal for one in own.values() if one.tokenizer == fingerprint for signal in one.of.values()]
        chosen[fingerprint] = how = _chosen(across, teacher, student, heard)
        if how not in (SPANS, "uld"):
            tokens = np.unique(np.concatenate([signal.topk_ids.ravel() for signal in heard])).tolist() if heard else []
            made[fingerprint] = outcomes(how, teacher, student, tokens)
    return {
        name: Heard(signals, chosen[signals.tokenizer], made.get(signals.tokenizer), teachers[signals.tokenizer].table)
        if signals.tokenizer in teachers
        else Heard(signals)
        for name, signals in own.items()
    }


def _chosen(across: Across, teacher: Tokenizer, student: Tokenizer, heard: Sequence[Signal]) -> Across:
    """What `auto` is for a teacher, by texts that it spoke of."""
    if across != "auto":
        return across
    sample = heard[:: 1 + len(heard) // SAMPLE]  # of all writers
    raw = (b"".join(teacher.table[token] for token in signal.ids[1:-1]) for signal in sample)
    shared = coverage(teacher, student, [text.decode(errors="replace") for text in raw])
    return SPANS if shared is None else shared.chosen(across)


def _renamed(signals: Signals, numbers: np.ndarray, fingerprint: str) -> Signals:
    """Signals in other numbers; a token that has none joins the rest, and a document that needs it is left out."""
    of: dict[str, Signal] = {}
    for name, signal in signals.of.items():
        ids, topk_ids = numbers[signal.ids], numbers[signal.topk_ids]
        if (ids < 0).any():
            continue
        topk_logprobs = np.where(topk_ids < 0, -np.inf, signal.topk_logprobs).astype(signal.topk_logprobs.dtype)
        of[name] = replace(signal, ids=ids, topk_ids=np.maximum(topk_ids, 0), topk_logprobs=topk_logprobs)
    return Signals(fingerprint, signals.lineage, of)
