"""Content-addressed step folders: a step is found again by what it depends on, and exists only once it is whole.

`<root>/<phase>/<item>-<key>/` holds a finished artifact and its `manifest.json`; the same name with `.partial` holds
one under way. The manifest is written last and the folder then renamed, so a crash at any moment leaves either
nothing, something to go on from, or the finished step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from deepfusion.artifacts import MANIFEST, RECORD, Artifact, folder_digest
from deepfusion.files import write_whole
from deepfusion.memory import Training

A = TypeVar("A", bound=Artifact)


@dataclass(frozen=True)
class Facts:
    """What a step cost on this machine, this time."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    training: Training | None = None  # memory of a device's training
    precision: str | None = None  # what it computed in that was to be in bfloat16


@dataclass(frozen=True)
class Step(Generic[A]):
    """One unit of work, fully determined: its arguments are values or finished artifacts."""

    phase: str
    item: str | None
    function: str  # "module:name"
    version: int
    gives: type[A]
    arguments: dict[str, Any]
    also_keyed_by: Any = None  # what decides the result but is not passed on, such as the digest of a file
    unkeyed: dict[str, Any] = field(default_factory=dict[str, Any])  # passed on, but decides nothing by its own words:
    # timings, or a path, for which the digest of what lies there stands in `also_keyed_by`

    @property
    def name(self) -> str:
        """The step as people read it."""
        return self.phase if self.item is None else f"{self.phase} {self.item}"

    @property
    def key(self) -> str:
        """SHA-256 over everything the result depends on."""
        facts = [self.phase, self.function, self.version, canonical(self.arguments), canonical(self.also_keyed_by)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def canonical(value: Any) -> Any:
    """A JSON tree that is equal exactly when two arguments lead to the same result: artifacts count by their digest."""
    if isinstance(value, Artifact):
        return {"artifact": value.digest}
    if isinstance(value, BaseModel):
        return {"section": type(value).__name__, "fields": value.model_dump(mode="json")}
    if isinstance(value, dict):
        return {str(k): canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{type(value).__name__} cannot be part of a step's key")


class Store:
    """The folder that finished steps live in."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, step: Step[A]) -> Path:
        """Where the finished step lies, or will."""
        return self.root / step.phase / f"{step.item or step.phase}-{step.key[:12]}"

    def partial(self, step: Step[A]) -> Path:
        """Where the step is built."""
        folder = self.folder(step)
        return folder.with_name(folder.name + ".partial")

    def find(self, step: Step[A]) -> A | None:
        """The finished artifact, or None; a folder whose files have changed size or gone is taken for unfinished."""
        manifest = self.manifest(step)
        folder = self.folder(step)
        if manifest is None:
            return None
        for name, size in manifest["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                return None
        return step.gives(folder=folder, digest=manifest["digest"], **manifest["record"])

    def manifest(self, step: Step[A]) -> dict[str, Any] | None:
        """What was written down about the finished step."""
        try:
            manifest = json.loads((self.folder(step) / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return manifest if manifest.get("key") == step.key else None

    def begin(self, step: Step[A]) -> Path:
        """The folder to build in: empty, or what an interrupted attempt left."""
        shutil.rmtree(self.folder(step), ignore_errors=True)  # only ever there if `find` refused it
        partial = self.partial(step)
        partial.mkdir(parents=True, exist_ok=True)
        return partial

    def finish(self, step: Step[A], facts: Facts) -> A:
        """Seal a built step: drop scratch files, write the manifest, rename."""
        partial, folder = self.partial(step), self.folder(step)
        # An attempt that ended between the manifest and the renaming has left one, and files it was still writing.
        for scratch in sorted([*partial.glob(".*"), *partial.rglob("*.tmp"), *partial.glob(MANIFEST)]):
            shutil.rmtree(scratch) if scratch.is_dir() else scratch.unlink()
        record = json.loads((partial / RECORD).read_text(encoding="utf-8"))
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors writes files that nobody else may read
        files = {p.relative_to(partial).as_posix(): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
        artifact = step.gives(folder=folder, digest=folder_digest(partial, record), **record)
        manifest = {
            "phase": step.phase,
            "item": step.item,
            "key": step.key,
            "function": step.function,
            "version": step.version,
            "depends_on": canonical(step.arguments),
            "and_on": canonical(step.also_keyed_by),
            "digest": artifact.digest,
            "record": record,
            "files": files,
            "seconds": round(facts.seconds, 3),
            "cpu_seconds": round(facts.cpu_seconds, 3),
            "peak_bytes": facts.peak_bytes,
            "training": facts.training and asdict(facts.training),
            "precision": facts.precision,
        }
        write_whole(partial / MANIFEST, json.dumps(manifest, indent=1))
        partial.rename(folder)
        return artifact

    def discard(self, step: Step[A]) -> None:
        """Remove what a failed attempt left."""
        shutil.rmtree(self.partial(step), ignore_errors=True)


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder's visible files, by hard link where the disk allows it; not what makes it a step."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        relative = path.relative_to(source)
        if not relative.name.startswith(".") and relative.as_posix() not in (RECORD, MANIFEST):
            link(path, target / relative)


def link(path: Path, copy: Path) -> None:
    """Copy a file, in place of what was there; by hard link where the disk allows it."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.unlink(missing_ok=True)
    try:
        os.link(path.resolve(), copy)  # the file itself: a relative link would lead nowhere from here
    except OSError:
        shutil.copy2(path, copy)
