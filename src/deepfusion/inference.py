"""Trying out a finished checkpoint: its score on a file of questions, and what it writes."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from deepfusion.checkpoints import check_finite, open_config, open_model, open_tokenizer
from deepfusion.config import EvaluatePhase, Runtime
from deepfusion.data.corpora import read_questions
from deepfusion.data.documents import ScoredQuestion, read_jsonl, write_jsonl
from deepfusion.data.tokens import Tokenizer
from deepfusion.engine import Watcher
from deepfusion.metrics import ResultRow, summarise
from deepfusion.phases.evaluate import ROWS, evaluate
from deepfusion.worker import settle
from deepfusion.writing import write


def score_file(model: Path, data: Path, batch_tokens: int, runtime: Runtime, watch: Watcher) -> list[ResultRow]:
    """Every metric of a checkpoint on a JSONL file of questions, per domain and over all.

    Raises:
        ValueError: there is no checkpoint, no usable question, or no such accelerator; names it.
    """
    _prepare(model, runtime)
    with TemporaryDirectory() as scratch:
        asked, into = Path(scratch) / "questions.jsonl", Path(scratch) / "scores"
        into.mkdir()
        write_jsonl(asked, read_questions(data))
        config = EvaluatePhase(batch_tokens=batch_tokens)
        began = time.monotonic()
        watch.started("evaluate", into)
        evaluate(model, asked, config, system=model.name, item=None, into=into, runtime=runtime)
        watch.finished("evaluate", time.monotonic() - began, cached=False)
        return summarise(read_jsonl(into / ROWS, ScoredQuestion), system=model.name, seed=0)


def complete(model: Path, prompt: str, max_new_tokens: int, temperature: float, seed: int, runtime: Runtime) -> str:
    """The prompt and what a checkpoint writes after it, until it ends by itself or has written `max_new_tokens`.

    Raises:
        ValueError: there is no checkpoint or no such accelerator; names it.
    """
    _prepare(model, runtime)
    network: Any = open_model(model)
    network.to(runtime.accelerator)
    generator = torch.Generator(runtime.accelerator).manual_seed(seed)
    [written] = write(
        network,
        Tokenizer(open_tokenizer(model)),
        [prompt],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=1,
        generator=generator,
    )
    return written.text


def _prepare(model: Path, runtime: Runtime) -> None:
    open_config(model)
    check_finite(model)  # its scores would be no numbers, and what it writes nothing
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[runtime.accelerator]:
        raise ValueError(f"this machine has no {runtime.accelerator}: use --accelerator cpu")
    settle(runtime)
