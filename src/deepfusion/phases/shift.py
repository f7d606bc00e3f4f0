"""Shift: of what teachers say the students learn what a device has learned, on top of what the base model knows.

A device's model can be a worse language model than the base: its probabilities, taken as they are, teach its errors
with its knowledge. What it learned in private is the quotient of its probabilities and its public ancestor's, so the
target is base · writer / ancestor, renormalised (proxy-tuning, arXiv 2401.08565; emulated fine-tuning, arXiv
2310.12962). Across tokenizers the same is done to the likelihood of every chunk of bytes that both share.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from transformers import PreTrainedModel

from deepfusion import checkpoints
from deepfusion.artifacts import Checkpoint, TransferSet, Work
from deepfusion.config import Runtime, TransferPhase
from deepfusion.data.documents import TransferDocument, read_jsonl
from deepfusion.data.hearing import in_own_tokens
from deepfusion.data.tokens import Tokenizer, chunk_spans, spelt
from deepfusion.families import context_length
from deepfusion.precision import usable
from deepfusion.progress import Ticker
from deepfusion.signals import Signal, Signals
from deepfusion.store import link_tree
from deepfusion.writing import opinions

LEAST = 1e-6  # probability of all tokens that were not kept: below it, rounding of those that were decides
CERTAIN = -1e-3  # a product of likelihoods can exceed 1: a chunk's is at most this
Spans = list[tuple[int, int, int, int]]  # as of `chunk_spans`


@dataclass(frozen=True)
class _Reading:
    """A document as the base reads it."""

    ids: np.ndarray  # [n]
    spans: Spans | None  # chunks shared with the writer's tokens; none: these are the writer's tokens


def shift(
    base: Checkpoint, transfer: TransferSet, config: TransferPhase, *, into: Path, runtime: Runtime
) -> TransferSet:
    """The transfer set with every writer's probabilities as a shift of the base's own.

    Signals without their writer's ancestor's probabilities stay as they are, and so do those on documents that the base
    cannot read or that are longer than its context, of which no student of its shape is taught. A transfer set that
    was shifted has none left to shift.

    Returns:
        The same documents, counts and notices; `work` is that of asking the base alone.
    """
    model = checkpoints.open_model(base.folder, usable(config.dtype, runtime.accelerator, into), runtime.accelerator)
    tokenizer = Tokenizer(checkpoints.open_tokenizer(base.folder))
    documents = {document.id: document for document in read_jsonl(transfer.documents, TransferDocument)}
    ticker = Ticker(into, sum(document.writer is not None for document in documents.values()), "documents")
    tokens = 0
    (into / "signals").mkdir(exist_ok=True)
    for path in sorted(transfer.signals.glob("*.safetensors")):
        said = in_own_tokens(Signals.load(path), transfer.tokenizers, tokenizer)
        readings = {
            name: reading
            for name, signal in said.of.items()
            if name in documents and (reading := _reading(documents[name], signal, said, model, tokenizer))
        }
        tokens += sum(len(reading.ids) for reading in readings.values())
        of = said.of | _shifted(said.of, readings, model, tokenizer, ticker)
        Signals(said.tokenizer, said.lineage, of).save(into / "signals" / path.name)
    if transfer.tokenizers.is_dir():
        link_tree(transfer.tokenizers, into / "tokenizers")
    shutil.copyfile(transfer.documents, into / transfer.documents.name)
    work = Work(tokens=tokens, forward=float(tokens * base.active_parameters))
    return transfer.model_copy(update={"folder": into, "work": work, "shifted": True}).sealed()


def _reading(
    document: TransferDocument, signal: Signal, said: Signals, model: PreTrainedModel, tokenizer: Tokenizer
) -> _Reading | None:
    """A document in the base's tokens; none if it is not taught to a model of the base's shape, or not shifted."""
    if signal.before is None or signal.before_topk is None:
        return None
    spans: Spans | None = None
    ids = signal.ids
    if said.tokenizer != tokenizer.fingerprint:
        try:
            ids, ends = spelt(document.text, tokenizer)
            spans = chunk_spans(ends, signal.ends)
        except ValueError as error:
            print(f"not shifted: {document.id}: {error}", file=sys.stderr)  # into the step's log
            return None
    context = context_length(model.config)
    fits = (context is None or len(ids) <= context) and int(ids.max()) < _vocabulary(model, tokenizer)
    return _Reading(ids, spans) if fits else None


def _vocabulary(model: PreTrainedModel, tokenizer: Tokenizer) -> int:
    """Tokens that the base's head and tokenizer both know."""
    return min(int(model.config.vocab_size), len(tokenizer.table))


