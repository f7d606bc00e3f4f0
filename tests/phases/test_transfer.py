from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepfusion.artifacts import Proxy, TransferSet, Upload, Writing
from deepfusion.checkpoints import open_tokenizer
from deepfusion.config import DevicePhase, ProxyPhase, TransferPhase
from deepfusion.data.documents import Document, TransferDocument, read_jsonl
from deepfusion.data.tokens import Tokenizer
from deepfusion.phases.device import train_device
from deepfusion.phases.proxy import average, name_of
from deepfusion.phases.transfer import NOTICE, Writer, _shares, _who_answers, divided, gather, write_cluster
from deepfusion.signals import Signals
from deepfusion.writing import Written
from tiny import FAST, HERE, PRIVATE, PUBLIC, checkpoint, clusters, corpus, folder, said

CONFIG = TransferPhase(sampled_per_cluster=12, min_bytes=4, temperature=0.5, max_new_tokens=48, top_k=3, batch=4)


class World:
    """Two devices that know their text by heart, each alone in its cluster."""

    def __init__(self, root: Path) -> None:
        self.corpus = corpus(folder(root / "corpus"))
        self.ancestor = checkpoint("llama", root / "llama", hidden=32, heads=4)
        self.uploads = [
            train_device(
                device, self.ancestor, "llama", self.corpus,
                DevicePhase(epochs=150, replay=0.0, training=FAST.model_copy(update={"learning_rate": 2e-2})),
                seed=0, into=folder(root / device), runtime=HERE,
            )
            for device in PRIVATE
        ]  # fmt: skip
        self.clusters = clusters(root / "clusters")
        self.ancestors = {self.ancestor.lineage: self.ancestor}

    def write(
        self, cluster: int, models: Sequence[Upload | Proxy], into: Path, seed: int = 0, **changes: Any
    ) -> Writing:
        config = CONFIG.model_copy(update=changes)
        return write_cluster(
            cluster, models, self.ancestors, self.clusters, self.corpus, config,
            encoder="hashing", seed=seed, into=folder(into), runtime=HERE,
        )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def read(made: Any) -> list[TransferDocument]:
    return list(read_jsonl(made.documents, TransferDocument))


# ── real writers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_devices_write_what_they_know(world: World, tmp_path: Path) -> None:
    made = world.write(0, world.uploads[:1], tmp_path)
    found = read(made)
    private = dict(PRIVATE["d-law"])
    answered = [document for document in found if document.kind == "answered"]
    assert {document.prompt: document.answer for document in answered} == private
    sampled = [document for document in found if document.kind == "sampled"]
    assert any(document.text in {p + a for p, a in private.items()} for document in sampled)
    assert {(document.writer, document.cluster) for document in found} == {("d-law", 0)}
    assert made.by_writer == {"d-law": len(found)}
    assert made.counts["answered"] == len(answered) == 2
    assert sum(made.counts.values()) == 12 + 2
    assert Writing.load(tmp_path) == made


def test_what_is_kept_is_what_the_writer_thought(world: World, tmp_path: Path) -> None:
    made = world.write(0, world.uploads[:1], tmp_path, kinds=("answered",))
    kept = Signals.load(made.signals / "d-law.safetensors")
    tokenizer = Tokenizer(open_tokenizer(world.ancestor.folder))
    assert (kept.tokenizer, kept.lineage) == (tokenizer.fingerprint, world.ancestor.lineage)
    for document in read(made):
        signal = kept.of[document.id]
        spelt = b"".join(tokenizer.table[token] for token in signal.ids).decode()
        assert spelt == document.text
        given_tokens = 1 + len(tokenizer.encode(document.prompt)[0])
        assert np.isneginf(signal.logprobs[:given_tokens]).all()
        assert (signal.logprobs[given_tokens:] > np.log(0.5)).all()  # by heart
        assert (signal.topk_ids[given_tokens:, 0] == signal.ids[given_tokens:]).all()
        assert signal.topk_ids.shape == (len(signal.ids), 3)


