"""Models write: batched sampling that keeps, with every token, what the model thought of the alternatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deepfusion.data.batches import Tokenizer
from deepfusion.families import family
from deepfusion.signals import Signal


@dataclass(frozen=True)
class Written:
    """One text as its writer wrote it; a signal row whose log-probabilities are −inf has no opinion (the prompt's)."""

    text: str
    finished: bool  # the writer ended it by itself
    signal: Signal


@torch.no_grad()
def write(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    generator: torch.Generator,
) -> list[Written]:
    """Continue every prompt ("" writes from nothing) until its end token or `max_new_tokens`, as one batch.

    Only the last position's logits ever exist. `temperature` 0 is greedy; the probabilities kept are the model's own,
    at temperature 1. A text whose bytes are not UTF-8 counts as unfinished.
    """
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    heads = [[tokenizer.start, *inner] for inner, _ in encoded]
    ends = [[0, *inner_ends] for _, inner_ends in encoded]
    longest = max(len(head) for head in heads)
    pads = [longest - len(head) for head in heads]
    device = model.device
    ids = torch.tensor([[tokenizer.end] * pad + head for pad, head in zip(pads, heads, strict=True)], device=device)
    mask = torch.tensor([[0] * pad + [1] * len(head) for pad, head in zip(pads, heads, strict=True)], device=device)
    rows = len(prompts)
    alive = torch.ones(rows, dtype=torch.bool, device=device)
    tokens: list[Tensor] = []
    logprobs: list[Tensor] = []
    best_ids: list[Tensor] = []
    best_logprobs: list[Tensor] = []
    room = _longest(model) - longest
    cache = None
    step = ids
    for _ in range(min(max_new_tokens, max(room, 0))):
        logits, cache = _last_logits(model, step, mask, cache)
        log_p = torch.log_softmax(logits.float(), -1)
        best = log_p.topk(min(top_k, log_p.shape[-1]), -1)
        if temperature > 0:
            chosen = torch.multinomial((log_p / temperature).softmax(-1), 1, generator=generator)
        else:
            chosen = best.indices[:, :1]
        tokens.append(torch.where(alive, chosen[:, 0], tokenizer.end))
        logprobs.append(log_p.gather(1, chosen)[:, 0])
        best_ids.append(best.indices)
        best_logprobs.append(best.values)
        alive = alive & (chosen[:, 0] != tokenizer.end)
        if not bool(alive.any()):
            break
        step = tokens[-1][:, None]
        mask = torch.cat([mask, torch.ones(rows, 1, dtype=mask.dtype, device=device)], 1)
    if not tokens:
        nothing = np.zeros(0), np.zeros((0, 0)), np.zeros((0, 0))
        return [
            Written(prompts[row], False, _signal(heads[row], ends[row], [], [], *nothing))
            for row in range(len(prompts))
        ]
    columns = [torch.stack(each, 1).cpu().numpy() for each in (tokens, logprobs, best_ids, best_logprobs)]
    return [
        _one(prompts[row], heads[row], ends[row], [column[row] for column in columns], tokenizer) for row in range(rows)
    ]


def _longest(model: PreTrainedModel) -> int:
    """Tokens of the longest text that a model takes."""
    return int(getattr(model.config, "max_position_embeddings", None) or 10**9)


def _last_logits(model: PreTrainedModel, step: Tensor, mask: Tensor, cache: object) -> tuple[Tensor, object]:
    positions = {}
    if family(model.config.model_type).packs:  # the others count positions from the mask themselves
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]}
    outputs = model(
        input_ids=step, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **positions
    )
    return outputs.logits[:, -1], outputs.past_key_values


