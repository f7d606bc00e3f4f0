"""Models write: batched sampling that keeps, with every token, what the model thought of the alternatives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deepfusion.data.tokens import Tokenizer
from deepfusion.families import context_length, family, head
from deepfusion.scoring import LOGITS_AT_ONCE
from deepfusion.signals import Signal

MANY_TOKENS = 2**17  # a vocabulary above this is drawn from by one number a row
THINNED = 2**15  # with a vocabulary from this on, rows that have ended leave the batch once they are half of it


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
    at temperature 1, over the tokenizer's tokens. A text that fills the model's context before it ends, or whose bytes
    are not UTF-8, counts as unfinished; how long one prompt is does not shorten what follows another.
    """
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    heads = [[tokenizer.start, *inner] for inner, _ in encoded]
    room = [min(max_new_tokens, _longest(model) - len(head)) for head in heads]
    fitting = [row for row, left in enumerate(room) if left > 0]
    new = _continued(
        model,
        tokenizer,
        [heads[row] for row in fitting],
        [room[row] for row in fitting],
        temperature=temperature,
        top_k=top_k,
        generator=generator,
    )
    columns = dict(zip(fitting, new, strict=True))
    nothing = [np.zeros(0, np.int64), np.zeros(0), np.zeros((0, 0)), np.zeros((0, 0))]
    return [
        _one(prompts[row], heads[row], [0, *ends], columns.get(row, nothing), tokenizer)
        for row, (_, ends) in enumerate(encoded)
    ]


def _continued(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    heads: Sequence[Sequence[int]],
    room: Sequence[int],
    *,
    temperature: float,
    top_k: int,
    generator: torch.Generator,
) -> list[list[np.ndarray]]:
    """What follows each head, at most `room` tokens each: tokens and their log-probabilities `[n]`, and those of the
    most probable tokens `[n, k]`; after an end token they mean nothing.
    """
    if not heads:
        return []
    longest = max(map(len, heads))
    device, rows = model.device, len(heads)
    pads = [longest - len(head) for head in heads]
    ids = torch.tensor([[tokenizer.end] * pad + [*head] for pad, head in zip(pads, heads, strict=True)], device=device)
    mask = torch.tensor([[0] * pad + [1] * len(head) for pad, head in zip(pads, heads, strict=True)], device=device)
    left = torch.tensor(room, device=device)
    alive = torch.ones(rows, dtype=torch.bool, device=device)
    here = torch.arange(rows, device=device)  # which rows are being continued
    said: list[tuple[Tensor, ...]] = []
    cache, step = None, ids
    for count in range(1, max(room) + 1):
        logits, cache = _last_logits(model, step, mask, cache)
        log_p = torch.log_softmax(logits[:, : len(tokenizer.table)].float(), -1)
        best = log_p.topk(min(top_k, log_p.shape[-1]), -1)
        chosen = drawn((log_p / temperature).softmax(-1), generator) if temperature > 0 else best.indices[:, :1]
        tokens = torch.where(alive, chosen[:, 0], tokenizer.end)
        said.append((here, tokens, log_p.gather(1, chosen)[:, 0], best.indices, best.values))
        alive = alive & (chosen[:, 0] != tokenizer.end) & (left > count)
        if not bool(alive.any()):
            break
        step = tokens[:, None]
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype, device=device)], 1)
        if len(tokenizer.table) >= THINNED and 2 * int(alive.sum()) <= len(alive):
            kept = alive.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            here, step, mask, left, alive = (each[kept] for each in (here, step, mask, left, alive))
    return _by_row(said, room, tokenizer.end)


def _by_row(said: Sequence[tuple[Tensor, ...]], room: Sequence[int], end: int) -> list[list[np.ndarray]]:
    """What was said step by step, of the rows named first, as columns of each row; `end` where a row had ended."""
    _, *kinds = said[0]
    columns = [np.zeros((len(room), len(said), *kind.shape[1:]), kind.cpu().numpy().dtype) for kind in kinds]
    columns[0].fill(end)
    for at, (here, *found) in enumerate(said):
        for column, values in zip(columns, found, strict=True):
            column[here.cpu().numpy(), at] = values.cpu().numpy()
    return [[column[row, : room[row]] for column in columns] for row in range(len(room))]


def drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row, `[rows, 1]`, of probabilities `[rows, V]`."""
    if probabilities.shape[-1] <= MANY_TOKENS or probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, 1, generator=generator)
    # There `multinomial` takes longer than the model: it draws a number for every token, of which Gemma has 262,144.
    upto = probabilities.cumsum(-1, dtype=torch.float64)
    place = torch.rand(len(upto), 1, dtype=torch.float64, generator=generator) * upto[:, -1:]
    return torch.searchsorted(upto, place, right=True).clamp(max=upto.shape[-1] - 1)


def _longest(model: PreTrainedModel) -> int:
    """Tokens of the longest text that a model takes."""
    return context_length(model.config) or 10**9


def _last_logits(model: PreTrainedModel, step: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
    positions = {}
    if family(model.config.model_type).packs:  # the others count positions from the mask themselves
        # Rows that have come to an end run on beside the others, and must not run out of positions.
        place = (mask.cumsum(1) - 1).clamp(min=0, max=_longest(model) - 1)
        positions = {"position_ids": place[:, -step.shape[1] :]}
    outputs = model(
        input_ids=step, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **positions
    )
    return outputs.logits[:, -1], outputs.past_key_values


def _one(prompt: str, head: list[int], ends: list[int], columns: list[np.ndarray], tokenizer: Tokenizer) -> Written:
    tokens, logprobs, best_ids, best_logprobs = columns
    ended = np.flatnonzero(tokens == tokenizer.end)
    count = int(ended[0]) + 1 if len(ended) else len(tokens)
    pieces = [b"" if token == tokenizer.end else tokenizer.table[token] for token in tokens[:count].tolist()]
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


def with_gain(
    signals: Mapping[str, Signal],
    ancestor: PreTrainedModel,
    tokenizer: Tokenizer,
    batch: int = 64,
    *,
    keep_before: bool = False,
) -> dict[str, Signal]:
    """The signals with each token's gain: how many nats likelier its writer found it than the writer's public ancestor.

    What a device has learned in private stands out; words that everyone could have guessed do not. Tokens that the
    writer has no opinion on, and those that the ancestor finds likelier, have none. `keep_before` keeps the ancestor's
    own log-probabilities too, of each token and of each kept alternative.
    """
    result: dict[str, Signal] = {}
    ids = {name: signal.ids for name, signal in signals.items()}
    others = {name: signal.topk_ids for name, signal in signals.items()} if keep_before else {}
    for name, before, before_topk in opinions(ancestor, tokenizer, ids, others, batch):
        signal = signals[name]
        gain = np.zeros(len(signal.ids), np.float16)
        gain[1:] = np.maximum(signal.logprobs[1:] - before[1:], 0)
        result[name] = replace(signal, gain=gain)
        if keep_before:
            result[name] = replace(result[name], before=before, before_topk=before_topk.astype(np.float16))
    return {name: result[name] for name in signals}


@torch.no_grad()
def opinions(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    ids: Mapping[str, np.ndarray],
    others: Mapping[str, np.ndarray],
    batch: int = 64,
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """What a model thinks of every token of texts by others, and of the tokens that could have stood there instead.

    Args:
        model: with the tokenizer's vocabulary.
        tokenizer: the model's.
        ids: text → its tokens `[n]`, with the start token.
        others: text → tokens `[n, k]`, those of row i instead of token i; may leave texts out.
        batch: texts at a time.

    Yields:
        Text, shorter ones first, and log-probabilities `[n]` and `[n, k]` (k 0 where left out) float32, given the
        tokens before; the first row, which nothing predicts, is zero.
    """
    names = sorted(ids, key=lambda name: len(ids[name]))
    for at in range(0, len(names), batch):
        some = names[at : at + batch]
        inputs, mask = padded([ids[name].tolist() for name in some], tokenizer.end, model.device)
        depth = max((others[name].shape[1] for name in some if name in others), default=0)
        wanted = np.zeros((*inputs.shape, 1 + depth), np.int64)  # each token, and what could have stood there
        wanted[..., 0] = inputs.cpu().numpy()
        for row, name in enumerate(some):
            if name in others:
                wanted[row, : len(ids[name]), 1 : 1 + others[name].shape[1]] = others[name]
        asked = torch.from_numpy(wanted[:, 1:]).to(model.device)
        found = np.zeros(wanted.shape, np.float32)
        for block, logits in next_logits(model, hidden(model, inputs, mask), tokenizer):
            log_p = torch.log_softmax(logits.float(), -1)
            found[:, 1:][:, block] = log_p.gather(2, asked[:, block]).cpu().numpy()
        for row, name in enumerate(some):
            k = others[name].shape[1] if name in others else 0
            yield name, found[row, : len(ids[name]), 0].copy(), found[row, : len(ids[name]), 1 : 1 + k].copy()


def padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask `[rows, longest]`, padded at the end, where a causal model's other positions cannot see it."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids.to(device), mask.to(device)


def hidden(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """What enters a causal model's head, `[rows, tokens, width]`."""
    return model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def next_logits(model: PreTrainedModel, states: Tensor, tokenizer: Tokenizer) -> Iterator[tuple[slice, Tensor]]:
    """Logits `[rows, n, V]` at all positions but the last of what enters the head, a block of positions at a time.

    With a large vocabulary all of them are more than memory holds. Entries with which the model's vocabulary is padded
    beyond its tokenizer's are left out: they stand for nothing.

    Yields:
        Which positions, and their logits.
    """
    project = head(model)
    last = states.shape[1] - 1
    size = max(1, LOGITS_AT_ONCE // (len(states) * model.config.vocab_size))
    for start in range(0, last, size):
        stop = min(start + size, last)
        yield slice(start, stop), project(states[:, start : start + size])[:, : stop - start, : len(tokenizer.table)]


@torch.no_grad()
def prompt_nats(model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[str], batch: int = 64) -> np.ndarray:
    """−log p of every prompt per UTF-8 byte, `[n]` float64: how much at home a model is in a text's words.

    Of a prompt longer than the model takes, the last tokens count, and their bytes.
    """
    totals, room = np.zeros(len(prompts)), _longest(model)
    sizes = np.ones(len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), batch):
        chosen = order[at : at + batch]
        rows: list[list[int]] = []
        for i in chosen:
            inner, ends = tokenizer.encode(prompts[i])
            cut = max(0, len(inner) + 1 - room)
            rows.append([tokenizer.start, *inner[cut:]])
            sizes[i] = max(1, len(prompts[i].encode()) - (ends[cut - 1] if cut else 0))
        ids, mask = padded(rows, tokenizer.end, model.device)
        nats = torch.zeros(ids[:, 1:].shape, device=model.device)
        for block, logits in next_logits(model, hidden(model, ids, mask), tokenizer):
            by_token = logits.transpose(1, 2).float()
            nats[:, block] = torch.nn.functional.cross_entropy(by_token, ids[:, 1:][:, block], reduction="none")
        totals[chosen] = (nats * mask[:, 1:]).sum(1).double().cpu().numpy()
    return totals / sizes
