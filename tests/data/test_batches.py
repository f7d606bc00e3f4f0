import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfusion.checkpoints import open_model
from deepfusion.config import LogitsObjective, Training
from deepfusion.data.batches import Schedule, collate, isolation_mask, pack
from deepfusion.data.documents import Document
from deepfusion.data.lessons import Lesson, lessons
from deepfusion.data.tokens import Tokenizer
from deepfusion.families import FAMILIES, family
from deepfusion.objectives import build_objective
from deepfusion.training import Learner, Outputs, run
from pico import TEXTS, pico, pico_tokenizer

PLAIN = LogitsObjective(beta=0)


@torch.inference_mode()
def logits(outputs: Outputs) -> torch.Tensor:
    return outputs.predictions.head(outputs.predictions.states)


def document(prompt: str = "", answer: str = "yes", name: str = "d") -> Document:
    return Document(id=name, domain="law", prompt=prompt, answer=answer)


def lesson(ids: list[int], weights: list[float] | None = None) -> Lesson:
    held = [0.0, *[1.0] * (len(ids) - 1)] if weights is None else weights
    return Lesson(np.array(ids, np.int64), np.array(held, np.float32))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(pico_tokenizer())


# ── documents apart ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_document_counts_as_it_does_alone(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = open_model(pico(name, tmp_path))
    documents = [document("What is the capital? ", "Eldermere."), document(answer=TEXTS[0]), document("Who? ", "🙂")]
    text = lessons(documents, tokenizer, Training(answer_weight=3))
    rows = pack([len(one) for one in text], [2, 0, 1], 128, alone=not family(name).packs)
    assert len(rows) == (1 if family(name).packs else 3)
    batch = collate([[[text[index] for index in row] for row in rows]])
    learner = Learner(model, build_objective(PLAIN, 0, 0, {}), balance=0.0)
    with torch.inference_mode():
        together = logits(run(model, batch)).flatten(0, 1)[batch["document"].flatten() >= 0]
        alone = torch.cat([model(torch.from_numpy(text[i].ids)[None]).logits[0] for row in rows for i in row])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        losses = [float(learner(**collate([[[one]]]))["loss"]) for one in text]
        weights = [float(one.weights.sum()) for one in text]
        expected = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
        assert float(learner(**batch)["loss"]) == pytest.approx(expected, rel=1e-4)


def test_router_logits_change_no_other_logits(tmp_path: Path) -> None:
    model = open_model(pico("mixtral", tmp_path))
    batch = collate([[[lesson([0, 40, 41, 0]), lesson([0, 50, 0])], [lesson([0, 60, 0])]]])
    with torch.inference_mode():
        plain, routed = run(model, batch), run(model, batch, router_logits=True)
    torch.testing.assert_close(logits(routed), logits(plain))
    assert [logits.shape for logits in routed.router_logits] == [(14, 4)] * 2


def test_who_cannot_pack_says_so(tmp_path: Path) -> None:
    model = open_model(pico("bloom", tmp_path))
    with pytest.raises(ValueError, match="bloom cannot keep documents apart within a row"):
        run(model, collate([[[lesson([0, 40, 0]), lesson([0, 50, 0])]]]))


def test_isolation_mask_by_hand() -> None:
    mask = isolation_mask(torch.tensor([[0, 0, 1, -1]]))
    assert mask.int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]]


