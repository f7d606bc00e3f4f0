"""Whether two tokenizers cut every text alike, and how one's numbers read in the other's.

Vocabularies are compared by content: numbers, special tokens and what is put around a text may all differ.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerFast

from deepfusion.data.tokens import Tokenizer


def segmentation(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 over what decides how text is cut into which pieces, and nothing else.

    Equal digests mean that every text is cut into the same pieces. Of a BPE only the pieces that its merges lead to
    count: others are never produced. That two tokenizers with different digests agree on all text all the same is
    possible, and not looked for.
    """
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    added = tree.get("added_tokens") or []
    literal = sorted(
        [t["content"], t["single_word"], t["lstrip"], t["rstrip"], t["normalized"]] for t in added if not t["special"]
    )
    model = _pieces(tree["model"], {t["content"] for t in added})
    content = [model, literal, _without(tree.get("normalizer")), _without(tree.get("pre_tokenizer"))]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _pieces(model: dict[str, Any], added: set[str]) -> dict[str, Any]:
    """A tokenizer's model with its pieces in an order of their own, and without what was added to it."""
    model = {**model, "unk_token": model.get("unk_token") is not None}
    if model["type"] == "Unigram":
        model["unk_id"] = model.get("unk_id") is not None
        model["vocab"] = sorted(entry for entry in model["vocab"] if entry[0] not in added)
    elif model["type"] == "BPE":
        whole = model.get("ignore_merges") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        pieces = set(model["vocab"]) - added
        model["vocab"] = sorted(pieces if whole else {p for p in pieces if len(p) == 1 or p.startswith("<0x")})
        model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    return model


def _without(part: Any, key: str = "trim_offsets") -> Any:
    """A part of a tokenizer without a setting that says how offsets are told, not how text is cut."""
    if isinstance(part, dict):
        return {k: _without(v, key) for k, v in cast("dict[str, Any]", part).items() if k != key}
    if isinstance(part, list):
        return [_without(entry, key) for entry in cast("list[Any]", part)]
    return part


def renaming(teacher: Tokenizer, student: Tokenizer) -> np.ndarray:
    """`[V_t]` int64: the student's number of each of the teacher's tokens, by name; -1 where it has none.

    Meant for tokenizers of one `segmentation`. Start and end tokens are the student's, whatever they are called.
    """
    numbers, ours = student.raw.get_vocab(), np.full(len(teacher.table), -1, np.int64)
    for token, index in teacher.raw.get_vocab().items():
        ours[index] = numbers.get(token, -1)
    ours[teacher.start], ours[teacher.end] = student.start, student.end
    return ours
