"""What many runs found, by variant, seed and system; and what of it is better than what. Nothing here opens a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, cast

from deepfusion.comparison.statistics import Estimate, Paired, estimate, paired
from deepfusion.findings import CEILING, RESULT, relative
from deepfusion.labels import BASELINES, BOUNDS, CONTROLS, METRICS
from deepfusion.metrics import Subset

ORDER: tuple[Subset, ...] = ("private_only", "all", "public")
ROWS = ("base", "device", *CONTROLS, *BASELINES, RESULT, *BOUNDS)
"""Systems that stand in tables, in this order; the stages in between are in the files of values."""
LOWER_IS_BETTER = frozenset({"token_log_perplexity", "answer_nats_per_byte"})
TRAINED_FOR = {RESULT: "device", "fedjets": "fedjets_device", "fedavg_dense": "fedavg_device", "btx": "btx_device"}
"""Who has devices train, and in which phase."""


@dataclass(frozen=True)
class Entry:
    """One finished run."""

    variant: str
    seed: int
    results: Mapping[str, Any]  # the tree of results.json


@dataclass(frozen=True)
class Failure:
    """A run that came to no end."""

    variant: str
    seed: int
    reason: str


@dataclass(frozen=True)
class Question:
    """What systems are compared by."""

    metric: str
    subset: Subset
    domain: str = "all"

    @property
    def lower(self) -> bool:
        """Whether less is better."""
        return self.metric in LOWER_IS_BETTER


@dataclass(frozen=True)
class Study:
    """All runs of a comparison."""

    name: str
    variants: Sequence[str]
    seeds: Sequence[int]
    entries: Sequence[Entry]
    failed: Sequence[Failure] = ()

    def systems(self) -> list[str]:
        """Those of the tables that some run has measured."""
        found = {row["system"] for entry in self.entries for row in entry.results["rows"]}
        return [system for system in ROWS if system in found]

    def questions(self, *, domains: bool = False) -> list[Question]:
        """Every metric and subset that was measured, over all domains or in each one too."""
        found = {
            (row["metric"], row["subset"], row["domain"]) for entry in self.entries for row in entry.results["rows"]
        }
        names = ["all", *sorted({domain for _, _, domain in found if domains} - {"all"})]
        return [
            Question(metric, subset, domain)
            for subset in ORDER
            for metric in METRICS
            for domain in names
            if (metric, subset, domain) in found
        ]

    def values(self, variant: str, system: str, question: Question) -> dict[int, float]:
        """Seed → value, the plain mean where a system has several items; without seeds where it is no number."""
        wanted = (system, question.metric, question.subset, question.domain)
        found: dict[int, float] = {}
        for entry in self.entries:
            if entry.variant != variant:
                continue
            numbers = [
                row["value"]
                for row in entry.results["rows"]
                if (row["system"], row["metric"], row["subset"], row["domain"]) == wanted
            ]
            if numbers and all(number is not None and math.isfinite(number) for number in numbers):
                found[entry.seed] = fmean(numbers)
        return found

    def estimate(self, variant: str, system: str, question: Question) -> Estimate | None:
        """A system's mean over seeds."""
        values = self.values(variant, system, question)
        return estimate(list(values.values())) if values else None

    def against(self, variant: str, system: str, question: Question) -> Paired | None:
        """DeepFusion minus a system, paired by seed."""
        return paired(self.values(variant, RESULT, question), self.values(variant, system, question))

    def best(self, variant: str, question: Question) -> tuple[list[str], bool] | None:
        """The systems with the best mean, centralised training aside, and whether there is one that is significantly
        better than each other (p < .05, paired, uncorrected); none where there is nothing to compare, or all are equal.

        A system that lacks a seed that others have is not among them: it may lack the hardest.
        """
        rivals = [system for system in self.systems() if system != CEILING]
        values = {system: found for system in rivals if (found := self.values(variant, system, question))}
        most = max(map(len, values.values()), default=0)
        means = {system: fmean(found.values()) for system, found in values.items() if len(found) == most}
        if len(means) < 2 or math.isclose(min(means.values()), max(means.values())):
            return None
        winner = (min if question.lower else max)(means.values())
        best = [system for system, mean in means.items() if math.isclose(mean, winner)]
        others = [paired(values[best[0]], values[system]) for system in values if system != best[0]]
        return best, len(best) == 1 and all(other is not None and self._ahead(other, question) for other in others)

    @staticmethod
    def _ahead(difference: Paired, question: Question) -> bool:
        """Whether a difference is significant, and for the better."""
        return difference.significant and (difference.mean < 0) == question.lower

    def gap_closed(self, variant: str, question: Question) -> Estimate | None:
        """The share of the way from the base to centralised training, over seeds."""
        ours, base, ceiling = (self.values(variant, system, question) for system in (RESULT, "base", CEILING))
        shares = [
            (ours[seed] - base[seed]) / (ceiling[seed] - base[seed])
            for seed in ours
            if seed in base and seed in ceiling and ceiling[seed] != base[seed]
        ]
        return estimate(shares) if shares else None

    # ── what it takes ─────────────────────────────────────────────────────────────────────────────────────────────

    def traffic(self, variant: str, system: str) -> Estimate | None:
        """Bytes on the wire, both ways, all devices and all rounds up to the best; of who has devices train."""
        found: list[float] = []
        for results in self._results(variant):
            sizes = results["bytes"]
            if system == RESULT:
                found.append(sizes["up"] + sizes["down"])
            elif system in sizes["baselines"]:
                found.append(sizes["baselines"][system]["up"] + sizes["baselines"][system]["down"])
        return estimate(found) if found else None

    def memory(self, variant: str, system: str) -> Estimate | None:
        """Peak resident bytes of the process in which a device trains, of the device that needs most."""
        phase = TRAINED_FOR.get(system)
        found = [
            max(peaks)
            for results in self._results(variant)
            if (peaks := [one["peak_bytes"] for one in results["phases"] if one["name"] == phase and one["peak_bytes"]])
        ]
        return estimate(found) if found else None

    def compute(self, variant: str, system: str) -> Estimate | None:
        """Server compute in multiples of DeepFusion's."""
        found = [
            shares[system]
            for results in self._results(variant)
            if system
            in (
                shares := relative(
                    (part["system"], part["part"], part["token_parameters"]) for part in results["compute"]
                )
            )
        ]
        return estimate(found) if found else None

    def _results(self, variant: str) -> Iterator[Mapping[str, Any]]:
        return (entry.results for entry in self.entries if entry.variant == variant)

    # ── for programs ──────────────────────────────────────────────────────────────────────────────────────────────

    def value_rows(self) -> list[dict[str, Any]]:
        """Every number of every run, stages and single devices included."""
        return [
            {"variant": entry.variant, "seed": entry.seed}
            | {key: row[key] for key in ("system", "item", "domain", "subset", "metric", "value", "count")}
            for entry in self.entries
            for row in entry.results["rows"]
        ]

    def comparison_rows(self) -> list[dict[str, Any]]:
        """Every mean with its interval, and DeepFusion's difference to it."""
        rows: list[dict[str, Any]] = []
        for variant in self.variants:
            for question in self.questions(domains=True):
                best = self.best(variant, question)
                for system in self.systems():
                    own = self.estimate(variant, system, question)
                    if own is None:
                        continue
                    other = self.against(variant, system, question) if system != RESULT else None
                    rows.append(
                        {"variant": variant, **asdict(question), "system": system, **asdict(own)}
                        | {
                            "difference": other and other.mean,
                            "difference_half": other and other.half,
                            "p": other and other.p,
                            "best": best is not None and system in best[0],
                            "significantly_best": best == ([system], True),
                        }
                    )
        return rows

    def tree(self) -> dict[str, Any]:
        """Everything but the single values, as plain values."""
        return {
            "name": self.name,
            "variants": list(self.variants),
            "seeds": list(self.seeds),
            "failed": [asdict(one) for one in self.failed],
            "versions": cast("dict[str, str]", dict(self.entries[0].results["versions"])) if self.entries else {},
            "comparison": self.comparison_rows(),
        }
