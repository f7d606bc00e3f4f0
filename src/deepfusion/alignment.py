"""Where tokens lie in the bytes of a text: what two tokenizers have in common, whatever their vocabularies.

Spans are counted in bytes, for byte-level tokenizers cut characters apart and their character offsets then overlap.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

_UNDERLINE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's visible space, U+2581
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


# ── vocabularies ──────────────────────────────────────────────────────────────────────────────────────────────────────


def vocabulary_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes that each token id stands for; `b""` for special tokens and unused ids.

    Byte-level BPE and SentencePiece-style vocabularies are told apart by the tokenizer's own decoder.

    Raises:
        ValueError: the tokenizer is of neither kind, so its tokens do not determine the text.
    """
    kinds = _decoder_types(tokenizer)
    if "ByteLevel" in kinds:
        to_bytes = _byte_level
    elif kinds & {"Metaspace", "Replace", "ByteFallback"}:
        to_bytes = _sentencepiece
    else:
        raise ValueError(
            f"tokenizer {_name(tokenizer)} decodes by {sorted(kinds) or 'nothing known'}: only byte-level and "
            "SentencePiece-style tokenizers give every token its bytes; choose a model that has one of these"
        )
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        table[index] = to_bytes(token)
    for index, token in added.items():  # added tokens are matched in the text itself, not in its byte-level spelling
        literal = token.content if to_bytes is _byte_level else token.content.replace(_UNDERLINE, " ")
        table[index] = b"" if token.special else literal.encode()
    return table


def start_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before every document: bos, or eos where there is no bos."""
    return _special(tokenizer, tokenizer.bos_token_id, tokenizer.eos_token_id)


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token after every document: eos, or bos where there is no eos."""
    return _special(tokenizer, tokenizer.eos_token_id, tokenizer.bos_token_id)


def _special(tokenizer: PreTrainedTokenizerBase, first: Any, second: Any) -> int:
    index = second if first is None else first
    if not isinstance(index, int):
        raise ValueError(f"tokenizer {_name(tokenizer)} has neither a bos nor an eos token: set `eos_token`")
    return index


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__


def _decoder_types(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Types of the steps of a fast tokenizer's decoder; none for one that has no `tokenizers` backend."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    tree = json.loads(decoder.__getstate__())
    return {step["type"] for step in tree.get("decoders", [tree])}


def _gpt2_alphabet() -> dict[str, int]:
    """Character → byte of the byte-level spelling: printable bytes stand for themselves, the others begin at U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_ALPHABET = _gpt2_alphabet()


def _byte_level(token: str) -> bytes:
    if all(character in _ALPHABET for character in token):
        return bytes(_ALPHABET[character] for character in token)
    return token.encode()


def _sentencepiece(token: str) -> bytes:
    fallback = _FALLBACK.fullmatch(token)
    return bytes([int(fallback[1], 16)]) if fallback else token.replace(_UNDERLINE, " ").encode()


# ── spans ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def encode(tokenizer: PreTrainedTokenizerBase, text: str, table: Sequence[bytes]) -> tuple[list[int], list[int]]:
    """Token ids of `text` without special tokens, and each token's end in `text.encode()`.

    Special tokens spelt out in the text are text: byte for byte what they look like. A dummy space that the tokenizer
    puts before the text belongs to no byte: the first token's span is one byte shorter.

    Args:
        tokenizer: a fast tokenizer.
        text: any text.
        table: its `vocabulary_bytes`.

    Raises:
        ValueError: the text is not Unicode, or the tokens do not spell it byte for byte.
    """
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has an unpaired surrogate at character {error.start}: it is not Unicode, clean it first"
        ) from None
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    pieces = [table[index] or str(tokenizer.convert_ids_to_tokens(index)).encode() for index in ids]
    ends = list(accumulate(map(len, pieces)))
    spelt = b"".join(pieces)
    if spelt == content:
        return ids, ends
    if spelt == b" " + content:
        return ids, [max(end - 1, 0) for end in ends]
    return ids, _walk(pieces, content, _name(tokenizer))


def _walk(pieces: Sequence[bytes], content: bytes, name: str) -> list[int]:
    """Ends of pieces that spell `content` but for its literal U+2581, which SentencePiece cannot tell from a space."""
    underline = _UNDERLINE.encode()
    spelt, normal = b"".join(pieces), content.replace(underline, b" ")
    dummy = int(spelt.startswith(b" ") and _agreement(spelt[1:], normal) >= _agreement(spelt, normal))
    covered = [0] * (dummy + 1)  # bytes of `content` spelt by the first n bytes of `spelt`
    for _ in normal:
        covered.append(covered[-1] + (len(underline) if content.startswith(underline, covered[-1]) else 1))
    if spelt[dummy:] != normal:
        same = dummy + _agreement(spelt[dummy:], normal)
        at = covered[same]
        raise ValueError(
            f"tokenizer {name} does not spell this text: byte {at} differs (text {content[at : at + 8]!r}, tokens "
            f"{spelt[same : same + 8]!r}); it normalises text or lacks a character: normalise the text first, e.g. NFC"
        )
    return [covered[end] for end in accumulate(map(len, pieces))]


def _agreement(a: bytes, b: bytes) -> int:
    """How many first bytes are the same."""
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


def chunks(ends_a: Sequence[int], ends_b: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """The smallest groups of tokens of two tokenizations of one text that cover the same bytes.

    Args:
        ends_a: each token's end in bytes, never falling.
        ends_b: the same for the other tokenization.

    Returns:
        (a_from, a_to, b_from, b_to) per group: tokens `a_from:a_to` cover what tokens `b_from:b_to` cover. Tokens of no
        width belong to the group that ends where they are.

    Raises:
        ValueError: the two end at different bytes.
    """
    last_a, last_b = ends_a[-1] if ends_a else 0, ends_b[-1] if ends_b else 0
    if last_a != last_b:
        raise ValueError(f"these are not tokens of one text: it ends at byte {last_a} or {last_b}")
    shared = sorted((set(ends_a) & set(ends_b)) - {0})
    groups: list[tuple[int, int, int, int]] = []
    a = b = 0
    for boundary in shared:
        a_from, b_from = a, b
        while a < len(ends_a) and ends_a[a] <= boundary:
            a += 1
        while b < len(ends_b) and ends_b[b] <= boundary:
            b += 1
        groups.append((a_from, a, b_from, b))
    return groups


# ── patches ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def patch_bounds(total_bytes: int, patches: int) -> list[tuple[int, int]]:
    """The bytes that each patch touches: patch p is the real interval [p·L/P, (p+1)·L/P) of a text of L bytes.

    Neighbours share the byte that a bound falls into; in a text shorter than P bytes, patches are parts of a byte.
    """
    return [(p * total_bytes // patches, -(-(p + 1) * total_bytes // patches)) for p in range(patches)]


def patch_membership(ends: Sequence[int], total_bytes: int, patches: int) -> list[tuple[int, int]]:
    """(token, patch) for every patch that a token's span intersects, in the order of tokens.

    Every patch has a token when the text has a byte; tokens of no width have no patch.
    """
    return list(_membership(ends, total_bytes, patches))


def _membership(ends: Sequence[int], total_bytes: int, patches: int) -> Iterator[tuple[int, int]]:
    start = 0
    for token, end in enumerate(ends):
        if end > start:
            first, last = start * patches // total_bytes, (end * patches - 1) // total_bytes
            yield from ((token, patch) for patch in range(first, last + 1))
        start = end
