"""Who agrees with what was written: by hand, and through the files."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepfusion.artifacts import Likelihoods, TransferSet, Work
from deepfusion.config import TransferPhase
from deepfusion.data.documents import TransferDocument, read_jsonl, write_jsonl
from deepfusion.phases.agree import agree, doubted
from tiny import checkpoint, folder, transfer, upload


def written(name: str, writer: str, cluster: int, answer: str = "ten bytes.") -> TransferDocument:
    return TransferDocument(id=name, domain="x", answer=answer, kind="sampled", writer=writer, cluster=cluster)


def test_another_reader_decides_by_hand() -> None:
    """What the writer itself has learned does not count, a longer text needs more, and every cluster keeps its half."""
    documents = [
        written("alone", "a", 0), written("shared", "a", 0), written("long", "b", 0, "x" * 100),
        written("short", "b", 0), written("other", "c", 1), written("tie", "c", 1),
    ]  # fmt: skip
    learned = {
        "a": {"alone": 90.0, "shared": 1.0, "long": 30.0, "short": 5.0, "other": -2.0, "tie": -2.0},
        "b": {"alone": -1.0, "shared": 4.0, "long": 99.0, "short": 99.0},
    }
    # Per byte: alone -.1, shared .4, long .3, short .5; other and tie -.2 each.
    assert doubted(documents, learned, 0.5) == {"alone", "long", "tie"}
    assert doubted(documents, learned, 0.75) == {"alone"}  # of two, 1.5 are kept: rounded up
    assert doubted(documents, learned, 1.0) == set()


def test_what_nobody_else_can_read_goes_first() -> None:
    documents = [written("unread", "a", 0), written("read", "b", 0)]
    assert doubted(documents, {"a": {"read": -50.0, "unread": 9.0}}, 0.5) == {"unread"}
    assert doubted(documents, {}, 0.5) == {"read"}


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(-5, 5)), min_size=1), st.floats(0.01, 1))
def test_the_share_holds_in_every_cluster(texts: list[tuple[int, float]], share: float) -> None:
    documents = [written(str(n), "a", cluster) for n, (cluster, _) in enumerate(texts)]
    nats = {str(n): nats for n, (_, nats) in enumerate(texts)}
    dropped = doubted(documents, {"b": nats}, share)
    for cluster in range(3):
        of = [document.id for document in documents if document.cluster == cluster]
        kept = [name for name in of if name not in dropped]
        assert share * len(of) <= len(kept) < share * len(of) + 1
        assert min((nats[n] for n in kept), default=0) >= max((nats[n] for n in of if n in dropped), default=-9)


def likelihoods(into: Path, nats: dict[str, float]) -> Likelihoods:
    return Likelihoods(folder=folder(into), nats=nats, work=Work(tokens=3, forward=30.0)).sealed()


def test_what_is_left_keeps_its_teacher(tmp_path: Path) -> None:
    ancestor = checkpoint("llama", tmp_path / "llama")
    models = [upload(name, ancestor, folder(tmp_path / name)) for name in ("d-law", "d-food")]
    before = transfer(folder(tmp_path / "transfer"), ancestor)
    texts = [written(f"d-law/s{n}", "d-law", 0) for n in range(2)] + [written("d-food/s0", "d-food", 1)]
    documents = [*read_jsonl(before.documents, TransferDocument), *texts]
    write_jsonl(before.documents, documents)
    counts = {"public": 4, "answered": 4, "sampled": 3, "dropped sampled: duplicate": 1}
    gathered = before.model_copy(
        update={"counts": counts, "by_writer": {"d-law": 4, "d-food": 3}, "per_cluster": (4, 3), "work": Work(tokens=5)}
    ).sealed()
    found = {
        "d-law": likelihoods(tmp_path / "1", {"d-law/s0": 1.0, "d-law/s1": 1.0, "d-food/s0": 9.0}),
        "d-food": likelihoods(tmp_path / "2", {"d-law/s0": 8.0, "d-law/s1": 2.0, "d-food/s0": 1.0}),
    }
    ancestors = {ancestor.lineage: likelihoods(tmp_path / "3", {text.id: 9.0 for text in texts})}
    made = agree(gathered, models, found, ancestors, TransferPhase(keep_agreed=0.5), into=folder(tmp_path / "made"))
    assert [d.id for d in read_jsonl(made.documents, TransferDocument)] == [
        document.id for document in documents if document.id != "d-law/s0"
    ]
    assert made.counts == {**counts, "sampled": 2, "dropped sampled: nobody agrees": 1}
    assert (made.by_writer, made.per_cluster) == ({"d-law": 3, "d-food": 3}, (3, 3))
    assert made.work == Work(tokens=5 + 3 * 3, forward=3 * 30.0)
    assert {path.name for path in made.signals.iterdir()} == {"d-law.safetensors", "d-food.safetensors"}
    assert TransferSet.load(tmp_path / "made") == made


@pytest.mark.parametrize(("share", "wanted"), [(1.0, 600), (0.5, 1200), (0.7, 858)])
def test_more_is_written_than_is_kept(share: float, wanted: int) -> None:
    config = TransferPhase(keep_agreed=share)
    assert config.written_per_cluster == wanted
    assert config.reads == (share < 1)
    assert not config.model_copy(update={"kinds": ("public", "answered")}).reads
