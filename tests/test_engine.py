import errno
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import deepfusion.engine
import steps
from deepfusion.artifacts import MANIFEST
from deepfusion.config import Runtime
from deepfusion.engine import Engine, StepError
from deepfusion.errors import InputError
from deepfusion.store import Store
from steps import Note

HERE = Runtime(workers=0)
LIGHT = "from deepfusion import worker; worker.PRELOADED = ('torch', 'transformers'); worker.main()"


class Seen:
    """A watcher with a memory."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def started(self, name: str, folder: Path) -> None:
        assert folder.name.endswith(".partial")
        self.events.append(f"started {name}")

    def finished(self, name: str, seconds: float, cached: bool) -> None:
        assert seconds >= 0
        self.events.append(f"{'found' if cached else 'finished'} {name}")

    def failed(self, name: str, reason: str) -> None:
        self.events.append(f"failed {name}: {reason}")

    def message(self, text: str) -> None:
        self.events.append(text)


def note(engine: Engine, text: str, function: str = "note", item: str | None = "a", **options: Any) -> Future[Note]:
    return engine.submit("notes", f"steps:{function}", 1, Note, item, text=text, **options)


def left(root: Path) -> list[str]:
    """Step folders, finished or not."""
    return sorted(path.name.split("-")[0] + path.suffix for path in root.glob("*/*"))


# ── in this process ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_step_runs_once_whatever_the_runtime(tmp_path: Path) -> None:
    seen = Seen()
    with Engine(Store(tmp_path), HERE, seen) as engine:
        first = note(engine, "hello").result()
    with Engine(Store(tmp_path), Runtime(workers=0, threads=2, checkpoint_seconds=1), seen) as engine:
        second = note(engine, "hello").result()
        third = note(engine, "hello", unkeyed={}, priority=3).result()
    assert first == second == third
    assert (first.folder / "note.txt").read_text() == "hello"
    assert seen.events == ["started notes a", "finished notes a", "found notes a", "found notes a"]
    assert [done.cached for done in engine.done] == [True, True]
    assert engine.done[0].facts.peak_bytes > 0


def test_every_step_has_a_peak_of_its_own(tmp_path: Path) -> None:
    """Also in one process, and also when it is found again."""
    with Engine(Store(tmp_path), HERE) as engine:
        for item, size in (("large", "96"), ("small", "8")):
            note(engine, size, "trained", item=item).result()
        note(engine, "none", item="none").result()
    large, small, none = (done.facts for done in engine.done)
    assert large.training is not None
    assert small.training is not None
    assert none.training is None
    assert large.training.peak_bytes - large.training.before_bytes > 90 * 2**20
    assert small.training.peak_bytes - small.training.before_bytes < 40 * 2**20
    assert large.peak_bytes >= large.training.peak_bytes > small.peak_bytes + 40 * 2**20
    with Engine(Store(tmp_path), HERE) as engine:
        note(engine, "96", "trained", item="large").result()
        note(engine, "none", item="none").result()
    assert [done.facts.training for done in engine.done] == [large.training, None]


def test_futures_are_arguments(tmp_path: Path) -> None:
    with Engine(Store(tmp_path), HERE) as engine:
        words = [note(engine, word, item=word) for word in ("one", "two", "three")]
        both = engine.submit("join", "steps:joined", 1, Note, notes=words[:2], by={"x": words[2]})
        again = engine.submit("join", "steps:joined", 1, Note, notes=[both, words[0].result()], by={})
        assert again.result().text == "one two three one"
    assert [done.step.name for done in engine.done] == ["notes one", "notes two", "notes three", "join", "join"]


def test_a_mistake_leaves_nothing_and_holds_back_what_depends_on_it(tmp_path: Path) -> None:
    seen = Seen()
    with Engine(Store(tmp_path / "steps"), HERE, seen) as engine:
        wrong = note(engine, "x", "mistaken")
        after = engine.submit("join", "steps:joined", 1, Note, notes=[wrong], by={})
        last = engine.submit("join", "steps:joined", 1, Note, notes=[after], by={})
        for future in (wrong, after, last):
            with pytest.raises(InputError, match=r"^notes a: x is wrong$"):
                future.result()
        assert note(engine, "fine", item="b").result().text == "fine"  # others go on
    assert left(tmp_path / "steps") == ["b"]


def test_a_failure_is_told_once(tmp_path: Path) -> None:
    """By the watcher, if the run goes on without the step; else by who runs it, and that is not the watcher."""
    seen = Seen()
    with Engine(Store(tmp_path), HERE, seen) as engine:
        for item, function, expendable in (
            ("a", "mistaken", False),
            ("b", "mistaken", True),
            ("c", "full", True),
            ("d", "confused", False),
            ("e", "confused", True),
            ("f", "tried", True),
        ):
            assert note(engine, item, function, item=item, expendable=expendable).exception() is not None
    assert [event for event in seen.events if event.startswith("failed")] == [
        "failed notes e: notes e: cannot reshape e; the run goes on without it",
        "failed notes f: notes f: RuntimeError: not yet; the run goes on without it",
    ]


@pytest.mark.parametrize("function", ["full", "full_in_other_words"])
def test_a_full_disk_leaves_nothing(function: str, tmp_path: Path) -> None:
    words = r"notes a: .*No space"
    with Engine(Store(tmp_path / "steps"), HERE) as engine, pytest.raises(OSError, match=words) as raised:
        note(engine, "weights", function).result()
    assert raised.value.errno == errno.ENOSPC
    assert left(tmp_path / "steps") == []


def test_a_disk_that_is_full_at_the_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest is the last thing written."""
    write = Path.write_text

    def refuse(path: Path, *arguments: Any, **options: Any) -> int:
        if path.name.startswith(MANIFEST):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, *arguments, **options)

    with Engine(Store(tmp_path / "steps"), HERE) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_text", refuse)
            with pytest.raises(OSError, match="No space left") as raised:
                note(engine, "hello").result()
        assert raised.value.errno == errno.ENOSPC
        assert left(tmp_path / "steps") == []
        assert note(engine, "hello").result().text == "hello"