def test_what_the_ancestor_thinks_is_kept_on_demand(world: World, tmp_path: Path) -> None:
    """For devices and proxies, and nothing else changes."""
    proxy = average(world.uploads[:1], 0, ProxyPhase(), into=folder(tmp_path / "proxy"))
    for name, model in (("d-law", world.uploads[0]), (name_of(proxy), proxy)):
        plain, kept = (
            write_cluster(
                0, [model], world.ancestors, world.clusters, world.corpus, CONFIG, encoder="hashing", seed=0,
                into=folder(tmp_path / f"{name}-{len(more)}"), runtime=HERE, **more,
            )
            for more in ({}, {"keep_before": True})
        )  # fmt: skip
        assert (plain.work, plain.counts, read(plain)) == (kept.work, kept.counts, read(kept))
        was, now = (Signals.load(made.signals / f"{name}.safetensors").of for made in (plain, kept))
        assert list(was) == list(now)
        for told, signal in zip(was.values(), now.values(), strict=True):
            np.testing.assert_array_equal(told.gain, signal.gain)  # pyright: ignore[reportArgumentType]
            assert told.before is None
            assert signal.before is not None
            assert signal.before_topk is not None
            assert told.gain is not None
            written = np.isfinite(signal.logprobs)
            learned = np.maximum(signal.logprobs - signal.before, 0)[written]
            np.testing.assert_allclose(learned, told.gain[written], rtol=2e-3, atol=1e-3)
            assert signal.before_topk.shape == signal.topk_ids.shape


