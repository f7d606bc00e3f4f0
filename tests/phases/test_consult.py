import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deepfusion.alignment import patch_membership
from deepfusion.artifacts import Likelihoods, Proxy, Teaching, Upload, Work
from deepfusion.checkpoints import open_model, open_tokenizer
from deepfusion.config import Consultation, DistillPhase, LogitsObjective, ProxyPhase, VAAObjective
from deepfusion.data.documents import TransferDocument, read_jsonl, write_jsonl
from deepfusion.data.tokens import Tokenizer
from deepfusion.phases.consult import consult, likeliest, likelihoods
from deepfusion.phases.proxy import average, name_of
from deepfusion.signals import Signals
from deepfusion.students import transfer_lessons
from pico import normalise, pad_vocabulary
from tiny import FAST, HERE, PUBLIC, World, checkpoint, folder, upload

PLAIN = DistillPhase(objective=LogitsObjective(beta=3), training=FAST, teacher_top_k=5)
VAA = PLAIN.model_copy(update={"objective": VAAObjective(stages=1, patches=2, width=8, heads=2)})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def asked(world: World, teacher: Upload | Proxy, into: Path, config: DistillPhase = PLAIN) -> tuple[Teaching, Signals]:
    told = consult(teacher, 0, world.transfer, config.consultation, into=folder(into), runtime=HERE)
    return told, Signals.load(told.signals)


def test_a_proxy_is_asked_about_public_text_and_what_its_cluster_knows(world: World, tmp_path: Path) -> None:
    told, signals = asked(world, world.proxy, tmp_path)
    assert list(signals.of) == [*(f"public-{n}" for n in range(len(PUBLIC))), "d-law/a0", "d-law/a1"]
    assert (told.teacher, told.cluster, told.lineage, told.width) == (
        name_of(world.proxy),
        0,
        world.ancestor.lineage,
        16,
    )
    assert Teaching.load(tmp_path) == told


def test_a_device_is_asked_about_what_it_wrote(world: World, tmp_path: Path) -> None:
    told, signals = asked(world, world.device, tmp_path)
    assert list(signals.of) == ["d-law/a0", "d-law/a1"]
    assert told.teacher == "d-law"
    kept = Signals.load(world.transfer.signals / "d-law.safetensors")
    for name, signal in signals.of.items():  # in the tokens that it wrote
        assert signal.ids.tolist() == kept.of[name].ids.tolist()
        assert signal.ends.tolist() == kept.of[name].ends.tolist()


@pytest.mark.parametrize("top_k", [5, None])
def test_what_is_kept_is_what_the_teacher_says(top_k: int | None, world: World, tmp_path: Path) -> None:
    told, signals = asked(world, world.proxy, tmp_path, PLAIN.model_copy(update={"teacher_top_k": top_k}))
    model, tokenizer = open_model(world.proxy.model), Tokenizer(open_tokenizer(world.proxy.model))
    tokens = 0
    for document in read_jsonl(world.transfer.documents, TransferDocument):
        if document.id not in signals.of:
            continue
        signal = signals.of[document.id]
        ids = torch.tensor([[tokenizer.start, *tokenizer.encode(document.text)[0], tokenizer.end]])
        assert signal.ids.tolist() == ids[0].tolist()
        assert signal.ends[-1] == signal.ends[-2] == len(document.text.encode())
        with torch.inference_mode():
            log_p = model(ids).logits[0, :-1].log_softmax(-1)
        best = log_p.topk(top_k or log_p.shape[-1], -1)
        np.testing.assert_allclose(signal.logprobs[1:], log_p.gather(1, ids[0, 1:, None])[:, 0], atol=1e-5)
        np.testing.assert_allclose(signal.topk_logprobs[1:], best.values, atol=2e-2)
        if top_k:
            assert (signal.topk_ids[1:] == best.indices.numpy()).mean() > 0.9  # but for ties
        assert not signal.logprobs[0]
        assert not signal.topk_logprobs[0].any()
        tokens += ids.numel()
    assert told.work.tokens == tokens
    assert told.work.forward == tokens * world.proxy.active_parameters


def test_features_are_stages_pooled_over_patches(world: World, tmp_path: Path) -> None:
    objective = VAAObjective(stages=1, patches=2, standardise="none")
    _, signals = asked(world, world.proxy, tmp_path, VAA.model_copy(update={"objective": objective}))
    model, tokenizer = open_model(world.proxy.model), Tokenizer(open_tokenizer(world.proxy.model))
    text = PUBLIC[0][1]
    inner, ends = tokenizer.encode(text)
    with torch.inference_mode():
        last = model(torch.tensor([[tokenizer.start, *inner, tokenizer.end]]), output_hidden_states=True).hidden_states[
            -1
        ]
    members = patch_membership(ends, len(text.encode()), 2)
    for patch in (0, 1):
        mean = torch.stack([last[0, 1 + token] for token, p in members if p == patch]).mean(0)
        np.testing.assert_allclose(signals.of["public-0"].features[0, patch], mean, atol=5e-3)  # pyright: ignore[reportOptionalSubscript]


