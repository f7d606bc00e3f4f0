"""What teachers said about documents, kept on disk: the loss cannot tell a cached teacher from a live one.

One file holds one teacher's signals on many documents, in the teacher's own tokens. A writer's signals are free: they
are computed while it writes. All of a document's tokens are kept, with the start and end tokens; the first row of
each document (the start token, which nothing predicts) is zero.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file


@dataclass(frozen=True)
class Signal:
    """One teacher on one document of n tokens."""

    ids: np.ndarray  # [n] int32, teacher's tokens
    ends: np.ndarray  # [n] int32, byte at which each token ends
    logprobs: np.ndarray  # [n] float32, log p(token | those before)
    topk_ids: np.ndarray  # [n, k] int32, most probable tokens, given those before
    topk_logprobs: np.ndarray  # [n, k] float16
    gain: np.ndarray | None = None  # [n] float16, nats by which the token is likelier than under the public ancestor
    features: np.ndarray | None = None  # [J, P, W] float16, standardised stage features pooled over patches
    before: np.ndarray | None = None  # [n] float32, log p(token | those before) under the writer's public ancestor
    before_topk: np.ndarray | None = None  # [n, k] float16, the ancestor's for each of `topk_ids`


# What not every signal has, how many rows of it a document has (one per token, or one in all), and its type on disk.
_EXTRAS = (
    ("gain", "tokens", np.float16),
    ("features", "document", np.float16),
    ("before", "tokens", np.float32),
    ("before_topk", "tokens", np.float16),
)


@dataclass(frozen=True)
class Signals:
    """One teacher on many documents."""

    tokenizer: str  # fingerprint: equal fingerprints mean equal tokens
    lineage: str
    of: dict[str, Signal]  # document id → signal

    def save(self, path: Path) -> None:
        """Write one safetensors file, the same bytes for the same signals."""
        signals = list(self.of.values())
        offsets = np.cumsum([0, *(len(s.ids) for s in signals)]).astype(np.int64)
        width = max((s.topk_ids.shape[1] for s in signals), default=0)
        tensors = {
            "offsets": offsets,
            "ids": _joined([s.ids for s in signals], np.int32),
            "ends": _joined([s.ends for s in signals], np.int32),
            "logprobs": _joined([s.logprobs for s in signals], np.float32),
            "topk_ids": _joined([s.topk_ids for s in signals], np.int32, width),
            "topk_logprobs": _joined([s.topk_logprobs for s in signals], np.float16, width),
        }
        about = {"documents": list(self.of), "tokenizer": self.tokenizer, "lineage": self.lineage}
        for extra, rows, dtype in _EXTRAS:
            held = {name: getattr(signal, extra) for name, signal in self.of.items()}
            held = {name: values for name, values in held.items() if values is not None}
            if held:
                join = np.concatenate if rows == "tokens" else np.stack
                tensors[extra] = join(list(held.values())).astype(dtype)
            if 0 < len(held) < len(self.of):
                about[extra] = list(held)  # whose they are, where not everyone has some
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"about": json.dumps(about)})  # one key: several would be in random order

    @classmethod
    def load(cls, path: Path) -> Signals:
        """Read a file that `save` wrote."""
        with safe_open(path, framework="numpy") as stored:
            about = json.loads(stored.metadata()["about"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (not a dict)
        offsets = tensors["offsets"]
        sizes = dict(zip(about["documents"], np.diff(offsets).tolist(), strict=True))
        extras: dict[str, dict[str, np.ndarray]] = {name: {} for name in sizes}
        for extra, rows, _ in _EXTRAS:
            if extra not in tensors:
                continue
            owners = about.get(extra, about["documents"])
            ends = np.cumsum([sizes[name] for name in owners])
            parts = np.split(tensors[extra], ends[:-1]) if rows == "tokens" else tensors[extra]
            for name, values in zip(owners, parts, strict=True):
                extras[name][extra] = values
        of: dict[str, Signal] = {}
        for index, document in enumerate(about["documents"]):
            span = slice(int(offsets[index]), int(offsets[index + 1]))
            of[document] = Signal(
                ids=tensors["ids"][span],
                ends=tensors["ends"][span],
                logprobs=tensors["logprobs"][span],
                topk_ids=tensors["topk_ids"][span],
                topk_logprobs=tensors["topk_logprobs"][span],
                **extras[document],
            )
        return cls(about["tokenizer"], about["lineage"], of)

    @classmethod
    def merged(cls, parts: Iterable[Signals]) -> Signals:
        """Signals of one teacher from several files."""
        parts = list(parts)
        of = {document: signal for part in parts for document, signal in part.of.items()}
        return cls(parts[0].tokenizer, parts[0].lineage, of)


def _joined(arrays: list[np.ndarray], dtype: type, width: int | None = None) -> np.ndarray:
    if not arrays:
        return np.zeros((0,) if width is None else (0, width), dtype)
    return np.concatenate(arrays).astype(dtype)
