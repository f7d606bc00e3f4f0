"""What a causal LM makes of given text: −log p of prompt and continuation, batch by batch in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

LOGITS_AT_ONCE = 2**26  # with large vocabularies this bounds a batch before its tokens do: 256 MiB in float32
Observer = Callable[[list[int], Tensor], None]  # indices of a batch's pieces, and [B, T] where tokens are real


@dataclass(frozen=True)
class Piece:
    """A tokenised prompt and continuation, start token aside."""

    ids: tuple[int, ...]
    first: int  # index of the continuation's first token
    prompt_bytes: int  # bytes that the prompt's tokens cover


@dataclass(frozen=True)
class Score:
    """A model's view of one piece."""

    prompt_nats: float
    answer_nats: float
    answer_tokens: int
    correct_tokens: int


@torch.inference_mode()
def score(
    model: Any,
    pieces: Sequence[Piece],
    start: int,
    batch_tokens: int,
    advance: Callable[[float], None] = lambda tokens: None,
    observe: Observer | None = None,
) -> list[Score]:
    """Score every piece under a causal LM, in the order given; `observe` is called after each batch's forward pass."""
    limit = min(batch_tokens, max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size))
    results: dict[int, Score] = {}
    for batch in batches([len(piece.ids) for piece in pieces], limit):
        width = len(pieces[batch[0]].ids)
        inputs = torch.full((len(batch), width), start)
        real = torch.zeros((len(batch), width), dtype=torch.bool)
        for place, i in enumerate(batch):
            ids = torch.tensor(pieces[i].ids)
            inputs[place, 1 : len(ids)] = ids[:-1]
            real[place, : len(ids)] = True
        labels = torch.tensor([token for i in batch for token in pieces[i].ids])
        # Right padding is invisible to a causal model's real tokens; logits are computed for those alone.
        logits = model(
            input_ids=inputs.to(model.device),
            attention_mask=real.long().to(model.device),
            logits_to_keep=real.to(model.device),
            use_cache=False,
        ).logits
        if observe is not None:
            observe(batch, real)
        nats, hits = judge(logits.reshape(len(labels), -1), labels.to(model.device))
        position = 0
        for i in batch:
            middle, end = position + pieces[i].first, position + len(pieces[i].ids)
            results[i] = Score(
                prompt_nats=float(nats[position:middle].sum()),
                answer_nats=float(nats[middle:end].sum()),
                answer_tokens=end - middle,
                correct_tokens=int(hits[middle:end].sum()),
            )
            position = end
        advance(len(labels))
    return [results[i] for i in range(len(pieces))]


def judge(
    logits: Float[Tensor, "tokens vocab"], labels: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """−log p of each label (float64, so that sums do not depend on the batch), and 1 where greedy choice hits it."""
    nats = [
        block.float().logsumexp(-1) - block.float().gather(-1, label[:, None])[:, 0]
        for block, label in zip(logits.split(1024), labels.split(1024), strict=True)
    ]
    return torch.cat(nats).double().cpu(), (logits.argmax(-1) == labels).long().cpu()


def batches(lengths: Sequence[int], limit: int) -> Iterable[list[int]]:
    """Indices grouped by falling length, so that a group's longest times its size stays within `limit`."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
