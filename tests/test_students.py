from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepfusion.artifacts import Checkpoint
from deepfusion.checkpoints import as_checkpoint, open_tokenizer
from deepfusion.config import LogitsObjective, VAAObjective
from deepfusion.data.documents import TransferDocument, read_jsonl, write_jsonl
from deepfusion.data.lessons import Lesson, lessons
from deepfusion.data.tokens import Tokenizer
from deepfusion.families import family
from deepfusion.signals import Signals
from deepfusion.students import feature_patches, learn, tokens_within, transfer_lessons, widths
from pico import normalise, pad_vocabulary
from tiny import FAST, HERE, PRIVATE, PUBLIC, checkpoint, folder, said, teaching, transfer, weights

PLAIN = LogitsObjective(beta=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint("llama", tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Of another tokenizer."""
    return checkpoint("gpt2", tmp_path_factory.mktemp("models") / "gpt2", vocab=300)


def taught_by(found: list[Lesson]) -> list[str]:
    """Who speaks in each lesson: a teacher of the same tokenizer, one of another, or nobody."""
    return ["same" if one.topk_ids is not None else "other" if one.chunk is not None else "-" for one in found]


def texts(found: list[Lesson], base: Checkpoint) -> list[str]:
    table = Tokenizer(open_tokenizer(base.folder)).table
    return [b"".join(table[token] for token in one.ids).decode() for one in found]


# ── lessons of the transfer set ───────────────────────────────────────────────────────────────────────────────────────


def test_each_document_is_taught_by_its_writer(base: Checkpoint, foreign: Checkpoint, tmp_path: Path) -> None:
    for writer, voice in ((base, "same"), (foreign, "other")):
        made = transfer(folder(tmp_path / voice), writer)
        found = transfer_lessons(base, made, (), FAST)
        assert texts(found, base) == [d.text for d in read_jsonl(made.documents, TransferDocument)]
        assert taught_by(found) == ["-"] * len(PUBLIC) + [voice] * 4
        assert [one.cluster for one in found] == [0, 1, 0, 0, 0, 1, 1]


def test_a_branch_learns_what_its_cluster_knows(base: Checkpoint, tmp_path: Path) -> None:
    made = transfer(tmp_path, base)
    by_cluster = [texts(transfer_lessons(base, made, (), FAST, cluster=cluster), base) for cluster in (0, 1)]
    everything = texts(transfer_lessons(base, made, (), FAST), base)
    assert Counter(by_cluster[0] + by_cluster[1]) == Counter(everything)
    assert [p + a for p, a in PRIVATE["d-law"]] == by_cluster[0][-2:]
    assert [p + a for p, a in PRIVATE["d-food"]] == by_cluster[1][-2:]


def test_public_text_alone(base: Checkpoint, tmp_path: Path) -> None:
    found = transfer_lessons(base, transfer(tmp_path, base), (), FAST, only_public=True)
    assert texts(found, base) == ["".join(pair) for pair in PUBLIC]


def test_what_a_device_thought_while_it_wrote_goes_before_what_it_says_later(
    base: Checkpoint, foreign: Checkpoint, tmp_path: Path
) -> None:
    """Asked later it has an opinion on the prompts too, which others wrote; of its answers features are taken alone."""
    made = transfer(folder(tmp_path / "transfer"), base)
    asked = {f"d-law/a{n}": p + a for n, (p, a) in enumerate(PRIVATE["d-law"])}
    told = teaching("d-law", 0, asked, foreign, tmp_path / "told")
    signals = Signals.load(told.signals)
    of = {
        name: replace(one, features=np.full((1, 2, 16), n, np.float16))
        for n, (name, one) in enumerate(signals.of.items())
    }
    Signals(signals.tokenizer, signals.lineage, of).save(told.signals)
    found = transfer_lessons(base, made, [told], FAST, objective=VAAObjective(stages=1, patches=2))
    alone = transfer_lessons(base, made, (), FAST)
    assert taught_by(found) == taught_by(alone) == ["-"] * 3 + ["same"] * 4
    for one, plain in zip(found, alone, strict=True):
        assert np.array_equal(one.ids, plain.ids)
        if plain.topk_logprobs is not None:
            assert np.array_equal(one.topk_logprobs, plain.topk_logprobs)
            assert np.isneginf(one.topk_logprobs[:2]).all()
    assert [None if one.features is None else int(one.features.max()) for one in found] == [None] * 3 + [
        0,
        1,
        None,
        None,
    ]


def test_a_device_that_kept_nothing_is_heard_by_what_it_says_later(
    base: Checkpoint, foreign: Checkpoint, tmp_path: Path
) -> None:
    made = transfer(folder(tmp_path / "transfer"), base)
    (made.signals / "d-law.safetensors").unlink()
    asked = {f"d-law/a{n}": p + a for n, (p, a) in enumerate(PRIVATE["d-law"])}
    told = teaching("d-law", 0, asked, foreign, tmp_path / "told")
    assert taught_by(transfer_lessons(base, made, [told], FAST)) == ["-"] * 3 + ["other"] * 2 + ["same"] * 2


def test_proxies_are_asked_about_everything_they_may_know(
    base: Checkpoint, foreign: Checkpoint, tmp_path: Path
) -> None:
    """Two teachers for cluster 0, one for cluster 1, asked about all public documents."""
    made = transfer(folder(tmp_path / "transfer"), base)
    public = {f"public-{n}": p + a for n, (p, a) in enumerate(PUBLIC)}
    told = [
        teaching("p0", 0, public | {"d-law/a0": "".join(PRIVATE["d-law"][0])}, base, tmp_path / "p0"),
        teaching("p1", 0, public, foreign, tmp_path / "p1"),
        teaching("p2", 1, public, base, tmp_path / "p2"),
    ]
    joint = transfer_lessons(base, made, told, FAST, ask="proxies")
    # Cluster 0 knows public documents 0 and 2, cluster 1 the other; of the answers only the first was asked about.
    assert taught_by(joint) == ["same", "other", "same", "same", "other", "same", "-", "-", "-"]
    branches = [transfer_lessons(base, made, told, FAST, ask="proxies", cluster=cluster) for cluster in (0, 1)]
    assert taught_by(branches[0]) == ["same", "other"] * 3 + ["same", "-"]
    assert taught_by(branches[1]) == ["same"] * 3 + ["-", "-"]
    assert [one.cluster for one in branches[1]] == [0, 1, 0, 1, 1]  # who knows a document is not who is asked about it


def test_a_document_too_long_for_its_teachers_lesson_is_still_learnt(base: Checkpoint, tmp_path: Path) -> None:
    """A prompt loses its beginning, and with it the teacher's tokens."""
    made = transfer(tmp_path, base)
    size = max(len(one) for one in transfer_lessons(base, made, (), FAST))
    shorter = FAST.model_copy(update={"context": size - 1})
    found = transfer_lessons(base, made, (), shorter)
    assert max(len(one) for one in found) == size - 1
    assert "-" in taught_by(found)[len(PUBLIC) :]


def test_no_lesson_is_longer_than_the_student_reads(foreign: Checkpoint, tmp_path: Path) -> None:
    """A student's own context counts, whatever the training's."""
    short = checkpoint("llama", tmp_path / "short", context=16)
    for writer in (short, foreign):
        made = transfer(folder(tmp_path / writer.model_type), writer)
        found = transfer_lessons(short, made, (), FAST)
        assert max(map(len, found)) == 16
        assert "-" in taught_by(found)[len(PUBLIC) :]


def test_what_the_student_cannot_spell_is_left_out(base: Checkpoint, tmp_path: Path, capsys: Any) -> None:
    """Nobody can mend what a device's model has written; public text must be mended by who gave it."""
    student = checkpoint("llama", tmp_path / "student")
    normalise(student.folder)
    made = transfer(folder(tmp_path / "transfer"), base)
    odd = TransferDocument(id="odd", domain="x", answer="Cafe\u0301.", kind="sampled", writer="d-odd", cluster=0)
    write_jsonl(made.documents, [*read_jsonl(made.documents, TransferDocument), odd])
    teacher = Tokenizer(open_tokenizer(base.folder))
    kept = Signals(teacher.fingerprint, base.lineage, {"odd": said(odd.text, teacher)})
    kept.save(made.signals / "d-odd.safetensors")
    assert taught_by(transfer_lessons(base, made, (), FAST)) == ["-"] * 3 + ["same"] * 5
    assert taught_by(transfer_lessons(student, made, (), FAST)) == ["-"] * 3 + ["other"] * 4
    assert "does not spell this text" in capsys.readouterr().err
    write_jsonl(made.documents, [odd.model_copy(update={"kind": "public", "writer": None})])
    with pytest.raises(ValueError, match="does not spell this text"):
        transfer_lessons(student, made, (), FAST)


@pytest.mark.parametrize("wider", ["teacher", "student"])
def test_vocabularies_padded_beyond_the_tokenizer_go_together(wider: str, tmp_path: Path) -> None:
    """Heads of different sizes, one tokenizer: what the teacher kept is meant for tokens that both have."""
    models = {name: checkpoint("llama", tmp_path / name, seed=n) for n, name in enumerate(("teacher", "student"))}
    pad_vocabulary(models[wider].folder, scale=1000.0 if wider == "teacher" else 1.0)
    models[wider] = as_checkpoint(models[wider].folder)
    made = transfer(folder(tmp_path / "transfer"), models["teacher"])
    found = transfer_lessons(models["student"], made, (), FAST)
    assert taught_by(found) == ["-"] * len(PUBLIC) + ["same"] * 4
    size = len(Tokenizer(open_tokenizer(models["student"].folder)).table)
    assert all(one.topk_ids.max() < size for one in found if one.topk_ids is not None)
    into = folder(tmp_path / "learnt")
    objective = LogitsObjective(beta=3)
    learnt = learn(models["student"], found, objective, FAST, tokens=300, seed=0, into=into, runtime=HERE)
    losses = [loss for _, loss in learnt.losses]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    assert {name: len(tensor) for name, tensor in weights(into).items()} == {
        name: len(tensor) for name, tensor in weights(models["student"].folder).items()
    }


def test_features_are_asked_for_by_the_objective_alone(tmp_path: Path, base: Checkpoint) -> None:
    assert feature_patches(PLAIN) == 0
    assert feature_patches(VAAObjective(patches=3)) == 3
    told = teaching("p0", 0, {"a": "text"}, base, tmp_path)
    assert widths([told]) == {base.lineage: 16}


# ── learning ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_budget_in_tokens_by_hand(base: Checkpoint) -> None:
    """A token costs its active parameters once forward and twice backward."""
    assert tokens_within(3.0 * 1000, base.model_copy(update={"active_parameters": 10})) == 100


@pytest.mark.parametrize("trains", [None, frozenset({"ffn"}), frozenset({"router", "embedding"})])
def test_only_what_trains_changes(trains: frozenset[str] | None, tmp_path: Path) -> None:
    student = checkpoint("mixtral", tmp_path / "student")
    tokenizer = Tokenizer(open_tokenizer(student.folder))
    text = lessons(read_jsonl(transfer(tmp_path).documents, TransferDocument), tokenizer, FAST)
    into = folder(tmp_path / "learnt")
    learnt = learn(student, text, PLAIN, FAST, tokens=200, seed=0, into=into, runtime=HERE, trains=trains, balance=0.1)  # pyright: ignore[reportArgumentType]
    before, after, kind = weights(student.folder), weights(into), family("mixtral")
    assert set(after) == set(before)
    changed = {kind.role(name) for name in before if before[name] != after[name]}
    assert changed - {"head"} == (trains or {"embedding", "attention", "norm", "router", "ffn"})
    assert learnt.lineage == student.lineage
    assert learnt.work.tokens >= 200
    assert learnt.work.token_parameters == 3 * learnt.work.tokens * student.active_parameters
    assert Checkpoint.load(into) == learnt


def test_a_teacher_of_the_same_tokenizer_is_followed(base: Checkpoint, tmp_path: Path) -> None:
    """On text whose labels say nothing, the student takes over the teacher's distribution."""
    teacher = checkpoint("gpt2", tmp_path / "teacher", seed=7)
    made = transfer(folder(tmp_path / "transfer"), teacher, public=False)
    found = transfer_lessons(base, made, (), FAST)
    objective = LogitsObjective(beta=10, label_teaches=False)
    into = folder(tmp_path / "learnt")
    learnt = learn(base, found, objective, FAST, tokens=4000, seed=0, into=into, runtime=HERE)
    assert learnt.losses[-1][1] < learnt.losses[0][1]


def test_equal_arguments_give_equal_digests(base: Checkpoint, tmp_path: Path) -> None:
    tokenizer = Tokenizer(open_tokenizer(base.folder))
    text = lessons(read_jsonl(transfer(tmp_path).documents, TransferDocument), tokenizer, FAST)
    digests = [
        learn(base, text, PLAIN, FAST, tokens=200, seed=seed, into=folder(tmp_path / str(n)), runtime=HERE).digest
        for n, seed in enumerate((0, 0, 1))
    ]
    assert digests[0] == digests[1] != digests[2]