def test_features_are_standardised_over_documents(world: World, tmp_path: Path) -> None:
    _, signals = asked(world, world.proxy, tmp_path, VAA)
    features = np.stack([np.asarray(signal.features, np.float32) for signal in signals.of.values()])
    assert features.shape == (5, 1, 2, 16)
    np.testing.assert_allclose(features.mean((0, 2)), 0, atol=1e-2)
    np.testing.assert_allclose(features.std((0, 2)), 1, atol=0.15)


def test_features_can_be_standardised_by_patch(world: World, tmp_path: Path) -> None:
    objective = VAAObjective(stages=1, patches=2, standardise="layer_norm")
    _, signals = asked(world, world.proxy, tmp_path, VAA.model_copy(update={"objective": objective}))
    features = np.stack([np.asarray(signal.features, np.float32) for signal in signals.of.values()])
    np.testing.assert_allclose(features.mean(-1), 0, atol=1e-3)
    np.testing.assert_allclose(features.std(-1), 1, atol=1e-2)


def test_what_teachers_are_asked_does_not_depend_on_what_is_made_of_it() -> None:
    """So that a recipe which differs in that alone finds the same answers."""
    plain = PLAIN.consultation
    assert plain == PLAIN.model_copy(update={"budget_tokens": 7, "objective": LogitsObjective(beta=9)}).consultation
    assert plain != PLAIN.model_copy(update={"teacher_top_k": 6}).consultation

    def wanted(**fields: object) -> Consultation:
        return DistillPhase(objective=VAAObjective.model_validate(fields)).consultation

    for same in ({"alpha": 9.0}, {"matching": "cosine"}, {"attention": False}, {"width": 8}, {"warmup": 3}):
        assert wanted(**same) == wanted()
    for other in ({"stages": 1}, {"patches": 3}, {"standardise": "none"}, {"teacher_layers": "last"}):
        assert wanted(**other) != wanted()


def test_what_others_wrote_and_a_teacher_cannot_spell_it_is_not_asked(world: World, tmp_path: Path) -> None:
    odd = TransferDocument(id="odd", domain="x", answer="Cafe\u0301.", kind="sampled", writer="d-odd", cluster=0)
    made = world.transfer.model_copy(update={"folder": folder(tmp_path / "transfer")})
    write_jsonl(made.documents, [*read_jsonl(world.transfer.documents, TransferDocument), odd])
    proxy = world.proxy.model_copy(update={"folder": tmp_path / "proxy"})
    shutil.copytree(world.proxy.model, proxy.model)
    for number, ids in enumerate((["d-law/a0", "d-law/a1", "odd"], ["d-law/a0", "d-law/a1"])):
        told = consult(proxy, 0, made, PLAIN.consultation, into=folder(tmp_path / str(number)), runtime=HERE)
        assert list(Signals.load(told.signals).of)[len(PUBLIC) :] == ids
        normalise(proxy.model)


@pytest.mark.parametrize("top_k", [5, None])
def test_nothing_beyond_the_tokenizer_is_kept(top_k: int | None, world: World, tmp_path: Path) -> None:
    """A vocabulary padded beyond its tokenizer's says what the same model says without."""
    config = PLAIN.model_copy(update={"teacher_top_k": top_k})
    wide = world.proxy.model_copy(update={"folder": tmp_path / "wide"})
    shutil.copytree(world.proxy.model, wide.model)
    pad_vocabulary(wide.model)
    _, plain = asked(world, world.proxy, tmp_path / "plain", config)
    _, padded = asked(world, wide, tmp_path / "padded", config)
    for name, signal in plain.of.items():
        np.testing.assert_allclose(padded.of[name].logprobs, signal.logprobs, atol=1e-5)
        np.testing.assert_allclose(padded.of[name].topk_logprobs, signal.topk_logprobs, atol=1e-2)
        assert padded.of[name].topk_ids.max() < len(Tokenizer(open_tokenizer(wide.model)).table)


