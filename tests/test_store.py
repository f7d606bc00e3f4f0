import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepfusion.artifacts import MANIFEST, RECORD, Artifact
from deepfusion.config import ProxyPhase, TunePhase
from deepfusion.store import Facts, Step, Store, link_tree
from steps import Note, note, step

FACTS = Facts(1.23456, 0.5, 1000)


def built(store: Store, text: str = "hello", **changes: Any) -> Step[Note]:
    """A finished step."""
    made = step(text, **changes)
    note(text, into=store.begin(made))
    store.finish(made, FACTS)
    return made


# ── keys ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def keyed(**changes: Any) -> str:
    arguments = changes.pop("arguments", {"config": ProxyPhase(), "seed": 1})
    fields = {"phase": "proxy", "item": "0", "function": "steps:note", "version": 1, "gives": Note} | changes
    return Step(arguments=arguments, **fields).key


@pytest.mark.parametrize(
    "changes",
    [
        {"phase": "other"},
        {"function": "steps:joined"},
        {"version": 2},
        {"also_keyed_by": {"file": "digest"}},
        {"arguments": {"config": ProxyPhase(), "seed": 2}},
        {"arguments": {"config": ProxyPhase(weights="tokens"), "seed": 1}},
        {"arguments": {"config": ProxyPhase(), "seed": 1, "more": None}},
        {"arguments": {"config": TunePhase(), "seed": 1}},
    ],
    ids=str,
)
def test_what_decides_the_result_changes_the_key(changes: dict[str, Any]) -> None:
    assert keyed(**changes) != keyed()


def test_what_decides_nothing_does_not_change_the_key() -> None:
    assert keyed(item="1") == keyed(unkeyed={"phases": [1]}) == keyed(arguments={"seed": 1, "config": ProxyPhase()})


def test_artifacts_count_by_content_and_not_by_place() -> None:
    here = [Artifact(folder=Path("here"), digest="d"), Artifact(folder=Path("there"), digest="d")]
    assert keyed(arguments={"models": here}) == keyed(arguments={"models": here[::-1]})
    other = [here[0], Artifact(folder=Path("here"), digest="e")]
    assert keyed(arguments={"models": here}) != keyed(arguments={"models": other})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(VALUES, VALUES)
def test_equal_keys_mean_equal_arguments(one: Any, other: Any) -> None:
    as_json = [json.dumps(value, sort_keys=True) for value in (one, other)]
    assert (keyed(arguments={"x": one}) == keyed(arguments={"x": other})) == (as_json[0] == as_json[1])


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(TypeError, match="PosixPath cannot be part of a step's key"):
        keyed(arguments={"path": Path("x")})


# ── folders ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_finished_step_is_found_with_what_it_said(tmp_path: Path) -> None:
    store = Store(tmp_path / "steps")
    assert store.find(step("hello")) is None
    made = built(store)
    found = store.find(made)
    assert found is not None
    assert (found.text, found.folder) == ("hello", store.folder(made))
    assert found.digest == Note.load(found.folder).digest
    assert found.folder.name == f"a-{made.key[:12]}"
    assert not store.partial(made).exists()
    manifest = json.loads((found.folder / MANIFEST).read_text())
    assert manifest["files"] == {"note.txt": 5, RECORD: (found.folder / RECORD).stat().st_size}
    assert (manifest["key"], manifest["digest"], manifest["seconds"]) == (made.key, found.digest, 1.235)
    assert store.find(step("other")) is None
    assert store.find(step("hello", version=2)) is None


def test_scratch_is_no_result(tmp_path: Path) -> None:
    digests: set[str] = set()
    for name in ("clean", "littered"):
        store, made = Store(tmp_path / name), step("hello")
        into = store.begin(made)
        if name == "littered":
            (into / ".trainer").mkdir()
            (into / ".trainer" / "weights").touch()
            (into / ".progress.json").touch()
            (into / "model").mkdir()
            for half in ("half.tmp", "model/half.tmp", "manifest.json.tmp"):
                (into / half).touch()
        digests.add(store.finish(made, FACTS).digest if note("hello", into=into) else "")
        assert sorted(p.name for p in store.folder(made).rglob("*") if p.is_file()) == [MANIFEST, "note.txt", RECORD]
    assert len(digests) == 1


def test_an_end_between_manifest_and_renaming_is_gone_on_from(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = built(store)
    store.folder(made).rename(store.partial(made))
    assert store.find(made) is None
    note("hello", into=store.begin(made))
    store.finish(made, Facts(100.0, 0.5, 1000))  # a longer manifest than the one that was left
    assert store.find(made) is not None


@pytest.mark.parametrize("harm", ["longer", "shorter", "gone", "no manifest", "half a manifest", "another key"])
def test_a_harmed_step_is_built_anew(harm: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = built(store)
    file, manifest = store.folder(made) / "note.txt", store.folder(made) / MANIFEST
    if harm == "gone":
        file.unlink()
    elif harm == "no manifest":
        manifest.unlink()
    elif harm == "half a manifest":
        manifest.write_text(manifest.read_text()[:50])
    elif harm == "another key":
        manifest.write_text(manifest.read_text().replace(made.key, "0" * 64))
    else:
        file.write_text("hello!" if harm == "longer" else "hell")
    assert store.find(made) is None
    assert list(store.begin(made).iterdir()) == []
    note("hello", into=store.partial(made))
    store.finish(made, FACTS)
    assert store.find(made) is not None


def test_an_interrupted_attempt_is_kept_and_a_failed_one_is_not(tmp_path: Path) -> None:
    store, made = Store(tmp_path), step("hello")
    (store.begin(made) / "half").touch()
    assert [p.name for p in store.begin(made).iterdir()] == ["half"]
    store.discard(made)
    assert not store.partial(made).exists()


# ── links ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_link_tree_takes_files_and_not_what_makes_them_a_step(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "model").mkdir(parents=True)
    for name in ("a.txt", "model/b.txt", "model/record.json", RECORD, MANIFEST, ".hidden"):
        (source / name).write_text(name)
    for _ in range(2):  # again over what is there
        link_tree(source, target)
        found = sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file())
        assert found == ["a.txt", "model/b.txt", "model/record.json"]
        assert (target / "a.txt").samefile(source / "a.txt")


def test_link_tree_takes_what_links_lead_to(tmp_path: Path) -> None:
    """Downloaded checkpoints are folders of relative links into a folder of blobs."""
    blobs, snapshot, target = tmp_path / "blobs", tmp_path / "snapshots" / "abc", tmp_path / "deep" / "store"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    (blobs / "1234").write_text("weights")
    (snapshot / "model.safetensors").symlink_to(Path("..") / ".." / "blobs" / "1234")
    link_tree(snapshot, target)
    copy = target / "model.safetensors"
    assert (copy.read_text(), copy.is_symlink()) == ("weights", False)


def test_link_tree_copies_where_links_are_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("cross-device link")

    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.txt").write_text("a")
    monkeypatch.setattr(os, "link", refuse)
    link_tree(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target" / "a.txt").read_text() == "a"
    assert not (tmp_path / "target" / "a.txt").samefile(tmp_path / "source" / "a.txt")
