"""What comes in: idempotent, resumable, and nothing that is announced wrongly, unsigned or spoiled gets through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepfusion.artifacts import Upload
from deepfusion.config import Recipe
from deepfusion.federation.inbox import Inbox, started
from deepfusion.federation.manifest import MOST_BYTES, Manifest, digest, sign, verify
from deepfusion.federation.project import Project, init
from tiny import TREE

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CONTENTS = {"model/a.safetensors": b"0123456789", "model/config.json": b"{}", "model/empty.txt": b""}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    tree = TREE | {"federation": {"devices": ["north", "south"], "quorum": 2}, "evaluate": {"references": []}}
    return init(tmp_path_factory.mktemp("made") / "there", Recipe.parse(tree), tree, ["example.org", "::1"], 8000)


@pytest.fixture
def upload(tmp_path: Path) -> Upload:
    return sent(tmp_path / "made")


def sent(folder: Path, device: str = "north") -> Upload:
    for name, content in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return Upload(
        folder=folder, device=device, ancestor="tiny", model_type="gpt2", lineage="gpt2-h8", parameters=1,
        active_parameters=1, tokens=1, embedding="00", bytes=13,
    ).sealed()  # fmt: skip


def nothing_wrong(upload: Upload) -> None:
    assert upload.model.is_dir()


def inbox(root: Path, project: Project, check: Callable[[Upload], None] = nothing_wrong, most: int = 100) -> Inbox:
    return Inbox(root / "inbox", project.keys, check, {"north": most, "south": most})


def announced(box: Inbox, project: Project, upload: Upload, order: str = "o", by: str = "north") -> str:
    content = Manifest.of(upload, "o").content
    box.announce("north", order, content, sign(content, project.device(by) / "node.key"))
    return digest(content)


def stream() -> bytes:
    return b"".join(CONTENTS[name] for name in sorted(CONTENTS))


@FEW
@given(cuts=st.lists(st.integers(0, 12), max_size=6), repeats=st.integers(1, 3))
def test_pieces_of_any_size_and_repeated_make_the_same_upload(
    cuts: list[int], repeats: int, project: Project, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("pieces")
    upload, whole = sent(root / "made"), stream()
    of = ""
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), len(whole)], strict=True):
        for _ in range(repeats):  # by a new inbox each time: the server was killed in between
            box = inbox(root, project)
            of = announced(box, project, upload)
            box.add("north", of, first, whole[first:last])
    box = inbox(root, project)
    verdict = box.settle("north")
    assert verdict is not None
    assert (verdict.state, verdict.digest) == ("accepted", of)
    assert box.upload("north").digest == upload.digest
    announced(box, project, upload)  # once more, and late
    assert box.wanted("north") is None
    assert box.verdict("north") == verdict


def test_spoiled_bytes_are_asked_for_again(project: Project, tmp_path: Path, upload: Upload) -> None:
    box = inbox(tmp_path, project)
    of = announced(box, project, upload)
    box.add("north", of, 0, b"X" + stream()[1:])
    assert box.settle("north") is None
    wanted = box.wanted("north")
    assert wanted is not None
    assert wanted.offset == 0
    box.add("north", of, 0, stream())
    verdict = box.settle("north")
    assert verdict is not None
    assert verdict.state == "accepted"


def test_a_rejected_upload_leaves_no_bytes_but_its_reason(project: Project, tmp_path: Path, upload: Upload) -> None:
    def refuse(_: Upload) -> None:
        raise ValueError("device north: tensor a holds NaN or infinity")

    box = inbox(tmp_path, project, refuse)
    box.add("north", announced(box, project, upload), 0, stream())
    verdict = box.settle("north")
    assert verdict is not None
    assert verdict.state == "rejected"
    assert "NaN" in verdict.reason
    assert [path.name for path in (tmp_path / "inbox").rglob("*") if path.is_file()] == ["north.json"]


def test_killed_between_renaming_and_verdict(project: Project, tmp_path: Path, upload: Upload) -> None:
    box = inbox(tmp_path, project)
    box.add("north", announced(box, project, upload), 0, stream())
    verdict = box.settle("north")
    (tmp_path / "inbox" / "verdicts" / "north.json").unlink()
    assert inbox(tmp_path, project).verdict("north") == verdict


@pytest.mark.parametrize("left", [".signature", ".manifest.json", "model"])
def test_killed_while_an_upload_is_forgotten(
    left: str, project: Project, tmp_path: Path, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of a refused upload is left by a kill, the inbox opens, and the device may send it again."""

    def refuse(_: Upload) -> None:
        raise ValueError("it is refused")

    def kill(folder: Path, **_: Any) -> None:
        for path in folder.iterdir():
            if path.name != left and path.is_file():
                path.unlink()
        raise KeyboardInterrupt

    box = inbox(tmp_path, project, refuse)
    box.add("north", announced(box, project, upload), 0, stream())
    with monkeypatch.context() as patched:
        patched.setattr("deepfusion.federation.inbox.shutil.rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            box.settle("north")
    box = inbox(tmp_path, project)
    assert box.wanted("north") is None
    box.add("north", announced(box, project, upload), 0, stream())
    verdict = box.settle("north")
    assert verdict is not None
    assert verdict.state == "accepted"


def test_a_start_that_was_not_written_whole_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "started.json.tmp").write_text("17640")
    assert started(tmp_path, 9.0) == 9.0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"by": "south"}, "not signed by the key"),
        ({"order": "other"}, "answers another order"),
        ({"most": 11}, "it announces 12 bytes"),
        ({"device": "south"}, "it sends an upload of 'south'"),
    ],
)
def test_what_may_not_be_announced(wrong: dict[str, Any], words: str, project: Project, tmp_path: Path) -> None:
    upload = sent(tmp_path / "made", wrong.pop("device", "north"))
    box = inbox(tmp_path, project, most=wrong.pop("most", 100))
    with pytest.raises(ValueError, match=words):
        announced(box, project, upload, **wrong)
    assert box.wanted("north") is None


