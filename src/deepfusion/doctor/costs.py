"""What phases take, and the run as a whole, once it is known what their steps have to do and how fast that goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deepfusion.config import Recipe, Runtime
from deepfusion.doctor.diagnosis import Cost
from deepfusion.doctor.memory import peak
from deepfusion.doctor.timing import IMPORTING, Rates
from deepfusion.doctor.work import Task


def phases(recipe: Recipe, tasks: Sequence[Task], rates: Rates | None) -> Iterator[Cost]:
    """The cost of each phase, in order; without rates nothing is said of time."""
    for phase, own in _by_phase(tasks).items():
        each = [rates.seconds(task) for task in own] if rates else []
        yield Cost(
            phase=phase,
            steps=sum(task.steps for task in own),
            tokens=sum(task.tokens * task.steps for task in own),
            flops=sum(task.flops * task.steps for task in own),
            seconds_each=max(each) if rates else None,
            seconds=sum(s * task.steps for s, task in zip(each, own, strict=True)) if rates else None,
            peak_bytes=max(peak(task, recipe) for task in own),
            disk_bytes=sum(task.disk * task.steps for task in own),
        )


def duration(tasks: Sequence[Task], rates: Rates, runtime: Runtime) -> float:
    """Seconds from start to report: no less than all work shared among workers, nor than the method's own phases one
    after another, each with its steps side by side.
    """
    workers = max(1, runtime.workers)
    total = sum(rates.seconds(task) * task.steps for task in tasks)
    chain = 0.0
    for own in _by_phase([task for task in tasks if task.own]).values():
        each = [rates.seconds(task) for task in own]
        chain += max(sum(s * task.steps for s, task in zip(each, own, strict=True)) / workers, *each)
    return (IMPORTING if runtime.workers else 0) + max(total / workers, chain)


def _by_phase(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.phase, []).append(task)
    return groups
