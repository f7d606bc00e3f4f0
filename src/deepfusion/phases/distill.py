"""Phase II, distillation: what teachers know goes into copies of the base model.

`joint`: one student learns from all documents, each with its own teacher. `branch`: K copies of it go on, each with
its cluster's documents and teachers; branches alone, from public text and averaged proxies, are the published method
(Eq. 11 of arXiv 2602.14301).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deepfusion import alignment, checkpoints
from deepfusion.artifacts import Artifact, Checkpoint, Proxy, Teaching, TransferSet, Upload, Work
from deepfusion.config import Consultation, DistillPhase, Features, Runtime
from deepfusion.data.documents import TransferDocument, read_jsonl
from deepfusion.data.hearing import keep_tokenizer
from deepfusion.data.tokens import Tokenizer
from deepfusion.families import Role, context_length, family
from deepfusion.objectives.vaa import pool_patches, prepared, teacher_layers
from deepfusion.phases.proxy import name_of
from deepfusion.progress import Ticker
from deepfusion.signals import Signal, Signals
from deepfusion.store import link_tree
from deepfusion.students import learn, tokens_within, transfer_lessons, widths
from deepfusion.writing import hidden, next_logits, padded

BATCH = 32  # documents asked about at a time
FFN: frozenset[Role] = frozenset({"ffn"})


def distill(
    student: Checkpoint,
    transfer: TransferSet,
    teachings: Sequence[Teaching],
    config: DistillPhase,
    *,
    budget: float,
    cluster: int | None = None,
    paid: Sequence[Artifact] = (),
    seed: int,
    into: Path,
    runtime: Runtime,
) -> Checkpoint:
    """Train a copy of `student` on the transfer set under the recipe's objective: jointly, or as one cluster's branch.

    Args:
        budget: token-parameters, forward and backward.
        cluster: the branch's cluster; none: joint. A branch about which there is no text stays as it is.
        paid: what was made for this training alone, and took part of its budget.
    """
    budget -= sum(made.work.token_parameters for made in paid)
    share = config.joint_rate if cluster is None else config.branch_rate
    training = config.training.model_copy(update={"learning_rate": config.training.learning_rate * share})
    text = transfer_lessons(
        student,
        transfer,
        teachings,
        training,
        cluster=cluster,
        ask=config.teachers,
        objective=config.objective,
    )
    if not text and cluster is not None:
        link_tree(student.folder, into)
        return checkpoints.as_checkpoint(into, lineage_of=student.lineage)
    return learn(
        student,
        text,
        config.objective,
        training,
        tokens=tokens_within(budget, student),
        trains=FFN if cluster is not None and config.branch_trains == "ffn" else None,
        teacher_widths=widths(teachings),
        seed=seed,
        into=into,
        runtime=runtime,
    )


def consult(
    teacher: Upload | Proxy,
    cluster: int,
    transfer: TransferSet,
    config: Consultation,
    *,
    into: Path,
    runtime: Runtime,
) -> Teaching:
    """Ask one teacher about documents and keep its answers: the teacher cache.

    A proxy is asked about all public documents and those that its cluster knows; a device about what it wrote. Kept
    are the top-k probabilities (all of them if `top_k` is none) and, for VAA, J stages' features pooled over patches.
    """
    name = teacher.device if isinstance(teacher, Upload) else name_of(teacher)
    documents = [
        document
        for document in read_jsonl(transfer.documents, TransferDocument)
        if document.writer == name
        or (isinstance(teacher, Proxy) and (document.kind == "public" or document.cluster == cluster))
    ]
    model = checkpoints.open_model(teacher.model, accelerator=runtime.accelerator)
    tokenizer = Tokenizer(checkpoints.open_tokenizer(teacher.model))
    kept = Signals.load(path) if (path := transfer.signals / f"{name}.safetensors").exists() else None
    ticker = Ticker(into, len(documents), "documents")
    of: dict[str, Signal] = {}
    tokens = 0
    context = context_length(model.config)
    ordered = sorted(documents, key=lambda document: len(document.text))
    for at in range(0, len(ordered), BATCH):
        some = ordered[at : at + BATCH]
        encoded = [(document, _tokens(document, tokenizer, kept)) for document in some]
        fitting = [(d, e) for d, e in encoded if e is not None and (context is None or len(e[0]) <= context)]
        if fitting:
            tokens += sum(len(ids) for _, (ids, _) in fitting)
            of |= _ask(model, tokenizer, fitting, config)
        ticker.advance(len(some))
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
        work=Work(tokens=tokens, forward=float(tokens * teacher.active_parameters)),
    ).sealed()


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
    some: list[tuple[TransferDocument, tuple[list[int], list[int]]]],
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
