"""What a device has learned, on top of what the base knows: by hand, and through real models."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfusion.artifacts import Checkpoint, TransferSet, Work
from deepfusion.checkpoints import open_model, open_tokenizer
from deepfusion.config import DevicePhase, LogitsObjective, TransferPhase
from deepfusion.data.batches import collate
from deepfusion.data.documents import TransferDocument, read_jsonl, write_jsonl
from deepfusion.data.hearing import Heard, keep_tokenizer
from deepfusion.data.lessons import Lesson, taught
from deepfusion.data.tokens import Tokenizer, chunk_spans, spelt
from deepfusion.objectives import build_objective
from deepfusion.phases.device import train_device
from deepfusion.phases.shift import CERTAIN, chunkwise, shift, tokenwise
from deepfusion.phases.transfer import gather, write_cluster
from deepfusion.signals import Signal, Signals
from deepfusion.students import transfer_lessons
from deepfusion.training import Learner
from deepfusion.writing import with_gain
from pico import normalise
from tiny import FAST, HERE, checkpoint, clusters, corpus, folder, transfer

# ── equal tokenizers, by hand ─────────────────────────────────────────────────────────────────────────────────────────


def signal(
    writer: Sequence[Sequence[float]], ancestor: Sequence[Sequence[float]], ids: Sequence[int], spoken: Sequence[int]
) -> Signal:
    """A start token, and one row for each of `writer`: probabilities of the tokens `ids`, of which one was spoken."""
    n, k = len(writer) + 1, len(ids)
    topk, before_topk = np.full((n, k), -np.inf, np.float16), np.zeros((n, k), np.float16)
    topk[1:], before_topk[1:] = np.log(writer), np.log(ancestor)
    logprobs, before = np.full(n, -np.inf, np.float32), np.zeros(n, np.float32)
    for row, token in enumerate(spoken):
        logprobs[1 + row] = np.log(writer[row][list(ids).index(token)])
        before[1 + row] = np.log(ancestor[row][list(ids).index(token)])
    return Signal(
        ids=np.array([3, *spoken], np.int32),
        ends=np.arange(n).astype(np.int32),
        logprobs=logprobs,
        topk_ids=np.tile(np.array(ids, np.int32), (n, 1)),
        topk_logprobs=topk,
        gain=np.ones(n, np.float16),
        before=before,
        before_topk=before_topk,
    )


def asked(rows: Sequence[Sequence[float]], told: Signal, words: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """What a base of these probabilities says of a signal's tokens, and of those kept."""
    table = np.log(np.array([[1 / words] * words, *rows], np.float32))
    at = np.arange(len(table))
    known = np.where(told.topk_ids < words, told.topk_ids, 0)
    spoken = np.minimum(told.ids, words - 1)  # the start token's own row means nothing
    return table[at, spoken], table[at[:, None], known]


def test_four_words_by_hand() -> None:
    """Two words are kept, two are the rest: base .4 .2 | .4, writer .6 .2 | .2, ancestor .3 .4 | .3."""
    told = signal([[0.6, 0.2]], [[0.3, 0.4]], ids=[2, 0], spoken=[2])
    shifted = tokenwise(told, *asked([[0.2, 0.3, 0.4, 0.1]], told), vocabulary=4)
    # .4 · .6/.3 = .8; .2 · .2/.4 = .1; .4 · .2/.3 = .8/3: together 3.5/3
    np.testing.assert_allclose(np.exp(shifted.topk_logprobs[1]), [2.4 / 3.5, 0.3 / 3.5], rtol=2e-3)
    assert np.exp(shifted.logprobs[1]) == pytest.approx(2.4 / 3.5, rel=2e-3)
    assert np.isneginf(shifted.topk_logprobs[0]).all()
    assert np.isneginf(shifted.logprobs[0])
    assert (shifted.before, shifted.before_topk) == (None, None)
    assert (shifted.ids is told.ids, shifted.gain is told.gain, shifted.topk_ids is told.topk_ids) == (True,) * 3
    assert (shifted.topk_logprobs.dtype, shifted.logprobs.dtype) == (np.float16, np.float32)


ROW = st.lists(st.floats(0.02, 1), min_size=4, max_size=4).map(lambda row: [value / sum(row) for value in row])


