"""What runs look like while they run."""

import io
import json
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from deepfusion.display import POLL_SECONDS, Display, amount, duration, read_progress, size
from deepfusion.progress import PROGRESS, Ticker


def write(folder: Path, **facts: object) -> None:
    (folder / PROGRESS).write_text(json.dumps({"unit": "tokens", "done_at_start": 0, **facts}))


def test_rate_and_time_left_count_from_this_attempt(tmp_path: Path) -> None:
    # 60 of 100 done, 20 of them by an attempt before; 40 in 8 seconds are 5 a second, so 40 more take 8.
    write(tmp_path, done=60, total=100, started_at=1000, done_at_start=20)
    reading = read_progress(tmp_path, now=1008)
    assert reading is not None
    assert (reading.done, reading.rate, reading.remaining) == (60, 5, 8)


def test_no_rate_before_anything_happened(tmp_path: Path) -> None:
    write(tmp_path, done=20, total=100, started_at=1000, done_at_start=20)
    reading = read_progress(tmp_path, now=1008)
    assert reading is not None
    assert (reading.rate, reading.remaining) == (None, None)


def test_more_done_than_foreseen_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, done=110, total=100, started_at=1000)
    reading = read_progress(tmp_path, now=1010)
    assert reading is not None
    assert reading.remaining == 0


def test_a_step_that_has_not_written_yet(tmp_path: Path) -> None:
    assert read_progress(tmp_path, now=0) is None
    (tmp_path / PROGRESS).write_text('{"done": 1')  # a reader may meet half a file
    assert read_progress(tmp_path, now=0) is None


def test_reads_what_a_ticker_writes(tmp_path: Path) -> None:
    Ticker(tmp_path, total=8, unit="documents", done=2)
    reading = read_progress(tmp_path, now=2e9)
    assert reading is not None
    assert (reading.done, reading.total, reading.unit) == (2, 8, "documents")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7260, "2 h 01 min"),
        (172_799, "47 h 59 min"),
        (604_000, "6 d 23 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (950, "950"), (999.7, "1 k"), (1234, "1.23 k"), (45.6e6, "45.6 M"), (2e21, "2e+03 E")]
)
def test_amount(value: float, text: str) -> None:
    assert amount(value) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (950, "950 B"), (1234, "1.23 kB"), (7.5e9, "7.5 GB")])
def test_size(count: float, text: str) -> None:
    assert size(count) == text


def shown(*, terminal: bool, quiet: bool = False, folder: Path) -> str:
    """Everything that a display prints for one run of three steps."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, color_system=None)
    with Display(quiet=quiet, console=console) as display:
        display.finished("data", 0.0, cached=True)
        display.started("device d0", folder)
        display.finished("device d0", 12.34, cached=False)
        display.message("cluster 1 has strangers [d0, d1]")
        display.started("device d1", folder)
        display.failed("device d1", "device d1: no text")
    return stream.getvalue()


def test_one_line_an_event_where_there_is_no_terminal(tmp_path: Path) -> None:
    assert shown(terminal=False, folder=tmp_path).splitlines() == [
        "start   device d0",
        "done    device d0  12 s",
        "cluster 1 has strangers [d0, d1]",
        "start   device d1",
        "failed  device d1: no text",
        "1 step was already done",
    ]


def test_bars_on_a_terminal(tmp_path: Path) -> None:
    write(tmp_path, done=1, total=4, started_at=1)
    text = shown(terminal=True, folder=tmp_path)
    assert "done    device d0  12 s" in text
    assert "start   " not in text


@pytest.mark.parametrize(("total", "told"), [(1, "0 of 1 document"), (3, "0 of 3 documents")])
def test_one_is_one(tmp_path: Path, total: int, told: str) -> None:
    write(tmp_path, done=0, total=total, unit="documents", started_at=1)
    stream = io.StringIO()
    with Display(console=Console(file=stream, force_terminal=True, width=100, color_system=None)) as display:
        display.started("write", tmp_path)
        time.sleep(2.5 * POLL_SECONDS)
    assert re.search(rf"{told}\b", stream.getvalue())


def test_quiet_is_quiet(tmp_path: Path) -> None:
    assert shown(terminal=True, quiet=True, folder=tmp_path) == ""
