"""Where devices and the base model start from: given checkpoints, or tiny ones made on the spot from public text."""

from __future__ import annotations

from pathlib import Path

import torch

from deepfusion import checkpoints
from deepfusion.artifacts import Checkpoint, Corpus, Work
from deepfusion.config import PLAIN, MadeModel, Runtime
from deepfusion.data.batches import Schedule
from deepfusion.data.documents import Document, read_jsonl
from deepfusion.data.lessons import lessons
from deepfusion.data.tokens import Tokenizer
from deepfusion.errors import reading_inputs
from deepfusion.families import family
from deepfusion.objectives import build_objective
from deepfusion.store import link_tree
from deepfusion.training import Learner, fit


def make(made: MadeModel, corpus: Corpus, *, seed: int, into: Path, runtime: Runtime) -> Checkpoint:
    """Initialise a tiny model, train its tokenizer and then the model on the public text.

    The tokenizer depends on the public text and `made.vocab` alone, so that models with equal `vocab` share it.
    """
    documents = list(read_jsonl(corpus.public, Document))
    questions = [document.text for document in read_jsonl(corpus.questions, Document)]
    raw = checkpoints.make_tokenizer([document.text for document in documents] + questions, made.vocab)
    tokenizer = Tokenizer(raw)
    model = checkpoints.make_model(made, raw, seed)
    work, losses = Work(), ()
    if made.tokens:
        kind = family(model.config.model_type)
        schedule = Schedule(
            lessons(documents, tokenizer, made.training, made.context),
            made.tokens,
            made.training,
            packs=kind.packs,
            seed=seed,
        )
        learner = Learner(model, build_objective(PLAIN, 0, 0, {}))
        done = fit(learner, schedule, made.training, seed=seed, into=into, runtime=runtime)
        active = kind.matrix_parameters(model.config)
        work = Work(tokens=done.tokens, forward=done.tokens * active, backward=2.0 * done.tokens * active)
        losses = done.losses
    checkpoints.save_model(model.to(getattr(torch, made.training.dtype)), raw, into)
    return checkpoints.as_checkpoint(into, work=work, losses=losses)


def take(path: str, *, into: Path) -> Checkpoint:
    """Take a given checkpoint folder into the store, by hard links where possible.

    Raises:
        InputError: the folder is not a checkpoint that we can read; names what is wrong with it.
    """
    folder = Path(path)
    with reading_inputs():
        checkpoints.validate(folder)
        checkpoints.open_tokenizer(folder)  # here, where the message still names the folder that was given
    link_tree(folder, into)
    return checkpoints.as_checkpoint(into)
