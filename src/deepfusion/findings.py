"""What a run found out, gathered for its report, and the few numbers that follow from it."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal, Self

from deepfusion.artifacts import Clusters, Corpus, Intake, Judgements, Proxy, Scores, TransferSet, Upload, Wire, Work
from deepfusion.data.documents import Judged, ScoredQuestion, read_jsonl
from deepfusion.labels import METRICS
from deepfusion.metrics import ResultRow, Subset, gap_closed, graded, summarise

RESULT, BASE, CEILING = "deepfusion", "base", "centralized"
# The training that ends with each stage of a run.
TRAINED: dict[str, tuple[str, ...]] = {
    "joint_student": ("joint",),
    "branch": ("joint", "branch"),
    "branch_ensemble": ("joint", "branch"),
    "merged": ("joint", "branch", "router"),
    RESULT: ("joint", "branch", "router", "tune"),
}
BEFORE_TRAINING = ("write", "consult", "shift", "mix")


def versions() -> dict[str, str]:
    """Of Python and of the packages that can change a result."""
    packages = {"deepfusion": "deepfusion-moe"} | {
        name: name for name in ("torch", "transformers", "tokenizers", "numpy")
    }
    return {"python": platform.python_version()} | {name: version(package) for name, package in packages.items()}


@dataclass(frozen=True)
class Measured:
    """One model's, or ensemble's, answers to the test questions."""

    system: str
    rows: Sequence[ScoredQuestion]
    item: str | None = None  # which of several: a device's id, a cluster
    routing: dict[str, Any] | None = None

    @classmethod
    def of(cls, scores: Scores) -> Self:
        """What an evaluation step left."""
        rows = list(read_jsonl(scores.folder / "rows.jsonl", ScoredQuestion))
        return cls(scores.system, rows, scores.item, scores.routing)


@dataclass(frozen=True)
class Graded:
    """What a judge thinks of one model's answers."""

    system: str
    rows: Sequence[Judged]

    @classmethod
    def of(cls, judgements: Judgements) -> Self:
        """What a judging step left."""
        return cls(judgements.system, list(read_jsonl(judgements.folder / "judged.jsonl", Judged)))


@dataclass(frozen=True)
class Compute:
    """One part of a system's server compute."""

    system: str
    part: str  # "write", "consult", "shift", "mix", "joint", "branch", "router", "tune", or a reference's "train"
    work: Work
    critical: float | None = None  # token-parameters on the longest path with a worker per copy; none: all of them


@dataclass(frozen=True)
class Step:
    """One step of the run, as the engine saw it."""

    name: str
    item: str | None
    seconds: float
    cpu_seconds: float
    cached: bool
    tokens: int | None = None
    flops: float | None = None
    peak_bytes: int | None = None
    side: Literal["device", "server", "reference"] = "server"  # whose memory and time it was
    training: Mapping[str, int] | None = None  # memory of a device's training


@dataclass(frozen=True)
class Device:
    """One accepted device: how it trained its model, what it sent, and what that took."""

    device: str
    ancestor: str  # the recipe's name
    model_type: str
    method: str
    sends: str
    parameters: int
    trained_parameters: int
    tokens: int  # of private text
    bytes: int  # sent
    before_bytes: int | None  # resident before its model was opened: libraries, text
    training_peak_bytes: int | None  # most that was resident until its training ended
    codec: str | None = None  # how it was packed, if it was
    error: float | None = None  # what the server's copy of the model misses, relative to its weights
    lost: float | None = None  # the same relative to what training changed in them


@dataclass(frozen=True)
class Traffic:
    """What a baseline puts on the wire, all devices and rounds together."""

    rounds: int
    down: int  # bytes
    up: int


