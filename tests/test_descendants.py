"""What a stranger writes beside weights is held against the ancestor's own files before anything is made of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepfusion.checkpoints import open_model, open_tokenizer, save_model
from deepfusion.descendants import Ancestor
from pico import DENSE, pico


@pytest.fixture(scope="module")
def ancestor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico("gpt2", tmp_path_factory.mktemp("ancestor"))


@pytest.fixture
def folder(ancestor: Path, tmp_path: Path) -> Path:
    return shutil.copytree(ancestor, tmp_path / "sent")


def says(name: str, **fields: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        held = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps(held | fields))

    return change


def panicking(folder: Path) -> None:
    """The library makes a normalizer of the first, at which it panics; Python's JSON reads the last alone."""
    path = folder / "tokenizer.json"
    bad = '{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, '
    path.write_text(bad + path.read_text().lstrip().removeprefix("{"))


def test_a_panic_of_the_tokenizers_library_is_an_error(folder: Path) -> None:
    panicking(folder)
    with pytest.raises(ValueError, match=r"has no usable tokenizer"):
        open_tokenizer(folder)


def numbered(folder: Path) -> None:
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["model"]["vocab"]["zzz"] = 2**32 - 2  # the library writes a line for every number below
    path.write_text(json.dumps(fields))


def with_nothing_in_rows(folder: Path) -> None:
    """A tensor that any family passes over, of as many rows as there can be, without a byte."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    end = len(content) - 8 - length
    entry = {"dtype": "F32", "shape": [2**60, 0], "data_offsets": [end, end]}
    head = json.dumps(json.loads(content[8 : 8 + length]) | {"h.rotary_emb.inv_freq": entry}).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + content[8 + length :])


def of_many_tensors(folder: Path) -> None:
    for number in range(3):
        (folder / f"{number}.safetensors").write_bytes((2**16).to_bytes(8, "little") + b"{" * 2**16)


def long_winded(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text() + " " * 2**17)


REFUSED = {
    "a label for every number": (says("config.json", num_labels=10**12), "num_labels is 1000000000000, and its"),
    "a layer for every number": (says("config.json", n_layer=10**12), "n_layer is 1000000000000, and its"),
    "a token of any number": (numbered, "tokenizer.json: model is not its ancestor's"),
    "rows without end": (with_nothing_in_rows, "1 tensors more than its ancestor"),
    "weights from elsewhere": (
        says("adapter_config.json", base_model_name_or_path="/", peft_type="LORA"),
        "adapter_config.json is no part of a checkpoint of its ancestor",
    ),
    "another file of tokens": (says("tokenizer_config.json", tokenizer_file="/dev/zero"), "tokenizer_file is /dev/z"),
    "another end": (says("tokenizer_config.json", eos_token="a"), "eos_token is a, and its ancestor's is <"),
    "what cannot be opened": (says("generation_config.json", cache_implementation=7), "config.json is not valid: "),
    "what cannot be shown": (says("config.json", activation_function="\ud800\x1b[2J"), "function is ��"),
    "more than can be meant": (long_winded, "config.json has .* bytes, and cannot need more than"),
    "more names than it has": (of_many_tensors, "have headers of .* bytes, and cannot need more than"),
    "a key twice": (panicking, "'normalizer' stands in it twice"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{" + "9" * 5000), "config.json is not JSON"),
    "no object": (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "is not a JSON object"),
    "another text": (lambda folder: (folder / "merges.txt").write_text("a b"), "merges.txt is no part of"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_the_ancestors_is_refused_before_it_is_used(what: str, folder: Path, ancestor: Path) -> None:
    change, words = REFUSED[what]
    change(folder)
    with pytest.raises(ValueError, match=words):
        Ancestor(ancestor).validate(folder)


def test_what_a_library_writes_of_an_older_ancestor_is_its_own(tmp_path: Path, folder: Path) -> None:
    """Merges as lines, padding, indentation and the fields that say how a file was made are not the tokenizer."""
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["model"]["merges"] = [" ".join(pair) for pair in fields["model"]["merges"]]
    fields["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(fields))
    says("tokenizer_config.json", name_or_path="/somewhere")(folder)
    save_model(open_model(folder), open_tokenizer(folder), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer.json").read_text()) != fields
    Ancestor(folder).validate(tmp_path / "again")
    Ancestor(folder).validate(shutil.copytree(folder, tmp_path / "copied"))


@pytest.mark.parametrize("model_type", DENSE)
def test_what_is_saved_of_an_ancestor_of_any_type_is_its_descendant(model_type: str, tmp_path: Path) -> None:
    folder = pico(model_type, tmp_path / "ancestor")
    save_model(open_model(folder, torch.bfloat16), open_tokenizer(folder), tmp_path / "sent")
    Ancestor(folder).validate(tmp_path / "sent")


def test_an_ancestors_tokenizer_is_opened_for_the_first_descendant_alone(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def counted(one: Path) -> Any:
        opened.append(one)
        return open_tokenizer(one)

    save_model(open_model(folder), open_tokenizer(folder), tmp_path / "trained")
    monkeypatch.setattr("deepfusion.descendants.open_tokenizer", counted)
    ancestor = Ancestor(folder)
    ancestor.validate(tmp_path / "trained")
    assert opened == [folder]
    ancestor.validate(tmp_path / "trained")
    assert opened == [folder]
    path = tmp_path / "trained" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))  # the same, in other bytes: looked into
    ancestor.validate(tmp_path / "trained")
    assert opened.count(tmp_path / "trained") == 1


def test_an_ancestors_own_files_are_known_without_saving_it_again(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))  # not as it is saved
    ancestor, copy = Ancestor(folder), shutil.copytree(folder, tmp_path / "copied")
    ancestor.validate(copy)
    monkeypatch.setattr("deepfusion.descendants.save_tokenizer", None)
    ancestor.validate(copy)


def test_a_tokenizer_that_lacks_a_file_is_opened(tmp_path: Path, folder: Path) -> None:
    save_model(open_model(folder), open_tokenizer(folder), tmp_path / "trained")
    (tmp_path / "trained" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        Ancestor(folder).validate(tmp_path / "trained")