@settings(deadline=None)
@given(st.lists(st.tuples(ROW, ROW), min_size=1, max_size=4))
def test_who_has_learned_nothing_teaches_the_base_its_own(rows: list[tuple[list[float], list[float]]]) -> None:
    kept = [row[:2] for row, _ in rows]
    told = signal(kept, kept, ids=[0, 1], spoken=[0] * len(rows))
    base, base_topk = asked([own for _, own in rows], told)
    shifted = tokenwise(told, base, base_topk, vocabulary=4)
    np.testing.assert_array_equal(shifted.topk_logprobs[1:], base_topk[1:].astype(np.float16))
    np.testing.assert_allclose(shifted.logprobs[1:], base[1:], atol=1e-6)


@settings(deadline=None)
@given(st.lists(st.tuples(ROW, ROW), min_size=1, max_size=4))
def test_a_base_that_is_the_ancestor_learns_the_writers_own(rows: list[tuple[list[float], list[float]]]) -> None:
    told = signal([row[:2] for row, _ in rows], [own[:2] for _, own in rows], ids=[0, 1], spoken=[1] * len(rows))
    shifted = tokenwise(told, *asked([own for _, own in rows], told), vocabulary=4)
    np.testing.assert_allclose(np.exp(shifted.topk_logprobs[1:].astype(float)), [row[:2] for row, _ in rows], atol=5e-3)
    np.testing.assert_allclose(np.exp(shifted.logprobs[1:]), [row[1] for row, _ in rows], atol=5e-3)


def test_rows_without_an_opinion_stay_so() -> None:
    told = signal([[0.6, 0.2], [0.5, 0.3]], [[0.3, 0.4], [0.25, 0.25]], ids=[0, 1], spoken=[0, 1])
    logprobs, topk = told.logprobs.copy(), told.topk_logprobs.copy()
    logprobs[1], topk[1] = -np.inf, -np.inf  # the prompt was given to the writer
    told = replace(told, logprobs=logprobs, topk_logprobs=topk)
    shifted = tokenwise(told, *asked([[0.25] * 4] * 2, told), vocabulary=4)
    assert np.isneginf(shifted.topk_logprobs[:2]).all()
    assert np.isneginf(shifted.logprobs[:2]).all()
    assert np.isfinite(shifted.topk_logprobs[2]).all()


def test_what_the_base_does_not_know_joins_the_rest() -> None:
    """Of a head of three words the fourth is unknown: base .5 | .5, writer .6 | .4, ancestor .3 | .7."""
    told = signal([[0.6, 0.2]], [[0.3, 0.4]], ids=[0, 3], spoken=[0])
    shifted = tokenwise(told, *asked([[0.5, 0.3, 0.2]], told, words=3), vocabulary=3)
    assert np.isneginf(shifted.topk_logprobs[1, 1])
    assert np.exp(float(shifted.topk_logprobs[1, 0])) == pytest.approx(1 / (1 + 0.5 * 0.4 / 0.7), rel=2e-3)


# ── other tokenizers, by hand ─────────────────────────────────────────────────────────────────────────────────────────


def test_chunks_by_hand() -> None:
    """Writer: start, ab c | d ef | end; base: start, a bc | def | end; the prompt (ab c) was given to the writer."""
    told = Signal(
        ids=np.zeros(6, np.int32),
        ends=np.array([0, 2, 3, 4, 6, 6], np.int32),
        logprobs=np.array([-np.inf, -np.inf, -np.inf, -1.0, -2.0, -0.5], np.float32),
        topk_ids=np.zeros((6, 1), np.int32),
        topk_logprobs=np.zeros((6, 1), np.float16),
        before=np.array([0, -1, -1, -2.5, -4.0, -3.0], np.float32),
        before_topk=np.zeros((6, 1), np.float16),
    )
    ends = np.array([0, 1, 3, 6, 6], np.int32)
    base = np.array([0, -1, -1, -5.0, -0.25], np.float32)
    spans = chunk_spans(ends, told.ends)
    assert spans == [(1, 3, 1, 3), (3, 4, 3, 5), (4, 5, 5, 6)]
    shifted = chunkwise(told, base, spans)
    # def: -5 + (-1 + 2.5) + (-2 + 4) = -1.5; end: -.25 + (-.5 + 3) > 0, which no likelihood is
    assert shifted.logprobs.tolist() == [-np.inf] * 3 + [-1.5, 0.0, np.float32(CERTAIN)]
    assert shifted.before is None
    silent = replace(told, logprobs=np.full(6, -np.inf, np.float32))
    assert np.isneginf(chunkwise(silent, base, spans).logprobs).all()


# ── whole transfer sets ───────────────────────────────────────────────────────────────────────────────────────────────


