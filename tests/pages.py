"""Examples of the documentation: files by the title of their block, and the commands of blocks of `sh`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.M | re.S)


def files(page: str) -> dict[str, str]:
    """Name → content of what a page asks to be saved."""
    return {title: content for _, title, content in BLOCK.findall((DOCS / page).read_text(encoding="utf-8")) if title}


def commands(page: str) -> list[list[str]]:
    """The commands of a page, in order, without their comments."""
    blocks = BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))
    lines = [line for language, _, content in blocks if language == "sh" for line in content.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def save(page: str, folder: Path, *names: str) -> None:
    """Save a page's files, or those that are named."""
    found = files(page)
    for name in names or found:
        (folder / name).write_text(found[name], encoding="utf-8")


def call(command: list[str], folder: Path) -> str:
    """Run a command as a reader would; gives what it printed."""
    first, *rest = command
    modules = {"deepfusion": ["-m", "deepfusion.cli"], "python": []}
    done = subprocess.run(
        [sys.executable, *modules[first], *rest],
        cwd=folder, env=os.environ | {"COLUMNS": "80"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
