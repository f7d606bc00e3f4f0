"""Runs everything that a comparison asks for, seed by seed or several seeds at a time, and writes down what came of it.

A seed has a folder, in which all its variants share one store of steps: what they have in common is done once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from deepfusion import pipeline
from deepfusion.comparison.grid import Variant
from deepfusion.comparison.study import Entry, Failure, Study
from deepfusion.config import Recipe, Runtime
from deepfusion.display import Display
from deepfusion.engine import StepError, Watcher
from deepfusion.errors import InputError
from deepfusion.summary import read_results

CHILD = "from deepfusion.comparison import collect; collect.main()"


@dataclass(frozen=True)
class Plan:
    """What is to run."""

    recipe: str  # a file, or the name of an embedded one
    settings: Sequence[str]  # key=value, of all runs
    variants: Sequence[Variant]
    seeds: Sequence[int]

    def of(self, variant: Variant, seed: int) -> Recipe:
        """The recipe of one run.

        Raises:
            InputError: it is none.
        """
        return Recipe.load(self.recipe, [*self.settings, *variant.settings, f"seed={seed}"])

    def check(self) -> str:
        """The name of the recipe, if every run's can be read."""
        names = [self.of(variant, seed).name for variant in self.variants for seed in self.seeds]
        return names[0]


def folder(out: Path, variant: Variant, seed: int) -> Path:
    """Where a run's report and MoE lie."""
    return out / f"seed-{seed}" / variant.folder


def collect(plan: Plan, out: Path, runtime: Runtime, watch: Watcher, jobs: int = 1) -> Study:
    """Run what has not run yet, and gather all of it.

    A run that fails is left out and told; others go on.

    Args:
        plan: what to run.
        out: where; each seed in a folder of its own.
        runtime: of each run.
        watch: told of every step.
        jobs: seeds at a time, each in a process of its own if there are several.

    Raises:
        InputError: a run's recipe is none, or not one run came to an end; with the first one's reason.
    """
    name = plan.check()
    seeds: dict[int, list[Failure]] = {}
    if jobs == 1 or len(plan.seeds) == 1:
        for seed in plan.seeds:
            told = _seed(plan, seed, out, runtime, watch)
            seeds[seed] = [Failure(variant.name, seed, reason) for variant, reason in told if reason is not None]
    else:
        # In this order: leaving by an exception ends the children first, for whom the threads wait.
        with ThreadPoolExecutor(jobs) as pool, _Children(plan, out, runtime, watch) as children:
            seeds = dict(zip(plan.seeds, pool.map(children.run, plan.seeds), strict=True))
    failed = [failure for seed in plan.seeds for failure in seeds[seed]]
    lost = {(failure.variant, failure.seed) for failure in failed}
    entries = [
        Entry(variant.name, seed, read_results(folder(out, variant, seed)))
        for variant in plan.variants
        for seed in plan.seeds
        if (variant.name, seed) not in lost
    ]
    if not entries:
        raise InputError(f"no run came to an end; the first: {failed[0].reason}")
    return Study(name, [variant.name for variant in plan.variants], list(plan.seeds), entries, failed)


def _seed(plan: Plan, seed: int, out: Path, runtime: Runtime, watch: Watcher) -> Iterator[tuple[Variant, str | None]]:
    """Run a seed's variants, one after the other; each with why it failed, if it did."""
    for variant in plan.variants:
        label = f"seed {seed}" + (f", {variant.name}" if variant.name else "")
        watch.message(f"run     {label}")
        into = folder(out, variant, seed)
        reason: str | None = None
        try:
            pipeline.run(plan.of(variant, seed), into, runtime, watch, steps=into.parent / "steps")
        except (ValueError, StepError, OSError) as error:
            reason = str(error)
            watch.failed(label, reason)
        yield variant, reason


class _Children:
    """Processes that run one seed each; leaving it by an exception stops them."""

    def __init__(self, plan: Plan, out: Path, runtime: Runtime, watch: Watcher) -> None:
        self._plan, self._out, self._runtime, self._watch = plan, out, runtime, watch
        self._running: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()
        self._over = False

    def __enter__(self) -> _Children:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        with self._lock:
            self._over = True
            for child in self._running:
                assert child.stdin is not None
                child.stdin.close()  # at which it stops

    def run(self, seed: int) -> list[Failure]:
        """Run a seed in a process of its own, and pass on what it tells."""
        with self._lock:
            if self._over:
                return []
            child = subprocess.Popen(
                [sys.executable, "-c", CHILD], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )  # fmt: skip
            self._running.append(child)
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        last = ""
        with child:
            child.stdin.write(json.dumps(_task(self._plan, seed, self._out, self._runtime)) + "\n")
            child.stdin.flush()
            for line in child.stderr:
                last = line.rstrip()
                self._watch.message(f"seed {seed} | {last}")
            told = dict(json.loads(line) for line in child.stdout if line.endswith("\n"))
        lost = last or "its process ended"  # of those that it did not come to, or was killed in
        reasons = {variant.name: told.get(variant.name, lost) for variant in self._plan.variants}
        return [Failure(name, seed, reason) for name, reason in reasons.items() if reason is not None]


def _task(plan: Plan, seed: int, out: Path, runtime: Runtime) -> dict[str, Any]:
    return {"plan": asdict(plan), "seed": seed, "out": str(out), "runtime": runtime.model_dump(mode="json")}


def main() -> None:
    """A child: takes a task as a line of JSON, writes one for each variant that has ended, stops when stdin ends."""
    task = cast("dict[str, Any]", json.loads(sys.stdin.readline()))
    threading.Thread(target=_stop_at_the_end, daemon=True).start()
    plan = task["plan"]
    variants = [Variant(one["name"], tuple(one["settings"])) for one in plan["variants"]]
    plan = Plan(plan["recipe"], plan["settings"], variants, plan["seeds"])
    try:
        with Display() as display:
            runtime = Runtime.model_validate(task["runtime"])
            for variant, reason in _seed(plan, task["seed"], Path(task["out"]), runtime, display):
                print(json.dumps([variant.name, reason]), flush=True)
    except KeyboardInterrupt:
        sys.exit(130)


def _stop_at_the_end() -> None:
    import _thread

    sys.stdin.read()  # whoever began this is gone, or wants no more of it
    _thread.interrupt_main()