class World:
    """A base; a device whose model has its tokenizer, and one that has another."""

    def __init__(self, root: Path) -> None:
        self.base = checkpoint("llama", root / "base")
        self.others = {
            "d-law": checkpoint("llama", root / "law", 1),
            "d-food": checkpoint("gpt2", root / "food", vocab=300),
        }
        self.before = {"d-law": checkpoint("llama", root / "old", 2), "d-food": self.base}
        self.before["d-food"] = checkpoint("gpt2", root / "old-food", 3, vocab=300)
        self.transfer = self.written(root / "transfer", self.before)

    def written(self, into: Path, before: dict[str, Checkpoint]) -> TransferSet:
        """What the devices would keep of their texts with these ancestors."""
        for device, writer in self.others.items():
            transfer(folder(into / device), writer)
        for device, writer in self.others.items():
            said = Signals.load(into / device / "signals" / f"{device}.safetensors")
            tokenizer = Tokenizer(open_tokenizer(writer.folder))
            of = with_gain(said.of, open_model(before[device].folder), tokenizer, keep_before=True)
            replace(said, of=of).save(into / "signals" / f"{device}.safetensors")
            keep_tokenizer(said.tokenizer, writer.folder, into / "tokenizers")
        made = TransferSet.load(into / "d-law")
        (into / "documents.jsonl").write_bytes(made.documents.read_bytes())
        facts = {"folder": into, "work": Work(tokens=1, forward=9.0), "notices": ("a notice",)}
        return made.model_copy(update=facts).sealed()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def signals(made: TransferSet, device: str) -> Signals:
    return Signals.load(made.signals / f"{device}.safetensors")


def texts(made: TransferSet) -> dict[str, TransferDocument]:
    return {document.id: document for document in read_jsonl(made.documents, TransferDocument)}


def log_p(model: Checkpoint, ids: np.ndarray) -> torch.Tensor:
    """Log-probabilities `[n - 1, V]` of what follows each token."""
    with torch.inference_mode():
        return open_model(model.folder)(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1].log_softmax(-1)


def test_the_writers_own_tokens_are_shifted_one_by_one(world: World, tmp_path: Path) -> None:
    made = shift(world.base, world.transfer, TransferPhase(), into=folder(tmp_path / "a"), runtime=HERE)
    was, now = signals(world.transfer, "d-law"), signals(made, "d-law")
    assert (now.tokenizer, now.lineage, list(now.of)) == (was.tokenizer, was.lineage, list(was.of))
    for name, told in was.of.items():
        ids, at = told.ids, now.of[name]
        own, writer, before = (log_p(m, ids) for m in (world.base, world.others["d-law"], world.before["d-law"]))
        rows = np.flatnonzero(np.isfinite(told.logprobs))
        assert 0 < len(rows) < len(ids)
        for row in rows:
            kept = torch.from_numpy(told.topk_ids[row].astype(np.int64))
            sides = [side[row - 1][kept].exp() for side in (own, writer, before)]
            sides = [torch.cat([side, 1 - side.sum(0, keepdim=True)]) for side in sides]
            target = sides[0] * sides[1] / sides[2]
            np.testing.assert_allclose(np.exp(at.topk_logprobs[row]), (target / target.sum())[:-1], rtol=2e-2)
            spoken = (own + writer - before)[row - 1][int(ids[row])] - target.sum().log()
            assert at.logprobs[row] == pytest.approx(float(spoken), abs=2e-2)
        silent = np.isneginf(told.logprobs)
        assert np.isneginf(at.logprobs[silent]).all()
        assert np.isneginf(at.topk_logprobs[silent]).all()
        np.testing.assert_array_equal(at.gain, told.gain)  # pyright: ignore[reportArgumentType]


def test_other_tokens_are_shifted_chunk_by_chunk(world: World, tmp_path: Path) -> None:
    made = shift(world.base, world.transfer, TransferPhase(), into=folder(tmp_path / "a"), runtime=HERE)
    was, now = signals(world.transfer, "d-food"), signals(made, "d-food")
    student = Tokenizer(open_tokenizer(world.base.folder))
    assert was.tokenizer != student.fingerprint
    for name, document in texts(made).items():
        if name not in was.of:
            continue
        old, new = (taught(document, one.of[name], Heard(one, "span_likelihood"), student, FAST) for one in (was, now))
        assert old is not None
        assert new is not None
        assert old.chunk is not None
        assert new.chunk_logprobs is not None
        np.testing.assert_array_equal(old.chunk, new.chunk)  # pyright: ignore[reportArgumentType]
        ids, ends = spelt(document.text, student)
        own = torch.cat([torch.zeros(1), log_p(world.base, ids).gather(1, torch.from_numpy(ids)[1:, None])[:, 0]])
        told = was.of[name]
        assert told.before is not None
        spans = [s for s in chunk_spans(ends, told.ends) if np.isfinite(told.logprobs[s[2] : s[3]].sum())]
        assert len(spans) > 2
        for found, (a, b, c, d) in zip(new.chunk_logprobs, spans, strict=True):
            expected = float(own[a:b].sum()) + float(told.logprobs[c:d].sum() - told.before[c:d].sum())
            assert found == pytest.approx(min(expected, CERTAIN), abs=1e-4)


