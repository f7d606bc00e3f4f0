"""What holds for the repository as a whole: nothing of one machine in it, and documents that say what the code says."""

import re
import subprocess
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
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
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
    listed = re.findall(r"^### `(\w+)", page, flags=re.M)
    assert sorted(listed) == sorted(deepfusion.__all__)


def test_what_the_paper_page_names_exists() -> None:
    """Every function and test of the table `equation → function → test` is there."""
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and line.count(" | ") == 4]
    functions = [name for row in rows[1:] for name in re.findall(r"`([\w.]+)`", row[2])]
    tests = [name for row in rows[1:] for name in re.findall(r"`([\w./]+)`", row[3])]
    assert len(functions) > 15
    missing = [name for name in functions if not defined(name)]
    assert not missing, f"docs/paper.md names {missing}"
    assert [name for name in tests if not (ROOT / "tests" / name).is_file()] == []


def defined(name: str) -> bool:
    """Whether `package.module.function` has a definition of that function."""
    module, _, function = name.rpartition(".")
    path = ROOT / "src" / "deepfusion" / f"{module.replace('.', '/')}.py"
    return path.is_file() and bool(re.search(rf"^(def|class) {function}\b", path.read_text(encoding="utf-8"), re.M))


@pytest.mark.parametrize("name", ["LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "README.md", "constraints.txt"])
def test_what_every_project_has(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8").strip()


def test_pins_are_exact() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
