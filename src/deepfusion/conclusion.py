"""A run's last step: gather what every artifact knows into `Findings`, and have them written up."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from deepfusion.artifacts import (
    Artifact,
    Checkpoint,
    Clusters,
    Corpus,
    Intake,
    Judgements,
    Proxy,
    Report,
    Round,
    Scores,
    Teaching,
    TransferSet,
    Upload,
    Wire,
    Work,
)
from deepfusion.config import Recipe
from deepfusion.findings import Compute, Findings, Graded, Measured, Step, Traffic
from deepfusion.labels import BESIDE, CONTROLS, counted, label
from deepfusion.metrics import ensemble
from deepfusion.phases.report import model_card, report

ENSEMBLES = {"device": "device_ensemble", "proxy": "proxy_ensemble", "branch": "branch_ensemble"}
FOLDERS = re.compile(r"(?<![\w.:/~-])(?:/[^\s/'\",:;()]+)+/(?=[^\s/'\",:;()])")


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
    parts: Mapping[str, Mapping[str, Sequence[Artifact]]] | None = None,
    rounds: Mapping[str, Sequence[Round]] | None = None,
    changed: TransferSet | None = None,
    judgements: Sequence[Judgements] = (),
    wire: Mapping[str, Wire] | None = None,
    into: Path,
) -> Report:
    """Write `results.json`, `report.html` and the MoE's model card; none of them names a folder of this machine.

    Args:
        students: `joint_student`, `merged`, `deepfusion` and the references, by name.
        phases: what each step cost, as the engine saw it.
        warnings: what else is to be said of the run.
        parts: reference → part of its server compute → what was made in it, beside its last training.
        rounds: baseline → what its devices have sent and were sent, in parts that add up.
        changed: the transfer set as `shift` or `mix` made it, if students learned from that.
        judgements: what a judge thinks of some of the models.
        wire: device → bytes of the messages with it, where devices are elsewhere.
    """
    tree = portable(recipe.model_dump(mode="json"))
    rejected = [r.model_copy(update={"reason": without_folders(r.reason)}) for r in intake.rejected]
    findings = Findings(
        run=recipe.name,
        seed=recipe.seed,
        recipe=tree,
        recipe_digest=hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest(),
        measured=_measured(scores),
        graded=[Graded.of(one) for one in judgements],
        corpus=corpus,
        uploads=uploads,
        intake=intake.model_copy(update={"rejected": tuple(rejected)}),
        clusters=clusters,
        proxies=proxies,
        transfer=transfer,
        compute=_compute(recipe, transfer, changed, teachings, students, branches, parts or {}),
        steps=[_step(facts, set(recipe.evaluate.references)) for facts in phases],
        wire=wire or {},
        baselines={name: _traffic(parts) for name, parts in (rounds or {}).items()},
        losses={
            **{
                name: student.losses
                for name, student in students.items()
                if student.losses and (name != "joint_student" or recipe.distill.shares.joint)
            },
            **{f"branch {n}": b.losses for n, b in enumerate(branches) if recipe.distill.shares.branch},
            **{f"device {upload.device}": upload.losses for upload in uploads},
        },
        warnings=[without_folders(warning) for warning in (*warnings, *transfer.notices, *_ungraded(judgements))],
    )
    written = report(findings, into=into)
    model_card(findings, students["deepfusion"], into=into)
    return written.model_copy(update={"moe_digest": students["deepfusion"].digest}).sealed()


def portable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as plain values without the folders of this machine: of files and models the names alone."""
    return {key: _named(value, key) for key, value in recipe.items()}


def _named(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        inside = "arguments" if key == "arguments" else ""  # all that `datasets` is given may be a path
        return {k: _named(v, inside or k) for k, v in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_named(entry, key) for entry in cast("list[Any]", value)]
    path = isinstance(value, str) and key in ("path", "encoder", "arguments") and Path(value).is_absolute()
    return Path(value).name if path else value


def without_folders(text: str) -> str:
    """A sentence in which files keep only their names."""
    return FOLDERS.sub("", text)


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
    changed: TransferSet | None,
    teachings: Sequence[Teaching],
    students: Mapping[str, Checkpoint],
    branches: Sequence[Checkpoint],
    before: Mapping[str, Mapping[str, Sequence[Artifact]]],
) -> list[Compute]:
    """Server compute by system and part. All that learn from the transfer text are charged for having it written."""
    asked = sum((teaching.work for teaching in teachings), Work())
    changing, change = changed.work if changed is not None else Work(), "mix" if recipe.distill.mixed else "shift"
    shares = recipe.distill.shares  # without a stage its student is the one before, whose work is not this stage's
    joint = students["joint_student"].work if shares.joint else Work()
    branched = sum((branch.work for branch in branches), Work()) if shares.branch else Work()
    longest = max((branch.work.token_parameters for branch in branches), default=0.0) if branched.tokens else 0.0
    merged = students["merged"]
    tuned = students["deepfusion"].work if shares.tune else Work()
    parts = [
        Compute("deepfusion", "write", transfer.work),
        Compute("deepfusion", "consult", asked),
        Compute("deepfusion", change, changing),
        Compute("deepfusion", "joint", joint),
        Compute("deepfusion", "branch", branched, longest),
        Compute("deepfusion", "router", merged.work),
        Compute("deepfusion", "tune", tuned),
    ]
    for name, student in students.items():
        earlier = [
            Compute(name, part, sum((m.work for m in made), Work())) for part, made in before.get(name, {}).items()
        ]
        if name in CONTROLS or name in ("btx", "ofa_kd", "fedmkt"):
            parts.append(Compute(name, "write", transfer.work))
            if name in ("dense_kd", "ofa_kd"):
                parts.append(Compute(name, "consult", asked))
            if name == "dense_kd" or (name == "ofa_kd" and recipe.distill.mixed):  # which cannot hear what is shifted
                parts.append(Compute(name, change, changing))
            parts += earlier
            if shares.tune or name not in ("ofa_kd", "fedmkt"):  # then its MoE is the merged one
                parts.append(Compute(name, "train", student.work))
        elif name == "centralized":
            parts.append(Compute(name, "train", student.work))
        elif name == "fedjets":  # the round that was best may be one that the server did not train
            parts += earlier
    return [part for part in parts if part.work.token_parameters]


def _ungraded(judgements: Sequence[Judgements]) -> list[str]:
    return [
        f"{one.judge} gave no number for {counted(one.ungraded, 'answer')} of {label(one.system)}, left out of its mean"
        for one in judgements
        if one.ungraded
    ]


def _traffic(parts: Sequence[Round]) -> Traffic:
    down, up = sum(part.down_bytes for part in parts), sum(part.up_bytes for part in parts)
    return Traffic(max(part.number for part in parts), down, up)


def _step(facts: Mapping[str, Any], references: set[str]) -> Step:
    name = facts["name"]
    reference = name in references or name in BESIDE
    side = "reference" if reference else "device" if name == "device" else "server"
    return Step(**facts, side=side)