def test_all_but_the_probabilities_stays(world: World, tmp_path: Path) -> None:
    made, again = (
        shift(world.base, world.transfer, TransferPhase(), into=folder(tmp_path / name), runtime=HERE) for name in "ab"
    )
    assert made.digest == again.digest != world.transfer.digest
    assert TransferSet.load(tmp_path / "a") == made
    assert made.documents.read_bytes() == world.transfer.documents.read_bytes()
    changed = {"folder", "digest", "work", "shifted"}
    assert made.shifted
    assert made.model_dump(exclude=changed) == world.transfer.model_dump(exclude=changed)
    student = Tokenizer(open_tokenizer(world.base.folder))
    told, found = signals(world.transfer, "d-law"), texts(made)
    tokens = sum(len(signal.ids) for signal in told.of.values())
    tokens += sum(len(spelt(found[name].text, student)[0]) for name in signals(world.transfer, "d-food").of)
    assert made.work == Work(tokens=tokens, forward=float(tokens * world.base.active_parameters))


def test_what_was_shifted_is_not_shifted_again(world: World, tmp_path: Path) -> None:
    made = shift(world.base, world.transfer, TransferPhase(), into=folder(tmp_path / "a"), runtime=HERE)
    again = shift(world.base, made, TransferPhase(), into=folder(tmp_path / "b"), runtime=HERE)
    assert again.work == Work()
    for device in world.others:
        path = Path("signals") / f"{device}.safetensors"
        assert (again.folder / path).read_bytes() == (made.folder / path).read_bytes()


def test_an_interrupted_attempt_harms_nothing(world: World, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in world.transfer.folder.rglob("*") if path.is_file()}
    digests = {
        shift(world.base, world.transfer, TransferPhase(), into=folder(tmp_path / "a"), runtime=HERE).digest
        for _ in range(2)
    }
    assert len(digests) == 1
    assert {path: path.read_bytes() for path in before} == before


def test_the_base_as_everyones_ancestor_changes_nothing(world: World, tmp_path: Path) -> None:
    """Of a writer with the base's tokenizer that started from the base itself, what it said is what is taught."""
    started = world.written(tmp_path / "started", {**world.before, "d-law": world.base})
    made = shift(world.base, started, TransferPhase(), into=folder(tmp_path / "a"), runtime=HERE)
    for name, told in signals(started, "d-law").of.items():
        found = signals(made, "d-law").of[name]
        rows = np.isfinite(told.logprobs)
        np.testing.assert_allclose(found.topk_logprobs[rows], told.topk_logprobs[rows], atol=1e-2)
        np.testing.assert_allclose(found.logprobs[rows], told.logprobs[rows], atol=5e-3)


def test_writers_who_learned_nothing_teach_the_base_its_own(world: World, tmp_path: Path) -> None:
    idle = world.written(tmp_path / "idle", world.others)
    made = shift(world.base, idle, TransferPhase(), into=folder(tmp_path / "a"), runtime=HERE)
    student = Tokenizer(open_tokenizer(world.base.folder))
    for name, told in signals(idle, "d-law").of.items():
        found, rows = signals(made, "d-law").of[name], np.isfinite(told.logprobs)
        own = log_p(world.base, told.ids).gather(1, torch.from_numpy(told.topk_ids[1:].astype(np.int64))).numpy()
        np.testing.assert_allclose(found.topk_logprobs[rows], own[rows[1:]], atol=2e-2)
    kept = signals(made, "d-food")
    for name, told in kept.of.items():
        learnt = taught(texts(made)[name], told, Heard(kept, "span_likelihood"), student, FAST)
        assert learnt is not None
        assert learnt.chunk is not None
        assert learnt.chunk_logprobs is not None
        own = log_p(world.base, learnt.ids).gather(1, torch.from_numpy(learnt.ids)[1:, None])[:, 0].double().numpy()
        sums = np.zeros(len(learnt.chunk_logprobs))
        inside = learnt.chunk[1:] >= 0
        np.add.at(sums, learnt.chunk[1:][inside], own[inside])
        np.testing.assert_allclose(learnt.chunk_logprobs, np.minimum(sums, CERTAIN), atol=1e-4)


