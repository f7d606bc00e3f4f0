"""One student's training, from checkpoint to checkpoint: open, learn within a budget, save."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from deepfusion import checkpoints
from deepfusion.artifacts import Checkpoint, Teaching, TransferSet, Work
from deepfusion.config import PLAIN, LogitsObjective, Runtime, Training, VAAObjective
from deepfusion.data.batches import Schedule
from deepfusion.data.coverage import SPANS
from deepfusion.data.documents import TransferDocument, read_jsonl
from deepfusion.data.hearing import Heard, hear
from deepfusion.data.lessons import Lesson, focused, lessons, taught
from deepfusion.data.tokens import Tokenizer
from deepfusion.families import Role, context_length, family
from deepfusion.objectives import build_objective
from deepfusion.signals import Signals
from deepfusion.training import Learner, fit

PASSES = 3.0  # a token's forward counts its active parameters once, its backward twice


def tokens_within(budget: float, student: Checkpoint) -> float:
    """Tokens that may be trained on for `budget` token-parameters."""
    return budget / (PASSES * student.active_parameters)


def learn(
    student: Checkpoint,
    text: Sequence[Lesson],
    objective: LogitsObjective,
    training: Training,
    *,
    tokens: float,
    seed: int,
    into: Path,
    runtime: Runtime,
    trains: frozenset[Role] | None = None,
    teacher_widths: Mapping[str, int] | None = None,
    balance: float = 0.0,
    ownership: float = 0.0,
    heldout: Sequence[Lesson] = (),
    patience: int = 3,
) -> Checkpoint:
    """Train a copy of `student` on lessons and save it into `into`.

    Args:
        trains: roles of the tensors that may change; none: all. The rest is frozen.
        heldout: with it, training stops when their loss no longer improves (at `patience`), and the best weights stay.
    """
    model = checkpoints.open_model(student.folder, getattr(torch, training.dtype))
    kind = family(student.model_type)
    if trains is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(kind.role(name) in trains)
    depth = int(model.config.num_hidden_layers)
    learner = Learner(
        model,
        build_objective(objective, int(model.config.hidden_size), depth, teacher_widths or {}),
        balance=balance,
        ownership=ownership,
    )
    schedule = Schedule(text, tokens, training, packs=kind.packs, seed=seed)
    checking = (
        Schedule(heldout, sum(map(len, heldout)), training, packs=kind.packs, seed=seed) if len(heldout) else None
    )
    done = fit(learner, schedule, training, seed=seed, into=into, runtime=runtime, heldout=checking, patience=patience)
    checkpoints.save_model(model, checkpoints.open_tokenizer(student.folder), into)
    active = student.active_parameters
    return checkpoints.as_checkpoint(
        into,
        lineage_of=student.lineage,
        losses=done.losses,
        work=Work(tokens=done.tokens, forward=float(done.tokens * active), backward=2.0 * done.tokens * active),
    )


def transfer_lessons(
    student: Checkpoint,
    transfer: TransferSet,
    teachings: Sequence[Teaching],
    training: Training,
    *,
    cluster: int | None = None,
    ask: str = "writers",
    only_public: bool = False,
    objective: LogitsObjective = PLAIN,
) -> list[Lesson]:
    """The transfer set as lessons for `student`: each document with its teacher's signals, in the student's tokens.

    Args:
        teachings: what teachers said after the fact. A written document's teacher is its writer, by the probabilities
            kept while writing, with the features that it was asked for, if it was; public documents have none.
        cluster: only what this cluster knows; none: everything.
        ask: `writers`: one lesson per document; `proxies`: one per document and teacher of the document's cluster (or
            of `cluster`, which is then asked about every public document, as published);
            `likeliest`: one per document and teacher that has been asked about it.
        only_public: leave out written documents.
        objective: what the lessons are for: its `focus`, the patches of features that it wants, and how it hears
            teachers with other tokenizers.
    """
    documents = list(read_jsonl(transfer.documents, TransferDocument))
    shape = checkpoints.open_config(student.folder)
    longest = context_length(shape) or training.context
    training = training.model_copy(update={"context": min(training.context, longest)})
    tokenizer = Tokenizer(checkpoints.open_tokenizer(student.folder))
    # Of a shifted teacher nothing but the likelihood of chunks has been shifted across tokenizers.
    across = SPANS if transfer.shifted else objective.across
    knows_of = {teaching.teacher: teaching.cluster for teaching in teachings}
    said = hear({one.teacher: (Signals.load(one.signals), one.tokenizers) for one in teachings}, tokenizer, across)
    written = {path.stem: Signals.load(path) for path in sorted(transfer.signals.glob("*.safetensors"))}
    kept = hear({name: (signals, transfer.tokenizers) for name, signals in written.items()}, tokenizer, across)
    writers = said | {name: _featured(one, said[name]) if name in said else one for name, one in kept.items()}
    result: list[Lesson] = []
    for document in documents:
        if only_public and document.kind != "public":
            continue
        about_all = ask == "proxies" and document.kind == "public"
        if cluster is not None and document.cluster != cluster and not about_all:
            continue
        knows = document.cluster if cluster is None else cluster
        if ask == "likeliest":
            teachers = [one for one in said.values() if document.id in one.signals.of]
        elif ask == "proxies":
            teachers = [one for name, one in said.items() if knows_of[name] == knows and document.id in one.signals.of]
        else:
            own = writers.get(document.writer or "")
            teachers = [own] if own is not None and document.id in own.signals.of else []
        owner = -1 if document.cluster is None else document.cluster
        fitting = [
            lesson
            for teacher in teachers
            if (
                lesson := _taught(
                    document,
                    teacher,
                    tokenizer,
                    training,
                    vocabulary=shape.vocab_size,
                    cluster=owner,
                    patches=feature_patches(objective),
                )
            )
        ]
        result += fitting or _untaught(document, tokenizer, training, owner)
    return focused(result, objective.focus)


def _featured(writer: Heard, asked: Heard) -> Heard:
    """A writer, by what it thought while it wrote, with the features that it was asked for afterwards.

    Asked afterwards it has an opinion on prompts too, which it did not write, and which is not taught without VAA.
    """
    of = {
        name: replace(signal, features=asked.signals.of[name].features) if name in asked.signals.of else signal
        for name, signal in writer.signals.of.items()
    }
    return replace(writer, signals=replace(writer.signals, of=of))


def _taught(
    document: TransferDocument, teacher: Heard, tokenizer: Tokenizer, training: Training, **options: int
) -> Lesson | None:
    """`taught`; of a written document that the student's tokenizer cannot spell, none."""
    try:
        return taught(document, teacher.signals.of[document.id], teacher, tokenizer, training, **options)
    except ValueError as error:
        if document.writer is None:
            raise
        print(f"without its teacher: {document.id}: {error}", file=sys.stderr)  # into the step's log
        return None


def _untaught(document: TransferDocument, tokenizer: Tokenizer, training: Training, cluster: int) -> list[Lesson]:
    """A document's plain lesson; of a written one that the student cannot spell, or whose answer is too long, none."""
    try:
        return lessons([document], tokenizer, training, cluster=cluster)
    except ValueError as error:
        if document.writer is None:
            raise
        print(f"left out: {error}", file=sys.stderr)  # into the step's log
        return []


def widths(teachings: Sequence[Teaching]) -> dict[str, int]:
    """Width of the cached features by teacher lineage."""
    return {teaching.lineage: teaching.width for teaching in teachings}


def feature_patches(objective: LogitsObjective) -> int:
    """Patches per stage that the objective wants of teachers' features; 0: none."""
    return objective.patches if isinstance(objective, VAAObjective) else 0
