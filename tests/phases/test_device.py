from pathlib import Path

import pytest

from deepfusion.artifacts import Checkpoint, Corpus, Upload
from deepfusion.config import DevicePhase
from deepfusion.data.documents import write_jsonl
from deepfusion.encoders import embed
from deepfusion.errors import InputError
from deepfusion.phases.device import train_device
from deepfusion.phases.upload import receive
from tiny import FAST, HERE, PRIVATE, checkpoint, corpus, documents, folder, weights

CONFIG = DevicePhase(epochs=4, replay=0.5, training=FAST)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def ancestor(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint("gpt2", tmp_path_factory.mktemp("models") / "gpt2")


def train(text: Corpus, ancestor: Checkpoint, into: Path, config: DevicePhase = CONFIG, seed: int = 0) -> Upload:
    return train_device("d-law", ancestor, "small", text, config, seed=seed, into=folder(into), runtime=HERE)


def test_an_upload_is_a_model_and_an_embedding(text: Corpus, ancestor: Checkpoint, tmp_path: Path) -> None:
    upload = train(text, ancestor, tmp_path / "d-law", CONFIG.model_copy(update={"epochs": 40}))
    assert (upload.device, upload.ancestor, upload.model_type) == ("d-law", "small", "gpt2")
    assert (upload.lineage, upload.parameters) == (ancestor.lineage, ancestor.parameters)
    assert upload.losses[-1][1] < upload.losses[0][1] / 2
    assert upload.embedding == embed("hashing", [p + a for p, a in PRIVATE["d-law"]], 64).hex()
    assert Upload.load(upload.folder) == upload
    taken = receive([upload], {}, embedding_bytes=64, into=folder(tmp_path / "intake"))
    assert taken.bytes == {"d-law": upload.bytes}
    assert {name: len(value) for name, value in weights(upload.model).items()} == {
        name: len(value) for name, value in weights(ancestor.folder).items()
    }


def test_nothing_of_the_text_is_sent(text: Corpus, ancestor: Checkpoint, tmp_path: Path) -> None:
    upload = train(text, ancestor, tmp_path)
    sent = [path for path in upload.folder.rglob("*") if path.is_file() and ".trainer" not in path.parts]
    assert {path.relative_to(upload.folder).parts[0] for path in sent} == {"model", "record.json", ".progress.json"}
    assert not any(a.encode() in path.read_bytes() for path in sent for _, a in PRIVATE["d-law"])


def test_a_device_reads_its_own_text_and_the_public_text(text: Corpus, ancestor: Checkpoint, tmp_path: Path) -> None:
    alone = corpus(folder(tmp_path / "corpus"))
    alone.private("d-food").unlink()
    alone.test.unlink()
    alone.heldout.unlink()
    alone.questions.unlink()
    assert train(alone, ancestor, tmp_path / "a").digest == train(text, ancestor, tmp_path / "b").digest


def test_equal_seeds_give_equal_uploads(text: Corpus, ancestor: Checkpoint, tmp_path: Path) -> None:
    digests = [train(text, ancestor, tmp_path / str(n), seed=seed).digest for n, seed in enumerate((0, 0, 1))]
    assert digests[0] == digests[1] != digests[2]


def test_epochs_count_passes_over_private_text(text: Corpus, ancestor: Checkpoint, tmp_path: Path) -> None:
    once = train(text, ancestor, tmp_path / "1", CONFIG.model_copy(update={"epochs": 1, "replay": 0.0}))
    often = train(text, ancestor, tmp_path / "8", CONFIG.model_copy(update={"epochs": 8, "replay": 0.0}))
    batch = FAST.rows * FAST.context
    assert once.tokens == often.tokens
    assert once.tokens <= once.work.tokens < once.tokens + batch
    assert 8 * once.tokens <= often.work.tokens < 8 * once.tokens + batch
    assert often.work.token_parameters == 3 * often.work.tokens * often.active_parameters
    replayed = train(text, ancestor, tmp_path / "replay", CONFIG.model_copy(update={"epochs": 8, "replay": 0.5}))
    assert replayed.tokens == once.tokens
    assert replayed.work.tokens >= 8 * 1.5 * once.tokens


@pytest.mark.parametrize("context", [16, 64])
def test_a_long_answer_is_the_users_mistake(context: int, text: Corpus, tmp_path: Path) -> None:
    """Too long for the training's context, or for the model's own."""
    long = corpus(folder(tmp_path / "corpus"))
    write_jsonl(long.private("d-law"), documents([("Who? ", "Ann " * 30)], "law"))
    ancestor = checkpoint("gpt2", tmp_path / "gpt2", context=context)
    config = CONFIG.model_copy(update={"training": FAST.model_copy(update={"context": 80 - context})})
    with pytest.raises(InputError, match=r"the answer of document 'law-0' takes \d+ tokens and the context holds 14"):
        train(long, ancestor, tmp_path / "device", config)


def test_an_encoder_that_is_none_is_the_users_mistake_and_found_first(
    text: Corpus, ancestor: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepfusion.phases.device.fit", lambda *_, **__: pytest.fail("it was trained for nothing"))
    config = CONFIG.model_copy(update={"encoder": str(folder(tmp_path / "encoder"))})
    with pytest.raises(InputError, match="encoder is not a checkpoint folder"):
        train(text, ancestor, tmp_path / "device", config)


def test_what_goes_wrong_in_training_is_the_devices_own(
    text: Corpus, ancestor: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("shapes do not match")

    monkeypatch.setattr("deepfusion.phases.device.fit", broken)
    with pytest.raises(ValueError, match="shapes do not match") as raised:
        train(text, ancestor, tmp_path)
    assert not isinstance(raised.value, InputError)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_uploaded_weights_have_the_recipes_precision(dtype: str, text: Corpus, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"training": FAST.model_copy(update={"dtype": dtype}), "epochs": 1})
    ancestor = checkpoint("llama", tmp_path / "llama")
    upload = train(text, ancestor, tmp_path / "device", config)
    size = sum(path.stat().st_size for path in upload.model.glob("*.safetensors"))
    assert size == pytest.approx(upload.parameters * (4 if dtype == "float32" else 2), rel=0.2)