@pytest.mark.parametrize(
    ("offset", "piece", "words"), [(1, b"a", "from 0 on were asked"), (0, b"x" * 13, "more bytes"), (-1, b"a", "from")]
)
def test_bytes_that_were_not_asked_for(
    offset: int, piece: bytes, words: str, project: Project, tmp_path: Path, upload: Upload
) -> None:
    box = inbox(tmp_path, project)
    of = announced(box, project, upload)
    with pytest.raises(ValueError, match=words):
        box.add("north", of, offset, piece)


NAMES = [
    "../x.json", "model/../../x.json", "/etc/passwd", "model/.hidden.json", "model/a.py", "model/a.bin", "model",
    "model/a.json\n", "packed/a.json", "model/a b.json", "model/sub/a.json", "model/" + "a" * 300 + ".json",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_files_that_no_upload_has(name: str, upload: Upload) -> None:
    fields = json.loads(Manifest.of(upload, "o").content)
    fields["files"][0]["name"] = name
    with pytest.raises(ValueError, match="its manifest"):
        Manifest.read(json.dumps(fields).encode())


CORPUS = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b'{"version":1}',
    b"\xff\xfe",
    b'{"a":' * 2000,
    b"9" * 5000,
    b" " * (MOST_BYTES + 1),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def read_or_refused(content: bytes) -> None:
    said = "its manifest"
    try:
        Manifest.read(content)
    except ValueError as error:
        said = str(error)
    assert said.startswith("its manifest")
    assert len(said) < 1000


@pytest.mark.parametrize("content", CORPUS, ids=range(len(CORPUS)))
def test_what_is_no_manifest_is_refused_in_a_line(content: bytes) -> None:
    read_or_refused(content)


@FEW
@given(content=st.binary(max_size=400))
def test_any_bytes_for_a_manifest(content: bytes) -> None:
    read_or_refused(content)


@FEW
@given(data=st.data())
def test_any_field_of_a_manifest_replaced_by_anything(data: st.DataObject, upload: Upload) -> None:
    fields = json.loads(Manifest.of(upload, "o").content)
    node: Any = data.draw(st.sampled_from([fields, fields["record"], fields["files"][0]]))
    node[data.draw(st.sampled_from(sorted(node)))] = data.draw(JSON)
    read_or_refused(json.dumps(fields).encode())


@FEW
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_no_bit_of_a_manifest_can_be_turned(at: int, bit: int, project: Project, upload: Upload) -> None:
    content = bytearray(Manifest.of(upload, "o").content)
    signature = sign(bytes(content), project.device("north") / "node.key")
    verify(bytes(content), signature, project.keys / "north.pub")
    content[at % len(content)] ^= 1 << bit
    with pytest.raises(ValueError, match="not signed"):
        verify(bytes(content), signature, project.keys / "north.pub")


def test_the_deadline_counts_from_the_first_start(tmp_path: Path) -> None:
    assert started(tmp_path, 5.0) == 5.0
    assert started(tmp_path, 9.0) == 5.0


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"tokens": -1}, "tokens: "),
        ({"work": {"forward": float("nan")}}, "work.forward: "),
        ({"work": {"tokens": -3}}, "work.tokens: "),
    ],
)
def test_facts_that_cannot_be_are_refused(record: dict[str, Any], words: str, upload: Upload) -> None:
    fields = json.loads(Manifest.of(upload, "o").content)
    with pytest.raises(ValueError, match=f"its manifest is not one: {words}"):
        Manifest.read(json.dumps(fields | {"record": fields["record"] | record}).encode())


def test_a_record_may_leave_out_what_has_a_default(upload: Upload) -> None:
    fields = json.loads(Manifest.of(upload, "o").content)
    del fields["record"]["sends"]
    assert Manifest.read(json.dumps(fields).encode()).files[0].name.startswith("model/")
