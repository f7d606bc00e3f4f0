"""What holds for the repository as a whole: nothing of one machine in it, and documents that say what the code says."""

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deepfusion
from deepfusion import reference
from deepfusion.config import Recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "src" / "deepfusion" / "recipes").glob("*.yaml"))
MACHINE = re.compile(r"(?<![\w./~-])/(?:home|root|work|Users|opt|mnt|srv|workspace|data)/[\w.-]+")
REGISTRY = re.compile(r"index-url|find-links|pythonhosted|artifactory|pypi\.org/simple|download\.pytorch\.org", re.I)


def tracked() -> list[Path]:
    """Text files that are, or would be, part of the repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of tracked files")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    paths = [ROOT / name for name in names if name and ROOT / name != Path(__file__)]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


@pytest.mark.parametrize("pattern", [MACHINE, REGISTRY], ids=["paths", "registries"])
def test_no_file_names_a_machine(pattern: re.Pattern[str]) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        for number, line in enumerate(
            path.read_text(encoding="utf-8", errors="replace").splitlines(), 1
        )  # a corpus is bytes
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_there_are_recipes() -> None:
    assert {"demo", "smoke"} <= {path.stem for path in RECIPES}
    assert (ROOT / "recipes").resolve() == (ROOT / "src" / "deepfusion" / "recipes").resolve()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path: Path) -> None:
    assert Recipe.load(path).name == path.stem


def test_the_recipe_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page == reference.render(), "write it anew: python -m deepfusion.reference > docs/recipes.md"


def test_every_recipe_key_has_a_sentence() -> None:
    assert [line for line in reference.render().splitlines() if line.endswith("|  |")] == []


def test_the_api_page_lists_the_public_api() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^### `(\w+)", page, flags=re.M) + re.findall(r"^\| `deepfusion\.(\w+)` \|", page, flags=re.M)
    assert sorted(listed) == sorted(deepfusion.__all__)


@pytest.mark.parametrize("page", ["api.md", "paper.md"])
def test_every_name_in_the_documents_can_be_imported(page: str) -> None:
    """Dotted names in code spans that begin with one of our modules or public names, and imports in examples."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    ours = {path.stem for path in (ROOT / "src" / "deepfusion").iterdir()} | set(deepfusion.__all__)
    spans = re.findall(r"`((?:[A-Za-z_]\w*\.)+[A-Za-z_]\w*)\b(?!/)", text)
    names = [name.removeprefix("deepfusion.") for name in spans]
    names = [name for name in names if name.split(".")[0] in ours]
    for module, imported in re.findall(r"^from deepfusion(\S*) import (.+)$", text, flags=re.M):
        names += [f"{module}.{name}".lstrip(".") for name in imported.split(", ")]
    assert len(names) > 15
    assert [name for name in names if not importable(name)] == []


def importable(name: str) -> bool:
    """Whether `deepfusion.<name>` is a module, or what a chain of attributes of one leads to."""
    try:
        pkgutil.resolve_name(f"deepfusion.{name}")
    except (ImportError, AttributeError):
        return False
    return True


def test_the_check_above_can_fail() -> None:
    assert importable("phases.cluster.cluster")
    assert not importable("phases.cluster.clusters")
    assert not importable("phases.clusters")


def test_what_the_paper_page_calls_a_test_is_one() -> None:
    """In the table `equation → function → test`."""
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and line.count(" | ") == 4]
    tests = [name for row in rows[1:] for name in re.findall(r"`([\w./]+)`", row[3])]
    assert len(tests) > 15
    assert [name for name in tests if not (ROOT / "tests" / name).is_file()] == []


@pytest.mark.slow
def test_the_phases_by_hand_run(tmp_path: Path) -> None:
    """The example of the API page, as it stands there."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "api.md").read_text(), flags=re.M | re.S)
    [example] = [block for block in blocks if "by_hand" in block]
    (tmp_path / "recipes").symlink_to(RECIPES[0].parent)
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True)
    assert (tmp_path / "runs" / "by_hand" / "moe" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "by_hand" / "scores" / "rows.jsonl").stat().st_size > 0


@pytest.mark.parametrize("name", ["LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "README.md", "constraints.txt"])
def test_what_every_project_has(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8").strip()


def test_every_module_has_its_place_in_the_readme() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("src/deepfusion/\n")[2]
    source = ROOT / "src" / "deepfusion"
    rooms = [*source.glob("*.py"), *source.glob("phases/*.py"), *source.glob("baselines/*.py")]
    rooms += [folder for folder in source.iterdir() if (folder / "__init__.py").exists()]
    lost = [room.stem for room in rooms if room.stem != "__init__" and not re.search(rf"\b{room.stem}\b", tree)]
    assert lost == []


def test_pins_are_exact() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
