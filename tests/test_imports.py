"""Imports go one way, and nothing heavy is imported before it is needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "deepfusion"

# From the bottom up: a module imports from its own layer and those below. A package's name covers its modules.
LAYERS = (
    ("errors", "files", "artifacts", "config", "progress", "memory", "data.documents"),
    (
        "losses",
        "alignment",
        "metrics",
        "labels",
        "findings",
        "outcome",
        "store",
        "signals",
        "inputs",
        "roles",
        "precision",
    ),
    (
        "layouts",
        "families",
        "weights",
        "merging",
        "checkpoints",
        "adapters",
        "quantisation",
        "codecs",
        "descendants",
        "routing",
        "scoring",
        "encoders",
    ),
    ("objectives", "data", "training", "students", "ancestors", "writing", "figures", "page", "rendering", "judging"),
    ("phases", "conclusion"),
    ("baselines",),
    ("engine", "worker", "preload", "steps"),
    ("planner", "outlook", "learning", "elsewhere"),
    ("references",),
    ("pipeline", "inference"),
    ("display", "summary"),
    ("federation",),
    ("cli", "comparison", "reference", "doctor", "fleet", "import_gguf", "__init__"),
)
LIGHT = ("deepfusion", "deepfusion.cli", "deepfusion.config", "deepfusion.artifacts", "deepfusion.store")
HEAVY = {"torch", "transformers", "datasets", "sklearn", "matplotlib", "accelerate"}


def modules() -> list[str]:
    """Every module, by its name below `deepfusion`."""
    names = (path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", ".") for path in SOURCE.rglob("*.py"))
    return sorted(name.removesuffix(".__init__") for name in names)


def layer(module: str) -> int | None:
    """The number of a module's layer; the longest matching name decides."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for number, names in enumerate(LAYERS):
            if name in names:
                return number
    return None


def file_of(module: str) -> Path:
    """The file of a module."""
    path = SOURCE / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(module: str) -> Iterator[str]:
    """Our own modules that a module imports anywhere: at the top, in functions, or for types alone."""
    known = set(modules())
    for node in ast.walk(ast.parse(file_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.removeprefix("deepfusion.") for name in node.names if "deepfusion." in name.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively: write deepfusion.… out"
            if node.module == "deepfusion":
                yield from (name.name for name in node.names if name.name in known)
            elif (node.module or "").startswith("deepfusion."):
                base = (node.module or "").removeprefix("deepfusion.")
                for name in node.names:
                    below = f"{base}.{name.name}"
                    yield below if below in known else base


def test_every_module_has_a_layer() -> None:
    lost = [module for module in modules() if layer(module) is None]
    assert not lost, f"say in tests/test_imports.py which layer {lost} belong to"


@pytest.mark.parametrize("module", modules())
def test_nothing_is_imported_from_above(module: str) -> None:
    here = layer(module)
    assert here is not None
    upward = [name for name in imported(module) if (there := layer(name)) is None or there > here]
    assert not upward, f"{module} imports {upward} from above"


def loaded_by(statement: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print(*sorted(name for name in sys.modules if '.' not in name))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return HEAVY & set(result.stdout.split())


def test_light_modules_stay_light() -> None:
    # A run whose steps are all done must say so within a second or two; torch and transformers take longer to import.
    assert loaded_by(f"import {', '.join(LIGHT)}, deepfusion.pipeline") == set()


def test_the_check_above_can_fail() -> None:
    assert loaded_by("import deepfusion.losses") == {"torch"}
