"""A run's last step: gather what every artifact knows into `Findings`, and have them written up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepfusion.artifacts import (
    Checkpoint,
    Clusters,
    Corpus,
    Intake,
    Proxy,
    Report,
    Scores,
    Teaching,
    TransferSet,
    Upload,
    Work,
)
from deepfusion.config import Recipe
from deepfusion.findings import Compute, Findings, Measured, Step
from deepfusion.metrics import ensemble
from deepfusion.phases.report import model_card, report

ENSEMBLES = {"device": "device_ensemble", "proxy": "proxy_ensemble", "branch": "branch_ensemble"}
ON_TRANSFER_TEXT = ("pooled_text", "pooled_text_dense", "dense_kd")


def conclude(
    recipe: Recipe,
    corpus: Corpus,
    uploads: Sequence[Upload],
    intake: Intake,
    clusters: Clusters,
    proxies: Sequence[Proxy],
    transfer: TransferSet,
    teachings: Sequence[Teaching],
    students: Mapping[str, Checkpoint],
    branches: Sequence[Checkpoint],
    scores: Sequence[Scores],
    phases: Sequence[Mapping[str, Any]],
    warnings: Sequence[str] = (),
    *,
    into: Path,
) -> Report:
    """Write `results.json`, `report.html` and the MoE's model card.

    Args:
        students: `joint_student`, `merged`, `deepfusion` and the references, by name.
        phases: what each step cost, as the engine saw it.
    """
    tree = recipe.model_dump(mode="json")
    findings = Findings(
        run=recipe.name,
        seed=recipe.seed,
        recipe=tree,
        recipe_digest=hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest(),
        measured=_measured(scores),
        corpus=corpus,
        uploads=uploads,
        intake=intake,
        clusters=clusters,
        proxies=proxies,
        transfer=transfer,
        compute=_compute(recipe, transfer, teachings, students, branches),
        steps=[_step(facts, set(recipe.evaluate.references)) for facts in phases],
        losses={
            **{
                name: student.losses
                for name, student in students.items()
                if student.losses and (name != "joint_student" or recipe.distill.shares.joint)
            },
            **{f"branch {n}": b.losses for n, b in enumerate(branches) if recipe.distill.shares.branch},
            **{f"device {upload.device}": upload.losses for upload in uploads},
        },
        warnings=[*warnings, *transfer.notices],
    )
    written = report(findings, into=into)
    model_card(findings, students["deepfusion"], into=into)
    return written.model_copy(update={"moe_digest": students["deepfusion"].digest}).sealed()


def _measured(scores: Sequence[Scores]) -> list[Measured]:
    """Every model, and every group of models that answers together."""
    single = [Measured.of(score) for score in scores]
    together = [
        Measured(name, ensemble([measured.rows for measured in single if measured.system == system]))
        for system, name in ENSEMBLES.items()
        if any(measured.system == system for measured in single)
    ]
    return single + together


def _compute(
    recipe: Recipe,
    transfer: TransferSet,
    teachings: Sequence[Teaching],
    students: Mapping[str, Checkpoint],
    branches: Sequence[Checkpoint],
) -> list[Compute]:
    """Server compute by system and part. All that learn from the transfer text are charged for having it written."""
    asked = sum((teaching.work for teaching in teachings), Work())
    shares = recipe.distill.shares  # without a stage its student is the one before, whose work is not this stage's
    joint = students["joint_student"].work if shares.joint else Work()
    branched = sum((branch.work for branch in branches), Work()) if shares.branch else Work()
    longest = max((branch.work.token_parameters for branch in branches), default=0.0) if branched.tokens else 0.0
    merged = students["merged"]
    tuned = students["deepfusion"].work if shares.tune else Work()
    parts = [
        Compute("deepfusion", "write", transfer.work),
        Compute("deepfusion", "consult", asked),
        Compute("deepfusion", "joint", joint),
        Compute("deepfusion", "branch", branched, longest),
        Compute("deepfusion", "router", merged.work),
        Compute("deepfusion", "tune", tuned),
    ]
    for name, student in students.items():
        if name in ON_TRANSFER_TEXT:
            parts.append(Compute(name, "write", transfer.work))
            if name == "dense_kd":
                parts.append(Compute(name, "consult", asked))
            parts.append(Compute(name, "train", student.work))
        elif name == "centralized":
            parts.append(Compute(name, "train", student.work))
    return [part for part in parts if part.work.token_parameters]


def _step(facts: Mapping[str, Any], references: set[str]) -> Step:
    name = facts["name"]
    side = "reference" if name in references or name == "upcycle" else "device" if name == "device" else "server"
    return Step(**facts, side=side)
