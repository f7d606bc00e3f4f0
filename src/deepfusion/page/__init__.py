"""The report's page: findings in; text, tables and figures out. A section whose facts are absent is left out."""

from __future__ import annotations

from collections.abc import Sequence

from deepfusion import figures
from deepfusion.findings import Findings, headline, main_subset
from deepfusion.metrics import ResultRow
from deepfusion.page import costs, method, quality
from deepfusion.page.parts import QUESTIONS, SUBSETS, Section, percent

__all__ = ["sections", "summary", "tiles"]


def sections(findings: Findings, rows: Sequence[ResultRow]) -> list[Section]:
    """All sections that have something to say, in the page's order."""
    candidates = [
        quality.results(rows),
        quality.stages(rows),
        quality.domains(rows),
        method.clusters(findings),
        method.transfer(findings),
        method.routing(findings),
        method.training(findings),
        costs.compute(findings),
        costs.traffic(findings),
        costs.time(findings),
        costs.remarks(findings),
        costs.recipe(findings),
    ]
    return [section for section in candidates if section is not None]


def summary(findings: Findings, rows: Sequence[ResultRow]) -> str:
    """The run in two sentences."""
    facts, text = headline(rows), ""
    if findings.uploads:
        types = sorted({upload.model_type for upload in findings.uploads})
        grouped = f", grouped into {findings.clusters.k} domains," if findings.clusters else ""
        text = f"{len(findings.uploads)} devices with models of type {', '.join(types)}{grouped} taught one MoE. "
    if "token_accuracy" not in facts:
        return text + "The MoE was not measured."
    text += f"On {QUESTIONS[main_subset(rows)]} it predicts {percent(facts['token_accuracy'])} % of the answers' tokens"
    others = {"base_token_accuracy": "the base model", "centralized_token_accuracy": "centralised training"}
    beside = [f"{percent(facts[key])} % for {name}" for key, name in others.items() if key in facts]
    return text + (f", against {' and '.join(beside)}." if beside else ".")


def tiles(findings: Findings, rows: Sequence[ResultRow]) -> list[tuple[str, str]]:
    """(value, label) of the page's few large numbers."""
    facts, found = headline(rows), list[tuple[str, str]]()
    if "token_accuracy" in facts:
        found.append((f"{percent(facts['token_accuracy'])} %", f"token accuracy, {SUBSETS[main_subset(rows)]}"))
    if "gap_closed" in facts:
        found.append((f"{percent(facts['gap_closed'], 0)} %", "of the gap to centralised training closed"))
    if "token_log_perplexity" in facts:
        found.append((f"{facts['token_log_perplexity']:.3f}", "nats per answer token"))
    if up := findings.bytes_up():
        found.append((figures.size(sum(up.values())), f"sent by {len(up)} devices, once"))
    return found