@dataclass(frozen=True)
class Findings:
    """Everything that the report tells; what a run did not have stays empty and takes its section with it."""

    run: str
    seed: int
    recipe: Mapping[str, Any]  # as plain YAML values
    recipe_digest: str
    measured: Sequence[Measured]
    graded: Sequence[Graded] = ()
    corpus: Corpus | None = None
    uploads: Sequence[Upload] = ()
    intake: Intake | None = None
    clusters: Clusters | None = None
    proxies: Sequence[Proxy] = ()
    transfer: TransferSet | None = None
    compute: Sequence[Compute] = ()
    steps: Sequence[Step] = ()
    bytes_down: Mapping[str, int] = field(default_factory=dict)  # device → bytes it was sent
    wire: Mapping[str, Wire] = field(default_factory=dict)  # device elsewhere → bytes of the messages with it
    baselines: Mapping[str, Traffic] = field(default_factory=dict)  # by name, of those with rounds of their own
    losses: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)  # name → (step, loss); "device …"
    warnings: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=versions)

    def rows(self) -> list[ResultRow]:
        """Every number of every system."""
        measured = [summarise(found.rows, found.system, self.seed, found.item) for found in self.measured]
        return [row for part in (*measured, *self._grades()) for row in part]

    def _grades(self) -> list[list[ResultRow]]:
        return [graded(found.rows, found.system, self.seed) for found in self.graded]

    def bytes_up(self) -> dict[str, int]:
        """Device → bytes it sent (Eq. 5 of arXiv 2602.14301): as counted at the door, or by the devices themselves."""
        return self.intake.bytes if self.intake else {upload.device: upload.bytes for upload in self.uploads}

    def all_wire(self) -> Wire:
        """Bytes of all messages, with all devices."""
        return Wire(up=sum(one.up for one in self.wire.values()), down=sum(one.down for one in self.wire.values()))

    def devices(self) -> list[Device]:
        """Every accepted device, in order."""
        took = {step.item: step.training or {} for step in self.steps if step.side == "device"}
        sent = self.bytes_up()
        return [
            Device(
                device=upload.device,
                ancestor=upload.ancestor,
                model_type=upload.model_type,
                method=upload.method,
                sends=upload.sends,
                parameters=upload.parameters,
                trained_parameters=upload.trained_parameters,
                tokens=upload.tokens,
                bytes=sent.get(upload.device, upload.bytes),
                before_bytes=took.get(upload.device, {}).get("before_bytes"),
                training_peak_bytes=took.get(upload.device, {}).get("peak_bytes"),
                **(upload.packing.model_dump() if upload.packing else {}),
            )
            for upload in self.uploads
        ]

    def all_warnings(self) -> list[str]:
        """The run's own, those of its clusters and proxies, and what could not be measured, once each."""
        of_clusters = self.clusters.warnings if self.clusters else ()
        of_proxies = [warning for proxy in self.proxies for warning in proxy.warnings]
        return list(dict.fromkeys([*self.warnings, *of_clusters, *of_proxies, *_unmeasured(self.rows())]))

    def relative_compute(self) -> dict[str, float]:
        """What the server spent on each system, in multiples of what it spent on the result."""
        return relative((part.system, part.part, part.work.token_parameters) for part in self.compute)

    def peaks(self) -> tuple[dict[str, int], int | None]:
        """Peak memory in bytes of each device, and of the server, where they were measured."""
        devices = {
            s.item: s.peak_bytes for s in self.steps if s.side == "device" and s.item and s.peak_bytes is not None
        }
        server = [s.peak_bytes for s in self.steps if s.side == "server" and s.peak_bytes is not None]
        return devices, max(server, default=None)


def mean(
    rows: Sequence[ResultRow], system: str, metric: str, subset: Subset = "private_only", domain: str = "all"
) -> float | None:
    """A system's value, the plain mean where it has several items; none where it was not measured, or is no number."""
    wanted = (system, metric, subset, domain)
    values = [row.value for row in rows if (row.system, row.metric, row.subset, row.domain) == wanted]
    return sum(values) / len(values) if values and all(map(math.isfinite, values)) else None


def main_subset(rows: Sequence[ResultRow]) -> Subset:
    """The questions that a run is judged by: those that only devices can answer, or all where the test set has none."""
    return "private_only" if any(row.subset == "private_only" for row in rows) else "all"


def headline(rows: Sequence[ResultRow]) -> dict[str, float]:
    """The run in a handful of numbers, on `main_subset`; what was not measured is absent."""
    subset = main_subset(rows)
    found = {
        metric: mean(rows, RESULT, metric, subset)
        for metric in ("token_accuracy", "token_log_perplexity", "choice_accuracy")
    }
    base, ceiling = (mean(rows, system, "token_accuracy", subset) for system in (BASE, CEILING))
    found |= {"base_token_accuracy": base, "centralized_token_accuracy": ceiling}
    ours = found["token_accuracy"]
    if ours is not None and base is not None and ceiling is not None:
        found["gap_closed"] = gap_closed(ours, base, ceiling)
    return {name: value for name, value in found.items() if value is not None}


def relative(parts: Iterable[tuple[str, str, float]]) -> dict[str, float]:
    """What the server spent on each system in multiples of the result, from (system, part, token-parameters).

    A stage of the run has all that was spent until then; what took no training at the server is absent. Empty where
    the result itself took none.
    """
    spent: dict[str, dict[str, float]] = {}
    for system, part, amount in parts:
        spent.setdefault(system, {})[part] = amount
    own = spent.pop(RESULT, {})
    totals = {
        stage: sum(own.get(part, 0.0) for part in (*BEFORE_TRAINING, *trained))
        for stage, trained in TRAINED.items()
        if any(part in own for part in trained)
    }
    totals |= {system: sum(amounts.values()) for system, amounts in spent.items()}
    ours = totals.get(RESULT)
    return {system: total / ours for system, total in totals.items()} if ours else {}


def _unmeasured(rows: Sequence[ResultRow]) -> list[str]:
    """A warning for every metric of a model that is not a finite number."""
    broken = dict.fromkeys((row.system, row.item, row.metric) for row in rows if not math.isfinite(row.value))
    return [
        f"{system if item is None else f'{system} {item}'} has no finite {METRICS.get(metric, metric)}: "
        "its probabilities are not numbers, as after a training that diverged"
        for system, item, metric in broken
    ]
