"""Teachers of every tokenizer, through lessons and batches into the loss."""

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_segmentation import renumbered

from deepfusion.checkpoints import open_model, open_tokenizer
from deepfusion.config import Across, LogitsObjective, Training
from deepfusion.data.batches import collate
from deepfusion.data.documents import Document
from deepfusion.data.hearing import Heard, hear, keep_tokenizer
from deepfusion.data.lessons import Lesson, taught
from deepfusion.data.outcomes import outcomes
from deepfusion.data.segmentation import segmentation
from deepfusion.data.tokens import Tokenizer, spelt
from deepfusion.objectives import Logits, Predictions
from deepfusion.signals import Signal, Signals
from deepfusion.students import transfer_lessons
from kinds import KINDS, text
from tiny import FAST, checkpoint, folder, transfer

tokenizer = cache(lambda kind: Tokenizer(KINDS[kind]()))
PAIRS = sorted(itertools.permutations(KINDS, 2))
ACROSS: tuple[Across, ...] = ("projected_kl", "hybrid_kl", "mined", "uld")


def told(words: str, teacher: Tokenizer, seed: int, k: int = 5) -> Signal:
    """What a teacher of random opinions says of a text: k tokens at each place, with the one that comes among them."""
    ids, ends = spelt(words, teacher)
    random = np.random.default_rng(seed)
    topk = np.stack([random.choice(len(teacher.table), k, replace=False) for _ in ids])
    topk[:, 0] = np.where((topk == ids[:, None]).any(1), topk[:, 0], ids)
    shares = random.dirichlet(np.ones(k + 1), len(ids))[:, :k]
    logprobs = np.log(np.maximum(shares, 1e-6))
    logprobs[0] = -np.inf
    at = (topk == ids[:, None]).argmax(1)
    return Signal(ids, ends, logprobs[np.arange(len(ids)), at].astype(np.float32), topk, logprobs.astype(np.float16))


@cache
def heard(across: Across, teacher: str, student: str) -> Heard:
    one, other = tokenizer(teacher), tokenizer(student)
    known = None if across == "uld" else outcomes(across, one, other, range(len(one.table)))
    return Heard(Signals(one.fingerprint, "x", {}), across, known, one.table)


def lesson(across: Across, pair: tuple[str, str], words: str, seed: int = 0) -> tuple[Lesson, Signal]:
    said = told(words, tokenizer(pair[0]), seed)
    document = Document(id="a", domain="x", answer=words)
    learnt = taught(document, said, heard(across, *pair), tokenizer(pair[1]), Training(context=4096))
    assert learnt is not None
    return learnt, said


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(ACROSS), st.sampled_from(PAIRS), text, st.integers(0, 9))
def test_no_probability_is_invented(across: Across, pair: tuple[str, str], words: str, seed: int) -> None:
    """What is said at a place adds up to what was said there, or less: the rest is said of no token."""
    learnt, said = lesson(across, pair, words, seed)
    assert learnt.places is not None
    assert learnt.outcome_logprobs is not None
    mass = np.exp(learnt.outcome_logprobs.astype(float)).sum(1)
    starts = spelt(words, tokenizer(pair[1]))[1]
    there = {int(end): place + 1 for place, end in enumerate(said.ends[:-1])}
    for place, total in zip(learnt.places, mass, strict=True):
        assert 0 < total <= np.exp(said.topk_logprobs[there[int(starts[place - 1])]].astype(float)).sum() + 1e-3
    if learnt.members is not None:
        places, slots, tokens = learnt.members.T
        assert len({*zip(places.tolist(), tokens.tolist(), strict=True)}) == len(tokens)  # a token is in one outcome
        finite = np.argwhere(np.isfinite(learnt.outcome_logprobs)).tolist()
        assert {*zip(places.tolist(), slots.tolist(), strict=True)} == {tuple(cell) for cell in finite}


