"""Asking a judge: what it is told, what its reply says, and the endpoint in between.

The client is the one that the protocol's owners keep. Every reply is kept as soon as it is there: what has been graded
once is not asked, and not paid, again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepfusion.config import JudgePhase
from deepfusion.data.documents import Question
from deepfusion.errors import InputError

TRIED = 3  # times that a judge is asked for a number before the answer stays ungraded
RETRIES = 4  # of a request that did not get through
THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.-])\d+(?:\.\d+)?")


def check(config: JudgePhase) -> None:
    """Whether the judge can be asked at all; nothing is sent.

    Raises:
        InputError: its client is not installed, or its key is not set.
    """
    if find_spec("openai") is None:
        raise InputError("judge needs the package openai: pip install 'deepfusion-moe[judge]', or leave judge out")
    if config.key is not None and not os.environ.get(config.key):
        raise InputError(
            f"judge.key names the environment variable {config.key}, which is not set: set it to the key of "
            f"{config.url}, or judge.key to none for an endpoint that wants no key"
        )


def request(config: JudgePhase, question: Question, answer: str) -> dict[str, Any]:
    """What the judge is asked about one answer, as fields of a chat completion."""
    told = config.prompt.format(question=question.prompt.strip(), reference=question.answer.strip(), answer=answer)
    return {**config.options, "model": config.model, "messages": [{"role": "user", "content": told}]}


def score_of(reply: str) -> float | None:
    """The first number of a reply, what it thought aside; none where there is none, or none from 0 to 100."""
    found = NUMBER.search(THOUGHTS.sub("", reply))
    value = float(found.group()) if found else -1.0
    return value if 0 <= value <= 100 else None


class Asked:
    """A judge, and all that it has ever replied to in this run's folder."""

    def __init__(self, config: JudgePhase, cache: Path) -> None:
        import openai

        key = os.environ[config.key] if config.key is not None else "none"
        self._client = openai.OpenAI(base_url=config.url, api_key=key, timeout=config.timeout, max_retries=RETRIES)
        self._config, self._cache = config, cache
        cache.mkdir(parents=True, exist_ok=True)

    def graded(self, request: dict[str, Any]) -> tuple[str, float | None]:
        """The reply and the score in it; a reply without one is asked for again, and the last one stands."""
        kept = self._cache / f"{_digest(self._config.url, request)}.json"
        if kept.exists():
            facts = json.loads(kept.read_text(encoding="utf-8"))
            return facts["reply"], facts["score"]
        reply, score = "", None
        for _ in range(TRIED):
            reply = self._reply(request)
            score = score_of(reply)
            if score is not None:
                break
        facts = {"url": self._config.url, "request": request, "reply": reply, "score": score}
        partial = kept.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")
        partial.write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
        partial.replace(kept)
        return reply, score

    def _reply(self, request: dict[str, Any]) -> str:
        import openai

        try:
            completion = self._client.chat.completions.create(**request)
            return completion.choices[0].message.content or ""
        except openai.APIStatusError as error:
            said = f"answered {error.status_code} ({_short(error.message)})"
        except openai.APIConnectionError as error:  # timeouts among them
            said = f"cannot be reached ({_short(str(error.__cause__ or error))})"
        except (openai.OpenAIError, AttributeError, IndexError, TypeError) as error:
            said = f"answered what is no chat completion ({type(error).__name__})"
        raise InputError(
            f"judge: {self._config.url} {said}: see to judge.url, judge.model and judge.key, and run again, which "
            "loses no grade that has been given; or leave judge out"
        )


def _digest(url: str, request: dict[str, Any]) -> str:
    text = json.dumps({"url": url, **request}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _short(text: str) -> str:
    return " ".join(text.split())[:160]