# ── one batch by hand ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_fields_stand_where_the_token_is_predicted() -> None:
    same = replace(
        lesson([0, 7, 8, 0], [0, 1, 4, 4]),
        topk_ids=np.array([[0, 0], [7, 5], [8, 5], [0, 5]]),
        topk_logprobs=np.array([[0, 0], [-np.inf] * 2, [-0.5, -1], [-0.25, -2]], np.float32),
        cluster=1,
    )
    other = replace(
        lesson([0, 9, 10, 11, 0]), chunk=np.array([-1, -1, 0, 0, 1]), chunk_logprobs=np.array([-3, -0.5], np.float32)
    )
    third = replace(lesson([0, 12, 0]), chunk=np.array([-1, 0, 1]), chunk_logprobs=np.array([-2, -1], np.float32))
    batch = {name: tensor.tolist() for name, tensor in collate([[[same, other], [third]]]).items()}
    n, z = -100, [0, 0]
    assert batch["input_ids"] == [[0, 7, 8, 0, 0, 9, 10, 11, 0], [0, 12, 0, 0, 0, 0, 0, 0, 0]]
    assert batch["position_ids"] == [[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 0, 0, 0, 0, 0, 0]]
    assert batch["document"] == [[0, 0, 0, 0, 1, 1, 1, 1, 1], [2, 2, 2, -1, -1, -1, -1, -1, -1]]
    assert batch["labels"] == [[7, 8, 0, n, 9, 10, 11, 0, n], [12, 0, n, n, n, n, n, n, n]]
    assert batch["weights"] == [[1, 4, 4, 0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert batch["cluster"] == [[1, 1, 1, 1, -1, -1, -1, -1, -1], [-1] * 9]
    assert batch["topk_ids"] == [[[7, 5], [8, 5], [0, 5], z, z, z, z, z, z], [z] * 9]
    assert batch["topk_logprobs"][0][:3] == [[-math.inf] * 2, [-0.5, -1], [-0.25, -2]]
    assert batch["topk_weight"] == [[0, 4, 4, 0, 0, 0, 0, 0, 0], [0] * 9]
    assert batch["chunk"] == [[-1, -1, -1, -1, -1, 0, 0, 1, -1], [2, 3, -1, -1, -1, -1, -1, -1, -1]]
    assert batch["chunk_logprobs"] == [-3, -0.5, -2, -1]
    assert batch["chunk_weight"] == [1, 1, 1, 1]
    assert not any(name.startswith(("features", "pool")) for name in batch)


def test_plain_lessons_have_no_teacher() -> None:
    names = {"input_ids", "position_ids", "document", "labels", "weights", "cluster"}
    assert set(collate([[[lesson([0, 7, 0])]]])) == names


def test_features_name_their_tokens_and_documents() -> None:
    def featured(ids: list[int], value: float, lineage: str) -> Lesson:
        pool = np.array([(1, 0), (2, 0), (2, 1)])
        return replace(lesson(ids), pool=pool, features=np.full((1, 2, 3), value, np.float16), lineage=lineage)

    rows = [[lesson([0, 5, 0]), featured([0, 7, 8, 0], 1, "gpt2-a")], [featured([0, 7, 8, 0], 2, "opt-b")]]
    batch = collate([[*rows, [featured([0, 7, 8, 0], 3, "gpt2-a")]]])
    assert batch["patch_documents"].tolist() == [0, 1, 2]
    assert batch["pool_token"].tolist() == [3 + 1, 3 + 2, 3 + 2, 7 + 1, 7 + 2, 7 + 2, 14 + 1, 14 + 2, 14 + 2]
    assert batch["pool_slot"].tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5]
    assert batch["features_document:gpt2-a"].tolist() == [0, 2]
    assert batch["features:gpt2-a"][:, 0, 0].tolist() == [[1, 1, 1], [3, 3, 3]]
    assert batch["features_document:opt-b"].tolist() == [1]
    assert batch["features:opt-b"].shape == (1, 1, 2, 3)


# ── rows and schedules ────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(4, 20), st.booleans(), st.randoms())
def test_rows_hold_every_document_in_order(lengths: list[int], context: int, alone: bool, random: Random) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)
    rows = pack(lengths, order, context, alone)
    assert [index for row in rows for index in row] == order
    sizes = [sum(lengths[index] for index in row) for row in rows]
    assert all(size <= context or len(row) == 1 for row, size in zip(rows, sizes, strict=True))
    if alone:
        assert all(len(row) == 1 for row in rows)
    else:  # a row is closed only when what comes next does not fit
        assert all(size + lengths[after[0]] > context for size, after in zip(sizes, rows[1:], strict=False))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(3, 24), min_size=1, max_size=20),
    st.integers(1, 3000),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 3),
)
def test_a_schedule_shows_every_document_equally_often(
    lengths: list[int], tokens: int, rows: int, packs: bool, seed: int
) -> None:
    text = [lesson([0] * length) for length in lengths]
    training = Training(context=24, rows=rows)
    schedule = Schedule(text, tokens, training, packs=packs, seed=seed)
    assert schedule.batches == Schedule(text, tokens, training, packs=packs, seed=seed).batches
    seen = Counter(index for batch in schedule.batches for row in batch for index in row)
    counts = [seen[index] for index in range(len(text))]
    assert max(counts) - min(counts) <= 1
    assert schedule.tokens == sum(n * length for n, length in zip(counts, lengths, strict=True)) >= tokens
    one_less = schedule.tokens - sum(lengths[index] for row in schedule.batches[-1] for index in row)
    assert one_less < tokens
    if packs:
        assert {len(batch) for batch in schedule.batches} == {rows}
    assert [[id(one) for one in row] for row in schedule[0]] == [
        [id(text[i]) for i in row] for row in schedule.batches[0]
    ]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(3, 24), min_size=1, max_size=20), st.integers(1, 400), st.integers(0, 4), st.booleans())
def test_a_sitting_is_a_part_of_one_long_training(lengths: list[int], tokens: int, sitting: int, packs: bool) -> None:
    text, training = [lesson([0] * length) for length in lengths], Training(context=24, rows=2)
    part = Schedule(text, tokens, training, packs=packs, seed=1, after=sitting * tokens)
    whole = Schedule(text, (sitting + 2) * tokens + 200, training, packs=packs, seed=1)
    sizes = [sum(lengths[i] for row in batch for i in row) for batch in whole.batches]
    first = next(number for number in range(len(sizes)) if sum(sizes[:number]) >= sitting * tokens)
    assert part.batches == whole.batches[first : first + len(part.batches)]
    assert part.tokens == sum(sizes[first : first + len(part.batches)]) >= tokens


def test_a_sitting_goes_on_where_the_last_one_ended() -> None:
    """Five sittings of a fifth of the text each are shown all of it, once."""
    text, training = [lesson([0] * 8) for _ in range(40)], Training(context=8, rows=4)
    parts = [Schedule(text, 64, training, packs=True, seed=0, after=sitting * 64) for sitting in range(5)]
    seen = Counter(i for part in parts for batch in part.batches for row in batch for i in row)
    assert seen == Counter(range(40))


def test_another_seed_is_another_order() -> None:
    text = [lesson([0] * length) for length in range(3, 23)]
    orders = {str(Schedule(text, 500, Training(), packs=True, seed=seed).batches) for seed in range(3)}
    assert len(orders) == 3


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="there is no text to train on"):
        Schedule([], 100, Training(), packs=True, seed=0)
