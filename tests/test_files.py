"""Small files: written whole, and JSON from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepfusion.files import read_object, write_whole


def test_a_file_is_written_over_another_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    (tmp_path / "a.json.tmp").write_text("what a kill has left")
    write_whole(tmp_path / "a.json", "naïve")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == "naïve".encode()


def test_whoever_is_killed_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Path, *_: object, **__: object) -> None:
        self.touch()
        raise KeyboardInterrupt

    (tmp_path / "a.json").write_text("old")
    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not JSON: "),
        (b"\xff", "is not JSON: "),
        (b"[" * 10**5, "is not JSON: "),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: "),
        (b"[]", "is not a JSON object"),
    ],
)
def test_what_is_no_object_is_refused_by_its_name(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json {words}"):
        read_object(tmp_path / "a.json")


def test_a_key_that_comes_twice_is_refused_where_it_matters(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": {"b": 1, "b": 2}}')
    assert read_object(path) == {"a": {"b": 2}}
    with pytest.raises(ValueError, match="'b' stands in it twice"):
        read_object(path, strict=True)
    path.write_text('{"a": {"b": 1}, "b": 2}')
    assert read_object(path, strict=True) == {"a": {"b": 1}, "b": 2}
