"""Runs steps as soon as what they depend on is there: those in the store at once, the rest in worker processes."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, cast

from deepfusion import memory, precision
from deepfusion.artifacts import Artifact
from deepfusion.config import Runtime
from deepfusion.errors import InputError, concerns_all
from deepfusion.store import Facts, Step, Store
from deepfusion.worker import call, described, settle

A = TypeVar("A", bound=Artifact)

WORKER = "from deepfusion import worker; worker.main()"


class Watcher(Protocol):
    """Who wants to see steps come and go; called from the engine's threads."""

    def started(self, name: str, folder: Path) -> None:
        """A step begins in `folder`, whose `.progress.json` tells how far it is."""
        ...

    def finished(self, name: str, seconds: float, cached: bool) -> None:
        """A step is in the store."""
        ...

    def failed(self, name: str, reason: str) -> None:
        """A step could not be done, and the run goes on without it; what stops a run is told by who runs it."""
        ...

    def message(self, text: str) -> None:
        """Something worth knowing."""
        ...


class Silent:
    """A watcher that looks away."""

    def started(self, name: str, folder: Path) -> None:
        """Ignore."""

    def finished(self, name: str, seconds: float, cached: bool) -> None:
        """Ignore."""

    def failed(self, name: str, reason: str) -> None:
        """Ignore."""

    def message(self, text: str) -> None:
        """Ignore."""


class StepError(RuntimeError):
    """A step broke in a way that is not the user's mistake; `reason` says how, without the place of its log."""

    def __init__(self, reason: str, log: Path | None = None) -> None:
        super().__init__(reason if log is None else f"{reason}; see {log}")
        self.reason = reason


@dataclass(frozen=True)
class Task:
    """A step that waits to be run."""

    step: Step[Any]
    future: Future[Any]
    expendable: bool


@dataclass(frozen=True)
class Done:
    """A finished step, for the report."""

    step: Step[Any]
    artifact: Artifact
    facts: Facts
    cached: bool


