"""What the doctor finds: one line each, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    part: Literal["text", "models", "lineages", "tokenizers", "training", "machine"]
    subject: str  # what was looked at, by its key in the recipe where it has one
    state: State  # a problem stops the run; a warning makes its result worse than it could be
    fact: str  # what was found
    advice: str = ""  # what to do; empty where there is nothing to do


@dataclass(frozen=True)
class Cost:
    """What the steps of one phase will take, all of them together but for `seconds_each` and `peak_bytes`."""

    phase: str
    steps: int
    tokens: float  # that pass through models
    flops: float  # two a token-parameter: a forward pass of one token counts its active parameters, a backward twice
    seconds_each: float | None  # of the longest step; none: not measured
    seconds: float | None
    peak_bytes: float  # memory of the largest step's process
    disk_bytes: float  # what the steps leave


@dataclass(frozen=True)
class Machine:
    """What there is to run on."""

    cores: int
    accelerator: str  # that was asked for
    accelerators: tuple[str, ...]  # that are there, beside the processor
    memory_bytes: int  # free for the run, of the accelerator's where one was asked for
    disk_bytes: int  # free where the run's folder would lie


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found."""

    recipe: str
    checks: tuple[Check, ...]
    costs: tuple[Cost, ...]  # empty where the text or a model cannot be read
    machine: Machine
    seconds: float | None  # that the run will take; none: not measured

    @property
    def state(self) -> State:
        """The worst of all checks."""
        states = {check.state for check in self.checks}
        return "problem" if "problem" in states else "warning" if "warning" in states else "ok"

    def count(self, state: State) -> int:
        """How many checks came out so."""
        return sum(check.state == state for check in self.checks)
