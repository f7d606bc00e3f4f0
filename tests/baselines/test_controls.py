from pathlib import Path
from typing import Any

import pytest

from deepfusion.artifacts import Checkpoint, Corpus, TransferSet, Work
from deepfusion.baselines.controls import centralized, dense_kd, pooled_text
from deepfusion.config import DistillPhase, EvaluatePhase, LogitsObjective
from deepfusion.data.documents import write_jsonl
from tiny import FAST, HERE, PRIVATE, PUBLIC, checkpoint, corpus, documents, folder, teaching, transfer, weights

CONFIG = DistillPhase(objective=LogitsObjective(beta=3), training=FAST)
BATCH = FAST.rows * FAST.context


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint("llama", tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, base: Checkpoint) -> TransferSet:
    return transfer(tmp_path_factory.mktemp("transfer"), base)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint("mixtral", tmp_path_factory.mktemp("models") / "moe", experts=2, top_k=1)


def budget(model: Checkpoint, tokens: int = 300) -> float:
    return 3.0 * model.active_parameters * tokens


def test_pooled_text_is_plain_training_on_the_transfer_text(
    base: Checkpoint, text: TransferSet, tmp_path: Path
) -> None:
    def run(name: str, text: TransferSet = text, told: Any = ()) -> Checkpoint:
        return pooled_text(
            base, text, told, FAST, budget=budget(base), balance=0.0, seed=0, into=folder(tmp_path / name),
            runtime=HERE,
        )  # fmt: skip

    made = run("made")
    assert 300 <= made.work.tokens < 300 + BATCH
    assert made.losses[-1][1] < made.losses[0][1]
    # Teachers have no say: their probabilities change no bit.
    silent = folder(tmp_path / "silent")
    (silent / "documents.jsonl").write_bytes(text.documents.read_bytes())
    assert run("unsigned", text=text.model_copy(update={"folder": silent})).digest == made.digest


def test_what_asking_teachers_costs_is_spent_on_training(base: Checkpoint, text: TransferSet, tmp_path: Path) -> None:
    asking = Work(tokens=1, forward=budget(base, 200))
    told = [teaching("p", 0, {"public-0": PUBLIC[0][1]}, base, tmp_path / "p").model_copy(update={"work": asking})]
    made = pooled_text(
        base, text, told, FAST, budget=budget(base), balance=0.0, seed=0, into=folder(tmp_path / "made"), runtime=HERE
    )
    assert 500 <= made.work.tokens < 500 + BATCH


def test_measuring_the_router_is_part_of_the_budget(
    base: Checkpoint, moe: Checkpoint, text: TransferSet, tmp_path: Path
) -> None:
    """As it is in tuning; but what made a dense base is nothing that the control asked for."""
    for model, spent in ((moe, 100), (base, 0)):
        worked = model.model_copy(update={"work": Work(tokens=1, forward=budget(model, 100))})
        made = pooled_text(
            worked, text, (), FAST, budget=budget(model), balance=0.0, seed=0,
            into=folder(tmp_path / model.model_type), runtime=HERE,
        )  # fmt: skip
        assert 300 - spent <= made.work.tokens < 300 - spent + BATCH
        assert made.work.token_parameters == 3 * made.work.tokens * model.active_parameters


def test_pooled_text_of_a_moe_is_balanced(moe: Checkpoint, text: TransferSet, tmp_path: Path) -> None:
    digests = {
        pooled_text(
            moe, text, (), FAST, budget=budget(moe), balance=balance, seed=0, into=folder(tmp_path / str(balance)),
            runtime=HERE,
        ).digest
        for balance in (0.0, 1.0)
    }  # fmt: skip
    assert len(digests) == 2


def test_dense_kd_is_the_joint_stage(base: Checkpoint, text: TransferSet, tmp_path: Path) -> None:
    made = dense_kd(base, text, (), CONFIG, budget=budget(base), seed=0, into=folder(tmp_path / "made"), runtime=HERE)
    plain = dense_kd(
        base, text, (), CONFIG.model_copy(update={"objective": LogitsObjective(beta=0)}), budget=budget(base), seed=0,
        into=folder(tmp_path / "plain"), runtime=HERE,
    )  # fmt: skip
    assert 300 <= made.work.tokens < 300 + BATCH
    assert made.model_type == "llama"
    assert made.digest != plain.digest


def test_what_was_made_for_dense_kd_is_part_of_its_budget(base: Checkpoint, text: TransferSet, tmp_path: Path) -> None:
    paid = [text.model_copy(update={"work": Work(tokens=1, forward=budget(base, 100))})]
    made = dense_kd(
        base, text, (), CONFIG, budget=budget(base), paid=paid, seed=0, into=folder(tmp_path / "made"), runtime=HERE
    )
    assert 200 <= made.work.tokens < 200 + BATCH


# ── what no federation could do ───────────────────────────────────────────────────────────────────────────────────────


def central(moe: Checkpoint, text: Corpus, into: Path, tokens: int = 4000) -> Checkpoint:
    config = EvaluatePhase(centralized_tokens=tokens, patience=2)
    return centralized(moe, text, FAST, config, balance=0.01, seed=0, into=folder(into), runtime=HERE)


def test_centralized_learns_all_text_until_held_out_text_is_worse(moe: Checkpoint, tmp_path: Path) -> None:
    text = corpus(folder(tmp_path / "corpus"))
    made = central(moe, text, tmp_path / "made", 30_000)
    assert made.work.tokens < 30_000 - BATCH  # it overfits its eight documents long before
    assert made.losses[-1][1] < made.losses[0][1] / 3
    assert weights(made.folder).keys() == weights(moe.folder).keys()


def test_centralized_reads_no_further_than_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = corpus(folder(tmp_path / "corpus"))
    short = checkpoint("mixtral", tmp_path / "short", experts=2, top_k=1, context=16)
    seen: list[int] = []

    def learn(student: Checkpoint, lessons: Any, *_: Any, heldout: Any, **__: Any) -> Checkpoint:
        seen.extend(len(lesson) for lesson in (*lessons, *heldout))
        return student

    monkeypatch.setattr("deepfusion.baselines.controls.learn", learn)
    central(short, text, tmp_path / "made")
    assert max(seen) == 16 < FAST.context


def test_centralized_reads_each_text_once(moe: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several devices hold the same documents; the centre would have them once."""
    text = corpus(folder(tmp_path / "corpus"))
    both = [pair for pairs in PRIVATE.values() for pair in pairs]
    for device in PRIVATE:
        write_jsonl(text.private(device), documents([*both, PUBLIC[0]], device))
    seen: list[int] = []

    def learn(student: Checkpoint, lessons: Any, *_: Any, heldout: Any, **options: Any) -> Checkpoint:
        seen.extend((len(lessons), len(heldout), options["tokens"], options["patience"]))
        return student

    monkeypatch.setattr("deepfusion.baselines.controls.learn", learn)
    central(moe, text, tmp_path / "made")
    assert seen == [len(both) + len(PUBLIC), 1, 4000, 2]
