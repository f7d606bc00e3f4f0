from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepfusion.artifacts import Checkpoint, Corpus, Round, Upload
from deepfusion.baselines.homogeneous import average_round, best_round, heldout_loss
from deepfusion.checkpoints import open_model, open_tokenizer
from deepfusion.data.documents import Document, read_jsonl, write_jsonl
from deepfusion.data.tokens import Tokenizer
from deepfusion.phases.upload import upload_bytes
from deepfusion.weights import Part, tensors, write
from tiny import FAST, HERE, checkpoint, corpus, folder, upload


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint("llama", tmp_path_factory.mktemp("models") / "base")


def moved(place: Path, by: float) -> None:
    """Add a number to every weight of a checkpoint."""
    write(place, [Part.of(name, tensor + by) for name, tensor in list(tensors(place))])


def sent(base: Checkpoint, into: Path, by: float, tokens: int, device: str = "d-law") -> Upload:
    """A device that adds a number to what it was sent: the pico model of seed 0, as the base is."""
    made = upload(device, base, into)
    moved(made.model, by)
    return made.model_copy(update={"tokens": tokens, "bytes": 1000})


def loaded(place: Path) -> dict[str, Tensor]:
    return dict(tensors(place))


@pytest.mark.parametrize(("weights", "mean"), [("tokens", 0.25), ("uniform", 0.5)])
def test_a_round_is_the_mean_of_what_devices_sent(base: Checkpoint, weights: str, mean: float, tmp_path: Path) -> None:
    """Of 30 tokens +0, of 10 tokens +1."""
    uploads = [sent(base, tmp_path / "a", 0.0, 30), sent(base, tmp_path / "b", 1.0, 10, "d-food")]
    made = average_round(base, uploads, weights, into=folder(tmp_path / "mean"))  # pyright: ignore[reportArgumentType]
    before, after = loaded(base.folder), loaded(made.folder)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name] + mean)
    assert (made.lineage, made.number, made.parameters) == (base.lineage, 1, base.parameters)


def test_rounds_add_up_what_they_put_on_the_wire(base: Checkpoint, tmp_path: Path) -> None:
    uploads = [sent(base, tmp_path / "a", 0.0, 30), sent(base, tmp_path / "b", 1.0, 10, "d-food")]
    first = average_round(base, uploads, "tokens", into=folder(tmp_path / "1"))
    size = upload_bytes(base.folder, b"")
    assert (first.down_bytes, first.up_bytes) == (2 * size, 2000)
    second = average_round(first, uploads[:1], "tokens", into=folder(tmp_path / "2"))
    again = upload_bytes(first.folder, b"")
    assert (second.number, second.down_bytes, second.up_bytes) == (2, 2 * size + again, 3000)
    assert loaded(second.folder).keys() == loaded(base.folder).keys()
    assert Round.load(second.folder).digest == second.digest


def test_models_that_nobody_was_sent_are_refused(base: Checkpoint, tmp_path: Path) -> None:
    other = sent(base, tmp_path / "a", 0.0, 30).model_copy(update={"lineage": "other"})
    with pytest.raises(ValueError, match="d-law sent a model of lineage other and was sent"):
        average_round(base, [other], "tokens", into=folder(tmp_path / "mean"))
    with pytest.raises(ValueError, match="no device has sent a model"):
        average_round(base, [], "tokens", into=folder(tmp_path / "none"))


# ── which round is best ───────────────────────────────────────────────────────────────────────────────────────────────


def rounds(base: Checkpoint, into: Path) -> list[Round]:
    """The base as it is, between two that have been spoilt."""
    return [
        average_round(base, [sent(base, into / f"sent-{n}", by, 30)], "tokens", into=folder(into / str(n))).model_copy(
            update={"number": n}
        )
        for n, by in enumerate((0.5, 0.0, 0.5), 1)
    ]


def best(of: list[Round], text: Corpus, into: Path) -> Round:
    return best_round(of, text, FAST, into=folder(into), runtime=HERE)


def test_the_round_that_finds_held_out_text_likeliest_is_the_best(base: Checkpoint, tmp_path: Path) -> None:
    text, of = corpus(folder(tmp_path / "corpus")), rounds(base, tmp_path)
    made = best(of, text, tmp_path / "best")
    assert made.number == 2
    assert [number for number, _ in made.heldout] == [1, 2, 3]
    assert min(loss for _, loss in made.heldout) == made.heldout[1][1]
    assert (made.down_bytes, made.up_bytes) == (of[1].down_bytes, of[1].up_bytes)
    for name, tensor in loaded(made.folder).items():
        assert torch.equal(tensor, loaded(base.folder)[name])


def test_without_held_out_text_it_is_the_last(base: Checkpoint, tmp_path: Path) -> None:
    text = corpus(folder(tmp_path / "corpus"))
    write_jsonl(text.heldout, list[Document]())
    made = best(rounds(base, tmp_path), text, tmp_path / "best")
    assert (made.number, made.heldout) == (3, ())


def test_held_out_loss_is_the_mean_over_tokens(base: Checkpoint, tmp_path: Path) -> None:
    """Every token after the start counts once, the end token too."""
    [document] = read_jsonl(corpus(folder(tmp_path)).heldout, Document)
    tokenizer, model = Tokenizer(open_tokenizer(base.folder)), open_model(base.folder)
    ids = torch.tensor([tokenizer.start, *tokenizer.encode(document.text)[0], tokenizer.end])
    with torch.inference_mode():
        log_p = model(ids[None]).logits[0].log_softmax(-1)
    by_hand = -log_p[:-1].gather(-1, ids[1:, None]).mean()
    assert heldout_loss(base, [document], FAST, HERE) == pytest.approx(float(by_hand), rel=1e-5)
