"""GGUF files become checkpoints that compute the same, or one line says why not."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepfusion import checkpoints, import_gguf
from deepfusion.alignment import vocabulary_bytes
from deepfusion.errors import InputError
from deepfusion.import_gguf import ARCHITECTURES, Imported
from ggufs import ARCHES, write_gguf
from pico import TEXTS, pico

# GPT-2's context and Qwen3's width of a head are not in a GGUF file, so they must be the usual ones.
SHAPES: dict[str, dict[str, Any]] = {"gpt2": {"context": 1024, "ffn": 128}, "qwen3": {"hidden": 128, "heads": 1}}
TEXT = "In 1987 the quick ship sailed; naïve café, привет, 你好."


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return pico("llama", tmp_path / "source")


def convert(file: Path, **options: Any) -> Imported:
    return import_gguf.import_gguf(file, file.parent / "out", **{"dtype": "float32", **options})


def test_every_architecture_is_tried() -> None:
    assert set(ARCHES) == set(ARCHITECTURES.values())


@pytest.mark.parametrize("model_type", ARCHES)
def test_what_is_imported_computes_what_the_source_does(model_type: str, tmp_path: Path) -> None:
    folder = pico(model_type, tmp_path / "source", **SHAPES.get(model_type, {}))
    done = convert(write_gguf(folder, tmp_path / "model.gguf"))
    assert (done.model_type, done.notes) == (model_type, ())
    assert done.parameters == checkpoints.parameters(folder)
    before, after = checkpoints.open_tokenizer(folder), checkpoints.open_tokenizer(done.folder)
    table = vocabulary_bytes(before)
    assert vocabulary_bytes(after)[: len(table)] == table  # a Gemma tokenizer brings a <mask> of its own
    for text in (*TEXTS, TEXT):
        assert after(text)["input_ids"] == before(text)["input_ids"]
    ids = torch.tensor([before(TEXT)["input_ids"][:64]])
    with torch.inference_mode():
        expected, found = (checkpoints.open_model(place)(ids).logits for place in (folder, done.folder))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_weights_are_saved_in_the_dtype_that_was_asked_for(source: Path, tmp_path: Path) -> None:
    done = convert(write_gguf(source, tmp_path / "model.gguf"), dtype="bfloat16")
    assert {dtype for dtype, _ in checkpoints.shapes(done.folder).values()} == {torch.bfloat16}


def test_nothing_in_the_result_names_a_folder_of_the_machine(source: Path, tmp_path: Path) -> None:
    done = convert(write_gguf(source, tmp_path / "model.gguf"))
    told = [path.read_text() for path in done.folder.glob("*.json")]
    assert len(told) >= 3
    assert not [text for text in told if str(tmp_path) in text or "local_files_only" in text]


@pytest.mark.parametrize(("pre", "apart"), [("smollm", True), ("gpt-2", False)])
def test_digits_are_cut_apart_where_the_model_learned_them_so(
    pre: str, apart: bool, source: Path, tmp_path: Path
) -> None:
    done = convert(write_gguf(source, tmp_path / "model.gguf", pre=pre))
    backend = checkpoints.open_tokenizer(done.folder).backend_tokenizer
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str("in 1987")]
    assert words == (["in", "Ġ", "1", "9", "8", "7"] if apart else ["in", "Ġ1987"])


def test_a_word_pattern_that_is_not_known_is_told(source: Path, tmp_path: Path) -> None:
    [note] = convert(write_gguf(source, tmp_path / "model.gguf", pre="deepseek-llm")).notes
    assert note.startswith("the file's tokenizer cuts words by the pattern 'deepseek-llm', for which GPT-2's was taken")


def test_settings_that_are_passed_over_are_told(source: Path, tmp_path: Path) -> None:
    done = convert(write_gguf(source, tmp_path / "model.gguf", settings={"llama.logit_scale": 0.5}))
    assert done.notes == ("the file's llama.logit_scale (0.5) was passed over",)


# ── what cannot be imported ───────────────────────────────────────────────────────────────────────────────────────────


def refused(file: Path, **options: Any) -> str:
    before = sorted(path.name for path in file.parent.iterdir())
    with pytest.raises(InputError) as raised:
        convert(file, **options)
    assert sorted(path.name for path in file.parent.iterdir()) == before  # nothing half-made is left
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_is_no_gguf_file_is_named(tmp_path: Path, source: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04")
    assert refused(tmp_path / "a.gguf") == f"{tmp_path / 'a.gguf'} is not a GGUF file: it does not begin with GGUF"
    assert refused(tmp_path / "none.gguf").endswith("none.gguf does not exist")
    assert refused(source).endswith("source is a folder, not a file")


@pytest.mark.parametrize("share", [0.001, 0.1, 0.7])
def test_a_file_that_was_cut_short_is_named(share: float, source: Path, tmp_path: Path) -> None:
    file = write_gguf(source, tmp_path / "model.gguf")
    content = file.read_bytes()
    file.write_bytes(content[: 8 + int(share * len(content))])
    assert "model.gguf is broken or cut short: " in refused(file)


def test_an_unknown_architecture_is_named_with_those_that_are_known(source: Path, tmp_path: Path) -> None:
    file = write_gguf(source, tmp_path / "model.gguf", architecture="mamba")
    assert refused(file) == (
        f"{file} holds a model of architecture 'mamba', which is not among those that can be imported: "
        "gemma2, gemma3, gpt2, llama, qwen2, qwen3"
    )


def test_a_part_of_a_file_is_named(source: Path, tmp_path: Path) -> None:
    named = write_gguf(source, tmp_path / "model-00001-of-00003.gguf")
    assert "is one of 3 parts: join them first, with llama.cpp's llama-gguf-split --merge" in refused(named)
    told = write_gguf(source, tmp_path / "model.gguf", settings={"split.count": 2})
    assert "is one of 2 parts" in refused(told)


def test_positions_that_would_be_lost_are_named(source: Path, tmp_path: Path) -> None:
    settings = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    assert "stretches its positions (llama.rope.scaling." in refused(
        write_gguf(source, tmp_path / "model.gguf", settings=settings)
    )


def test_a_tensor_that_would_be_lost_is_named(source: Path, tmp_path: Path) -> None:
    file = write_gguf(source, tmp_path / "model.gguf", tensors={"rope_freqs.weight": np.ones(4, np.float32)})
    assert "has 1 tensors of 4 values (rope_freqs.weight), and 1 of them have no place" in refused(file)


def test_a_missing_package_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(source, tmp_path / "model.gguf")
    monkeypatch.setattr(import_gguf, "is_gguf_available", lambda: False)
    assert refused(file) == "reading GGUF files needs the package gguf: pip install 'deepfusion-moe[gguf]'"
    assert "gguf" in sys.modules  # the check is what failed


def test_what_is_there_stays_unless_told_otherwise(source: Path, tmp_path: Path) -> None:
    file = write_gguf(source, tmp_path / "model.gguf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert refused(file) == f"{tmp_path / 'out'} is there already: give another folder, or --force to replace it"
    convert(file, force=True)
    assert not (tmp_path / "out" / "mine").exists()
    checkpoints.validate(tmp_path / "out")


def test_a_model_that_breaks_off_leaves_what_was_there(source: Path, tmp_path: Path) -> None:
    file = write_gguf(source, tmp_path / "model.gguf", tensors={"extra": np.ones(3, np.float32)})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    refused(file, force=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
