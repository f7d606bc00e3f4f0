"""The report's page: findings in; text, tables and figures out. A section whose facts are absent is left out."""

from __future__ import annotations

from collections.abc import Sequence

from deepfusion import figures
from deepfusion.findings import BASE, CEILING, RESULT, Findings, headline, main_subset, mean
from deepfusion.labels import CONTROLS, METRICS, SUBSETS, counted, joined, label
from deepfusion.metrics import ResultRow
from deepfusion.page import costs, method, quality
from deepfusion.page.parts import Section, percent, signed

__all__ = ["sections", "summary", "tiles"]

NO_CONTROL = "No control was trained at the same server compute, so this run alone shows no advantage."


def sections(findings: Findings, rows: Sequence[ResultRow]) -> list[Section]:
    """All sections that have something to say, in the page's order."""
    candidates = [
        quality.results(findings, rows),
        quality.stages(rows),
        quality.domains(rows),
        method.corpus(findings),
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


def summary(findings: Findings, rows: Sequence[ResultRow]) -> list[str]:
    """The run in a few sentences: what it was and how well it did, beside what, and what that is worth."""
    subset = main_subset(rows)
    measured = {name: mean(rows, name, "token_accuracy", subset) for name in (RESULT, BASE, *CONTROLS, CEILING)}
    shares = {name: f"{percent(share)} %" for name, share in measured.items() if share is not None}
    if RESULT not in shares:
        return [_who(findings) + "The MoE was not measured."]
    asked = max(row.count for row in rows if (row.system, row.domain, row.subset) == (RESULT, "all", subset))
    which = " that only devices can answer" if subset == "private_only" else ""
    base = f", the base model {shares[BASE]}" if BASE in shares else ""
    lead = (
        f"{_who(findings)}On {counted(asked, 'test question')}{which} it predicts {shares[RESULT]} of the answers' "
        f"tokens{base}."
    )
    rivals = joined([f"{label(name)} predicts {shares[name]}" for name in CONTROLS if name in shares])
    beside = [f"From the same text, at the same server compute, {rivals}." if rivals else NO_CONTROL]
    if CEILING in shares:
        beside.append(f"With all private text in one place, centralised training predicts {shares[CEILING]}.")
    beside.append("This is one seed: a small difference means little before it holds over several.")
    return [lead, " ".join(beside)]


def tiles(findings: Findings, rows: Sequence[ResultRow]) -> list[tuple[str, str]]:
    """(value, label) of the page's few large numbers."""
    facts, subset, found = headline(rows), main_subset(rows), list[tuple[str, str]]()
    if (ours := facts.get("token_accuracy")) is not None:
        found.append((f"{ours:.3f}", f"{METRICS['token_accuracy']} on {SUBSETS[subset]}"))
        controls = {name: mean(rows, name, "token_accuracy", subset) for name in CONTROLS}
        rivals = {name: accuracy for name, accuracy in controls.items() if accuracy is not None}
        if rivals:
            best = max(rivals, key=lambda name: rivals[name])
            change = signed(ours - rivals[best], 3)
            found.append((change, f"against the best control, {label(best)}"))
    if "gap_closed" in facts:
        found.append((f"{facts['gap_closed']:.2f}", "of the gap from base to centralised closed"))
    if "token_log_perplexity" in facts:
        found.append((f"{facts['token_log_perplexity']:.3f}", f"{METRICS['token_log_perplexity']}, less is better"))
    if up := findings.bytes_up():
        found.append((figures.size(sum(up.values())), f"sent by {counted(len(up), 'device')}, once"))
    return found


def _who(findings: Findings) -> str:
    if not findings.uploads:
        return ""
    types = sorted({upload.model_type for upload in findings.uploads})
    of = f"models of type {types[0]}" if len(types) == 1 else f"models of {len(types)} types ({', '.join(types)})"
    grouped = f", in {counted(findings.clusters.k, 'cluster')} by what they know," if findings.clusters else ""
    return f"{counted(len(findings.uploads), 'device')} with {of}{grouped} taught one MoE. "
