import json
from functools import cache
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer as Raw
from transformers import PreTrainedTokenizerFast

from deepfusion.data.segmentation import renaming, segmentation
from deepfusion.data.tokens import Tokenizer
from kinds import KINDS, byte_level, llama_style, text, unigram, wrap


def changed(tokenizer: PreTrainedTokenizerFast, change: Any) -> PreTrainedTokenizerFast:
    """The same with something changed in its `tokenizer.json`."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    change(tree)
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token") if getattr(tokenizer, name)}
    return wrap(Raw.from_str(json.dumps(tree)), **special)


def renumbered(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Every token has another number, and merges stay in their order."""

    def change(tree: dict[str, Any]) -> None:
        names = sorted(tree["model"]["vocab"])
        Random(0).shuffle(names)
        tree["model"]["vocab"] = {name: number for number, name in enumerate(names)}
        for token in tree["added_tokens"]:
            token["id"] = tree["model"]["vocab"].get(token["content"], token["id"])

    return changed(tokenizer, change)


@cache
def pair() -> tuple[Tokenizer, Tokenizer]:
    return Tokenizer(byte_level()), Tokenizer(renumbered(byte_level()))


@settings(deadline=None)
@given(text)
def test_renumbered_tokens_are_the_same_tokens(words: str) -> None:
    one, other = pair()
    assert one.fingerprint != other.fingerprint
    assert segmentation(one.raw) == segmentation(other.raw)
    numbers = renaming(one, other)
    ids, ends = one.encode(words)
    assert (numbers[ids].tolist(), ends) == other.encode(words)
    assert (numbers[one.start], numbers[one.end]) == (other.start, other.end)


def test_what_is_put_around_a_text_does_not_count() -> None:
    def other_end(tree: dict[str, Any]) -> None:
        tree["added_tokens"].append({**tree["added_tokens"][0], "id": 900, "content": "<|pad|>", "special": True})
        tree["pre_tokenizer"]["trim_offsets"] = not tree["pre_tokenizer"]["trim_offsets"]
        tree["post_processor"] = None

    assert segmentation(changed(byte_level(), other_end)) == segmentation(byte_level())


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (byte_level, lambda tree: tree["model"]["merges"].pop()),
        (byte_level, lambda tree: tree["pre_tokenizer"].update(add_prefix_space=True)),
        (byte_level, lambda tree: tree.update(normalizer={"type": "Lowercase"})),
        (byte_level, lambda tree: tree["added_tokens"].pop()),
        (llama_style, lambda tree: tree["model"].update(byte_fallback=False)),
        (unigram, lambda tree: tree["model"]["vocab"][3].__setitem__(1, -40.0)),
        (unigram, lambda tree: tree["pre_tokenizer"].update(prepend_scheme="never")),
    ],
)
def test_what_cuts_text_otherwise_is_told_apart(kind: Any, change: Any) -> None:
    assert segmentation(changed(kind(), change)) != segmentation(kind())


def test_kinds_are_told_apart() -> None:
    digests = {name: segmentation(make()) for name, make in KINDS.items()}
    assert len(set(digests.values())) == len(KINDS)
    assert digests == {name: segmentation(make()) for name, make in KINDS.items()}
