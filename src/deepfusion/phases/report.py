"""Report: a run's numbers for programs (`results.json`), for people (`report.html`), and on the model (`README.md`)."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import yaml

from deepfusion.artifacts import Checkpoint, Report
from deepfusion.checkpoints import open_config
from deepfusion.families import TARGETS, experts, family
from deepfusion.findings import Compute, Findings, Measured, Step, headline, main_subset, mean
from deepfusion.labels import METRICS, QUESTIONS, in_order, joined, label
from deepfusion.outcome import results
from deepfusion.rendering import page, template
from deepfusion.weights import shapes

__all__ = ["Compute", "Findings", "Measured", "Part", "Step", "model_card", "parameter_split", "report"]

IN_CARD = ("token_accuracy", "token_log_perplexity", "choice_accuracy")


class Part(NamedTuple):
    """Some of a model's weights: what they are, how many, and how many of them one token uses."""

    name: str
    parameters: int
    used: int


def report(findings: Findings, *, into: Path) -> Report:
    """Write `results.json` and `report.html`, one page that needs nothing else, into a folder.

    Raises:
        ValueError: a system was measured on no question.
    """
    # Drawing takes a second to import, and only this step draws.
    from deepfusion.page import sections, summary, tiles

    rows = findings.rows()
    tree = results(findings, rows)
    text = json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False)
    (into / "results.json").write_text(text, encoding="utf-8")
    footer = f"Seed {findings.seed}, recipe {findings.recipe_digest}."
    text = page(
        findings.run, summary(findings, rows), sections(findings, rows), tiles=tiles(findings, rows), footer=footer,
        versions=findings.versions,
    )  # fmt: skip
    (into / "report.html").write_text(text, encoding="utf-8")
    return Report(folder=into, name=findings.run, headline=headline(rows))


def model_card(findings: Findings, model: Checkpoint, *, into: Path) -> Path:
    """Write `README.md`, a Hugging Face model card, into the MoE's folder and return its path."""
    rows = findings.rows()
    subset = main_subset(rows)
    systems = in_order({found.system for found in findings.measured})
    parts, spent = parameter_split(model.folder), findings.relative_compute()
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "that-of-its-ancestors",
        "tags": ["moe", "deepfusion", model.model_type, "federated-learning", "knowledge-distillation"],
    }
    card = template("model_card.md.j2").render(
        front=yaml.safe_dump(front, sort_keys=False),
        findings=findings,
        model=model,
        native=TARGETS[model.model_type].native if model.model_type in TARGETS else True,
        parts=parts,
        total=Part("all", sum(part.parameters for part in parts), sum(part.used for part in parts)),
        questions=QUESTIONS[subset],
        metrics=[METRICS[metric] for metric in IN_CARD],
        figures=[(label(s), [mean(rows, s, metric, subset) for metric in IN_CARD], spent.get(s)) for s in systems],
        types=joined(sorted({upload.model_type for upload in findings.uploads})),
        written=sum(findings.transfer.per_cluster) if findings.transfer else 0,
    )
    path = into / "README.md"
    path.write_text(card, encoding="utf-8")
    return path


def parameter_split(folder: Path) -> list[Part]:
    """A checkpoint's weights by what they are for; their sums are all of its weights, and those that one token uses.

    Of an embedding a token uses one row, or all where it is the head too; of the experts, as many as it is sent to.
    """
    config = open_config(folder)
    known = family(config.model_type)
    held: Counter[str] = Counter()
    for name, (_, shape) in shapes(folder).items():
        held[known.role(name)] += math.prod(shape)
    moe = experts(config)
    tied = "head" not in held
    named = {
        "embedding": f"token embeddings, {'which are the output head too' if tied else 'of which one row is used'}",
        "attention": "attention",
        "router": "routers",
        "ffn": f"feed-forward layers: {moe.count} experts each, of which {moe.chosen} are used",
        "shared": "feed-forward layers that every token uses",
        "norm": "norms",
        "head": "output head",
    }
    used = dict(held)
    used["ffn"] = held["ffn"] * moe.chosen // moe.count
    if not tied:
        used["embedding"] = held["embedding"] // config.vocab_size
    return [Part(name, held[role], used[role]) for role, name in named.items() if held[role]]
