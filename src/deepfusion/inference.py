"""Trying out a finished checkpoint: its score on a file of questions, and what it writes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import ValidationError

from deepfusion.checkpoints import open_config, open_model, open_tokenizer
from deepfusion.config import EvaluatePhase, FileData, Runtime, TextSource
from deepfusion.data.batches import Tokenizer
from deepfusion.data.corpora import render_prompt
from deepfusion.data.documents import Question, ScoredQuestion, read_jsonl, write_jsonl
from deepfusion.data.tables import read_table
from deepfusion.engine import Watcher
from deepfusion.metrics import ResultRow, summarise
from deepfusion.phases.evaluate import ROWS, evaluate
from deepfusion.worker import settle
from deepfusion.writing import write

PROMPT = FileData.model_fields["prompt"].default


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


def read_questions(data: Path) -> Iterator[Question]:
    """The questions of a file, in the format of `Question`, or the test rows (all, without `split`) of real data.

    Raises:
        ValueError: names the file and line that is neither, or the file that has no test row.
    """
    found = False
    for origin, row in read_table(TextSource(path=str(data))):
        if row.get("split", "test") != "test":
            continue
        found = True
        fields = dict(row)
        if "question" in row:
            fields = {name: row.get(name) for name in ("id", "answer", "options", "answer_idx", "group")}
            fields["domain"] = row.get("domain", "all")
            fields["private"] = bool(row.get("private_group", False))
            fields["prompt"] = render_prompt(PROMPT, str(row["question"]), row.get("context"))
        try:
            yield Question.model_validate_json(json.dumps(fields))
        except ValidationError as error:
            fault = error.errors()[0]
            raise ValueError(f"{origin}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None
    if not found:
        raise ValueError(f"{data} has no row whose split is test: there is nothing to evaluate on")


def _prepare(model: Path, runtime: Runtime) -> None:
    open_config(model)
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[runtime.accelerator]:
        raise ValueError(f"this machine has no {runtime.accelerator}: use --accelerator cpu")
    settle(runtime)
