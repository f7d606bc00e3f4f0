"""Who grades what the models answer."""

from __future__ import annotations

import string
from typing import Any

from pydantic import Field, field_validator

from deepfusion.config.section import Section

PROMPT = """You grade an answer to a question, beside a reference answer that is right.

Question:
{question}

Reference answer:
{reference}

Answer to grade:
{answer}

How right and how complete is the answer, measured by the reference? Wording and length do not matter. Reply with one
whole number from 0 (wrong, or no answer) to 100 (as right and complete as the reference), and nothing else."""


class JudgePhase(Section):
    """An LLM behind an OpenAI-compatible endpoint grades what the base, the MoE and the references answer to test
    questions, from 0 to 100. *Test questions, right answers and what models wrote are sent to it*.
    """

    url: str
    """The endpoint, as `https://host/v1`; any server that has `chat/completions` below it."""
    model: str
    """The judge's name there."""
    key: str | None = "OPENAI_API_KEY"
    """The environment variable that holds the endpoint's key; none for an endpoint without."""
    questions: int = Field(default=50, ge=1)
    """Most test questions of each domain; taken evenly from all that have a prompt, the same for every system."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Most tokens of an answer; models answer greedily."""
    prompt: str = PROMPT
    """What the judge is told, with {question}, {reference} and {answer} in it. The score is its reply's first
    number."""
    options: dict[str, Any] = Field(default={"temperature": 0})
    """Further fields of every request, as in `{temperature: 0, max_tokens: 8}`."""
    parallel: int = Field(default=4, ge=1)
    """Requests at a time."""
    timeout: float = Field(default=60, gt=0)
    """Seconds that one request may take; it is tried again four times, with growing pauses."""

    @field_validator("url")
    @classmethod
    def _an_address(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"must begin with http:// or https://, not {url!r}")
        return url.rstrip("/")

    @field_validator("prompt")
    @classmethod
    def _with_all_parts(cls, prompt: str) -> str:
        try:
            named = [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]
        except ValueError as error:
            raise ValueError(f"is no template: {error} (write a brace as two)") from None
        if set(named) != {"question", "reference", "answer"}:
            raise ValueError("must have {question}, {reference} and {answer} in it, and nothing else in braces")
        return prompt
