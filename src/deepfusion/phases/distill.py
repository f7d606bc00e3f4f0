"""Phase II, distillation: what teachers know goes into copies of the base model.

`joint`: one student learns from all documents, each with its own teacher. `branch`: K copies of it go on, each with
its cluster's documents and teachers; branches alone, from public text and averaged proxies, are the published method
(Eq. 11 of arXiv 2602.14301).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deepfusion import alignment, checkpoints
from deepfusion.artifacts import Checkpoint, Proxy, Teaching, TransferSet, Upload, Work
from deepfusion.config import DistillPhase, LogitsObjective, Runtime, VAAObjective
from deepfusion.data.batches import Tokenizer
from deepfusion.data.documents import TransferDocument, read_jsonl
from deepfusion.families import Role
from deepfusion.objectives.vaa import pool_patches, stage_ends, standardise
from deepfusion.phases.proxy import name_of
from deepfusion.progress import Ticker
from deepfusion.signals import Signal, Signals
from deepfusion.store import link_tree
from deepfusion.students import feature_patches, learn, tokens_within, transfer_lessons, widths

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
    seed: int,
    into: Path,
    runtime: Runtime,
) -> Checkpoint:
    """Train a copy of `student` on the transfer set under the recipe's objective: jointly, or as one cluster's branch.

    Args:
        budget: token-parameters, forward and backward.
        cluster: the branch's cluster; none: joint. A branch about which there is no text stays as it is.
    """
    training = config.training
    if cluster is not None:
        training = training.model_copy(update={"learning_rate": training.learning_rate * config.branch_rate})
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
    config: DistillPhase,
    *,
    into: Path,
    runtime: Runtime,
) -> Teaching:
    """Ask one teacher about documents and keep its answers: the teacher cache.

    A proxy is asked about all public documents and those that its cluster knows; a device about what it wrote. Kept
    are the top-k probabilities (all of them if `teacher_top_k` is none) and, for VAA, J stages' features pooled over
    patches.
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
    context = getattr(model.config, "max_position_embeddings", None)
    ordered = sorted(documents, key=lambda document: len(document.text))
    for at in range(0, len(ordered), BATCH):
        some = ordered[at : at + BATCH]
        encoded = [_tokens(document, tokenizer, kept) for document in some]
        fitting = [(d, e) for d, e in zip(some, encoded, strict=True) if context is None or len(e[0]) <= context]
        if fitting:
            tokens += sum(len(ids) for _, (ids, _) in fitting)
            of |= _ask(model, tokenizer, fitting, config)
        ticker.advance(len(some))
    # What a document's writer learned in private was noted while it wrote.
    gains = {name: signal.gain for name, signal in kept.of.items()} if kept else {}
    of = {d.id: replace(of[d.id], gain=gains.get(d.id)) for d in documents if d.id in of}
    if isinstance(config.objective, VAAObjective):
        of = _standardised(of, config.objective)
    signals = Signals(tokenizer.fingerprint, teacher.lineage, of)
    signals.save(into / "signals.safetensors")
    return Teaching(
        folder=into,
        teacher=name,
        cluster=cluster,
        lineage=teacher.lineage,
        width=int(model.config.hidden_size),
        work=Work(tokens=tokens, forward=float(tokens * teacher.active_parameters)),
    ).sealed()


def _tokens(document: TransferDocument, tokenizer: Tokenizer, kept: Signals | None) -> tuple[list[int], list[int]]:
    """A document in the teacher's tokens: those it wrote, if it did."""
    if kept is not None and document.id in kept.of:
        return kept.of[document.id].ids.tolist(), kept.of[document.id].ends.tolist()
    ids, ends = tokenizer.encode(document.text)
    return [tokenizer.start, *ids, tokenizer.end], [0, *ends, ends[-1] if ends else 0]


@torch.no_grad()
def _ask(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    some: list[tuple[TransferDocument, tuple[list[int], list[int]]]],
    config: DistillPhase,
) -> dict[str, Signal]:
    width = max(len(ids) for _, (ids, _) in some)
    ids = torch.full((len(some), width), tokenizer.end)
    mask = torch.zeros(len(some), width, dtype=torch.long)
    for row, (_, (tokens, _)) in enumerate(some):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    patches = feature_patches(config.objective)
    outputs = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=bool(patches))
    log_p = torch.log_softmax(outputs.logits[:, :-1].float(), -1)
    best = log_p.topk(min(config.teacher_top_k or log_p.shape[-1], log_p.shape[-1]), -1)
    chosen = log_p.gather(2, ids[:, 1:, None])[..., 0]
    result: dict[str, Signal] = {}
    for row, (document, (tokens, ends)) in enumerate(some):
        n = len(tokens)
        result[document.id] = Signal(
            ids=np.array(tokens, np.int32),
            ends=np.array(ends, np.int32),
            logprobs=_after_start(chosen[row, : n - 1]).astype(np.float32),
            topk_ids=_after_start(best.indices[row, : n - 1]).astype(np.int32),
            topk_logprobs=_after_start(best.values[row, : n - 1]).astype(np.float16),
            features=_features(outputs.hidden_states, row, document, ends, config.objective) if patches else None,
        )
    return result


def _after_start(values: Tensor) -> np.ndarray:
    """A row of zeros for the start token, then the values."""
    array = values.cpu().numpy()
    return np.concatenate([np.zeros_like(array[:1]), array])


def _features(
    hidden_states: tuple[Tensor, ...], row: int, document: TransferDocument, ends: list[int], objective: LogitsObjective
) -> np.ndarray:
    assert isinstance(objective, VAAObjective)
    total = len(document.text.encode())
    membership = [(t + 1, p) for t, p in alignment.patch_membership(ends[1:-1], total, objective.patches)]
    stages = stage_ends(len(hidden_states) - 1, objective.stages)
    pooled = [pool_patches(hidden_states[stage][row], membership, objective.patches) for stage in stages]
    return torch.stack(pooled).float().cpu().numpy()


def _standardised(of: dict[str, Signal], objective: VAAObjective) -> dict[str, Signal]:
    """Features with mean 0 and deviation 1 per stage and dimension over all documents, if the recipe says so."""
    if not of:
        return of
    raw = torch.from_numpy(np.stack([signal.features for signal in of.values() if signal.features is not None]))
    features = standardise(raw)[0] if objective.standardise else raw
    return {
        name: replace(signal, features=features[number].numpy().astype(np.float16))
        for number, (name, signal) in enumerate(of.items())
    }
