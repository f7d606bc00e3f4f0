import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from deepfusion import weights
from deepfusion.artifacts import file_digest
from deepfusion.weights import (
    INDEX,
    WEIGHTS,
    Part,
    blocks,
    digest,
    distance,
    index,
    shapes,
    stored,
    stored_in,
    tensors,
    write,
)
from fuse import Blown, Fuse, contents, written

HELD: dict[str, Tensor] = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.tensor([1, 2], dtype=torch.int64),
}


def parts(named: dict[str, Tensor]) -> list[Part]:
    return [Part.of(name, tensor) for name, tensor in named.items()]


def test_one_file(tmp_path: Path) -> None:
    write(tmp_path, parts(HELD))
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    assert list(index(tmp_path)) == ["a", "b", "c"]
    assert shapes(tmp_path)["a"] == (torch.bfloat16, (4,))
    for name, tensor in tensors(tmp_path):
        assert torch.equal(tensor, HELD[name])
        assert tensor.dtype == HELD[name].dtype


def test_shards(tmp_path: Path) -> None:
    write(tmp_path, parts(HELD), shard_bytes=32)  # b has 24 bytes, a 8, c 16
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


def test_a_digest_is_of_tensors_not_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / name for name in ("whole", "cut", "other order", "another")]
    for folder in folders:
        folder.mkdir()
    write(folders[0], parts(HELD))
    write(folders[1], parts(HELD), shard_bytes=1)
    write(folders[2], reversed(parts(HELD)))
    write(folders[3], parts(HELD | {"b": HELD["b"] + 1}))
    digests = [digest(folder) for folder in folders]
    assert digests[0] == digests[1] == digests[2] == file_digest(folders[0] / WEIGHTS) != digests[3]
    monkeypatch.setattr("deepfusion.weights.BLOCK", 2)
    assert digest(folders[1]) == digests[0]


def test_transposed_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    write(tmp_path, [Part.of("t", HELD["b"].T)])
    assert torch.equal(dict(tensors(tmp_path))["t"], HELD["b"].T)


def test_a_file_has_the_bytes_of_the_library(tmp_path: Path) -> None:
    dtypes = (*weights._DTYPES.values(),)  # pyright: ignore[reportPrivateUsage]
    held = {f"{n % 3}-{n}": torch.arange(n + 1).to(dtype) for n, dtype in enumerate(dtypes)}
    held |= {"scalar": torch.tensor(2.5), "nothing": torch.ones(0, 3), 'ä"\\\n': torch.ones(1, 2, 3)}
    save_file(held, tmp_path / "theirs", metadata={"format": "pt"})
    write(tmp_path, parts(held))
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / "theirs").read_bytes()
    assert all(torch.equal(tensor, held[name]) for name, tensor in tensors(tmp_path))
    write(tmp_path, [])
    save_file({}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_are_made_and_read_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.arange(24.0).reshape(6, 4)
    write(tmp_path, [Part("w", torch.float32, (6, 4), lambda: iter([whole[:1], whole[1:4], whole[4:]]))])
    one = stored(tmp_path)["w"]
    assert torch.equal(one.read(), whole)
    assert torch.equal(one.read(slice(1, 3)), whole[1:3])
    assert torch.equal(one.read(slice(4, None)), whole[4:])
    assert list(weights.blocks(one.shape)) == [slice(0, 6)]
    assert list(weights.blocks(())) == [None]
    assert list(weights.blocks((0, 4))) == [slice(0, 0)]
    monkeypatch.setattr(weights, "BLOCK", 9)
    assert list(weights.blocks(one.shape)) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert list(weights.blocks(one.shape, slice(3, None))) == [slice(3, 5), slice(5, 6)]
    assert torch.equal(torch.cat([*one.through(slice(1, 4))]), whole[1:4])
    monkeypatch.setattr(weights, "BLOCK", 3)  # not even a row
    assert torch.equal(torch.cat([*one.through()]), whole)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (torch.ones(3, 2), r"shape \(3, 2\) instead of \(2, 3\)"),
        ([torch.ones(1, 3)], "12 bytes instead of 24"),
        ([torch.ones(3, 2)], r"rows \(3, 2\) of torch\.float32, but is to be \(2, 3\) of torch\.float32"),
        ([torch.ones(2, 3).half()], r"rows \(2, 3\) of torch\.float16, but is to be \(2, 3\) of torch\.float32"),
    ],
)
def test_a_part_is_what_it_was_announced_to_be(made: Tensor | list[Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"w was made .*{message}"):
        write(tmp_path, [Part("w", torch.float32, (2, 3), lambda: made)])
    with pytest.raises(ValueError, match=r"is not a readable|has no"):
        index(tmp_path)


def test_a_name_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 tensors have a name that another has"):
        write(tmp_path, [*parts(HELD), Part.of("b", torch.ones(1))])


def test_what_is_finished_is_not_made_again(tmp_path: Path) -> None:
    fuse, folder = Fuse(64), tmp_path / "disturbed"
    (tmp_path / "undisturbed").mkdir()
    folder.mkdir()
    six = parts({name: torch.full((4, 2), float(ord(name))) for name in "abcdef"})
    fuse.write(tmp_path / "undisturbed", six)
    undisturbed = contents(tmp_path / "undisturbed")
    assert len(undisturbed) == 4  # two tensors a file, and the index
    fuse.lasts = 3
    with pytest.raises(Blown):
        fuse.write(folder, six)
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors.tmp"]
    before = written(folder / left[0])
    fuse.lasts = 99
    fuse.write(folder, six, resume=True)
    assert fuse.made == list("cdef")
    assert contents(folder) == undisturbed
    assert written(folder / left[0]) == before
    # A file that is not as planned is made again, and without `resume` all are.
    with (folder / "model-00003-of-00003.safetensors").open("ab") as stream:
        stream.write(b"!")
    fuse.write(folder, six, resume=True)
    assert fuse.made == list("ef")
    fuse.write(folder, six, resume=True)
    assert fuse.made == []
    fuse.write(folder, six)
    assert fuse.made == list("abcdef")
    assert contents(folder) == undisturbed
    # Another plan leaves nothing of the last one.
    fuse.write(folder, [*six[:4], *parts({"x": torch.ones(4, 2), "y": torch.ones(4, 2)})], resume=True)
    assert fuse.made == list("xy")
    write(folder, six, resume=True)
    assert list(contents(folder)) == [WEIGHTS]


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
    write(tmp_path, parts(HELD))
    one = stored(tmp_path)["b"]
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[: one.start + 4])
    with pytest.raises(ValueError, match="is shorter than its header says"):
        one.read()


