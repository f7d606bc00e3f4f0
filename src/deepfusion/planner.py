"""What a run would do, found out by submitting its steps to an engine that runs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepfusion.config import Runtime
from deepfusion.engine import Engine, Task
from deepfusion.store import Store


class NotYetRunError(Exception):
    """What a planner says of a step that is not in the store."""


@dataclass(frozen=True)
class PlannedStep:
    """One line of a plan."""

    phase: str
    item: str | None
    state: Literal["done", "run", "wait"]
    reason: str
    count: int = 1  # of steps that it stands for, where they cannot be told one by one yet; or at least as many


class Planner(Engine):
    """An engine that runs nothing: it notes what is done, what would run, and what waits for that."""

    def __init__(self, store: Store, runtime: Runtime) -> None:
        super().__init__(store, runtime)
        self.steps: list[PlannedStep] = []

    def held_back(self, phase: str, item: str | None) -> None:
        """Note that a step waits."""
        self.steps.append(PlannedStep(phase, item, "wait", "depends on steps that have not run"))

    def admit(self, task: Task, priority: int) -> None:
        """Note that a step is done, or would run."""
        step = task.step
        artifact = self.store.find(step)
        if artifact is not None:
            self.steps.append(PlannedStep(step.phase, step.item, "done", f"in the store as {step.key[:12]}"))
            task.future.set_result(artifact)
            return
        under_way = self.store.partial(step).is_dir()
        reason = "goes on from where it was interrupted" if under_way else "not in the store"
        self.steps.append(PlannedStep(step.phase, step.item, "run", reason))
        task.future.set_exception(NotYetRunError(step.name))
