"""What the logs of apps say of steps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from deepfusion.federation.lines import Lines
from deepfusion.progress import Ticker


def test_a_step_that_takes_long_is_told_of_ever_less_often_until_it_ends(tmp_path: Path) -> None:
    said: list[str] = []
    ticker = Ticker(tmp_path, 200)
    ticker.advance(50)
    with Lines(said.append, first=0.05) as lines:
        lines.started("device north", tmp_path)
        time.sleep(1.0)
        told = len(said)
        assert 2 <= told <= 4  # after .05, .15, .35, .75 seconds, on a busy machine later
        lines.finished("device north", 1.0, cached=False)
        time.sleep(0.2)
    assert said[-1] == "done device north 1.0 s"
    assert len(said) == told + 1
    assert all(line.startswith("device north: ") for line in said[:told])


def test_what_is_said_of_a_step_is_how_far_it_is_and_how_long_it_still_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("deepfusion.progress.time.time", lambda: 1000.0)
    ticker = Ticker(tmp_path, 200)
    monkeypatch.setattr("deepfusion.progress.time.monotonic", lambda: 9e9)
    ticker.advance(50)
    monkeypatch.setattr("deepfusion.federation.lines.time.time", lambda: 1030.0)
    with Lines(said.append, first=60) as lines:
        lines.started("joint", tmp_path)
        lines._tell("joint", tmp_path, 60)
    assert said == ["joint: 25%, about 1 min 30 s left"]


def test_what_ends_otherwise_is_told_of_no_more(tmp_path: Path) -> None:
    said: list[str] = []
    Ticker(tmp_path, 200)
    with Lines(said.append, first=0.05) as lines:
        lines.started("device north", tmp_path)
        lines.failed("device north", "it has no text")
        lines.started("device south", tmp_path)
        lines.started("done before", tmp_path / "none")
        lines.finished("done before", 0.0, cached=True)
    time.sleep(0.3)
    assert said == ["failed device north: it has no text"]
