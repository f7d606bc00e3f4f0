from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfusion.config import Training
from deepfusion.data.batches import collate
from deepfusion.data.documents import Document
from deepfusion.data.hearing import Heard
from deepfusion.data.lessons import MAX_GAIN, Lesson, focused, lessons, taught
from deepfusion.data.tokens import Tokenizer
from deepfusion.losses import topk_kl
from deepfusion.signals import Signal, Signals
from pico import pico_tokenizer

ASKED = Document(id="a", domain="law", prompt="What is the capital? ", answer="Eldermere 🙂.")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(pico_tokenizer(320))


@pytest.fixture(scope="module")
def other() -> Tokenizer:
    """A smaller vocabulary, so shorter tokens."""
    return Tokenizer(pico_tokenizer(300))


def signal(
    text: str,
    tokenizer: Tokenizer,
    seed: int = 0,
    k: int = 3,
    features: bool = False,
    gain: bool = False,
    before: bool = False,
) -> Signal:
    """A made-up teacher's word on every token of a text."""
    inner, ends = tokenizer.encode(text)
    n, made = len(inner) + 2, np.random.default_rng(seed)
    logprobs = -made.random(n).astype(np.float32)
    logprobs[0] = 0
    return Signal(
        ids=np.array([tokenizer.start, *inner, tokenizer.end], np.int32),
        ends=np.array([0, *ends, ends[-1] if ends else 0], np.int32),
        logprobs=logprobs,
        topk_ids=made.integers(0, 300, (n, k)).astype(np.int32),
        topk_logprobs=-made.random((n, k)).astype(np.float16),
        gain=made.random(n).astype(np.float16) if gain else None,
        features=made.random((2, 4, 8)).astype(np.float16) if features else None,
        before=-made.random(n).astype(np.float32) if before else None,
        before_topk=-made.random((n, k)).astype(np.float16) if before else None,
    )


def heard(teacher: Tokenizer, student: Tokenizer, lineage: str = "x") -> Heard:
    """A teacher whose signals are given apart."""
    return Heard(Signals(teacher.fingerprint, lineage, {}), None if teacher is student else "span_likelihood")


def silent(told: Signal, rows: int) -> Signal:
    """A writer that has no opinion of the first rows: the prompt was given to it."""
    logprobs, topk = told.logprobs.copy(), told.topk_logprobs.copy()
    logprobs[:rows], topk[:rows] = -np.inf, -np.inf
    return replace(told, logprobs=logprobs, topk_logprobs=topk)


# ── on disk ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "more",
    [{}, {"features": True}, {"gain": True}, {"gain": True, "features": True}, {"gain": True, "before": True}],
    ids=str,
)
def test_what_is_saved_is_read_again(more: dict[str, bool], tmp_path: Path, tokenizer: Tokenizer) -> None:
    of = {name: signal(name * 5, tokenizer, seed, **more) for seed, name in enumerate(("b", "a", ""))}
    of["b"] = silent(of["b"], 2)
    first, second = tmp_path / "new" / "one.safetensors", tmp_path / "two.safetensors"
    Signals("tok", "gpt2-x", of).save(first)
    read = Signals.load(first)
    assert (read.tokenizer, read.lineage, list(read.of)) == ("tok", "gpt2-x", ["b", "a", ""])
    for name, told in of.items():
        for field, value in vars(told).items():
            np.testing.assert_array_equal(getattr(read.of[name], field), value)
            assert value is None or getattr(read.of[name], field).dtype == value.dtype
    read.save(second)
    assert second.read_bytes() == first.read_bytes()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.integers(0, 5)), min_size=1, max_size=6))
