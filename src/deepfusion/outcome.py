"""The tree of `results.json`: what a run found out, as plain values that any program can read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

from deepfusion.artifacts import Clusters, Proxy, TransferSet
from deepfusion.findings import Compute, Findings, headline
from deepfusion.metrics import ResultRow

SCHEMA = 1


def results(findings: Findings, rows: Sequence[ResultRow]) -> dict[str, Any]:
    """The tree of `results.json`: `None` stands for what is not a finite number, which JSON has no word for."""
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
            "baselines": {name: asdict(traffic) for name, traffic in findings.baselines.items()},
        },
        "memory": {"device_peak_bytes": devices, "server_peak_bytes": server},
        "devices": [asdict(device) for device in findings.devices()],
        "phases": [{key: value for key, value in asdict(step).items() if key != "training"} for step in findings.steps],
        "rejected": [r.model_dump() for r in findings.intake.rejected] if findings.intake else [],
        "warnings": findings.all_warnings(),
        "compute": [_compute(part) for part in findings.compute],
        "routing": {found.system: found.routing for found in findings.measured if found.routing is not None},
    }
    if findings.wire:
        per_device = {device: one.model_dump() for device, one in findings.wire.items()}
        tree["bytes"]["wire"] = findings.all_wire().model_dump() | {"per_device": per_device}
    if findings.corpus:
        tree["corpus"] = {"domains": list(findings.corpus.domains), "counts": findings.corpus.counts}
    if findings.clusters:
        tree["clusters"] = _facts(findings.clusters) | {"proxies": [_facts(proxy) for proxy in findings.proxies]}
    if findings.transfer:
        tree["transfer"] = _facts(findings.transfer)
    return _finite(tree)


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


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in cast("dict[str, Any]", tree).items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in cast("Sequence[Any]", tree)]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _facts(artifact: Clusters | Proxy | TransferSet) -> dict[str, Any]:
    return artifact.model_dump(mode="json", exclude={"folder", "digest", "work", "centroids", "shifted"})
