import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deepfusion import codecs, memory, precision
from deepfusion.artifacts import RECORD, Checkpoint, Corpus, Upload
from deepfusion.config import Codec, DevicePhase, LoRA
from deepfusion.data.documents import write_jsonl
from deepfusion.encoders import embed
from deepfusion.errors import InputError
from deepfusion.phases import device
from deepfusion.phases.device import train_device
from deepfusion.phases.upload import materialise, receive
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


def test_a_device_with_little_text_takes_so_many_steps_at_least(
    text: Corpus, ancestor: Checkpoint, tmp_path: Path
) -> None:
    """Passes decide where they make more steps than that."""
    taken: dict[int | None, int] = {}
    for least in (None, 1, 50):
        upload = train(text, ancestor, tmp_path / str(least), CONFIG.model_copy(update={"min_steps": least}))
        taken[least] = upload.losses[-1][0]
    assert taken[None] == taken[1] < 50 <= taken[50]


def test_a_sitting_has_its_share_of_the_steps() -> None:
    config = CONFIG.model_copy(update={"epochs": 30.0, "min_steps": 100})
    size = FAST.rows * FAST.context
    assert (config.tokens(size), config.tokens(10 * size)) == (100 * size, 300 * size)
    third = config.sitting(3)
    assert (third.epochs, third.min_steps) == (10, 34)  # rounded up
    assert config.sitting(8, 10) == third  # of which eight are more in all
    assert (third.tokens(size), third.tokens(10 * size)) == (34 * size, 100 * size)
    assert CONFIG.sitting(4, 1).min_steps is None


def test_nothing_of_the_text_is_sent(text: Corpus, ancestor: Checkpoint, tmp_path: Path) -> None:
    upload = train(text, ancestor, tmp_path)
    sent = [path for path in upload.folder.rglob("*") if path.is_file() and ".trainer" not in path.parts]
    assert {path.relative_to(upload.folder).parts[0] for path in sent} == {
        "model",
        "record.json",
        ".progress.json",
        ".memory.json",
    }
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