@pytest.mark.parametrize("across", ACROSS)
@pytest.mark.parametrize("pair", [("llama", "byte-level"), ("byte-level", "unigram")])
def test_a_student_learns_what_is_said_across(across: Across, pair: tuple[str, str]) -> None:
    """Logits of its own fall to the teacher's: the KL goes to 0, in one block of tokens or several."""
    learnt = [lesson(across, pair, words)[0] for words in ("the dog says: ½", "два слова 🙂 fox")]
    batch: dict[str, Any] = collate([[[one] for one in learnt], [learnt[::-1]]])
    objective = Logits(LogitsObjective(across=across, label_teaches=False, focus=0))
    vocabulary = len(tokenizer(pair[1]).table)
    logits = torch.zeros(*batch["labels"].shape, vocabulary, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    first = last = float("nan")
    for step in range(150):
        terms = objective(batch, Predictions.of(logits))
        last = float(terms["kl"].detach())
        first = last if not step else first
        optimizer.zero_grad()
        terms["kl"].backward()
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()
        optimizer.step()
    assert first > 0.3
    assert last < 0.15 * first


def test_blocks_of_tokens_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt = [lesson("projected_kl", ("llama", "byte-level"), words)[0] for words in ("the dog", "два", "½ of it 🙂")]
    batch = collate([[[one] for one in learnt]])
    torch.manual_seed(0)
    logits = torch.randn(*batch["labels"].shape, len(tokenizer("byte-level").table))
    objective = Logits(LogitsObjective(across="projected_kl"))
    whole = objective(batch, Predictions.of(logits))
    monkeypatch.setattr("deepfusion.objectives.logits.BLOCK", 3 * logits.shape[-1])
    parts = objective(batch, Predictions.of(logits.clone().requires_grad_()))
    for name, term in whole.items():
        torch.testing.assert_close(parts[name], term)
    silent = objective({k: v for k, v in batch.items() if k not in ("places", "members")}, Predictions.of(logits))
    assert silent["kl"] != whole["kl"]


# ── whole transfer sets ───────────────────────────────────────────────────────────────────────────────────────────────


def test_one_vocabulary_in_other_numbers_is_taught_token_by_token(tmp_path: Path) -> None:
    """By content, not by name: the writer's numbers are read as the student's."""
    writer, student = (checkpoint("llama", tmp_path / name) for name in ("writer", "student"))
    renamed = renumbered(open_tokenizer(writer.folder))
    renamed.save_pretrained(writer.folder)
    made = transfer(folder(tmp_path / "transfer"), writer)
    found = transfer_lessons(student, made, (), FAST)
    taught_ones = [one for one in found if one.topk_ids is not None]
    assert len(taught_ones) == 4
    theirs, ours = Tokenizer(open_tokenizer(writer.folder)), Tokenizer(open_tokenizer(student.folder))
    assert theirs.fingerprint != ours.fingerprint
    assert segmentation(theirs.raw) == segmentation(ours.raw)
    [signals] = [Signals.load(path) for path in sorted(made.signals.glob("d-law*"))]
    said, learnt = next(iter(signals.of.values())), taught_ones[0]
    assert [ours.table[i] for i in learnt.ids[1:-1]] == [theirs.table[i] for i in said.ids[1:-1]]
    assert learnt.topk_ids is not None
    assert [[ours.table[i] for i in row] for row in learnt.topk_ids[1:]] == [
        [theirs.table[i] for i in row] for row in said.topk_ids[1:]
    ]
    assert open_model(student.folder).config.vocab_size > learnt.topk_ids.max()


@pytest.mark.parametrize("across", ACROSS)
def test_writers_of_another_tokenizer_are_heard_as_the_recipe_says(across: Across, tmp_path: Path) -> None:
    writer = checkpoint("gpt2", tmp_path / "writer", vocab=300)
    student = checkpoint("llama", tmp_path / "student")
    made = transfer(folder(tmp_path / "transfer"), writer)
    found = transfer_lessons(student, made, (), FAST, objective=LogitsObjective(across=across))
    spoken = [one for one in found if one.places is not None]
    assert len(spoken) == 4
    assert all((one.members is None) == (across == "uld") for one in spoken)
    assert all(one.chunk is None and one.topk_ids is None for one in found)


def test_outcomes_are_worked_out_once_for_teachers_of_one_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(across: Across, teacher: Tokenizer, student: Tokenizer, tokens: list[int]) -> Any:
        made.append(len(tokens))
        return outcomes(across, teacher, student, tokens)

    monkeypatch.setattr("deepfusion.data.hearing.outcomes", counted)
    tokenizer("llama").raw.save_pretrained(tmp_path / "model")
    teacher = Tokenizer(open_tokenizer(tmp_path / "model"))
    keep_tokenizer(teacher.fingerprint, tmp_path / "model", tmp_path / "kept")
    voices = {
        name: (Signals(teacher.fingerprint, name, {"a": told("the dog", teacher, seed)}), tmp_path / "kept")
        for seed, name in enumerate(("one", "two"))
    }
    heard_ones = hear(voices, tokenizer("byte-level"), "projected_kl")
    assert heard_ones["one"].outcomes is heard_ones["two"].outcomes
    said = [signal.topk_ids for signals, _ in voices.values() for signal in signals.of.values()]
    assert made == [len(np.unique(np.concatenate([ids.ravel() for ids in said])))]


# ── what auto is ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_auto_is_decided_for_each_teacher_by_what_it_spoke_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Russian the student spells bytes, and so does one teacher; the other has whole words."""
    monkeypatch.setattr("deepfusion.data.coverage.FOREIGN", 0.1)
    voices: dict[str, tuple[Signals, Path]] = {}
    for kind in ("unigram", "byte-level"):
        tokenizer(kind).raw.save_pretrained(tmp_path / kind)
        teacher = Tokenizer(open_tokenizer(tmp_path / kind))
        keep_tokenizer(teacher.fingerprint, tmp_path / kind, tmp_path / "kept")
        said = told("два слова и ещё два слова", teacher, 0)
        voices[kind] = (Signals(teacher.fingerprint, kind, {"a": said}), tmp_path / "kept")
    found = hear(voices, tokenizer("llama"), "auto")
    assert {kind: one.across for kind, one in found.items()} == {
        "unigram": "span_likelihood",
        "byte-level": "projected_kl",
    }
    assert {kind: one.outcomes is not None for kind, one in found.items()} == {"unigram": False, "byte-level": True}


def test_a_shifted_teacher_is_heard_by_chunks(tmp_path: Path) -> None:
    writer, student = checkpoint("gpt2", tmp_path / "writer", vocab=300), checkpoint("llama", tmp_path / "student")
    made = transfer(folder(tmp_path / "transfer"), writer).model_copy(update={"shifted": True})
    found = transfer_lessons(student, made, (), FAST, objective=LogitsObjective(across="projected_kl"))
    assert sum(one.chunk is not None for one in found) == 4
    assert all(one.places is None for one in found)
