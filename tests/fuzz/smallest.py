"""Keep of what the fuzzers found few, short inputs that take every step of ours from line to line: `… upload`.

Reads tests/fuzz/corpus/<target> and runs/fuzz/<target>, and rewrites the former.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import intake  # noqa: E402

SOURCE = str(Path(intake.inspect.__code__.co_filename).parents[1])


def steps_of(target: Callable[[bytes], None], data: bytes) -> set[tuple[Any, Any]]:
    """The steps that an input takes from one line of the package to the next, within functions and between them."""
    found: set[tuple[Any, Any]] = set()
    before = None

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal before
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        if event == "line":
            here = (frame.f_code.co_filename, frame.f_lineno)
            found.add((before, here))
            before = here
        return trace

    sys.settrace(trace)
    try:
        target(data)
    finally:
        sys.settrace(None)
    return found


def main() -> None:
    name = sys.argv[1]
    intake.world()
    corpus = HERE / "corpus" / name
    files = [path for folder in (corpus, Path("runs/fuzz") / name) for path in folder.glob("*") if path.is_file()]
    inputs = sorted({path.read_bytes() for path in files}, key=lambda data: (len(data), data))
    intake.TARGETS[name](inputs[0])  # what is imported or made but once belongs to no input
    left = {data: steps_of(intake.TARGETS[name], data) for data in inputs}
    kept, seen = list[bytes](), set[tuple[Any, Any]]()
    while (best := max(inputs, key=lambda data: len(left[data] - seen))) and left[best] - seen:
        kept.append(best)
        seen |= left[best]
    shutil.rmtree(corpus, ignore_errors=True)
    corpus.mkdir(parents=True)
    for data in kept:
        (corpus / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
    print(f"{name}: {len(kept)} of {len(inputs)} inputs take all of {len(seen)} steps")


if __name__ == "__main__":
    main()