def test_torch_has_no_words_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash on a disk without room is taken for a full disk."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: os.statvfs_result((0,) * 10) and type("", (), {"free": 0}))
    with Engine(Store(tmp_path), HERE) as engine, pytest.raises(OSError, match="not yet") as raised:
        note(engine, "x", "tried").result()
    assert raised.value.errno == errno.ENOSPC


def test_a_crash_is_gone_on_from(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for _ in range(2):
        with Engine(store, HERE) as engine, pytest.raises(StepError, match=r"^notes a: RuntimeError: not yet$"):
            note(engine, "x", "tried").result()
        assert left(tmp_path) == ["a.partial"]
    with Engine(store, HERE) as engine:
        assert note(engine, "x", "tried").result().text == "x"
    assert left(tmp_path) == ["a"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Shells have what they start in the background ignore Ctrl-C, the tests included."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_reaches_a_step_and_leaves_it_to_go_on_from(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Engine(Store(tmp_path), HERE) as engine:
        note(engine, "x", "interrupted")
    assert time.monotonic() - began < 30  # and not the minute that the step takes
    assert left(tmp_path) == ["a.partial"]
    with Engine(Store(tmp_path), HERE) as engine:
        assert note(engine, "x", "interrupted").result().text == "x"


# ── in worker processes ───────────────────────────────────────────────────────────────────────────────────────────────


def lightly(patched: pytest.MonkeyPatch) -> None:
    """Workers that know our steps and import no more than every step needs."""
    known = os.environ.get("PYTHONPATH")
    patched.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(Path(steps.__file__).parent), known))))
    patched.setattr(deepfusion.engine, "WORKER", LIGHT)


