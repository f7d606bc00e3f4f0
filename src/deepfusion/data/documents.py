"""The records that text travels in, and their JSONL files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from deepfusion.errors import InputError

R = TypeVar("R", bound=BaseModel)


class Document(BaseModel):
    """One text to learn from. With a prompt, the answer is never cut; without one, `answer` is plain text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    domain: str
    prompt: str = ""
    answer: str
    group: str | None = None  # what is handed to devices as a whole: a fact, a company, a topic
    private: bool = False  # nothing public states it

    @property
    def text(self) -> str:
        """The whole text; the answer begins at byte `len(prompt.encode())`."""
        return self.prompt + self.answer


class TransferDocument(Document):
    """A document of the transfer set, and who knows it."""

    kind: Literal["public", "answered", "sampled"]
    writer: str | None = None  # name of the model that wrote it; its probabilities are kept under this name
    cluster: int | None = None  # the cluster that knows it


class Question(Document):
    """A test question; with options, the right one is `options[answer_idx]`."""

    options: tuple[str, ...] | None = None
    answer_idx: int | None = None


class ScoredQuestion(BaseModel):
    """How one model did on one test question."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    domain: str
    private: bool
    prompt_nats: float  # −log p(prompt)
    prompt_bytes: int
    answer_nats: float  # −log p(answer | prompt), summed over the answer's tokens
    answer_tokens: int
    answer_bytes: int
    correct_tokens: int  # answer tokens that the model would have chosen greedily, given those before
    choice: int | None = None  # option with the highest log-likelihood per byte
    answer_idx: int | None = None


class Judged(BaseModel):
    """What one model wrote in answer to one test question, and what a judge thinks of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    domain: str
    private: bool
    prompt: str
    reference: str  # the right answer
    answer: str  # the model's
    reply: str  # the judge's, in full
    score: float | None  # 0 to 100; none: the reply has no such number


def read_jsonl(path: Path, record: type[R]) -> Iterator[R]:
    """Yield one record a line.

    Raises:
        InputError: names the file and line that is not a valid record.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield record.model_validate_json(line)
            except ValidationError as error:
                fault = error.errors()[0]
                where = ".".join(str(part) for part in fault["loc"])
                raise InputError(f"{path}, line {number}: {where}: {fault['msg']}") from None


def write_jsonl(path: Path, records: Iterable[BaseModel]) -> int:
    """Write one record a line, defaults left out; returns how many."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as lines:
        for record in records:
            lines.write(json.dumps(record.model_dump(exclude_defaults=True), ensure_ascii=False) + "\n")
            count += 1
    return count
