"""Device phase: train m_n on the device's own text, embed that text (e_n), and make ready to send both, once."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig

from deepfusion import adapters, checkpoints, codecs, memory
from deepfusion.artifacts import Checkpoint, Corpus, Upload, Work
from deepfusion.config import PLAIN, DevicePhase, Runtime, Training
from deepfusion.data.batches import Schedule
from deepfusion.data.documents import Document, read_jsonl
from deepfusion.data.lessons import Lesson, lessons
from deepfusion.data.tokens import Tokenizer
from deepfusion.encoders import PROJECTION_SEED, embed, encode_texts
from deepfusion.errors import reading_inputs
from deepfusion.families import context_length, family
from deepfusion.objectives import build_objective
from deepfusion.phases.upload import upload_bytes
from deepfusion.precision import usable
from deepfusion.training import Learner, fit

ADAPTER, MODEL = ".adapter", ".model"  # where they are if they are not sent: never part of an artifact


def train_device(
    device: str,
    ancestor: Checkpoint,
    ancestor_name: str,
    corpus: Corpus,
    config: DevicePhase,
    *,
    seed: int,
    sitting: int = 0,
    into: Path,
    runtime: Runtime,
) -> Upload:
    """Train one device's model with the causal LM loss (Eq. 2 of arXiv 2602.14301) and embed its text.

    Of the corpus, only `private/<device>.jsonl` and the public text are read. The upload is `model/`, or `adapter/`, or
    either of them `packed/`, and e_n; no text. Where a device trains several times in a row, each `sitting` (0, 1, …)
    goes on in its text where the last one ended. Its training's peak memory is noted in the folder, and is no part of
    the upload.

    Raises:
        InputError: an answer does not fit the context, there is no such encoder, or the method cannot train such a
            model: the fault of what all were given.
        ValueError: the device has no text, or none with a word; or what it has trained is not finite and cannot be
            packed.
    """
    adapts, saved = config.method != "full", getattr(torch, config.training.dtype)
    # Weights beside an adapter are frozen, and not what is saved.
    dtype = usable(config.training.dtype, runtime.accelerator, into) if adapts else saved
    with reading_inputs():
        private = list(read_jsonl(corpus.private(device), Document))
        encode_texts(config.encoder, [device])  # a broken encoder is told before training, and as what it is
        before = memory.resident()
        model = checkpoints.open_model(ancestor.folder, dtype, nf4=config.method == "qlora")
        if adapts:
            adapters.attach(model, config.lora, seed=seed)
        tokenizer = Tokenizer(checkpoints.open_tokenizer(ancestor.folder))
        kind = family(model.config.model_type)
        text = device_text(private, corpus, tokenizer, config, model.config, seed=seed)
    schedule = text.schedule(config.training, packs=kind.packs, seed=seed, sitting=sitting)
    learner = Learner(model, build_objective(PLAIN, 0, 0, {}))
    done = fit(learner, schedule, config.training, seed=seed, into=into, runtime=runtime)
    memory.note(into, before)
    adapter = into / (config.sends if config.sends == "adapter" else ADAPTER)
    whole = into / (config.sends if config.sends == "model" else MODEL)
    if adapts:
        adapters.save(model, ancestor.folder, config.lora, adapter)
        if config.upload == "merged":
            adapters.merge(ancestor.folder, adapter, config.lora, into=whole)
    else:
        checkpoints.save_model(model.to(saved), tokenizer.raw, whole)
    packing = None
    if config.codec is not None:
        made, lora = (adapter, config.lora) if config.upload == "adapter" else (whole, None)
        packing = codecs.pack(made, ancestor.folder, config.codec, lora, into=into / config.sends)
        shutil.rmtree(made)
    texts = [document.text for document in private]
    embedding = embed(config.encoder, texts, config.embedding_bytes, PROJECTION_SEED)
    active = kind.matrix_parameters(model.config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Upload(
        folder=into,
        device=device,
        ancestor=ancestor_name,
        model_type=ancestor.model_type,
        lineage=ancestor.lineage,
        parameters=ancestor.parameters,
        active_parameters=active,
        tokens=text.own_tokens,
        embedding=embedding.hex(),
        bytes=upload_bytes(into / config.sends, embedding),
        losses=done.losses,
        method=config.method,
        trained_parameters=trained,
        sends=config.sends,
        packing=packing,
        work=_work(done.tokens, active, trained if adapts else 0),
    ).sealed()


@dataclass(frozen=True)
class DeviceText:
    """What a device trains on."""

    lessons: list[Lesson]  # its own, and public ones
    own_tokens: int
    tokens: float  # of the whole training

    def schedule(self, training: Training, *, packs: bool, seed: int, sitting: int) -> Schedule:
        """Its batches in one of several trainings in a row, each of which goes on where the last one ended."""
        return Schedule(self.lessons, self.tokens, training, packs=packs, seed=seed, after=sitting * self.tokens)


def device_text(
    private: Sequence[Document],
    corpus: Corpus,
    tokenizer: Tokenizer,
    config: DevicePhase,
    shape: PreTrainedConfig,
    *,
    seed: int,
    cluster: int = -1,
) -> DeviceText:
    """A device's private text, and as much public text as is to be mixed in; `cluster` is whose its own text is.

    Raises:
        ValueError: an answer does not fit the context.
    """
    context = context_length(shape)
    own = lessons(private, tokenizer, config.training, context, cluster=cluster)
    public = lessons(read_jsonl(corpus.public, Document), tokenizer, config.training, context)
    own_tokens = sum(map(len, own))
    replay = _sample(public, own_tokens * config.replay, seed)
    return DeviceText(own + replay, own_tokens, config.tokens(own_tokens + sum(map(len, replay))))


def _work(tokens: int, active: int, adapter: int) -> Work:
    """Of a training: where there is an adapter, the way back needs the gradients of its weights alone."""
    if not adapter:
        return Work(tokens=tokens, forward=tokens * active, backward=2.0 * tokens * active)
    return Work(tokens=tokens, forward=tokens * (active + adapter), backward=tokens * (active + 2.0 * adapter))


def _sample(public: list[Lesson], tokens: float, seed: int) -> list[Lesson]:
    """Seeded choice of public lessons worth about `tokens`."""
    chosen: list[Lesson] = []
    for index in np.random.default_rng([seed, 1]).permutation(len(public)):
        if tokens <= 0:
            break
        chosen.append(public[index])
        tokens -= len(public[index])
    return chosen
