"""Agree: of what was written from nothing, what other models have learned too.

A model that writes freely makes things up; what it makes up, nobody else has learned. So every written text is read by
the others that write, and of each cluster's texts those are kept that another model finds much likelier than its own
public ancestor does. What one device alone knows, nobody agrees with: this is for fleets that share what they know.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepfusion.artifacts import Likelihoods, Proxy, TransferSet, Upload
from deepfusion.config import TransferPhase
from deepfusion.data.documents import TransferDocument, read_jsonl, write_jsonl
from deepfusion.phases.proxy import name_of
from deepfusion.store import link_tree


def agree(
    transfer: TransferSet,
    models: Sequence[Upload | Proxy],
    found: Mapping[str, Likelihoods],
    before: Mapping[str, Likelihoods],
    config: TransferPhase,
    *,
    into: Path,
) -> TransferSet:
    """The transfer set with `config.keep_agreed` of each cluster's sampled texts; all other text stays.

    Args:
        transfer: with 1 / `keep_agreed` times as many sampled texts as are wanted.
        models: all that write.
        found: model → how likely it finds each written text.
        before: lineage → the same of the models' public ancestor.
        config: the share.
        into: the step's folder.

    Returns:
        The documents that are left, and all signals; `work` has what reading took beside what writing took.
    """
    learned = {
        name: _learned(before[model.lineage].nats, found[name].nats)
        for model in models
        if (name := model.device if isinstance(model, Upload) else name_of(model)) in found
    }
    documents = list(read_jsonl(transfer.documents, TransferDocument))
    dropped = doubted([document for document in documents if document.kind == "sampled"], learned, config.keep_agreed)
    kept = [document for document in documents if document.id not in dropped]
    write_jsonl(into / "documents.jsonl", kept)
    for folder in (transfer.signals, transfer.tokenizers):
        if folder.is_dir():
            link_tree(folder, into / folder.name)
    counts = Counter(transfer.counts) + Counter({"dropped sampled: nobody agrees": len(dropped)})
    counts["sampled"] -= len(dropped)
    by_writer = Counter(document.writer for document in kept if document.writer is not None)
    known = Counter(document.cluster for document in kept if document.kind != "public")
    work = sum((one.work for one in (*found.values(), *before.values())), transfer.work)
    return transfer.model_copy(
        update={
            "folder": into,
            "counts": dict(sorted(counts.items())),
            "by_writer": {name: by_writer[name] for name in transfer.by_writer if by_writer[name]},
            "per_cluster": tuple(known[cluster] for cluster in range(len(transfer.per_cluster))),
            "work": work,
        }
    ).sealed()


def doubted(
    documents: Sequence[TransferDocument], learned: Mapping[str, Mapping[str, float]], share: float
) -> set[str]:
    """The documents to leave out, so that of each cluster's `share` is left, rounded up.

    Those are left whose best other reader has learned most of them, by nats per byte; of equals the first.

    Args:
        documents: written, with their writers and clusters.
        learned: reader → document → nats by which it finds it likelier than its ancestor does.
        share: more than 0.
    """
    agreed = {
        document.id: max(
            (nats[document.id] for name, nats in learned.items() if name != document.writer and document.id in nats),
            default=-math.inf,
        )
        / max(1, len(document.text.encode()))
        for document in documents
    }
    left_out: set[str] = set()
    for cluster in {document.cluster for document in documents}:
        names = [document.id for document in documents if document.cluster == cluster]
        names.sort(key=lambda name: -agreed[name])  # which is stable
        left_out.update(names[math.ceil(share * len(names)) :])
    return left_out


def _learned(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {document: before[document] - nats for document, nats in after.items() if document in before}
