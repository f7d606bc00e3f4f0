from pathlib import Path

import pytest

from deepfusion.ancestors import make, take
from deepfusion.artifacts import Checkpoint, Corpus
from deepfusion.checkpoints import open_tokenizer, validate
from deepfusion.config import MadeModel
from pico import pico
from tiny import FAST, HERE, checkpoint, corpus, folder, weights

SHAPE = {"hidden": 16, "ffn": 16, "layers": 1, "heads": 2, "vocab": 300, "training": FAST}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus(tmp_path_factory.mktemp("corpus"))


def made(text: Corpus, into: Path, *, seed: int = 0, **shape: object) -> Checkpoint:
    return make(MadeModel(**SHAPE | {"tokens": 300} | shape), text, seed=seed, into=folder(into), runtime=HERE)  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_a_made_model_has_learnt_public_text(text: Corpus, tmp_path: Path) -> None:
    model = made(text, tmp_path / "a", type="gpt2", tokens=2000)
    validate(model.folder)
    assert model.losses[-1][1] < model.losses[0][1]
    assert model.work.tokens >= 2000
    assert model.work.token_parameters == 3 * model.work.tokens * model.active_parameters
    assert Checkpoint.load(model.folder) == model


def test_a_made_model_depends_on_its_seed_alone(text: Corpus, tmp_path: Path) -> None:
    one, same, other = (made(text, tmp_path / name, type="llama", seed=s) for name, s in (("a", 0), ("b", 0), ("c", 1)))
    assert one.digest == same.digest
    assert one.lineage == same.lineage
    assert one.lineage != other.lineage
    untrained = made(text, tmp_path / "d", type="llama", tokens=0)
    assert (untrained.losses, untrained.work.tokens) == ((), 0)
    assert untrained.parameters == one.parameters


def test_equal_vocabularies_are_one_tokenizer(text: Corpus, tmp_path: Path) -> None:
    wanted = (("a", "gpt2", 300), ("b", "opt", 300), ("c", "gpt2", 310))
    models = [made(text, tmp_path / name, type=kind, vocab=vocab, tokens=0) for name, kind, vocab in wanted]
    files = [(model.folder / "tokenizer.json").read_bytes() for model in models]
    assert files[0] == files[1] != files[2]
    assert open_tokenizer(models[2].folder).vocab_size == 310


def test_a_given_checkpoint_is_taken_as_it_is(tmp_path: Path) -> None:
    given = pico("gpt2", tmp_path / "given")
    (given / "README.md").write_text("about")
    taken = take(str(given), into=folder(tmp_path / "taken"))
    assert weights(taken.folder) == weights(given)
    assert (taken.folder / "model.safetensors").samefile(given / "model.safetensors")
    assert not (given / "record.json").exists()
    assert taken.lineage == checkpoint("gpt2", tmp_path / "same", hidden=32, layers=2, heads=4).lineage


def test_a_missing_tokenizer_is_told_of_the_folder_that_was_given(tmp_path: Path) -> None:
    given = pico("llama", tmp_path / "given")
    (given / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"^{given} has no tokenizer"):
        take(str(given), into=folder(tmp_path / "taken"))


def test_a_broken_checkpoint_is_not_taken(tmp_path: Path) -> None:
    given = pico("gpt2", tmp_path / "given")
    (given / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="given"):
        take(str(given), into=folder(tmp_path / "taken"))
    assert list((tmp_path / "taken").iterdir()) == []