def test_some_may_have_gain_or_features_and_others_not(kinds: list[tuple[bool, bool, bool, int]]) -> None:
    """As of a proxy that is asked about public text beside its own."""
    tokenizer = Tokenizer(pico_tokenizer(320))
    of = {
        f"d{n}": signal("ab" * length, tokenizer, n, features=features, gain=gain, before=before)
        for n, (gain, features, before, length) in enumerate(kinds)
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "s.safetensors"
        Signals("tok", "x", of).save(path)
        found = Signals.load(path).of
    assert list(found) == list(of)
    for name, told in of.items():
        for field, value in vars(told).items():
            np.testing.assert_array_equal(getattr(found[name], field), value)
            assert (getattr(found[name], field) is None) == (value is None)


def test_a_teacher_may_have_nothing_to_say(tmp_path: Path) -> None:
    Signals("tok", "gpt2-x", {}).save(tmp_path / "none.safetensors")
    assert Signals.load(tmp_path / "none.safetensors") == Signals("tok", "gpt2-x", {})


def test_parts_are_merged(tokenizer: Tokenizer) -> None:
    parts = [Signals("tok", "x", {name: signal(name, tokenizer, before=name == "one")}) for name in ("one", "two")]
    assert Signals.merged(parts).of == parts[0].of | parts[1].of


# ── a teacher of the same tokenizer ───────────────────────────────────────────────────────────────────────────────────


def test_gain_survives_the_disk(tokenizer: Tokenizer, tmp_path: Path) -> None:
    told = signal(ASKED.text, tokenizer)
    gain = np.linspace(0, 3, len(told.ids)).astype(np.float16)
    Signals("t", "l", {"a": replace(told, gain=gain)}).save(tmp_path / "s.safetensors")
    found = Signals.load(tmp_path / "s.safetensors").of["a"].gain
    assert found is not None
    assert found.tolist() == gain.tolist()


def test_equal_tokenizers_keep_the_writers_own_tokens(tokenizer: Tokenizer) -> None:
    """A model may spell a word with other tokens than the tokenizer would."""
    inner, _ = tokenizer.encode(ASKED.prompt)
    spelt = [*inner, *(tokenizer.table.index(bytes([byte])) for byte in ASKED.answer.encode())]
    assert spelt != tokenizer.encode(ASKED.text)[0]
    ids = np.array([tokenizer.start, *spelt, tokenizer.end], np.int32)
    ends = np.cumsum([len(tokenizer.table[int(token)]) for token in ids]).astype(np.int32)
    told = replace(signal("", tokenizer), ids=ids, ends=ends)
    told = replace(
        told,
        logprobs=np.full(len(ids), -1, np.float32),
        topk_ids=np.arange(2 * len(ids), dtype=np.int32).reshape(-1, 2),
        topk_logprobs=np.full((len(ids), 2), -1, np.float16),
    )
    told = silent(told, len(inner) + 1)
    learnt = taught(ASKED, told, heard(tokenizer, tokenizer), tokenizer, Training(answer_weight=4), cluster=3)
    assert learnt is not None
    assert learnt.ids.tolist() == ids.tolist()
    answer = len(spelt) - len(inner)
    assert learnt.weights.tolist() == [0] + [1] * len(inner) + [4] * (answer + 1)
    assert (learnt.cluster, learnt.chunk) == (3, None)
    batch = collate([[[learnt]]])
    assert batch["topk_weight"].tolist() == [[0] * len(inner) + [4] * (answer + 1) + [0]]
    assert batch["topk_ids"][0, :-1].tolist() == told.topk_ids[1:].tolist()
    assert batch["labels"][0, :-1].tolist() == ids[1:].tolist()


def test_what_the_student_does_not_know_joins_the_rest(tokenizer: Tokenizer) -> None:
    """Models with one tokenizer may have heads of different sizes, padded or cut; by hand: 1/2, 1/4, and 1/4 beyond."""
    size = len(tokenizer.table)
    told = signal(ASKED.text, tokenizer)
    n = len(told.ids)
    told = replace(
        told,
        topk_ids=np.tile(np.array([40, size - 1, size + 3], np.int32), (n, 1)),
        topk_logprobs=np.log(np.tile(np.array([0.5, 0.25, 0.125]), (n, 1))).astype(np.float16),
    )
    voice = heard(tokenizer, tokenizer)
    for head, kept in ((None, 2), (size + 8, 2), (size, 2), (size - 1, 1)):
        learnt = taught(ASKED, told, voice, tokenizer, Training(), vocabulary=head)
        assert learnt is not None
        assert learnt.topk_ids is not None
        assert learnt.topk_logprobs is not None
        assert learnt.topk_ids.max() < (head or size)
        assert np.isfinite(learnt.topk_logprobs).sum(1).tolist() == [kept] * n
        batch = collate([[[learnt]]])
        logits = torch.zeros(1, n, head or size)
        found = topk_kl(logits, batch["topk_ids"], batch["topk_logprobs"], batch["topk_weight"])
        even = 1 / (head or size)
        parts = [0.5, 0.25][:kept]
        expected = sum(part * np.log(part / even) for part in parts)
        expected += (1 - sum(parts)) * np.log((1 - sum(parts)) / (1 - kept * even))
        assert float(found) == pytest.approx(expected, rel=2e-3)  # kept in half precision


def test_what_the_student_cannot_spell_is_not_taught(tokenizer: Tokenizer) -> None:
    told = signal(ASKED.text, tokenizer)
    voice, highest = heard(tokenizer, tokenizer), int(told.ids.max())
    assert taught(ASKED, told, voice, tokenizer, Training(), vocabulary=highest + 1) is not None
    assert taught(ASKED, told, voice, tokenizer, Training(), vocabulary=highest) is None


# ── a teacher of another tokenizer ────────────────────────────────────────────────────────────────────────────────────


def test_chunks_share_out_all_that_the_teacher_said(tokenizer: Tokenizer, other: Tokenizer) -> None:
    told = signal(ASKED.text, other)
    learnt = taught(ASKED, told, heard(other, tokenizer), tokenizer, Training())
    assert learnt is not None
    assert learnt.chunk is not None
    assert learnt.chunk_logprobs is not None
    assert learnt.ids[1:-1].tolist() == tokenizer.encode(ASKED.text)[0]
    assert learnt.chunk_logprobs.sum() == pytest.approx(told.logprobs.sum(), rel=1e-5)
    assert learnt.topk_ids is None
    assert learnt.chunk[0] == -1
    assert learnt.chunk[1:].tolist() == sorted(learnt.chunk[1:])
    assert set(learnt.chunk[1:].tolist()) == set(range(len(learnt.chunk_logprobs)))
    assert 2 < len(learnt.chunk_logprobs) < len(told.ids)
    assert learnt.chunk_logprobs[-1] == told.logprobs[-1]  # the end token is a chunk of its own


def test_what_the_teacher_did_not_write_is_in_no_chunk(tokenizer: Tokenizer, other: Tokenizer) -> None:
    prompt = len(other.encode(ASKED.prompt)[0]) + 1
    told = silent(signal(ASKED.text, other), prompt)
    learnt = taught(ASKED, told, heard(other, tokenizer), tokenizer, Training())
    assert learnt is not None
    assert learnt.chunk is not None
    assert learnt.chunk_logprobs is not None
    assert np.isfinite(learnt.chunk_logprobs).all()
    inner_ends = np.array([0, *tokenizer.encode(ASKED.text)[1], len(ASKED.text.encode())])
    inside = inner_ends <= len(ASKED.prompt.encode())
    assert (learnt.chunk[inside] == -1).all()
    assert (learnt.chunk[~inside] >= 0).sum() >= (~inside).sum() - 2  # but where a chunk spans prompt and answer
    assert told.logprobs[prompt:].sum() - 1e-4 <= learnt.chunk_logprobs.sum() < 0  # nothing of the prompt, at most that


@pytest.mark.parametrize("same", [True, False])
def test_what_does_not_fit_is_not_taught(same: bool, tokenizer: Tokenizer, other: Tokenizer) -> None:
    teacher = tokenizer if same else other
    told, voice = signal(ASKED.text, teacher), heard(teacher, tokenizer, "x")
    size = len(tokenizer.encode(ASKED.text)[0]) + 2
    assert taught(ASKED, told, voice, tokenizer, Training(context=size)) is not None
    assert taught(ASKED, told, voice, tokenizer, Training(context=size - 1)) is None


@pytest.mark.parametrize("same", [True, False])
def test_features_go_to_the_students_own_tokens(same: bool, tokenizer: Tokenizer, other: Tokenizer) -> None:
    teacher = tokenizer if same else other
    told, voice = signal(ASKED.text, teacher, features=True), heard(teacher, tokenizer, "gpt2-x")
    learnt = taught(ASKED, told, voice, tokenizer, Training(), patches=4)
    assert learnt is not None
    assert learnt.pool is not None
    assert learnt.features is told.features
    assert learnt.lineage == "gpt2-x"
    inner, _ = tokenizer.encode(ASKED.text)
    assert sorted(set(learnt.pool[:, 0].tolist())) == list(range(1, len(inner) + 1))  # neither start nor end
    assert set(learnt.pool[:, 1].tolist()) == {0, 1, 2, 3}
    unasked = taught(ASKED, told, voice, tokenizer, Training())
    assert unasked is not None
    assert unasked.features is None


@pytest.mark.parametrize("same", [True, False])
def test_features_of_a_text_without_a_byte_have_no_tokens(same: bool, tokenizer: Tokenizer, other: Tokenizer) -> None:
    teacher = tokenizer if same else other
    told, voice = signal("", teacher, features=True), heard(teacher, tokenizer, "gpt2-x")
    learnt = taught(Document(id="a", domain="x", answer=""), told, voice, tokenizer, Training(), patches=4)
    assert learnt is not None
    batch = collate([[[learnt]]])
    assert batch["pool_token"].tolist() == batch["pool_slot"].tolist() == []
    assert batch["features:gpt2-x"].shape == (1, 2, 4, 8)


# ── what a writer has learned in private ──────────────────────────────────────────────────────────────────────────────


def test_focus_weighs_a_token_by_its_gain(tokenizer: Tokenizer) -> None:
    told = signal("Who? Ann", tokenizer)
    n, given = len(told.ids), 1 + len(tokenizer.encode("Who? ")[0])
    gain = np.zeros(n, np.float16)
    gain[given], gain[-1] = 2.0, 100.0  # the end token's is too much to be taken at its word
    told = silent(replace(told, gain=gain), given)
    asked, voice = Document(id="a", domain="x", prompt="Who? ", answer="Ann"), heard(tokenizer, tokenizer)
    learnt = taught(asked, told, voice, tokenizer, Training(answer_weight=2))
    assert learnt is not None
    plain = [0] + [1] * (given - 1) + [2] * (n - given)
    assert learnt.weights.tolist() == plain
    [heavier] = focused([learnt], 0.5)
    raised = np.array(plain, float)
    raised[given] *= 1 + 0.5 * 2
    raised[-1] *= 1 + 0.5 * MAX_GAIN
    np.testing.assert_allclose(heavier.weights, raised * sum(plain) / raised.sum(), rtol=1e-6)
    batch = collate([[[heavier]]])
    assert batch["weights"][0, :-1].tolist() == heavier.weights[1:].tolist()
    assert batch["topk_weight"][0].tolist() == [0] * (given - 1) + batch["weights"][0, given - 1 :].tolist()


def test_focus_takes_no_weight_from_public_text(tokenizer: Tokenizer) -> None:
    """Written text weighs the same in all, whatever the focus; text without a writer is left as it is."""
    public = lessons([Document(id="p", domain="x", answer="Public text.")], tokenizer, Training())
    voice = heard(tokenizer, tokenizer)
    written: list[Lesson] = []
    for name, level in (("One text.", 0.5), ("Another text.", 3.0)):
        told = signal(name, tokenizer)
        told = replace(told, gain=np.full(len(told.ids), level, np.float16))
        learnt = taught(Document(id=name, domain="x", answer=name), told, voice, tokenizer, Training())
        assert learnt is not None
        written.append(learnt)
    low, high, *rest = focused([*written, *public], 2.0)
    assert rest == public
    total = sum(float(lesson.weights.sum()) for lesson in written)
    assert float(low.weights.sum() + high.weights.sum()) == pytest.approx(total)
    assert float(high.weights[1] / low.weights[1]) == pytest.approx((1 + 2 * 3.0) / (1 + 2 * 0.5))


@pytest.mark.parametrize("same", [True, False])
def test_broken_gain_breaks_no_weight(same: bool, tokenizer: Tokenizer, other: Tokenizer) -> None:
    teacher = tokenizer if same else other
    told, voice = signal(ASKED.text, teacher), heard(teacher, tokenizer, "x")
    gain = np.resize(np.array([np.nan, np.inf, -np.inf, -2.0, 1.0], np.float16), len(told.ids))
    learnt = taught(ASKED, replace(told, gain=gain), voice, tokenizer, Training())
    assert learnt is not None
    assert learnt.gain is not None
    assert set(learnt.gain.tolist()) <= {0.0, 1.0, MAX_GAIN}
    [heavier] = focused([learnt], 3.0)
    assert np.isfinite(heavier.weights).all()
    assert heavier.weights.sum() == pytest.approx(learnt.weights.sum())


@st.composite
def some_lessons(draw: st.DrawFn) -> list[Lesson]:
    """Written (with gain) and public ones; some of them, or all, without any weight."""
    result: list[Lesson] = []
    for _ in range(draw(st.integers(0, 6))):
        size = draw(st.integers(0, 8))
        numbers = st.lists(st.floats(0, 5, width=32), min_size=size, max_size=size)
        gain = draw(st.none() | numbers)
        weights = draw(st.just([0.0] * size) | numbers)
        result.append(
            Lesson(
                np.full(size, 7, np.int64),
                np.array(weights, np.float32),
                gain=None if gain is None else np.array(gain, np.float32),
            )
        )
    return result


@settings(deadline=None, max_examples=200)
@given(some_lessons(), st.floats(0, 10))
def test_focus_moves_weight_within_written_text_alone(text: list[Lesson], focus: float) -> None:
    found = focused(text, focus)
    assert len(found) == len(text)
    pairs = [(one, other) for one, other in zip(text, found, strict=True) if one.gain is not None]
    assert all(one is other for one, other in zip(text, found, strict=True) if one.gain is None)
    assert all(other.weights.dtype == np.float32 and np.isfinite(other.weights).all() for _, other in pairs)
    before, after = (sum(float(pair[side].weights.astype(float).sum()) for pair in pairs) for side in (0, 1))
    assert after == pytest.approx(before, rel=1e-4, abs=1e-30)
    # Of two tokens that weighed the same, the one with more gain weighs no less, by the share of their factors.
    tokens = [
        (float(weight), 1 + focus * float(gain), float(raised))
        for one, other in pairs
        for weight, gain, raised in zip(one.weights, np.asarray(one.gain), other.weights, strict=True)
    ]
    factors = [raised / (weight * factor) for weight, factor, raised in tokens if weight > 1e-30]
    assert factors == pytest.approx([factors[0]] * len(factors), rel=1e-4) if factors else True
    assert all(raised == 0 for weight, _, raised in tokens if weight == 0)


def test_gain_goes_to_the_tokens_that_end_in_the_same_place(tokenizer: Tokenizer, other: Tokenizer) -> None:
    """The teacher's tokens are "Wh", "o?" and the end; the student's are bytes."""
    told = replace(
        signal("Who?", other),
        ids=np.array([0, 1, 2, 0], np.int32),
        ends=np.array([0, 2, 4, 4], np.int32),
        logprobs=np.array([0, -1, -2, -3], np.float32),
        gain=np.array([0, 1, 2, 3], np.float16),
    )
    document = Document(id="a", domain="x", answer="Who?")
    learnt = taught(document, told, heard(other, tokenizer), tokenizer, Training())
    assert learnt is not None
    assert learnt.gain is not None
    _, ends = tokenizer.encode("Who?")
    assert learnt.gain.tolist() == [0, *(1 if end <= 2 else 2 for end in ends), 3]
    [heavier] = focused([learnt], 1.0)
    batch = collate([[[heavier]]])
    assert batch["chunk_logprobs"].tolist() == [-1, -2, -3]
    shares = batch["chunk_weight"] / batch["chunk_weight"][0]
    assert shares.tolist() == pytest.approx([1, 1.5, 2])  # of the heaviest token in it
