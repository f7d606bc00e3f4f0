import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from deepfusion.weights import INDEX, WEIGHTS, index, shapes, tensors, write

HELD: dict[str, Tensor] = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.tensor([1, 2], dtype=torch.int64),
}


def test_one_file(tmp_path: Path) -> None:
    write(tmp_path, HELD.items())
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    assert list(index(tmp_path)) == ["a", "b", "c"]
    assert shapes(tmp_path)["a"] == (torch.bfloat16, (4,))
    for name, tensor in tensors(tmp_path):
        assert torch.equal(tensor, HELD[name])
        assert tensor.dtype == HELD[name].dtype


def test_shards(tmp_path: Path) -> None:
    write(tmp_path, HELD.items(), shard_bytes=32)  # b has 24 bytes, a 8, c 16
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        INDEX,
    ]
    contents = json.loads((tmp_path / INDEX).read_text())
    assert contents["metadata"] == {"total_size": 48}
    assert {name: file[:11] for name, file in contents["weight_map"].items()} == {
        "a": "model-00001",
        "b": "model-00001",
        "c": "model-00002",
    }
    assert all(torch.equal(tensor, HELD[name]) for name, tensor in tensors(tmp_path))


def test_transposed_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    write(tmp_path, [("t", HELD["b"].T)])
    assert torch.equal(dict(tensors(tmp_path))["t"], HELD["b"].T)


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"has no {WEIGHTS}"):
        index(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="is not an index"):
        index(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="points outside its folder"):
        index(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ValueError, match=r"gone\.safetensors is not a readable"):
        index(tmp_path)
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="dtype F8_E4M3, which is not supported"):
        shapes(tmp_path)
