"""Phases II and III as steps: from the transfer text and its teachers to the tuned MoE.

The run takes them, and so does every baseline that differs from it in the objective alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from deepfusion.artifacts import (
    Artifact,
    Checkpoint,
    Clusters,
    Corpus,
    Likelihoods,
    Proxy,
    Teaching,
    TransferSet,
    Upload,
)
from deepfusion.config import DistillPhase, Recipe
from deepfusion.roles import Teacher

A = TypeVar("A", bound=Artifact)


class Go(Protocol):
    """Submits a step of the table of steps."""

    def __call__(self, gives: type[A], phase: str, item: str | None = None, /, **arguments: Any) -> Future[A]:
        """As `Engine.submit`."""
        ...


@dataclass(frozen=True)
class Given:
    """What has been made ready for students, and for whatever stands beside the run."""

    recipe: Recipe
    corpus: Future[Corpus]
    base: Future[Checkpoint]
    start: Future[Checkpoint]  # what a dense student starts from: the base, or the base with task vectors
    kin: dict[int, Future[Proxy]]  # cluster → its proxy of the base's own lineage, of those whose task vectors are used
    uploads: Sequence[Upload]  # of the devices that the run accepted
    fluent: Sequence[Teacher]  # all that write, or could
    clusters: Clusters
    transfer: Future[TransferSet]
    lessons: Future[TransferSet]  # the transfer set as students are taught it, shifted or mixed, or as it is
    teachings: Sequence[Future[Teaching]]
    budget: float  # token-parameters

    @property
    def paid(self) -> dict[str, Any]:
        """What was made for the lessons alone, and is taken out of the budget of who learns from them first."""
        return {} if self.lessons is self.transfer else {"paid": [self.lessons]}


@dataclass(frozen=True)
class Students:
    """What became of the base, stage by stage."""

    joint: Future[Checkpoint]
    branches: list[Future[Checkpoint]]
    merged: Future[Checkpoint]
    moe: Future[Checkpoint]


def choose(go: Go, given: Given, distill: DistillPhase, *, prefix: str = "", priority: int) -> list[Future[Teaching]]:
    """Every document taught by who finds it likeliest, of all that write, if it finds it likelier than the student.

    `prefix` tells the phases of a baseline from the run's own.
    """
    found = {
        one.name: go(
            Likelihoods, f"{prefix}likelihoods", one.name, model=one.model, transfer=given.transfer, priority=priority
        )
        for one in given.fluent
    }  # fmt: skip
    student = go(
        Likelihoods, f"{prefix}likelihoods", "student", model=given.start, transfer=given.transfer, priority=priority
    )  # fmt: skip
    return [
        go(
            Teaching, f"{prefix}consult", one.name, teacher=one.model, cluster=one.cluster, transfer=given.transfer,
            config=distill.consultation, among=found, student=student, priority=priority,
        )
        for one in given.fluent
    ]  # fmt: skip


def students(go: Go, given: Given, distill: DistillPhase, *, prefix: str = "", priority: int) -> Students:
    """One student learns from everyone, copies of it go on, each in its own domain; they become one MoE.

    `prefix` tells the phases of a baseline from the run's own.
    """
    recipe, seed, k, shares = given.recipe, given.recipe.seed, given.recipe.cluster.k, distill.shares
    taught = {"transfer": given.lessons, "teachings": list(given.teachings), "priority": priority}

    # Phase II: distillation.
    joint = given.start
    if shares.joint:
        joint = go(
            Checkpoint, f"{prefix}joint", student=joint, config=distill, budget=shares.joint * given.budget, seed=seed,
            **taught, **given.paid,
        )  # fmt: skip
    branches = [joint] * k
    if distill.own_task_vectors:
        for cluster in given.kin:
            branches[cluster] = go(
                Checkpoint, f"{prefix}own_vector", f"cluster-{cluster}", student=joint, base=given.base,
                proxies=list(given.kin.values()), cluster=cluster, scale=distill.task_vectors, priority=priority,
            )  # fmt: skip
    if shares.branch:
        branches = [
            go(
                Checkpoint, f"{prefix}branch", f"cluster-{cluster}", student=student, config=distill,
                budget=shares.branch * given.budget / k, cluster=cluster, seed=seed + cluster, **taught,
            )
            for cluster, student in enumerate(branches)
        ]  # fmt: skip

    # Phase III: the copies' FFNs become experts of one MoE, which is tuned.
    merged = go(
        Checkpoint, f"{prefix}assemble", students=branches, transfer=given.transfer, config=recipe.assemble, seed=seed,
        priority=priority,
    )  # fmt: skip
    moe = merged
    if shares.tune:
        moe = go(
            Checkpoint, f"{prefix}tune", moe=merged, config=recipe.tune, ask=distill.teachers,
            budget=shares.tune * given.budget, seed=seed, **taught,
        )  # fmt: skip
    return Students(joint, branches, merged, moe)
