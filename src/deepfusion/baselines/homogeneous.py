"""What others do whose devices all train copies of one model: the server's base.

`fedavg_dense`: federated averaging (arXiv 1602.05629). In each round every device trains the model that it is sent on
its own text and sends it back; their mean, weighted by tokens, is sent in the next round. `btx`: Branch-Train-MiX
(arXiv 2403.07816) with one upload: every device trains the base, the models of a cluster are averaged, the means' FFNs
become the experts of an MoE, which is trained on the transfer text without teachers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from deepfusion import checkpoints
from deepfusion.artifacts import Checkpoint, Corpus, Round, Upload
from deepfusion.config import PLAIN, Runtime, Training
from deepfusion.data.batches import Schedule, collate
from deepfusion.data.documents import Document, read_jsonl
from deepfusion.data.lessons import lessons
from deepfusion.data.tokens import Tokenizer
from deepfusion.families import context_length, family
from deepfusion.objectives import build_objective
from deepfusion.phases.proxy import average_folders
from deepfusion.phases.upload import upload_bytes
from deepfusion.store import link_tree
from deepfusion.training import Learner


def average_round(
    sent: Checkpoint,
    uploads: Sequence[Upload],
    weights: Literal["uniform", "tokens"],
    *,
    into: Path,
    resume: bool = False,
) -> Round:
    """The mean of what devices made of one model: Σ (n_k / n) w_k, with n_k tokens of device k or all alike.

    Memory holds blocks of a few tensors, whatever the number and size of models.

    Args:
        sent: what every device was sent; a `Round` hands on what came before it.
        uploads: what devices made of it, one each.
        weights: whether a device counts by its number of private tokens.
        into: where the mean goes.
        resume: keep what an interrupted call with the same arguments has finished.

    Raises:
        ValueError: there is no upload, or one is of another lineage than what was sent.
    """
    if not uploads:
        raise ValueError("no device has sent a model: there is nothing to average")
    for upload in uploads:
        if upload.lineage != sent.lineage:
            raise ValueError(f"{upload.device} sent a model of lineage {upload.lineage} and was sent {sent.lineage}")
    counts = [upload.tokens if weights == "tokens" else 1 for upload in uploads]
    if len(uploads) == 1:
        link_tree(uploads[0].model, into)
    else:
        average_folders([u.model for u in uploads], [n / sum(counts) for n in counts], into=into, resume=resume)
    before = sent if isinstance(sent, Round) else None
    made = checkpoints.as_checkpoint(into, lineage_of=sent.lineage)
    return Round(
        **made.model_dump(exclude={"digest"}),
        number=1 + (before.number if before else 0),
        down_bytes=len(uploads) * upload_bytes(sent.folder, b"") + (before.down_bytes if before else 0),
        up_bytes=sum(upload.bytes for upload in uploads) + (before.up_bytes if before else 0),
    ).sealed()


def best_round(rounds: Sequence[Round], corpus: Corpus, training: Training, *, into: Path, runtime: Runtime) -> Round:
    """The round whose model finds held-out private text likeliest; the last one where none was kept aside."""
    kept = list(read_jsonl(corpus.heldout, Document))
    losses = [heldout_loss(one, kept, training, runtime) if kept else 0.0 for one in rounds]
    best = losses.index(min(losses)) if kept else len(rounds) - 1
    link_tree(rounds[best].folder, into)
    told = tuple((one.number, round(loss, 6)) for one, loss in zip(rounds, losses, strict=True)) if kept else ()
    return rounds[best].model_copy(update={"folder": into, "heldout": told}).sealed()


@torch.inference_mode()
def heldout_loss(model: Checkpoint, kept: Sequence[Document], training: Training, runtime: Runtime) -> float:
    """Mean training loss of documents that nobody trained on, batch by batch."""
    network = checkpoints.open_model(model.folder, accelerator=runtime.accelerator)
    tokenizer = Tokenizer(checkpoints.open_tokenizer(model.folder))
    text = lessons(kept, tokenizer, training, context_length(network.config))
    packs = family(model.model_type).packs
    learner = Learner(network, build_objective(PLAIN, 0, 0, {})).eval()
    batches = Schedule(text, sum(map(len, text)), training, packs=packs, seed=0)
    found = [
        float(learner(**{name: tensor.to(runtime.accelerator) for name, tensor in collate([batch]).items()})["loss"])
        for batch in (batches[number] for number in range(len(batches)))
    ]
    return sum(found) / len(found)