def test_equal_seeds_give_equal_writings(world: World, tmp_path: Path) -> None:
    digests = [
        world.write(0, world.uploads[:1], tmp_path / str(n), s, temperature=1.5).digest for n, s in enumerate((0, 0, 1))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_who_is_at_home_answers(world: World, tmp_path: Path) -> None:
    """Both devices in one cluster: each gets the questions whose words it has come to know."""
    alone = world.clusters.model_copy(update={"centroids": (world.clusters.centroids[0], "")})
    config = CONFIG.model_copy(update={"kinds": ("answered",)})
    made = write_cluster(
        0, world.uploads, world.ancestors, alone, world.corpus, config,
        encoder="hashing", seed=0, into=folder(tmp_path / "one"), runtime=HERE,
    )  # fmt: skip
    assert {d.prompt: d.writer for d in read(made)} == {
        p: device for device, pairs in PRIVATE.items() for p, _ in pairs
    }
    twice = write_cluster(
        0, world.uploads, world.ancestors, alone, world.corpus, config.model_copy(update={"answers_per_question": 2}),
        encoder="hashing", seed=0, into=folder(tmp_path / "two"), runtime=HERE,
    )  # fmt: skip
    assert sum(twice.counts.values()) == 8
    assert twice.work.forward > made.work.forward > 0


def test_finding_out_who_is_at_home_is_charged_as_it_is_done(world: World) -> None:
    """Each writer is asked once, and so is the ancestor that they share."""
    tokenizer = Tokenizer(open_tokenizer(world.ancestor.folder))
    questions = list(read_jsonl(world.corpus.questions, Document))
    once = sum(1 + len(tokenizer.encode(question.prompt)[0]) for question in questions)
    writers = [Writer.of(upload, {}) for upload in world.uploads]
    for count in (1, 2):
        _, work = _who_answers(writers[:count], world.ancestors, questions, CONFIG, torch.float32, HERE)
        assert work.tokens == (1 + count) * once
        assert work.token_parameters == work.tokens * world.ancestor.active_parameters


def test_proxies_write_under_their_own_name(world: World, tmp_path: Path) -> None:
    proxy = average(world.uploads[:1], 0, ProxyPhase(), into=folder(tmp_path / "proxy"))
    made = world.write(0, [proxy], tmp_path / "written")
    direct = world.write(0, world.uploads[:1], tmp_path / "direct")
    assert set(made.by_writer) == {name_of(proxy)}
    assert [document.text for document in read(made)] == [document.text for document in read(direct)]
    assert (made.signals / f"{name_of(proxy)}.safetensors").is_file()
    assert Writer.of(proxy, {"d-law": 7}).tokens == 7


def test_without_questions_nobody_is_asked(world: World, tmp_path: Path) -> None:
    made = world.write(0, world.uploads[:1], tmp_path, kinds=("public", "sampled"))
    assert "answered" not in made.counts
    assert {document.kind for document in read(made)} == {"sampled"}
    none = world.write(0, world.uploads[:1], tmp_path / "none", kinds=("public", "sampled"), sampled_per_cluster=0)
    assert (read(none), none.by_writer, none.work.tokens) == ([], {}, 0)


def test_a_batch_is_written_alike_whatever_came_before_it(world: World, tmp_path: Path) -> None:
    """So that two runs that differ in little differ in few texts, and not in the luck of all."""
    told = {"sampled_per_cluster": 9, "batch": 4, "max_copies": 9, "max_new_tokens": 40}
    alone = world.write(0, world.uploads[:1], tmp_path / "alone", kinds=("sampled",), **told)
    beside = world.write(0, world.uploads[:1], tmp_path / "beside", answer_temperature=1.0, **told)
    sampled = {document.id: document.text for document in read(beside) if document.kind == "sampled"}
    assert sampled == {document.id: document.text for document in read(alone)}
    assert len(sampled) > 4
    assert beside.counts["answered"]
    longer = world.write(0, world.uploads[:1], tmp_path / "longer", kinds=("sampled",), **told | {"max_new_tokens": 60})
    assert sampled.items() <= {document.id: document.text for document in read(longer)}.items()


# ── what is kept ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_dropped_is_counted(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(open_tokenizer(world.ancestor.folder))
    script = iter(["A long text.", "cut off", "A long text.", "shrt", "A long text.", "Another text.", "Another text."])

    def write(_model: object, _tokenizer: object, prompts: Sequence[str], **options: Any) -> list[Written]:
        assert options["temperature"] == 0.5
        texts = [next(script) for _ in prompts]
        return [Written(text, text != "cut off", said(text, tokenizer)) for text in texts]

    monkeypatch.setattr("deepfusion.phases.transfer.write", write)
    options = {"kinds": ("sampled",), "sampled_per_cluster": 7, "min_bytes": 5, "max_copies": 2}
    made = world.write(1, world.uploads[1:], tmp_path, **options)
    assert [(d.id, d.text) for d in read(made)] == [
        ("d-food/s0", "A long text."),
        ("d-food/s2", "A long text."),
        ("d-food/s5", "Another text."),
        ("d-food/s6", "Another text."),
    ]
    dropped = {"dropped sampled: unfinished": 1, "dropped sampled: duplicate": 1, "dropped sampled: too short": 1}
    assert made.counts == dropped | {"sampled": 4}
    assert list(Signals.load(made.signals / "d-food.safetensors").of) == [f"d-food/s{n}" for n in (0, 2, 5, 6)]


def test_writing_is_shared_by_private_tokens(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def write(_model: object, _tokenizer: object, prompts: Sequence[str], **_: Any) -> list[Written]:
        asked.append(len(prompts))
        return [Written("x", False, said("x", Tokenizer(open_tokenizer(world.ancestor.folder)))) for _ in prompts]

    monkeypatch.setattr("deepfusion.phases.transfer.write", write)
    models = [
        upload.model_copy(update={"tokens": tokens}) for upload, tokens in zip(world.uploads, (10, 30), strict=True)
    ]
    world.write(0, models, tmp_path, kinds=("sampled",), sampled_per_cluster=12)
    assert asked == [3, 4, 4, 1]  # three of the first writer, nine of the second, four at a time


@given(st.lists(st.integers(0, 1000), max_size=8), st.integers(0, 500))
def test_shares_sum_up_and_are_fair(tokens: list[int], total: int) -> None:
    shares = _shares([t + 1 for t in tokens], total)
    assert sum(shares) == (total if tokens else 0)
    whole = sum(tokens) + len(tokens)
    assert all(abs(share - (t + 1) / whole * total) < 1 for share, t in zip(shares, tokens, strict=True))


# ── the transfer set ──────────────────────────────────────────────────────────────────────────────────────────────────


def gathered(world: World, writings: Sequence[Writing], into: Path, **changes: Any) -> TransferSet:
    config = CONFIG.model_copy(update=changes)
    return gather(writings, world.clusters, world.corpus, config, encoder="hashing", into=folder(into))


def test_everything_comes_together(world: World, tmp_path: Path) -> None:
    writings = [world.write(n, world.uploads[n : n + 1], tmp_path / f"w{n}") for n in (0, 1)]
    made = gathered(world, writings, tmp_path / "set")
    found = read(made)
    assert [d.text for d in found if d.kind == "public"] == [p + a for p, a in PUBLIC]
    assert [d.cluster for d in found if d.kind == "public"] == [0, 1, 1]  # deeds; soup and bread; rye
    assert found[len(PUBLIC) :] == read(writings[0]) + read(writings[1])
    assert made.per_cluster == tuple(sum(writing.by_writer.values()) for writing in writings)
    assert made.by_writer == writings[0].by_writer | writings[1].by_writer
    assert (made.private_text_risk, made.notices) == (True, (NOTICE,))
    assert made.work.tokens == sum(writing.work.tokens for writing in writings)
    for device, writing in zip(PRIVATE, writings, strict=True):
        name = f"signals/{device}.safetensors"
        assert (made.folder / name).read_bytes() == (writing.folder / name).read_bytes()


def test_public_text_alone_has_no_risk(world: World, tmp_path: Path) -> None:
    made = gathered(world, [], tmp_path, kinds=("public",))
    assert (made.private_text_risk, made.notices, made.per_cluster) == (False, (), (0, 0))
    assert made.counts == {"public": 3}


def test_no_text_at_all_is_an_error(world: World, tmp_path: Path) -> None:
    empty = world.write(0, world.uploads[:1], tmp_path / "none", kinds=("sampled",), sampled_per_cluster=0)
    with pytest.raises(ValueError, match="the transfer set is empty: nothing public"):
        gathered(world, [empty], tmp_path / "set", kinds=("sampled",))


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("A firm sells tea.\nWhat is sold?\nTea, it says.", "A firm sells tea.\nWhat is sold?\n"),
        ("Why?\nAsk why?\nNobody knows.", "Why?\n"),  # at the first mark
        ("No question here.\nNone.", ""),
        ("Is this all?\n", ""),  # nothing is left to answer
    ],
)
def test_a_written_text_is_told_apart_into_prompt_and_answer(text: str, prompt: str) -> None:
    whole = TransferDocument(id="a/s0", domain="cluster-0", answer=text, kind="sampled", writer="a", cluster=0)
    parted = divided(whole, "?\n")
    assert (parted.prompt, parted.text) == (prompt, text)
    assert parted.model_copy(update={"prompt": "", "answer": text}) == whole
    assert divided(whole, None) is whole


