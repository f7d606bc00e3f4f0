"""Runs that nobody has run: results as a study takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepfusion.comparison.study import Entry, Study

VERSIONS = {"python": "3.11", "deepfusion": "0.1.0"}


def row(system: str, value: float | None, **other: Any) -> dict[str, Any]:
    facts = {"item": None, "domain": "all", "subset": "private_only", "metric": "token_accuracy", "count": 10}
    return facts | {"system": system, "value": value} | other


def results(values: Mapping[str, float | None], *more: dict[str, Any], devices: int = 2) -> dict[str, Any]:
    """System → token accuracy on what only devices know; nats are 1 − it."""
    rows = [row(system, value) for system, value in values.items()]
    rows += [
        row(system, None if value is None else 1 - value, metric="token_log_perplexity")
        for system, value in values.items()
    ]
    peak = {"deepfusion": "device", "btx": "btx_device"}
    return {
        "rows": [*rows, *more],
        "versions": VERSIONS,
        "bytes": {
            "up": 100 * devices,
            "down": 0,
            "baselines": {"btx": {"rounds": 1, "up": 300 * devices, "down": 200 * devices}} if "btx" in values else {},
        },
        "phases": [
            {"name": peak[system], "item": f"d{n}", "peak_bytes": (1 + n) * (1 if system == "deepfusion" else 5)}
            for system in peak
            if system in values
            for n in range(devices)
        ],
        "compute": [
            {"system": "deepfusion", "part": "joint", "token_parameters": 40.0},
            {"system": "dense_kd", "part": "train", "token_parameters": 50.0},
        ],
    }


def study(*, variants: tuple[str, ...] = ("N = 2", "N = 4"), seeds: int = 3, **values: list[float]) -> Study:
    """System → value of each seed; the second variant's systems are all .1 better."""
    entries = [
        Entry(
            variant,
            seed,
            results({system: of[seed] + 0.1 * number for system, of in values.items()}, devices=2 + 2 * number),
        )
        for number, variant in enumerate(variants)
        for seed in range(seeds)
    ]
    return Study("made", list(variants), list(range(seeds)), entries)
