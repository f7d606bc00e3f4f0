"""What every result stands beside: plain training on the same text at equal server compute, and training on everything.

`pooled_text`: a MoE of copies of the base, plain cross-entropy on exactly the transfer text. `pooled_text_dense`: the
dense base, the same. `dense_kd`: what the joint student starts from under its objective, with all of the budget.
`centralized`: the MoE on all private text, which no federation could do, until held-out text no longer improves.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepfusion import checkpoints
from deepfusion.artifacts import Artifact, Checkpoint, Corpus, Teaching, TransferSet
from deepfusion.config import PLAIN, DistillPhase, EvaluatePhase, Runtime, Training
from deepfusion.data.documents import Document, read_jsonl
from deepfusion.data.lessons import lessons
from deepfusion.data.tokens import Tokenizer
from deepfusion.families import context_length, family
from deepfusion.phases.distill import distill
from deepfusion.students import learn, tokens_within, transfer_lessons

CENTRAL_CHECKS = 20


def pooled_text(
    model: Checkpoint,
    transfer: TransferSet,
    teachings: Sequence[Teaching],
    training: Training,
    *,
    budget: float,
    balance: float,
    seed: int,
    into: Path,
    runtime: Runtime,
) -> Checkpoint:
    """Plain cross-entropy on exactly the transfer text, dense or MoE; asking teachers counts as budget not spent.

    Args:
        budget: token-parameters, forward and backward; what measuring a MoE's router took is part of it, as in tuning.
    """
    budget += sum(teaching.work.token_parameters for teaching in teachings)
    if family(model.model_type).routes:
        budget -= model.work.token_parameters
    text = transfer_lessons(model, transfer, (), training)
    return learn(
        model,
        text,
        PLAIN,
        training,
        tokens=tokens_within(budget, model),
        balance=balance,
        seed=seed,
        into=into,
        runtime=runtime,
    )


def dense_kd(
    base: Checkpoint,
    transfer: TransferSet,
    teachings: Sequence[Teaching],
    config: DistillPhase,
    *,
    budget: float,
    paid: Sequence[Artifact] = (),
    seed: int,
    into: Path,
    runtime: Runtime,
) -> Checkpoint:
    """The joint stage with the whole budget: what a dense student of equal active size makes of the same teachers.

    `paid` is what was made for it alone, and took part of that budget.
    """
    return distill(base, transfer, teachings, config, budget=budget, paid=paid, seed=seed, into=into, runtime=runtime)


def centralized(
    moe: Checkpoint,
    corpus: Corpus,
    training: Training,
    config: EvaluatePhase,
    *,
    balance: float,
    seed: int,
    into: Path,
    runtime: Runtime,
) -> Checkpoint:
    """The MoE of base copies on all devices' text and the public text, to convergence on held-out text."""
    tokenizer = Tokenizer(checkpoints.open_tokenizer(moe.folder))
    documents = {
        document.text: document
        for device in corpus.devices
        for document in read_jsonl(corpus.private(device.id), Document)
    }
    for document in read_jsonl(corpus.public, Document):
        documents.setdefault(document.text, document)
    longest = context_length(checkpoints.open_config(moe.folder))
    text = lessons(documents.values(), tokenizer, training, longest)
    heldout = lessons(read_jsonl(corpus.heldout, Document), tokenizer, training, longest)
    return learn(
        moe,
        text,
        PLAIN,
        training,
        tokens=config.centralized_tokens,
        balance=balance,
        heldout=heldout,
        patience=config.patience,
        seed=seed,
        into=into,
        runtime=runtime,
    )