class Engine:
    """Hands steps to workers in order of priority; futures of steps may be arguments of other steps.

    Without workers a step is run here and now, as it is submitted, so that Ctrl-C reaches it. Use as a context manager:
    leaving it by an exception ends every running step and leaves its folder to go on from.
    """

    def __init__(self, store: Store, runtime: Runtime, watch: Watcher | None = None) -> None:
        self.store, self.runtime, self.watch = store, runtime, watch or Silent()
        self.done: list[Done] = []
        self._ready: queue.PriorityQueue[tuple[int, int, Task | None]] = queue.PriorityQueue()
        self._count = itertools.count()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._workers: list[subprocess.Popen[bytes]] = []
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        with self._lock:
            self._closed = True
        if kind is not None:
            for worker in self._workers:
                worker.kill()  # a child notices within a fifth of a second that its worker is gone
        for _ in self._threads:
            self._ready.put((-(10**9), next(self._count), None))
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            with suppress(BrokenPipeError), worker:  # closes its pipes, at which it ends, and waits for that
                pass

    def submit(
        self, phase: str, function: str, version: int, gives: type[A], item: str | None = None, /, *,
        priority: int = 0, expendable: bool = False, also_keyed_by: Any = None,
        unkeyed: dict[str, Any] | None = None, **arguments: Any,
    ) -> Future[A]:  # fmt: skip
        """Plan one step; it runs when every future among its arguments has its artifact. Lower priority runs first.

        An expendable step is one that the run can do without: of its failure, if it is its own, the watcher is told.
        Any other failure is for who asks the future.
        """
        future: Future[A] = Future()
        waits_for = list({id(f): f for f in futures(arguments)}.values())
        left = itertools.count(len(waits_for) - 1, -1)

        def settle_one(_: object = None) -> None:
            if waits_for and next(left) > 0:
                return
            broken = next((f for f in waits_for if f.cancelled() or f.exception() is not None), None)
            if broken is not None:
                self.held_back(phase, item)
                future.cancel() if broken.cancelled() else future.set_exception(broken.exception())
                return
            try:
                step = Step(phase, item, function, version, gives, resolved(arguments), also_keyed_by, unkeyed or {})
                self.admit(Task(step, future, expendable), priority)
            except Exception as error:
                future.set_exception(error)

        if not waits_for:
            settle_one()
        for awaited in waits_for:
            awaited.add_done_callback(settle_one)
        return future

    def held_back(self, phase: str, item: str | None) -> None:
        """A step cannot run, for one that it depends on has not."""

    def admit(self, task: Task, priority: int) -> None:
        """A step can run, for all that it depends on is there: take it from the store, or hand it to a worker."""
        step = task.step
        artifact = self.store.find(step)
        if artifact is not None:
            manifest = self.store.manifest(step) or {}
            training = manifest.get("training") and memory.Training(**manifest["training"])
            facts = Facts(
                manifest["seconds"],
                manifest["cpu_seconds"],
                manifest["peak_bytes"],
                training,
                manifest.get("precision"),
            )
            self.done.append(Done(step, artifact, facts, cached=True))
            self.watch.finished(step.name, 0.0, cached=True)
            task.future.set_result(artifact)
            return
        if not self.runtime.workers:
            self._run(task, None)
            return
        self._ready.put((priority, next(self._count), task))
        with self._lock:
            if len(self._threads) < self.runtime.workers and not self._closed:
                thread = threading.Thread(target=self._serve, daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self) -> None:
        worker: subprocess.Popen[bytes] | None = None
        while (task := self._ready.get()[2]) is not None:
            if self._closed:
                task.future.cancel()
                continue
            try:
                if worker is None or worker.poll() is not None:
                    worker = self._hire()
            except Exception as error:
                task.future.set_exception(error)
            else:
                self._run(task, worker)

    def _run(self, task: Task, worker: subprocess.Popen[bytes] | None) -> None:
        try:
            artifact = self._build(task.step, worker)
        except BaseException as error:  # also what a console raises whose reader is gone: somebody waits for an answer
            task.future.set_exception(error)
            if not isinstance(error, Exception):
                if worker is None:
                    raise
            elif task.expendable and not self._closed and not concerns_all(error):
                self.watch.failed(task.step.name, f"{error}; the run goes on without it")
        else:
            task.future.set_result(artifact)

    def _hire(self) -> subprocess.Popen[bytes]:
        with self._lock:  # so that leaving the engine misses no worker
            if self._closed:
                raise StepError("the run is over")
            worker = _start_worker()
            self._workers.append(worker)
        return worker

    def _build(self, step: Step[A], worker: subprocess.Popen[bytes] | None) -> A:
        into = self.store.begin(step)
        self.watch.started(step.name, into)
        try:
            facts = self._run_here(step, into) if worker is None else self._run_in(worker, step, into)
            if training := memory.noted(into):  # the system's own high-water mark may be some pages behind
                facts = replace(facts, training=training, peak_bytes=max(facts.peak_bytes, training.peak_bytes))
            facts = replace(facts, precision=precision.noted(into))
            artifact = self.store.finish(step, facts)
        except (ValueError, OSError):
            self.store.discard(step)
            raise
        self.done.append(Done(step, artifact, facts, cached=False))
        self.watch.finished(step.name, facts.seconds, cached=False)
        return artifact

    def _run_here(self, step: Step[Any], into: Path) -> Facts:
        wall, cpu = time.monotonic(), time.process_time()
        memory.forget()
        try:
            settle(self.runtime)
            call(step.function, step.arguments | step.unkeyed, into, self.runtime)
        except Exception as error:
            raise _told(step, described(error, into)) from error
        return Facts(time.monotonic() - wall, time.process_time() - cpu, memory.peak())

    def _run_in(self, worker: subprocess.Popen[bytes], step: Step[Any], into: Path) -> Facts:
        log = self.store.root.parent / "logs" / f"{step.phase}-{step.item or step.phase}.log"
        try:
            facts = self._answered(worker, step, into, log)
        finally:
            if log.is_file() and not log.stat().st_size:
                log.unlink()
        if facts is None:
            raise StepError(f"{step.name}: the worker process ended", _written(log))
        if facts["status"] == 0:
            return Facts(facts["seconds"], facts["cpu_seconds"], facts["peak_bytes"])
        if facts["error"] is None:
            killed = signal.Signals(-facts["status"]).name if facts["status"] < 0 else f"exit {facts['status']}"
            hint = " (out of memory? `deepfusion doctor` says what a run needs)" if killed == "SIGKILL" else ""
            raise StepError(f"{step.name}: its process ended with {killed}{hint}", _written(log))
        raise _told(step, facts["error"], _written(log))

    def _answered(
        self, worker: subprocess.Popen[bytes], step: Step[Any], into: Path, log: Path
    ) -> dict[str, Any] | None:
        """What a worker says of a step that it was given; None when it ended itself."""
        arguments = step.arguments | step.unkeyed
        task = pickle.dumps(
            {"function": step.function, "arguments": arguments, "into": into, "runtime": self.runtime, "log": log}
        )
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(struct.pack("<I", len(task)) + task)
            worker.stdin.flush()
        except BrokenPipeError:
            raise StepError(f"{step.name}: the worker process is gone") from None
        answer = worker.stdout.readline()
        if not answer:
            worker.wait()
            return None
        return cast("dict[str, Any]", json.loads(answer))


def _told(step: Step[Any], error: dict[str, Any], log: Path | None = None) -> Exception:
    """What a step's error is to the outside, the same wherever the step ran."""
    message = f"{step.name}: {error['message']}"
    if error["kind"] == "input":
        return InputError(message)
    if error["kind"] == "value":
        return ValueError(message)
    if error["kind"] == "system":
        return OSError(error["errno"], message)
    return StepError(message, log)


def _written(log: Path) -> Path | None:
    """A log, if there is anything in it."""
    return log if log.is_file() else None


def _start_worker() -> subprocess.Popen[bytes]:
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def futures(value: Any) -> list[Future[Any]]:
    """Every future in a tree of mappings and lists."""
    if isinstance(value, Future):
        return [cast("Future[Any]", value)]
    if isinstance(value, dict):
        return [f for v in value.values() for f in futures(v)]
    if isinstance(value, list | tuple):
        return [f for v in value for f in futures(v)]
    return []


def resolved(value: Any) -> Any:
    """The same tree with the results of its futures, once they are there."""
    if isinstance(value, Future):
        return cast("Future[Any]", value).result()
    if isinstance(value, dict):
        return {k: resolved(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [resolved(v) for v in value]
    return value