def _shifted(
    signals: Mapping[str, Signal],
    readings: Mapping[str, _Reading],
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    ticker: Ticker,
) -> dict[str, Signal]:
    """The signals on all documents that the base reads."""
    result: dict[str, Signal] = {}
    vocabulary = _vocabulary(model, tokenizer)
    ids = {name: reading.ids for name, reading in readings.items()}
    same = [name for name, reading in readings.items() if reading.spans is None]
    others = {name: np.where(signals[name].topk_ids < vocabulary, signals[name].topk_ids, 0) for name in same}
    for name, logprobs, topk_logprobs in opinions(model, tokenizer, ids, others):
        spans = readings[name].spans
        if spans is None:
            result[name] = tokenwise(signals[name], logprobs, topk_logprobs, vocabulary)
        else:
            result[name] = chunkwise(signals[name], logprobs, spans)
        ticker.advance(1)
    return result


def tokenwise(signal: Signal, base: np.ndarray, base_topk: np.ndarray, vocabulary: int) -> Signal:
    """A signal in the base's own tokens: base `[n]` and `[n, k]` are the base's log-probabilities of the same.

    What the base does not know (`vocabulary`) joins the rest of all three distributions.
    """
    assert signal.before is not None
    assert signal.before_topk is not None
    known = np.isfinite(signal.topk_logprobs) & (signal.topk_ids < vocabulary)
    target = _with_rest(base_topk, known) + _with_rest(signal.topk_logprobs, known)
    target -= _with_rest(signal.before_topk, known)
    target[:, :-1][~known] = -np.inf
    total = np.logaddexp.reduce(target, 1)
    topk = signal.topk_logprobs.copy()
    topk[1:] = (target - total[:, None])[1:, :-1]
    logprobs = signal.logprobs.copy()
    logprobs[1:] = np.minimum(base + (signal.logprobs - signal.before) - total, 0)[1:]
    return replace(signal, logprobs=logprobs, topk_logprobs=topk, before=None, before_topk=None)


def _with_rest(logprobs: Float[np.ndarray, "n k"], known: Bool[np.ndarray, "n k"]) -> Float[np.ndarray, "n outcomes"]:
    """Log-probabilities of k tokens, 0 for those that are not known, and of everything but the known."""
    kept = np.where(known, logprobs, 0).astype(np.float64)
    rest = 1 - (np.exp(kept) * known).sum(1, keepdims=True)
    return np.concatenate([kept, np.log(np.clip(rest, LEAST, 1))], 1)


def chunkwise(signal: Signal, base: np.ndarray, spans: Spans) -> Signal:
    """A signal in other tokens than the base's: a chunk's whole log-likelihood is at its first token, 0 at others.

    `base` are the base's log-probabilities of its own tokens. A chunk that the writer has no opinion on has none.
    """
    assert signal.before is not None
    logprobs = signal.logprobs.copy()
    learned = signal.logprobs.astype(np.float64) - signal.before
    for base_from, base_to, start, stop in spans:
        likelihood = float(base[base_from:base_to].sum(dtype=np.float64) + learned[start:stop].sum())
        if np.isfinite(likelihood):
            logprobs[start:stop] = 0
            logprobs[start] = min(likelihood, CERTAIN)
    return replace(signal, logprobs=logprobs, before=None, before_topk=None)