@pytest.mark.parametrize("config", [PLAIN, VAA], ids=["logits", "vaa"])
def test_logits_of_large_vocabularies_come_in_blocks(
    config: DistillPhase, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more of them exist at a time than the limit, and the teacher says the same."""
    _, whole = asked(world, world.proxy, tmp_path / "whole", config)
    sizes: list[int] = []
    softmax = torch.log_softmax

    def noted(values: torch.Tensor, dim: int) -> torch.Tensor:
        sizes.append(values.numel())
        return softmax(values, dim)

    monkeypatch.setattr(torch, "log_softmax", noted)
    monkeypatch.setattr("deepfusion.writing.LOGITS_AT_ONCE", 4000)
    _, blocks = asked(world, world.proxy, tmp_path / "blocks", config)
    assert 0 < max(sizes) <= 4000
    assert sum(sizes) > 10 * 4000
    assert list(blocks.of) == list(whole.of)
    for name, signal in whole.of.items():
        np.testing.assert_allclose(blocks.of[name].logprobs, signal.logprobs, atol=1e-5)
        np.testing.assert_allclose(blocks.of[name].topk_logprobs, signal.topk_logprobs, atol=1e-2)
        assert (blocks.of[name].topk_ids == signal.topk_ids).mean() > 0.95  # but for ties
        if signal.features is not None:
            np.testing.assert_allclose(blocks.of[name].features, signal.features, atol=1e-2)  # pyright: ignore[reportArgumentType]


def test_what_was_noted_while_writing_stays_with_what_was_written(world: World, tmp_path: Path) -> None:
    """A proxy that wrote is asked about public text too, of which nobody knows what was learned in private."""
    into, name = folder(tmp_path / "transfer"), name_of(world.proxy)
    found = list(read_jsonl(world.transfer.documents, TransferDocument))
    written = [d.model_copy(update={"writer": name}) for d in found if d.writer == "d-law"]
    write_jsonl(into / "documents.jsonl", [*[d for d in found if d.kind == "public"], *written])
    kept = Signals.load(world.transfer.signals / "d-law.safetensors")
    of = {
        document: replace(signal, gain=np.arange(len(signal.ids)).astype(np.float16) / 8)
        for document, signal in kept.of.items()
    }
    Signals(kept.tokenizer, kept.lineage, of).save(into / "signals" / f"{name}.safetensors")
    made = world.transfer.model_copy(update={"folder": into})
    told = consult(world.proxy, 0, made, PLAIN.consultation, into=folder(tmp_path / "told"), runtime=HERE)
    signals = Signals.load(told.signals).of
    assert [name for name, signal in signals.items() if signal.gain is not None] == ["d-law/a0", "d-law/a1"]
    for document, signal in of.items():
        np.testing.assert_array_equal(signals[document].gain, signal.gain)  # pyright: ignore[reportArgumentType]
    lessons = transfer_lessons(world.base, made, [told], FAST, ask="proxies", objective=LogitsObjective(focus=2.0))
    plain = transfer_lessons(world.base, made, [told], FAST, ask="proxies", objective=LogitsObjective(focus=0.0))
    changed = [not np.array_equal(one.weights, other.weights) for one, other in zip(lessons, plain, strict=True)]
    assert changed == [False] * len(PUBLIC) + [True] * 2


def test_what_a_teacher_cannot_read_it_is_not_asked(world: World, tmp_path: Path) -> None:
    """The long document is left out; the student then learns it from its labels."""
    short = checkpoint("gpt2", tmp_path / "short", context=24)
    teacher = upload("d-law", short, tmp_path / "device")
    (teacher.model / "config.json").write_bytes((short.folder / "config.json").read_bytes())
    (teacher.model / "model.safetensors").write_bytes((short.folder / "model.safetensors").read_bytes())
    proxy = average([teacher], 0, ProxyPhase(), into=folder(tmp_path / "proxy"))
    _, signals = asked(world, proxy, tmp_path / "told")
    assert all(len(signal.ids) <= 24 for signal in signals.of.values())
    assert 0 < len(signals.of) < 5


# ── who teaches what ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_likeliest_teaches_if_it_is_likelier_than_the_student() -> None:
    teachers = {"a": {"x": 3.0, "y": 5.0, "tie": 1.0}, "b": {"x": 2.0, "y": 6.0, "tie": 1.0, "z": 4.0}}
    student = {"x": 2.5, "y": 4.0, "z": 4.5, "tie": 2.0, "unknown": 9.0}
    assert likeliest(teachers, student) == {"x": "b", "z": "b", "tie": "a"}
    assert likeliest(teachers, {"x": 2.0}) == {}  # no likelier is not likelier
    assert likeliest({}, student) == {}


@pytest.mark.parametrize("who", ["base", "device", "proxy"])
def test_likelihoods_are_of_whole_documents(who: str, world: World, tmp_path: Path) -> None:
    """Every document by itself, whatever else is in its batch; a writer's own in the tokens that it wrote."""
    model = getattr(world, who)
    found = likelihoods(model, world.transfer, into=folder(tmp_path), runtime=HERE)
    path = model.folder if who == "base" else model.model
    opened, tokenizer = open_model(path), Tokenizer(open_tokenizer(path))
    kept = Signals.load(world.transfer.signals / "d-law.safetensors").of
    tokens = 0
    documents = list(read_jsonl(world.transfer.documents, TransferDocument))
    assert list(found.nats) == [document.id for document in documents]
    for document in documents:
        ids = torch.tensor([[tokenizer.start, *tokenizer.encode(document.text)[0], tokenizer.end]])
        if who == "device" and document.id in kept:
            ids = torch.tensor([kept[document.id].ids.tolist()])
        with torch.inference_mode():
            log_p = opened(ids).logits[0, :-1].log_softmax(-1)
        assert found.nats[document.id] == pytest.approx(-float(log_p.gather(1, ids[0, 1:, None]).sum()), rel=1e-4)
        tokens += ids.numel()
    assert found.work == Work(tokens=tokens, forward=float(tokens * model.active_parameters))
    assert Likelihoods.load(tmp_path) == found
    some = likelihoods(model, world.transfer, ("answered",), into=folder(tmp_path / "some"), runtime=HERE)
    assert some.nats == {d.id: pytest.approx(found.nats[d.id], rel=1e-4) for d in documents if d.kind == "answered"}
    assert 0 < len(some.nats) < len(documents)


def test_a_chosen_teacher_is_asked_about_its_share_alone(world: World, tmp_path: Path) -> None:
    name = name_of(world.proxy)
    own = {"public-0": 1.0, "public-1": 3.0, "d-law/a0": 1.0, "d-food/a1": 1.0}
    other = {"public-0": 2.0, "public-1": 2.0, "d-law/a0": 2.0, "d-food/a1": 2.0}
    student = dict.fromkeys(own, 1.5)

    def found(of: str, nats: dict[str, float], forward: float) -> Likelihoods:
        return Likelihoods(folder=folder(tmp_path / of), nats=nats, work=Work(tokens=7, forward=forward)).sealed()

    told = consult(
        world.proxy, 0, world.transfer, PLAIN.consultation, {name: found("a", own, 50.0), "d": found("b", other, 20.0)},
        found("c", student, 30.0), into=folder(tmp_path / "told"), runtime=HERE,
    )  # fmt: skip
    signals = Signals.load(told.signals)
    assert list(signals.of) == ["public-0", "d-law/a0", "d-food/a1"]
    asked_about = sum(len(signal.ids) for signal in signals.of.values())
    assert told.work.tokens == 7 + asked_about
    assert told.work.forward == 50 + 30 / 2 + asked_about * world.proxy.active_parameters


def test_only_chosen_documents_have_a_teacher(world: World, tmp_path: Path) -> None:
    """Among them public ones, and those of other clusters; all others are learnt from their labels."""
    name = name_of(world.proxy)
    documents = [document.id for document in read_jsonl(world.transfer.documents, TransferDocument)]
    mine = {"public-1", documents[-1]}
    nats = {document: 1.0 if document in mine else 3.0 for document in documents}
    among = {name: Likelihoods(folder=folder(tmp_path / "a"), nats=nats).sealed()}
    student = Likelihoods(folder=folder(tmp_path / "b"), nats=dict.fromkeys(documents, 2.0)).sealed()
    config = PLAIN.consultation
    into = folder(tmp_path / "told")
    told = consult(world.proxy, 0, world.transfer, config, among, student, into=into, runtime=HERE)
    learnt = transfer_lessons(world.base, world.transfer, [told], FAST, ask="likeliest")
    assert len(learnt) == len(documents)
    taught = [
        document
        for document, lesson in zip(documents, learnt, strict=True)
        if lesson.topk_ids is not None or lesson.chunk is not None
    ]
    assert set(taught) == mine


def test_nobody_is_asked_who_finds_nothing_likeliest(world: World, tmp_path: Path) -> None:
    among = {name_of(world.proxy): Likelihoods(folder=folder(tmp_path / "a"), nats={"public-0": 2.0}).sealed()}
    student = Likelihoods(folder=folder(tmp_path / "b"), nats={"public-0": 1.0}).sealed()
    config, into = PLAIN.consultation, folder(tmp_path / "told")
    told = consult(world.proxy, 0, world.transfer, config, among, student, into=into, runtime=HERE)
    assert not Signals.load(told.signals).of
    learnt = transfer_lessons(world.base, world.transfer, [told], FAST, ask="likeliest")
    assert all(lesson.topk_ids is None and lesson.chunk is None for lesson in learnt)