@pytest.fixture(scope="module")
def hired(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine with one worker, which imports torch once for all tests."""
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patched:
        lightly(patched)
        with Engine(Store(root / "steps"), Runtime(workers=1)) as engine:
            yield engine


def test_a_worker_runs_steps(hired: Engine) -> None:
    words = [note(hired, word, "noisy", item=word) for word in ("one", "two")]
    both = hired.submit("join", "steps:joined", 1, Note, notes=words, by={}).result()
    assert both.text == "one two"
    assert (hired.store.root.parent / "logs" / "notes-one.log").read_text() == "from python\nfrom below\n"
    facts = hired.done[-1].facts
    assert 0 < facts.seconds < 60
    assert facts.peak_bytes > 2**20


def test_a_worker_tells_of_a_training(hired: Engine) -> None:
    note(hired, "64", "trained", item="trained").result()
    facts = hired.done[-1].facts
    assert facts.training is not None
    assert facts.peak_bytes >= facts.training.peak_bytes > facts.training.before_bytes + 60 * 2**20


def test_priorities_decide_what_runs_next(hired: Engine) -> None:
    before = len(hired.done)
    note(hired, "1", "ended", item="first")  # busy while the others queue up
    while not list(hired.store.root.glob("notes/first-*/begun")):
        threading.Event().wait(0.01)
    waiting = [note(hired, f"{p}", item=f"p{p}", priority=p) for p in (5, -10, 0, 10)]
    waiting += [note(hired, "later", item="later", priority=-10)]
    for future in waiting:
        future.result()
    assert [done.step.item for done in hired.done[before:]] == ["first", "p-10", "later", "p0", "p5", "p10"]


def test_a_log_is_a_plain_file_and_never_empty(hired: Engine) -> None:
    note(hired, "loud", "noisy", item="loud").result()
    note(hired, "quiet", item="quiet").result()
    logs = hired.store.root.parent / "logs"
    assert (logs / "notes-loud.log").stat().st_mode & 0o777 == 0o644 & ~umask()
    assert not (logs / "notes-quiet.log").exists()
    assert [path.name for path in logs.iterdir() if not path.stat().st_size] == []


def umask() -> int:
    """What this process takes from the modes of files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_worker_tells_mistakes_full_disks_and_crashes_apart(hired: Engine) -> None:
    with pytest.raises(InputError, match=r"^notes wrong: x is wrong$"):
        note(hired, "x", "mistaken", item="wrong").result()
    with pytest.raises(ValueError, match=r"^notes confused: cannot reshape x$") as confused:
        note(hired, "x", "confused", item="confused").result()
    assert not isinstance(confused.value, InputError)
    for function in ("full", "full_in_other_words"):
        with pytest.raises(OSError, match=f"notes {function}: .*No space left") as raised:
            note(hired, "weights", function, item=function).result()
        assert raised.value.errno == errno.ENOSPC
    assert not [name for name in left(hired.store.root) if name.startswith(("wrong", "full"))]
    words = r"^notes crash: RuntimeError: not yet; see .*/logs/notes-crash\.log$"
    with pytest.raises(StepError, match=words) as broken:
        note(hired, "x", "tried", item="crash").result()
    assert isinstance(broken.value, StepError)
    assert broken.value.reason == "notes crash: RuntimeError: not yet"
    assert "RuntimeError: not yet" in (hired.store.root.parent / "logs" / "notes-crash.log").read_text()
    assert "crash.partial" in left(hired.store.root)


def test_a_killed_step_says_so_and_its_worker_lives(hired: Engine) -> None:
    hint = r"\(out of memory\? `deepfusion doctor` says what a run needs\)"
    words = f"^notes big: its process ended with SIGKILL {hint}$"  # it wrote nothing to see
    with pytest.raises(StepError, match=words):
        note(hired, "x", "killed", item="big").result()
    assert "big.partial" in left(hired.store.root)
    assert note(hired, "after", item="after").result().text == "after"


def test_finished_files_of_a_killed_step_are_not_written_again(hired: Engine) -> None:
    with pytest.raises(StepError, match="SIGKILL"):
        note(hired, "abcde", "cut_short", item="cut").result()
    [partial] = hired.store.root.glob("*/cut-*.partial")
    before = {path: path.stat() for path in partial.glob("*.safetensors")}
    assert len(before) == 2
    with Engine(hired.store, hired.runtime) as engine:
        done = note(engine, "abcde", "cut_short", item="cut").result()
    assert done.text == "abccde"
    assert [(done.folder / path.name).stat().st_mtime_ns for path in before] == [s.st_mtime_ns for s in before.values()]


def test_a_killed_worker_is_replaced(hired: Engine) -> None:
    with pytest.raises(StepError, match=r"^notes bigger: the worker process ended$"):
        note(hired, "x", "killed_with_its_worker", item="bigger").result()
    assert note(hired, "again", item="again").result().text == "again"


def test_leaving_by_an_error_ends_what_runs_and_drops_what_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lightly(monkeypatch)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(KeyboardInterrupt), Engine(Store(tmp_path / "steps"), Runtime(workers=1)) as engine:  # noqa: PT012
        long = note(engine, "600", "ended", item="long")
        queued = note(engine, "hello", item="queued")
        behind = engine.submit("join", "steps:joined", 1, Note, notes=[queued], by={})
        while not list(tmp_path.rglob("begun")):
            threading.Event().wait(0.01)
        raise KeyboardInterrupt
    assert isinstance(long.exception(), StepError)
    assert left(tmp_path / "steps") == ["long.partial"]
    assert not any(future.done() and not future.cancelled() for future in (queued, behind))
    assert caplog.records == []


class Hung:
    """A watcher whose terminal has gone away."""

    started = failed = message = lambda *_: None

    def finished(self, *_: object, **__: object) -> None:
        raise SystemExit(1)


@pytest.mark.parametrize("workers", [0, 1])
def test_nobody_waits_for_ever_when_the_terminal_is_gone(workers: int, tmp_path: Path) -> None:
    """rich leaves the program when nobody reads what it prints, and may do so in any thread."""
    with (
        pytest.raises(SystemExit),
        Engine(Store(tmp_path), Runtime(workers=workers), Hung()) as engine,  # pyright: ignore[reportArgumentType]
    ):
        note(engine, "one").result(timeout=60)