def test_without_ancestors_nothing_is_shifted(world: World, tmp_path: Path) -> None:
    plain = transfer(folder(tmp_path / "plain"), world.others["d-law"])
    made = shift(world.base, plain, TransferPhase(), into=folder(tmp_path / "a"), runtime=HERE)
    assert made.work == Work()
    assert made.digest == plain.model_copy(update={"work": Work(), "shifted": True}).sealed().digest


def test_what_the_base_cannot_read_stays_as_it_is(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too long for its context, beyond its head, or not to be spelt by its tokenizer."""
    text = world.written(tmp_path / "text", world.before)
    longest = max(len(signal.ids) for signal in signals(text, "d-law").of.values())
    base = checkpoint("llama", tmp_path / "short", context=longest - 1)
    made = shift(base, text, TransferPhase(), into=folder(tmp_path / "a"), runtime=HERE)
    for name, told in signals(text, "d-law").of.items():
        assert (signals(made, "d-law").of[name].before is None) == (len(told.ids) < longest)
    assert made.work.tokens > 0
    # A device wrote what only composed characters spell.
    base = checkpoint("llama", tmp_path / "nfc")
    normalise(base.folder)
    found = [d.model_copy(update={"answer": d.answer + "e\u0301"}) for d in texts(text).values()]
    write_jsonl(text.documents, found)
    made = shift(base, text, TransferPhase(), into=folder(tmp_path / "b"), runtime=HERE)
    assert made.work == Work()
    for device in world.others:
        assert (made.signals / f"{device}.safetensors").read_bytes() == (
            text.signals / f"{device}.safetensors"
        ).read_bytes()
    assert "not shifted: d-food/a0: tokenizer" in capsys.readouterr().err


# ── from writing to learning ──────────────────────────────────────────────────────────────────────────────────────────


def loss(student: Checkpoint, lessons: Sequence[Lesson]) -> float:
    objective = build_objective(LogitsObjective(), 16, 1, {})
    with torch.no_grad():
        learner = Learner(open_model(student.folder), objective)
        return float(learner(**collate([[[lesson] for lesson in lessons]]))["loss"])


def test_devices_write_and_students_learn_what_they_learned(tmp_path: Path) -> None:
    base, text, groups = (
        checkpoint("llama", tmp_path / "base"),
        corpus(folder(tmp_path / "c")),
        clusters(tmp_path / "k"),
    )
    learning = DevicePhase(epochs=60, replay=0.0, training=FAST.model_copy(update={"learning_rate": 2e-2}))
    config = TransferPhase(sampled_per_cluster=12, min_bytes=1, temperature=0.5, max_new_tokens=24, top_k=4)
    ancestors = {
        "d-law": checkpoint("llama", tmp_path / "a", 3, hidden=32),
        "d-food": checkpoint("gpt2", tmp_path / "b", 4, hidden=32, vocab=300),
    }
    origins = {ancestor.lineage: ancestor for ancestor in ancestors.values()}
    devices = [
        train_device(device, ancestor, "x", text, learning, seed=0, into=folder(tmp_path / device), runtime=HERE)
        for device, ancestor in ancestors.items()
    ]
    lessons: list[list[Lesson]] = []
    for keep in ({"keep_before": True}, {}):
        into = tmp_path / f"{len(keep)}"
        writings = [
            write_cluster(
                cluster, [device], origins, groups, text, config, encoder="hashing", seed=0,
                into=folder(into / f"write-{cluster}"), runtime=HERE, **keep,
            )
            for cluster, device in enumerate(devices)
        ]  # fmt: skip
        written = gather(writings, groups, text, config, encoder="hashing", into=folder(into / "transfer"))
        assert set(written.by_writer) == set(ancestors)
        made = shift(base, written, TransferPhase(), into=folder(into / "shift"), runtime=HERE)
        assert (made.work.tokens > 0) == bool(keep)
        lessons.append(transfer_lessons(base, made, (), FAST, objective=LogitsObjective()))
    shifted, plain = lessons
    assert len(shifted) == len(plain)
    for one, other in zip(shifted, plain, strict=True):  # the same text, of the same weight
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.weights, other.weights)
    assert any(lesson.topk_ids is not None for lesson in shifted)
    assert any(lesson.chunk is not None for lesson in shifted)
    losses = [loss(base, each) for each in lessons]
    assert np.isfinite(losses).all()
    assert losses[0] < losses[1]  # the base is nearer to itself, shifted, than to others
