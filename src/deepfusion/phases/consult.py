"""Asking teachers about finished documents: what they think comes next, and how likely they find a text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deepfusion import alignment, checkpoints
from deepfusion.artifacts import Checkpoint, Likelihoods, Proxy, Teaching, TransferSet, Upload, Work
from deepfusion.config import Consultation, Features, Runtime
from deepfusion.data.documents import TransferDocument, read_jsonl
from deepfusion.data.hearing import keep_tokenizer
from deepfusion.data.tokens import Tokenizer
from deepfusion.families import context_length, family
from deepfusion.objectives.vaa import pool_patches, prepared, teacher_layers
from deepfusion.phases.proxy import name_of
from deepfusion.progress import Ticker
from deepfusion.signals import Signal, Signals
from deepfusion.writing import hidden, next_logits, padded

BATCH = 32  # documents asked about at a time
Encoded = tuple[TransferDocument, tuple[list[int], list[int]]]  # a document, its tokens, and where each of them ends


def consult(
    teacher: Upload | Proxy,
    cluster: int,
    transfer: TransferSet,
    config: Consultation,
    among: Mapping[str, Likelihoods] | None = None,
    student: Likelihoods | None = None,
    *,
    into: Path,
    runtime: Runtime,
) -> Teaching:
    """Ask one teacher about documents and keep its answers: the teacher cache.

    A proxy is asked about all public documents and those that its cluster knows; a device about what it wrote; and
    with `among` any teacher about those that `likeliest` gives it. Kept are the top-k probabilities (all of them if
    `top_k` is none) and, for VAA, J stages' features pooled over patches.

    Args:
        among: teacher → how likely it finds each document, of all who may teach it. Finding out is part of this
            teacher's work, as is its share of asking the student.
        student: the same of the student.
    """
    name = teacher.device if isinstance(teacher, Upload) else name_of(teacher)
    documents = list(read_jsonl(transfer.documents, TransferDocument))
    before = Work()
    if among is not None and student is not None:
        chosen = likeliest({one: found.nats for one, found in among.items()}, student.nats)
        documents = [document for document in documents if chosen.get(document.id) == name]
        before = among[name].work + Work(forward=student.work.forward / len(among))
    else:
        documents = [
            document
            for document in documents
            if document.writer == name
            or (isinstance(teacher, Proxy) and (document.kind == "public" or document.cluster == cluster))
        ]
    model = checkpoints.open_model(teacher.model, accelerator=runtime.accelerator)
    tokenizer = Tokenizer(checkpoints.open_tokenizer(teacher.model))
    kept = _kept(transfer, name)
    of: dict[str, Signal] = {}
    tokens = 0
    for fitting in _batches(documents, model, tokenizer, kept, into):
        tokens += sum(len(ids) for _, (ids, _) in fitting)
        of |= _ask(model, tokenizer, fitting, config)
    # What a document's writer learned in private was noted while it wrote.
    gains = {name: signal.gain for name, signal in kept.of.items()} if kept else {}
    of = {d.id: replace(of[d.id], gain=gains.get(d.id)) for d in documents if d.id in of}
    if config.features is not None:
        of = _prepared(of, config.features)
    signals = Signals(tokenizer.fingerprint, teacher.lineage, of)
    signals.save(into / "signals.safetensors")
    keep_tokenizer(tokenizer.fingerprint, teacher.model, into / "tokenizers")
    return Teaching(
        folder=into,
        teacher=name,
        cluster=cluster,
        lineage=teacher.lineage,
        width=int(model.config.hidden_size),
        work=before + Work(tokens=tokens, forward=float(tokens * teacher.active_parameters)),
    ).sealed()


@torch.no_grad()
def likelihoods(
    model: Checkpoint | Upload | Proxy,
    transfer: TransferSet,
    kinds: Sequence[str] = ("public", "answered", "sampled"),
    *,
    into: Path,
    runtime: Runtime,
) -> Likelihoods:
    """How likely a model finds each document, of some kinds, of the transfer set: of `l_k` of FedMKT (arXiv 2406.02224)
    the whole document's nats, which mean the same whatever its tokens are.

    A writer's own documents are taken in the tokens that it wrote. Documents that the model cannot spell or that are
    longer than its context have none.
    """
    folder = model.folder if isinstance(model, Checkpoint) else model.model
    name = model.device if isinstance(model, Upload) else None
    if isinstance(model, Proxy):
        name = name_of(model)
    opened = checkpoints.open_model(folder, accelerator=runtime.accelerator)
    tokenizer = Tokenizer(checkpoints.open_tokenizer(folder))
    documents = [document for document in read_jsonl(transfer.documents, TransferDocument) if document.kind in kinds]
    nats: dict[str, float] = {}
    tokens = 0
    for fitting in _batches(documents, opened, tokenizer, _kept(transfer, name) if name else None, into):
        tokens += sum(len(ids) for _, (ids, _) in fitting)
        ids, mask = padded([ids for _, (ids, _) in fitting], tokenizer.end, opened.device)
        found = [
            torch.log_softmax(logits.float(), -1).gather(2, ids[:, 1:, None][:, block])[..., 0]
            for block, logits in next_logits(opened, hidden(opened, ids, mask), tokenizer)
        ]
        each = (torch.cat(found, 1) * mask[:, 1:]).sum(1)
        nats |= {document.id: -float(total) for (document, _), total in zip(fitting, each, strict=True)}
    return Likelihoods(
        folder=into,
        nats={document.id: nats[document.id] for document in documents if document.id in nats},
        work=Work(tokens=tokens, forward=float(tokens * model.active_parameters)),
    ).sealed()


def likeliest(teachers: Mapping[str, Mapping[str, float]], student: Mapping[str, float]) -> dict[str, str]:
    """Document → its teacher: who finds it likeliest, if that one finds it likelier than the student does.

    This is DualMinCE (arXiv 2406.02224), on isolated documents: on packed rows it rejects nearly all.

    Args:
        teachers: teacher → document → nats of the whole document; of equals the first is taken.
        student: document → the student's.
    """
    chosen: dict[str, str] = {}
    for document, own in student.items():
        found = {name: nats[document] for name, nats in teachers.items() if document in nats}
        best = min(found, key=lambda name: found[name], default=None)
        if best is not None and found[best] < own:
            chosen[document] = best
    return chosen


def _kept(transfer: TransferSet, writer: str) -> Signals | None:
    """What a writer thought while it wrote; none of who wrote nothing."""
    path = transfer.signals / f"{writer}.safetensors"
    return Signals.load(path) if path.exists() else None


def _batches(
    documents: Iterable[TransferDocument],
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    kept: Signals | None,
    into: Path,
) -> Iterator[list[Encoded]]:
    """Documents of like length in batches, with their tokens, but for those that the model cannot take."""
    context = context_length(model.config)
    ordered = sorted(documents, key=lambda document: len(document.text))
    ticker = Ticker(into, len(ordered), "documents")
    for at in range(0, len(ordered), BATCH):
        some = ordered[at : at + BATCH]
        encoded = [(document, _tokens(document, tokenizer, kept)) for document in some]
        fitting = [(d, e) for d, e in encoded if e is not None and (context is None or len(e[0]) <= context)]
        if fitting:
            yield fitting
        ticker.advance(len(some))


def _tokens(
    document: TransferDocument, tokenizer: Tokenizer, kept: Signals | None
) -> tuple[list[int], list[int]] | None:
    """A document in the teacher's tokens: those it wrote, if it did; none if another wrote what it cannot spell."""
    if kept is not None and document.id in kept.of:
        return kept.of[document.id].ids.tolist(), kept.of[document.id].ends.tolist()
    try:
        ids, ends = tokenizer.encode(document.text)
    except ValueError as error:
        if document.writer is None:
            raise
        print(f"not asked about {document.id}: {error}", file=sys.stderr)  # into the step's log
        return None
    return [tokenizer.start, *ids, tokenizer.end], [0, *ends, ends[-1] if ends else 0]


