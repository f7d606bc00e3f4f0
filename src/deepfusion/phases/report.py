"""Report: a run's numbers for programs (`results.json`), for people (`report.html`), and on the model (`README.md`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from deepfusion.artifacts import Checkpoint, Report
from deepfusion.findings import Compute, Findings, Measured, Step, headline, main_subset, mean, results

__all__ = ["Compute", "Findings", "Measured", "Step", "model_card", "report"]


def report(findings: Findings, *, into: Path) -> Report:
    """Write `results.json` and `report.html`, one page that needs nothing else, into a folder.

    Raises:
        ValueError: a system was measured on no question.
    """
    # Drawing takes a second to import, and only this step draws.
    from deepfusion.page import sections, summary, tiles

    rows = findings.rows()
    tree = results(findings, rows)
    (into / "results.json").write_text(json.dumps(tree, indent=1, ensure_ascii=False), encoding="utf-8")
    page = _template("report.html.j2").render(
        run=findings.run,
        summary=summary(findings, rows),
        tiles=tiles(findings, rows),
        sections=sections(findings, rows),
        seed=findings.seed,
        digest=findings.recipe_digest,
        versions=findings.versions,
    )
    (into / "report.html").write_text(page, encoding="utf-8")
    return Report(folder=into, name=findings.run, headline=headline(rows))


def model_card(findings: Findings, model: Checkpoint, *, into: Path) -> Path:
    """Write `README.md`, a Hugging Face model card, into the MoE's folder and return its path."""
    rows, subset = findings.rows(), main_subset(findings.rows())
    metrics = ("token_accuracy", "token_log_perplexity", "choice_accuracy")
    systems = list(dict.fromkeys(found.system for found in findings.measured))
    figures = [(system, [mean(rows, system, metric, subset) for metric in metrics]) for system in systems]
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "that-of-its-ancestors",
        "tags": ["moe", "deepfusion", model.model_type, "federated-learning", "knowledge-distillation"],
    }
    card = _template("model_card.md.j2").render(
        front=yaml.safe_dump(front, sort_keys=False),
        findings=findings,
        model=model,
        private=subset == "private_only",
        figures=figures,
        types=sorted({upload.model_type for upload in findings.uploads}),
        written=sum(findings.transfer.per_cluster) if findings.transfer else 0,
    )
    path = into / "README.md"
    path.write_text(card, encoding="utf-8")
    return path


def _template(name: str) -> Any:
    def escaped(template: str | None) -> bool:
        return template is not None and template.endswith(".html.j2")

    environment = Environment(
        loader=PackageLoader("deepfusion"),
        autoescape=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = _markdown
    return environment.get_template(name)


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is, also inside a table."""
    return "".join("\\" + c if c in "\\`*_[]<>|#" else c for c in " ".join(text.split()))
