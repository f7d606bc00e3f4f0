"""What a fuzzer's bytes stand for: numbers, choices, and small harms to JSON, to safetensors and to bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

# JSON as it is written, some of which no value in Python stands for.
VALUES = (
    "null", "true", "false", "0", "1", "-1", "2", "2.5", "-0.0", "1e308", "1e400", "NaN", "Infinity", "65536",
    "1000000000", "4294967295", "4294967296", "9223372036854775807", "18446744073709551616", "1" + "0" * 40,
    "9" * 5000, '""', '"x"', '"\\ud800"', '"\\u0000"', '"\\u001b[2J"', '"../../x"', '"/etc/passwd"',
    '"' + "h" * 70000 + '"', "[]", "{}", "[[]]", "[1,2]", '{"a":{"b":[null]}}', "[" * 3000 + "]" * 3000,
    '{"a":' * 900 + "1" + "}" * 900, "[0,18446744073709551615]", "[4294967296,4294967296]", "[1152921504606846976,0]",
    '"F8_E4M3"', '"F64"', '"I8"', '"BF16"', '"llama"', '"mixtral"', '"bloom"', '"org/repo"', '"tokenizer.json"',
)  # fmt: skip
KEYS = (
    "x", "", "__metadata__", "weight_map", "num_labels", "id2label", "num_hidden_layers", "n_layer",
    "num_attention_heads", "hidden_size", "n_embd", "vocab_size", "max_position_embeddings", "n_positions",
    "layer_types", "rope_parameters", "rope_scaling", "rope_theta", "head_dim", "n_inner", "num_experts",
    "num_local_experts", "auto_map", "dtype", "torch_dtype", "attn_implementation", "_attn_implementation",
    "quantization_config", "model_type", "architectures", "pruned_heads", "use_cache", "tie_word_embeddings",
    "transformers_version", "tokenizer_file", "tokenizer_class", "vocab_file", "added_tokens_decoder", "added_tokens",
    "extra_special_tokens", "additional_special_tokens", "eos_token", "pad_token", "model_max_length",
    "chat_template", "normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding", "type",
    "pattern", "precompiled_charsmap", "dropout", "id", "content", "special", "sub_configs", "return_dict",
    "gguf_file", "h.rotary_emb.inv_freq", "data_offsets", "shape", "folder", "digest", "packing", "losses", "work",
    "sends", "device",
)  # fmt: skip
OPEN, CLOSE = "\ue000", "\ue001"  # around what is put into JSON as it is written


class Draws:
    """An input, read from its start; one that has ended gives zeros, so that every input stands for something."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    @property
    def more(self) -> bool:
        """Whether something is left."""
        return self.at < len(self.data)

    def below(self, count: int) -> int:
        """A number from 0 to `count` - 1."""
        taken = self.take(1 if count <= 256 else 2 if count <= 65536 else 4)
        return int.from_bytes(taken, "little") % max(1, count)

    def one(self, of: Sequence[T]) -> T:
        """One of several."""
        return of[self.below(len(of))]

    def take(self, count: int) -> bytes:
        """Bytes, fewer at the end."""
        taken = self.data[self.at : self.at + count]
        self.at += count
        return taken

    def some(self) -> bytes:
        """Up to 64 bytes."""
        return self.take(self.below(65))

    def text(self) -> str:
        """Up to 64 bytes of text."""
        return self.some().decode(errors="replace").replace(OPEN, "").replace(CLOSE, "")


def harm_json(content: bytes, draws: Draws) -> bytes:
    """JSON with one thing in it replaced, taken out, put in or standing twice; what is none comes back as it is."""
    try:
        tree: Any = [json.loads(content)]
        places = list(_places(tree))
        holder, key = draws.one(places)
        action = draws.below(5)
        written = draws.one(VALUES) if draws.below(4) else draws.text()
        if action == 0:
            holder[key] = f"{OPEN}{written}{CLOSE}"
        elif action == 1 and len(places) > 1:
            holder, key = (
                places[1 + places.index((holder, key)) % (len(places) - 1)] if holder is tree else (holder, key)
            )
            del holder[key]
        elif action == 2 and isinstance(holder, dict):
            name = draws.one(KEYS) if draws.below(4) else draws.text()
            holder[name] = f"{OPEN}{written}{CLOSE}"
        elif action == 3 and isinstance(holder, dict):
            holder[key] = f"{OPEN}{json.dumps(holder[key])},{json.dumps(str(key))}:{written}{CLOSE}"
        else:
            other, name = draws.one(places)
            if other is not tree and holder is not tree:
                holder[key] = json.loads(json.dumps(other[name]))
        made = json.dumps(tree[0], separators=(",", ":"), ensure_ascii=False)
    except (ValueError, RecursionError):
        return content
    first, *others = made.split(f'"{OPEN}')
    for other in others:
        inner, _, rest = other.partition(f'{CLOSE}"')
        first += json.loads(f'"{inner}"') + rest
    return first.encode(errors="surrogatepass")


def _places(tree: Any) -> Any:
    """Every holder and key of a tree, a holder's own first; of long lists the start."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
    for key, value in items[:40]:
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def harm_bytes(content: bytes, draws: Draws) -> bytes:
    """Bytes overwritten, cut off, put in or added."""
    action, at = draws.below(4), draws.below(len(content) + 1)
    if action == 0:
        new = draws.some()
        return content[:at] + new + content[at + len(new) :]
    if action == 1:
        return content[:at]
    if action == 2:
        return content[:at] + draws.some() + content[at:]
    return content + bytes([draws.below(256)]) * draws.one((1, 7, 4096, 2**17))


def harm_tensors(content: bytes, draws: Draws) -> bytes:
    """A safetensors file with something else in its header, or another length of it, or other bytes."""
    length = int.from_bytes(content[:8], "little")
    head, body = content[8 : 8 + length], content[8 + length :]
    action = draws.below(4)
    if action == 0:
        return harm_bytes(content, draws)
    if action == 1:
        wrong = draws.one((0, 1, length - 1, length + 1, 2**24 + 1, 2**27, 2**40, 2**63, 2**64 - 1))
        return (wrong % 2**64).to_bytes(8, "little") + head + body
    if action == 2:  # values: what is not finite, and what is very large
        at = draws.below(max(1, len(body) // 4)) * 4
        return content[: 8 + length] + body[:at] + draws.one(_NUMBERS) + body[at + 4 :]
    head = harm_json(head, draws)
    return len(head).to_bytes(8, "little") + head + body


_NUMBERS = (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\0\0\0\x80", b"\1\0\0\0", b"\xff\xff\xff\xff")