def with_header(path: Path, header: bytes, data: bytes = b"\0" * 8) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


ONE = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


def test_a_name_that_stands_twice_in_a_header_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"twice|not a readable"):
        stored_in(with_header(tmp_path / "a.safetensors", b"{" + ONE + b"," + ONE + b"}"))


def test_a_header_of_no_end_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="may have"):
        stored_in(tmp_path / "a.safetensors")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(ONE) + 1), put=st.binary(max_size=4), cut=st.integers(0, 6), data=st.integers(0, 16))
@example(at=2, put=b"", cut=0, data=7)
def test_any_header_is_read_or_refused(at: int, put: bytes, cut: int, data: int, tmp_path: Path) -> None:
    header = b"{" + ONE + b"}"
    path = with_header(tmp_path / "a.safetensors", header[:at] + put + header[at + cut :], b"\0" * data)
    try:
        found = stored_in(path)
    except ValueError:
        return
    for one in found.values():
        assert one.read().nbytes <= data


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("x.safetensors", "y.safetensors"):
        with_header(tmp_path / name, b"{" + ONE + b"}")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"tensor a is in x\.safetensors and again in y\.safetensors"):
        stored(tmp_path)


def test_distances_by_hand(tmp_path: Path) -> None:
    for name, values in (("now", [1.0, 2.0]), ("before", [4.0, -2.0])):
        (tmp_path / name).mkdir()
        write(tmp_path / name, [Part.of("a", torch.tensor(values))])
    changed, whole = distance(stored(tmp_path / "now"), stored(tmp_path / "before"))
    assert (changed, whole) == (5.0, pytest.approx(20**0.5))


def test_any_number_of_rows_without_elements_is_one_block() -> None:
    assert list(blocks((2**60, 0))) == [slice(0, 2**60)]
    assert list(blocks((0, 2**60))) == [slice(0, 0)]
    assert list(blocks((0, 0))) == [slice(0, 0)]


def test_a_name_without_end_is_refused(tmp_path: Path) -> None:
    """Patterns are matched against names, and names stand in reasons."""
    save_file({"h" * 1001: torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="has a tensor whose name has 1001 characters: 'hhhh"):
        stored(tmp_path)