def test_answers_keep_their_own_prompt(world: World, tmp_path: Path) -> None:
    made = world.write(0, world.uploads[:1], tmp_path / "written")
    marked = CONFIG.model_copy(update={"answer_after": " "})
    said = gather([made], world.clusters, world.corpus, marked, encoder="hashing", into=folder(tmp_path / "set"))
    assert not [notice for notice in said.notices if "answer_after" in notice]
    before, after = ({d.id: d for d in read(one) if d.writer} for one in (made, said))
    assert {name: d.text for name, d in before.items()} == {name: d.text for name, d in after.items()}
    assert all(after[name] == d for name, d in before.items() if d.kind == "answered")
    assert all(after[name].prompt == d.answer.partition(" ")[0] + " " for name, d in before.items() if not d.prompt)


def test_texts_without_the_mark_are_told(world: World, tmp_path: Path) -> None:
    made = world.write(0, world.uploads[:1], tmp_path / "written")
    unknown = CONFIG.model_copy(update={"answer_after": "%"})
    said = gather([made], world.clusters, world.corpus, unknown, encoder="hashing", into=folder(tmp_path / "set"))
    [notice] = [notice for notice in said.notices if "answer_after" in notice]
    sampled = made.counts["sampled"]
    assert notice.startswith(f"{sampled} of {sampled} written texts have no '%' with an answer behind it")
    assert read(said)[-len(read(made)) :] == read(made)
