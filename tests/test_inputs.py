"""What stands for files in the key of a step: their names and contents, and not where they lie."""

import json
from pathlib import Path
from typing import Any

import pytest

from deepfusion import pipeline
from deepfusion.config import Recipe
from deepfusion.errors import InputError
from deepfusion.inputs import by_content
from deepfusion.store import Step, Store

EMPTY = "e3b0c44298fc1c14"  # of SHA-256 over nothing


def laid_out(folder: Path, **contents: str) -> Recipe:
    """A recipe of two files of one name, a dataset, a model and an encoder, all below a folder."""
    texts = {"one/rows.jsonl": "1", "two/rows.jsonl": "2", "table.csv": "", "model/config.json": "{}", "mini/a": "a"}
    for name, content in (texts | {key.replace("__", "/"): value for key, value in contents.items()}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    files = [{"path": str(folder / name)} for name in ("one/rows.jsonl", "two/rows.jsonl")]
    table = {"dataset": "csv", "arguments": {"data_files": {"a": [str(folder / "table.csv"), "https://x/*.csv"]}}}
    return Recipe.parse(
        {
            "name": "laid_out",
            "data": {"source": {"kind": "files", "sources": [*files, table]}},
            "models": {"base": {"path": str(folder / "model")}, "ancestors": {"a": {"make": {"type": "gpt2"}}}},
            "device": {"encoder": str(folder / "mini")},
        }
    )


def test_paths_become_names_and_digests(tmp_path: Path) -> None:
    found = by_content(laid_out(tmp_path)).model_dump(mode="json")
    assert str(tmp_path) not in json.dumps(found)
    one, two, table = found["data"]["source"]["sources"]
    assert one["path"].startswith("rows.jsonl@sha256:")
    assert one["path"] != two["path"]  # of one name, but not of one content
    assert table["arguments"]["data_files"] == {"a": [f"table.csv@sha256:{EMPTY}", "https://x/*.csv"]}
    assert found["models"]["base"]["path"].startswith("model@sha256:")
    assert found["device"]["encoder"].startswith("mini@sha256:")


def test_a_recipe_without_paths_stays_as_it_is() -> None:
    recipe = Recipe.load("demo")
    assert by_content(recipe) == recipe


def test_copies_are_the_same_wherever_they_lie(tmp_path: Path) -> None:
    assert by_content(laid_out(tmp_path / "here")) == by_content(laid_out(tmp_path / "there"))


@pytest.mark.parametrize("name", ["one__rows.jsonl", "table.csv", "model__config.json", "mini__a"])
def test_a_changed_file_is_another(name: str, tmp_path: Path) -> None:
    assert by_content(laid_out(tmp_path, **{name: "other"})) != by_content(laid_out(tmp_path))


def test_files_that_change_places_are_others(tmp_path: Path) -> None:
    """Of two files with one name, which is first decides what a row is called and kept for."""
    changed = laid_out(tmp_path / "changed", **{"one__rows.jsonl": "2", "two__rows.jsonl": "1"})
    assert by_content(changed) != by_content(laid_out(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("one/rows.jsonl", "data.source.sources.0.path: {} does not exist: set it, as with --set {key}=FILE"),
        ("model/config.json", "models.base.path: {} does not exist: set it, as with --set {key}=FOLDER"),
        ("mini/a", "device.encoder: {} does not exist: set it, as with --set {key}=FOLDER"),
    ],
)
def test_what_is_missing_is_named_with_its_key(gone: str, message: str, tmp_path: Path) -> None:
    recipe = laid_out(tmp_path)
    (tmp_path / gone).unlink()
    folder = not message.startswith("data")
    if folder:
        (tmp_path / gone).parent.rmdir()
    with pytest.raises(InputError) as raised:
        by_content(recipe)
    place = (tmp_path / gone).parent if folder else tmp_path / gone
    assert str(raised.value) == message.format(place, key=message.split(":")[0])


def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path: Path) -> None:
    recipe = laid_out(tmp_path)
    with pytest.raises(InputError, match=r"models\.base\.path: .*rows\.jsonl is not a folder"):
        by_content(recipe.model_copy(update={"models": moved(recipe, str(tmp_path / "one" / "rows.jsonl"))}))
    (tmp_path / "one" / "rows.jsonl").unlink()
    (tmp_path / "one" / "rows.jsonl").mkdir()
    with pytest.raises(InputError, match=r"sources\.0\.path: .*rows\.jsonl is a folder, not a file"):
        by_content(recipe)


def moved(recipe: Recipe, base: str) -> Any:
    return recipe.models.model_copy(update={"base": recipe.models.base.model_copy(update={"path": base})})


def test_steps_of_copies_have_the_same_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the text and of given models, which read files; all others read what those made of them."""

    def keys(recipe: Recipe) -> dict[str, str]:
        seen: dict[str, str] = {}

        def find(_: Store, step: Step[Any]) -> None:
            seen[step.name] = step.key

        with monkeypatch.context() as patched:
            patched.setattr(Store, "find", find)
            pipeline.plan(recipe, tmp_path / "run")
        return seen

    here, there = (keys(laid_out(tmp_path / name)) for name in ("here", "there"))
    assert here == there
    assert set(here) == {"data", "take base"}
    changed = keys(laid_out(tmp_path / "changed", **{"one__rows.jsonl": "other"}))
    assert {name for name in here if here[name] != changed[name]} == {"data"}
