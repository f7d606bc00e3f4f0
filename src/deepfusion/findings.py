"""What a run found out, gathered for its report: typed facts in, the tree of `results.json` out."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Literal, Self

from deepfusion.artifacts import Clusters, Corpus, Intake, Proxy, Scores, TransferSet, Upload, Work
from deepfusion.data.documents import ScoredQuestion, read_jsonl
from deepfusion.metrics import ResultRow, Subset, gap_closed, summarise

SCHEMA = 1
RESULT, BASE, CEILING = "deepfusion", "base", "centralized"


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
class Compute:
    """One part of a system's server compute."""

    system: str
    part: str  # "teachers", "joint", "branch", "tune", …
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


@dataclass(frozen=True)
class Findings:
    """Everything that the report tells; what a run did not have stays empty and takes its section with it."""

    run: str
    seed: int
    recipe: Mapping[str, Any]  # as plain YAML values
    recipe_digest: str
    measured: Sequence[Measured]
    corpus: Corpus | None = None
    uploads: Sequence[Upload] = ()
    intake: Intake | None = None
    clusters: Clusters | None = None
    proxies: Sequence[Proxy] = ()
    transfer: TransferSet | None = None
    compute: Sequence[Compute] = ()
    steps: Sequence[Step] = ()
    bytes_down: Mapping[str, int] = field(default_factory=dict)  # device → bytes it was sent
    losses: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)  # name → (step, loss); "device …"
    warnings: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=versions)

    def rows(self) -> list[ResultRow]:
        """Every number of every system."""
        return [row for found in self.measured for row in summarise(found.rows, found.system, self.seed, found.item)]

    def bytes_up(self) -> dict[str, int]:
        """Device → bytes it sent (Eq. 5 of arXiv 2602.14301): as counted at the door, or by the devices themselves."""
        return self.intake.bytes if self.intake else {upload.device: upload.bytes for upload in self.uploads}

    def all_warnings(self) -> list[str]:
        """The run's own and those of its clusters and proxies, once each."""
        of_proxies = [warning for proxy in self.proxies for warning in proxy.warnings]
        return list(dict.fromkeys([*self.warnings, *(self.clusters.warnings if self.clusters else ()), *of_proxies]))

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
    """A system's value, the plain mean where it has several items; none where it was not measured."""
    wanted = (system, metric, subset, domain)
    values = [row.value for row in rows if (row.system, row.metric, row.subset, row.domain) == wanted]
    return sum(values) / len(values) if values else None


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


def results(findings: Findings, rows: Sequence[ResultRow]) -> dict[str, Any]:
    """The tree of `results.json`."""
    up, down = findings.bytes_up(), findings.bytes_down
    devices, server = findings.peaks()
    tree: dict[str, Any] = {
        "schema": SCHEMA,
        "run": findings.run,
        "recipe_digest": findings.recipe_digest,
        "versions": dict(findings.versions),
        "seed": findings.seed,
        "headline": headline(rows),
        "rows": [row.model_dump() for row in rows],
        "bytes": {
            "up": sum(up.values()),
            "down": sum(down.values()),
            "per_device": {name: {"up": up.get(name, 0), "down": down.get(name, 0)} for name in sorted({*up, *down})},
        },
        "memory": {"device_peak_bytes": devices, "server_peak_bytes": server},
        "phases": [asdict(step) for step in findings.steps],
        "rejected": [r.model_dump() for r in findings.intake.rejected] if findings.intake else [],
        "warnings": findings.all_warnings(),
        "compute": [_compute(part) for part in findings.compute],
        "routing": {found.system: found.routing for found in findings.measured if found.routing is not None},
    }
    if findings.clusters:
        tree["clusters"] = _facts(findings.clusters) | {"proxies": [_facts(proxy) for proxy in findings.proxies]}
    if findings.transfer:
        tree["transfer"] = _facts(findings.transfer)
    return tree


def _compute(part: Compute) -> dict[str, Any]:
    total = part.work.token_parameters
    return {
        "system": part.system,
        "part": part.part,
        "tokens": part.work.tokens,
        "forward": part.work.forward,
        "backward": part.work.backward,
        "token_parameters": total,
        "critical_path": total if part.critical is None else part.critical,
    }


def _facts(artifact: Clusters | Proxy | TransferSet) -> dict[str, Any]:
    return artifact.model_dump(mode="json", exclude={"folder", "digest", "work", "centroids"})