@torch.no_grad()
def _ask(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    some: Sequence[Encoded],
    config: Consultation,
) -> dict[str, Signal]:
    ids, mask = padded([tokens for _, (tokens, _) in some], tokenizer.end, model.device)
    if config.features is not None:
        states, layers = family(model.config.model_type).hidden_states(model, ids, mask)
    else:
        states, layers = hidden(model, ids, mask), ()
    chosen: list[Tensor] = []
    best_ids: list[Tensor] = []
    best: list[Tensor] = []
    for block, logits in next_logits(model, states, tokenizer):
        log_p = torch.log_softmax(logits.float(), -1)
        kept = log_p.topk(min(config.top_k or log_p.shape[-1], log_p.shape[-1]), -1)
        chosen.append(log_p.gather(2, ids[:, 1:, None][:, block])[..., 0])
        best_ids.append(kept.indices.int())
        best.append(kept.values.half())
    said = [torch.cat(blocks, 1).cpu().numpy() for blocks in (chosen, best_ids, best)]
    result: dict[str, Signal] = {}
    for row, (document, (tokens, ends)) in enumerate(some):
        logprobs, topk_ids, topk_logprobs = (_after_start(values[row, : len(tokens) - 1]) for values in said)
        result[document.id] = Signal(
            ids=np.array(tokens, np.int32),
            ends=np.array(ends, np.int32),
            logprobs=logprobs,
            topk_ids=topk_ids,
            topk_logprobs=topk_logprobs,
            features=_features(layers, row, document, ends, config.features) if config.features else None,
        )
    return result


def _after_start(values: np.ndarray) -> np.ndarray:
    """A row of zeros for the start token, then the values."""
    return np.concatenate([np.zeros_like(values[:1]), values])


def _features(
    hidden_states: tuple[Tensor, ...], row: int, document: TransferDocument, ends: list[int], wanted: Features
) -> np.ndarray:
    total = len(document.text.encode())
    membership = [(t + 1, p) for t, p in alignment.patch_membership(ends[1:-1], total, wanted.patches)]
    layers = teacher_layers(len(hidden_states) - 1, wanted)
    pooled = [pool_patches(hidden_states[layer][row], membership, wanted.patches) for layer in layers]
    return torch.stack(pooled).float().cpu().numpy()


def _prepared(of: dict[str, Signal], wanted: Features) -> dict[str, Signal]:
    """The signals with their features as they are kept, which takes all documents' at once."""
    if not of:
        return of
    raw = torch.from_numpy(np.stack([signal.features for signal in of.values() if signal.features is not None]))
    features = prepared(raw, wanted.standardise)
    return {
        name: replace(signal, features=features[number].numpy().astype(np.float16))
        for number, (name, signal) in enumerate(of.items())
    }
