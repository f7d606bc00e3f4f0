"""Device phase: train m_n on the device's own text, embed that text (e_n), and make ready to send both, once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from deepfusion import checkpoints
from deepfusion.artifacts import Checkpoint, Corpus, Upload, Work
from deepfusion.config import DevicePhase, Runtime
from deepfusion.data.batches import Schedule
from deepfusion.data.documents import Document, read_jsonl
from deepfusion.data.lessons import Lesson, lessons
from deepfusion.data.tokens import Tokenizer
from deepfusion.encoders import PROJECTION_SEED, embed, encode_texts
from deepfusion.errors import reading_inputs
from deepfusion.families import context_length, family
from deepfusion.objectives import build_objective
from deepfusion.phases.upload import upload_bytes
from deepfusion.students import PLAIN
from deepfusion.training import Learner, fit


def train_device(
    device: str,
    ancestor: Checkpoint,
    ancestor_name: str,
    corpus: Corpus,
    config: DevicePhase,
    *,
    seed: int,
    into: Path,
    runtime: Runtime,
) -> Upload:
    """Train one device's model with the causal LM loss (Eq. 2 of arXiv 2602.14301) and embed its text.

    Of the corpus, only `private/<device>.jsonl` and the public text are read. The upload is `model/` and e_n; no text.

    Raises:
        InputError: an answer does not fit the context, or there is no such encoder: the fault of what all were given.
        ValueError: the device has no text, or none with a word.
    """
    with reading_inputs():
        private = list(read_jsonl(corpus.private(device), Document))
        encode_texts(config.encoder, [device])  # a broken encoder is told before training, and as what it is
        model = checkpoints.open_model(ancestor.folder, getattr(torch, config.training.dtype))
        tokenizer = Tokenizer(checkpoints.open_tokenizer(ancestor.folder))
        kind = family(model.config.model_type)
        context = context_length(model.config)
        own = lessons(private, tokenizer, config.training, context)
        public = lessons(read_jsonl(corpus.public, Document), tokenizer, config.training, context)
    own_tokens = sum(map(len, own))
    replay = _sample(public, own_tokens * config.replay, seed)
    tokens = config.epochs * (own_tokens + sum(map(len, replay)))
    schedule = Schedule(own + replay, tokens, config.training, packs=kind.packs, seed=seed)
    learner = Learner(model, build_objective(PLAIN, 0, 0, {}))
    done = fit(learner, schedule, config.training, seed=seed, into=into, runtime=runtime)
    checkpoints.save_model(model.to(getattr(torch, config.training.dtype)), tokenizer.raw, into / "model")
    texts = [document.text for document in private]
    embedding = embed(config.encoder, texts, config.embedding_bytes, PROJECTION_SEED)
    active = kind.matrix_parameters(model.config)
    return Upload(
        folder=into,
        device=device,
        ancestor=ancestor_name,
        model_type=ancestor.model_type,
        lineage=ancestor.lineage,
        parameters=ancestor.parameters,
        active_parameters=active,
        tokens=own_tokens,
        embedding=embedding.hex(),
        bytes=upload_bytes(into / "model", embedding),
        losses=done.losses,
        work=Work(tokens=done.tokens, forward=done.tokens * active, backward=2.0 * done.tokens * active),
    ).sealed()


def _sample(public: list[Lesson], tokens: float, seed: int) -> list[Lesson]:
    """Seeded choice of public lessons worth about `tokens`."""
    chosen: list[Lesson] = []
    for index in np.random.default_rng([seed, 1]).permutation(len(public)):
        if tokens <= 0:
            break
        chosen.append(public[index])
        tokens -= len(public[index])
    return chosen
