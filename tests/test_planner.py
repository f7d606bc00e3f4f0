from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from deepfusion.config import Runtime
from deepfusion.engine import Engine, StepError
from deepfusion.planner import NotYetRunError, Planner
from deepfusion.store import Store
from steps import Note

HERE = Runtime(workers=0)


def note(engine: Engine, text: str, function: str = "note", *, item: str) -> Future[Note]:
    arguments: dict[str, Any] = {"text": text}
    return engine.submit("notes", f"steps:{function}", 1, Note, item, **arguments)


def test_a_planner_runs_nothing_and_says_why(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with Engine(store, HERE) as engine:
        note(engine, "done", item="done").result()
        with pytest.raises(StepError):
            note(engine, "x", "tried", item="half").result()
    planner = Planner(store, HERE)
    done, half, fresh = (
        note(planner, "done", item="done"),
        note(planner, "x", "tried", item="half"),
        note(planner, "y", item="fresh"),
    )
    after = planner.submit("join", "steps:joined", 1, Note, notes=[done, fresh], by={})
    assert done.result().text == "done"
    for future in (half, fresh, after):
        assert isinstance(future.exception(), NotYetRunError)
    assert [(s.phase, s.item, s.state) for s in planner.steps] == [
        ("notes", "done", "done"),
        ("notes", "half", "run"),
        ("notes", "fresh", "run"),
        ("join", None, "wait"),
    ]
    assert [s.reason for s in planner.steps[1:3]] == ["goes on from where it was interrupted", "not in the store"]
    assert sorted(path.name.split("-")[0] + path.suffix for path in tmp_path.glob("*/*")) == ["done", "half.partial"]