def _one(prompt: str, head: list[int], ends: list[int], columns: list[np.ndarray], tokenizer: Tokenizer) -> Written:
    tokens, logprobs, best_ids, best_logprobs = columns
    ended = np.flatnonzero(tokens == tokenizer.end)
    count = int(ended[0]) + 1 if len(ended) else len(tokens)
    # The end token spells nothing; nor do those with which vocabularies are often padded beyond their tokenizer's.
    spells = {token: tokenizer.table[token] for token in tokens.tolist() if token < len(tokenizer.table)}
    pieces = [b"" if token == tokenizer.end else spells.get(token, b"") for token in tokens[:count].tolist()]
    raw = b"".join(pieces)
    try:
        text, finished = prompt + raw.decode(), bool(len(ended))
    except UnicodeDecodeError:
        text, finished = prompt + raw.decode(errors="replace"), False
    total = len(prompt.encode())
    new_ends = [total + end for end in accumulate(map(len, pieces))]
    new = tokens[:count].tolist(), new_ends, logprobs[:count], best_ids[:count], best_logprobs[:count]
    return Written(text, finished, _signal(head, ends, *new))


def _signal(
    head: list[int],
    head_ends: list[int],
    new: list[int],
    new_ends: list[int],
    logprobs: np.ndarray,
    best_ids: np.ndarray,
    best_logprobs: np.ndarray,
) -> Signal:
    ids = np.array([*head, *new], np.int32)
    width = best_ids.shape[1]
    blank_ids = np.zeros((len(head), width), np.int32)
    blank_logprobs = np.full((len(head), width), -np.inf, np.float16)
    return Signal(
        ids=ids,
        ends=np.array([*head_ends, *new_ends], np.int32),
        logprobs=np.concatenate([np.full(len(head), -np.inf, np.float32), logprobs.astype(np.float32)]),
        topk_ids=np.concatenate([blank_ids, best_ids.astype(np.int32)]),
        topk_logprobs=np.concatenate([blank_logprobs, best_logprobs.astype(np.float16)]),
    )


@torch.no_grad()
def with_gain(
    signals: Mapping[str, Signal], ancestor: PreTrainedModel, tokenizer: Tokenizer, batch: int = 64
) -> dict[str, Signal]:
    """The signals with each token's gain: how many nats likelier its writer found it than the writer's public ancestor.

    What a device has learned in private stands out; words that everyone could have guessed do not. Tokens that the
    writer has no opinion on, and those that the ancestor finds likelier, have none.
    """
    result: dict[str, Signal] = {}
    names = sorted(signals, key=lambda name: len(signals[name].ids))
    for at in range(0, len(names), batch):
        some = names[at : at + batch]
        ids, mask = _padded([signals[name].ids.tolist() for name in some], tokenizer.end)
        ids, mask = ids.to(ancestor.device), mask.to(ancestor.device)
        log_p = torch.log_softmax(ancestor(input_ids=ids, attention_mask=mask, use_cache=False).logits.float(), -1)
        before = log_p[:, :-1].gather(2, ids[:, 1:, None])[..., 0].cpu().numpy()
        for row, name in enumerate(some):
            signal = signals[name]
            gain = np.zeros(len(signal.ids), np.float16)
            gain[1:] = np.maximum(signal.logprobs[1:] - before[row, : len(signal.ids) - 1], 0)
            result[name] = replace(signal, gain=gain)
    return {name: result[name] for name in signals}


def _padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask `[rows, longest]`, padded at the end, where a causal model's other positions cannot see it."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


@torch.no_grad()
def prompt_nats(model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[str], batch: int = 64) -> np.ndarray:
    """−log p of every prompt per UTF-8 byte, `[n]` float64: how much at home a model is in a text's words.

    Of a prompt longer than the model takes, the last tokens count.
    """
    totals, room = np.zeros(len(prompts)), _longest(model)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), batch):
        chosen = order[at : at + batch]
        encoded = [[tokenizer.start, *tokenizer.encode(prompts[i])[0][1 - room :]] for i in chosen]
        ids, mask = _padded(encoded, tokenizer.end)
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none")
        totals[chosen] = (nats * mask[:, 1:]).sum(1).double().cpu().numpy()
    return totals / np.array([max(1, len(prompt.encode())) for prompt in prompts])