@pytest.mark.parametrize("known", [True, False])
def test_weights_beside_an_adapter_are_as_the_processor_likes_them(
    known: bool, text: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[torch.dtype] = []
    open_model = device.checkpoints.open_model

    def noted(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
        opened.append(dtype)
        return open_model(folder, dtype, **options)

    monkeypatch.setattr(device.checkpoints, "open_model", noted)
    monkeypatch.setattr(precision, "knows_bfloat16", lambda _: known)
    coarse = CONFIG.model_copy(update={"training": FAST.model_copy(update={"dtype": "bfloat16"}), "epochs": 1})
    ancestor = checkpoint("llama", tmp_path / "llama")
    train(text, ancestor, tmp_path / "adapted", coarse.model_copy(update={"method": "lora"}))
    train(text, ancestor, tmp_path / "whole", coarse)
    assert opened == [torch.bfloat16 if known else torch.float32, torch.bfloat16]


@pytest.mark.usefixtures("without_bfloat16")
@pytest.mark.parametrize(
    ("method", "dtype", "note"),
    [("full", "bfloat16", None), ("full", "float32", "float32"), ("lora", "bfloat16", "float32")],
)
def test_word_is_left_of_what_is_computed_otherwise(
    method: str, dtype: str, note: str | None, text: Corpus, tmp_path: Path
) -> None:
    """Weights that are saved in bfloat16 are trained in it, slow as that may be."""
    training = FAST.model_copy(update={"dtype": dtype, "compute": "bfloat16"})
    config = CONFIG.model_copy(update={"training": training, "epochs": 1, "method": method})
    train(text, checkpoint("llama", tmp_path / "llama"), tmp_path / "device", config)
    assert precision.noted(tmp_path / "device") == note


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has none."""
    monkeypatch.setattr(precision, "knows_bfloat16", lambda _: False)


# ── adapters ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Wide enough for weights in four bits, and for an adapter to do something."""
    return checkpoint("llama", tmp_path_factory.mktemp("wide") / "llama", hidden=64, ffn=128)


def adapting(method: str, upload: str = "merged", **changes: Any) -> DevicePhase:
    return CONFIG.model_copy(update={"method": method, "upload": upload, "epochs": 40} | changes)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_is_sent_alone_or_merged(method: str, text: Corpus, wide: Checkpoint, tmp_path: Path) -> None:
    merged = train(text, wide, tmp_path / "merged", adapting(method))
    alone = train(text, wide, tmp_path / "alone", adapting(method, "adapter"))
    assert (merged.sends, alone.sends) == ("model", "adapter")
    assert (merged.method, merged.losses, merged.work) == (method, alone.losses, alone.work)
    assert merged.losses[-1][1] < merged.losses[0][1] - 0.5
    assert not (merged.folder / "adapter").exists()
    assert not alone.model.exists()
    assert {path.name for path in alone.sent.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert alone.bytes == sum(path.stat().st_size for path in alone.sent.iterdir()) + 64
    assert alone.bytes < merged.bytes / 2
    taken = receive([alone], {}, embedding_bytes=64, ancestors={"small": wide}, lora=CONFIG.lora,
                    into=folder(tmp_path / "intake"))  # fmt: skip
    assert taken.bytes == {"d-law": alone.bytes}
    whole = materialise(alone, wide, CONFIG.lora, into=folder(tmp_path / "whole"))
    assert weights(whole.model) == weights(merged.model) != weights(wide.folder)
    assert (whole.bytes, whole.lineage, whole.work.tokens) == (alone.bytes, wide.lineage, 0)
    assert Upload.load(whole.folder) == whole


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_model_is_packed(method: str, text: Corpus, wide: Checkpoint, tmp_path: Path) -> None:
    """A change by an adapter of rank 8 has that rank, so nothing is lost; one of all weights has not."""
    codec = Codec(numbers="float32", delta=True, rank=8)
    plain = train(text, wide, tmp_path / "plain", adapting(method))
    upload = train(text, wide, tmp_path / "packed", adapting(method, codec=codec))
    assert {path.name for path in upload.folder.iterdir() if not path.name.startswith(".")} == {"packed", "record.json"}
    assert (upload.losses, upload.sends) == (plain.losses, "packed")
    assert upload.packing is not None
    assert upload.packing.codec == "float32 delta rank 8"
    assert (upload.packing.lost < 1e-4) == (method == "lora")
    assert upload.bytes == (upload.sent / codecs.FILE).stat().st_size + 64 < plain.bytes / 2
    taken = receive([upload], {}, embedding_bytes=64, ancestors={"small": wide}, codec=codec,
                    into=folder(tmp_path / "intake"))  # fmt: skip
    assert taken.bytes == {"d-law": upload.bytes}
    whole = materialise(upload, wide, None, codec=codec, into=folder(tmp_path / "whole"))
    assert weights(whole.model).keys() == weights(plain.model).keys()


def test_without_a_codec_keys_and_records_say_nothing_of_it(text: Corpus, ancestor: Checkpoint, tmp_path: Path) -> None:
    """Steps of runs from before there were codecs are found again."""
    assert not {"codec", "own"} & set(CONFIG.model_dump(mode="json"))
    upload = train(text, ancestor, tmp_path)
    assert "packing" not in json.loads((upload.folder / RECORD).read_text())
    assert Upload.load(upload.folder).packing is None


def test_an_adapters_size_and_work_by_hand(text: Corpus, wide: Checkpoint, tmp_path: Path) -> None:
    """Rank 2 beside four matrices of 64 x 64 and three of 64 x 128; gradients of the frozen weights are not needed."""
    lora = LoRA(rank=2)
    upload = train(text, wide, tmp_path, adapting("lora", epochs=1, lora=lora))
    adapter = 2 * (4 * (64 + 64) + 3 * (64 + 128))
    assert upload.trained_parameters == adapter
    assert upload.parameters == wide.parameters
    tokens, active = upload.work.tokens, wide.active_parameters
    assert upload.work.forward == tokens * (active + adapter)
    assert upload.work.backward == tokens * (active + 2 * adapter)
    full = train(text, wide, tmp_path / "full", CONFIG.model_copy(update={"epochs": 1}))
    assert (full.method, full.trained_parameters, full.sends) == ("full", wide.parameters, "model")


def test_equal_seeds_give_equal_adapters(text: Corpus, wide: Checkpoint, tmp_path: Path) -> None:
    config = adapting("qlora", "adapter", epochs=2)
    digests = [train(text, wide, tmp_path / str(n), config, seed).digest for n, seed in enumerate((0, 0, 1))]
    assert digests[0] == digests[1] != digests[2]


def test_the_peak_of_training_is_noted_and_no_part_of_the_upload(
    text: Corpus, wide: Checkpoint, tmp_path: Path
) -> None:
    upload = train(text, wide, tmp_path, adapting("lora", "adapter", epochs=1))
    noted = memory.noted(tmp_path)
    assert noted is not None
    assert 50 * 2**20 < noted.before_bytes <= noted.peak_bytes
    (tmp_path / memory.NOTE).unlink()
    assert Upload.load(tmp_path).digest == upload.digest


@pytest.mark.parametrize(
    ("method", "ancestor", "words"),
    [
        ("lora", ("mixtral", {}), r"experts of a mixtral: set device\.method: full"),
        ("qlora", ("llama", {"hidden": 48, "ffn": 48}), r"has 48 inputs: use device\.method: lora"),
    ],
)
def test_a_model_that_cannot_be_adapted_is_the_users_mistake(
    method: str, ancestor: tuple[str, dict[str, int]], words: str, text: Corpus, tmp_path: Path
) -> None:
    name, shape = ancestor
    with pytest.raises(InputError, match=words):
        train(text, checkpoint(name, tmp_path / name, **shape), tmp_path / "device", adapting(method))
