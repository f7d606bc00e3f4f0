"""The models that a run is compared with: controls on the same text at equal server compute, what others do with the
same devices, and one that sees everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from deepfusion.artifacts import Checkpoint, Client, Round, Upload
from deepfusion.config import PLAIN, DevicePhase, DistillPhase, Recipe
from deepfusion.learning import Given, Go, choose, students
from deepfusion.roles import tunes_fedjets
from deepfusion.steps import LAST, sent_by


@dataclass(frozen=True)
class Beside:
    """What stands beside the run."""

    models: dict[str, Future[Checkpoint]] = field(default_factory=dict)  # name → model, as the recipe wants them
    # Name → what it took the server before its last training, by part.
    parts: dict[str, dict[str, Sequence[Future[Any]]]] = field(default_factory=dict)
    rounds: dict[str, list[Future[Round]]] = field(default_factory=dict)  # baseline → what its devices have done for it


def references(go: Go, given: Given) -> Beside:
    """Every reference that the recipe wants."""
    recipe = given.recipe
    wanted = dict.fromkeys(recipe.evaluate.references)
    beside = Beside()
    made: Future[Any]
    copies: Future[Checkpoint] | None = None
    if {"pooled_text", "centralized"} & wanted.keys():
        copies = _merged(go, given, "upcycle", [given.base] * recipe.cluster.k)
    common = {"teachings": list(given.teachings), "seed": recipe.seed, "priority": LAST, "budget": given.budget}
    training = recipe.distill.training  # no more of it: another objective leaves plain training as it was
    for name in wanted:
        if name == "centralized":
            made = go(
                Checkpoint, name, moe=copies, corpus=given.corpus, training=training,
                config=recipe.evaluate.convergence, balance=recipe.tune.balance, seed=recipe.seed, priority=LAST - 1,
            )  # fmt: skip
        elif name == "fedjets":
            made = _fedjets(go, given, beside)
        elif name == "fedavg_dense":
            made = _fedavg(go, given, beside)
        elif name == "btx":
            made = _btx(go, given, beside)
        elif name == "ofa_kd":
            made = _ofa(go, given, beside)
        elif name == "fedmkt":
            made = _fedmkt(go, given, beside)
        elif name == "dense_kd":
            made = go(
                Checkpoint, name, base=given.start, transfer=given.lessons, config=recipe.distill, **common,
                **given.paid,
            )  # fmt: skip
        else:
            moe = name == "pooled_text"
            made = go(
                Checkpoint, name, model=copies if moe else given.base, transfer=given.transfer, training=training,
                balance=recipe.tune.balance if moe else 0.0, **common,
            )  # fmt: skip
            if copies is not None and moe:
                beside.parts[name] = {"router": [copies]}
        beside.models[name] = made
    return beside


def _merged(go: Go, given: Given, phase: str, students: Sequence[Future[Checkpoint]]) -> Future[Checkpoint]:
    return go(
        Checkpoint, phase, students=list(students), transfer=given.transfer, config=given.recipe.assemble,
        seed=given.recipe.seed, priority=LAST,
    )  # fmt: skip


# ── other objectives ──────────────────────────────────────────────────────────────────────────────────────────────────


def _ofa(go: Go, given: Given, beside: Beside) -> Future[Checkpoint]:
    """The run's own phases from the same start, text, teachers and budget, under one-for-all distillation.

    Teachers are heard as they spoke: a shift is known of runs of bytes alone.
    """
    distill = given.recipe.distill
    config = distill.model_copy(update={"objective": given.recipe.baselines.ofa_kd, "shifted": False})
    heard = replace(given, lessons=given.transfer) if distill.shifted else given
    return _otherwise(go, heard, config, "ofa", "ofa_kd", beside)


def _fedmkt(go: Go, given: Given, beside: Beside) -> Future[Checkpoint]:
    """The same with FedMKT's loss, and its choice of a teacher for each document among all that write."""
    own = given.recipe.baselines.fedmkt
    fields = {"objective": own.objective, "teachers": "likeliest", "teacher_top_k": own.top_k}
    fields |= {"shifted": False, "mixed": 0}
    config = given.recipe.distill.model_copy(update=fields)
    teachings = choose(go, given, config, prefix="fedmkt_", priority=LAST)
    beside.parts["fedmkt"] = {"consult": teachings}
    plain = replace(given, lessons=given.transfer, teachings=teachings)
    return _otherwise(go, plain, config, "fedmkt", "fedmkt", beside)


def _otherwise(go: Go, given: Given, config: DistillPhase, short: str, name: str, beside: Beside) -> Future[Checkpoint]:
    made = students(go, given, config, prefix=f"{short}_", priority=LAST)
    beside.parts.setdefault(name, {}).update(
        joint=[made.joint] * (config.shares.joint > 0),
        branch=made.branches * (config.shares.branch > 0),
        router=[made.merged],
    )
    return made.moe


# ── devices that train parts of an MoE ────────────────────────────────────────────────────────────────────────────────


def _fedjets(go: Go, given: Given, beside: Beside) -> Future[Round]:
    recipe, config = given.recipe, given.recipe.baselines.fedjets
    # There is no text to measure a router on. Weights that add up to 1 are right for any number of experts; others are
    # scaled for all of them, and a device has a few.
    assemble = recipe.assemble.model_copy(update={"router": "random", "renormalise": True})
    moe: Future[Any] = go(
        Checkpoint, "fedjets_start", base=given.base, k=recipe.cluster.k, config=assemble, seed=recipe.seed,
        priority=LAST,
    )  # fmt: skip
    anchors = {
        device for members in given.clusters.members for device in members[: math.ceil(config.anchors * len(members))]
    }
    training = _all_weights(recipe)
    rounds: list[Future[Round]] = []
    for number in range(1, config.rounds + 1):
        clients = [
            go(
                Client, "fedjets_device", f"round-{number}-{upload.device}", device=upload.device, sent=moe,
                base=given.base, corpus=given.corpus, cluster=given.clusters.of(upload.device), count=config.experts,
                gate_weight=config.gate_weight, training=training, anchor=upload.device in anchors,
                seed=recipe.seed + 1000 + place, sitting=number - 1, priority=LAST,
            )
            for place, upload in enumerate(given.uploads)
        ]  # fmt: skip
        moe = go(Round, "fedjets_round", str(number), sent=moe, clients=clients, base=given.base, priority=LAST)
        rounds.append(moe)
    judged = {"corpus": given.corpus, "training": recipe.device.training, "priority": LAST}
    best = go(Round, "fedjets_best", rounds=rounds, **judged)
    made = best
    if tunes_fedjets(recipe):
        tuned = go(
            Round, "fedjets_tune", moe=best, transfer=given.transfer, config=recipe.tune,
            budget=recipe.distill.shares.tune * given.budget, seed=recipe.seed, priority=LAST,
        )  # fmt: skip
        made = go(Round, "fedjets", rounds=[best, tuned], **judged)
        beside.parts["fedjets"] = {"train": [tuned]}  # whether or not it was the better for it
    beside.rounds["fedjets"] = [made]
    return made


def _all_weights(recipe: Recipe) -> DevicePhase:
    """How a device of FedJETS trains: as the recipe's devices, but all weights, whatever these do.

    Parts of an MoE travel as published, and are not packed: they descend from no model that is known from the start.
    """
    config, device = recipe.baselines.fedjets, recipe.device
    own = device.training.learning_rate if device.method == "full" else recipe.distill.training.learning_rate
    training = device.training.model_copy(update={"learning_rate": config.learning_rate or own})
    whole = DevicePhase(epochs=device.epochs, min_steps=device.min_steps, replay=device.replay, training=training)
    return whole.sitting(config.rounds, config.epochs)


# ── devices that all train the base ───────────────────────────────────────────────────────────────────────────────────


def _fedavg(go: Go, given: Given, beside: Beside) -> Future[Any]:
    recipe = given.recipe
    model: Future[Any] = given.base
    config = recipe.baselines.fedavg_dense
    device = recipe.device.sitting(config.rounds, config.epochs)
    rounds: list[Future[Round]] = []
    for number in range(1, config.rounds + 1):
        sent = [
            _trained(go, given, "fedavg", f"round-{number}-", n, model, device, number - 1)
            for n in range(len(given.uploads))
        ]
        model = go(Round, "fedavg_round", str(number), sent=model, uploads=sent, weights="tokens", priority=LAST)
        rounds.append(model)
    best = go(
        Round, "fedavg_dense", rounds=rounds, corpus=given.corpus, training=recipe.device.training, priority=LAST
    )  # fmt: skip
    beside.rounds["fedavg_dense"] = [best]
    return best


def _btx(go: Go, given: Given, beside: Beside) -> Future[Checkpoint]:
    recipe = given.recipe
    place = {upload.device: n for n, upload in enumerate(given.uploads)}
    branches: list[Future[Any]] = []
    for cluster, members in enumerate(given.clusters.members):
        if not members:  # which happens only where there are fewer devices than clusters
            branches.append(given.base)
            continue
        sent = [_trained(go, given, "btx", "", place[name], given.base, recipe.device) for name in members]
        branch = go(
            Round, "btx_branch", f"cluster-{cluster}", sent=given.base, uploads=sent, weights=recipe.proxy.weights,
            priority=LAST,
        )  # fmt: skip
        branches.append(branch)
        beside.rounds.setdefault("btx", []).append(branch)
    merged = _merged(go, given, "btx_merge", branches)
    beside.parts["btx"] = {"router": [merged]}
    return go(
        Checkpoint, "btx", moe=merged, transfer=given.transfer, teachings=[],
        config=recipe.tune.model_copy(update={"objective": PLAIN}), budget=given.budget, seed=recipe.seed,
        priority=LAST,
    )  # fmt: skip


def _trained(
    go: Go,
    given: Given,
    baseline: str,
    prefix: str,
    number: int,
    model: Future[Any],
    config: DevicePhase,
    sitting: int = 0,
) -> Future[Upload]:
    """What an accepted device makes of a model that it is sent; of an adapter or what it packs, the whole model.

    Its uploads are as small as the run's own.
    """
    device = given.uploads[number].device
    # Nobody asks what its text is about: the run's clusters stand.
    config = config.of(device).model_copy(update={"encoder": "hashing"})
    upload = go(
        Upload, f"{baseline}_device", f"{prefix}{device}", device=device, ancestor=model, ancestor_name="base",
        corpus=given.corpus, config=config, seed=given.recipe.seed + 1000 + number, sitting=sitting, priority=LAST,
    )  # fmt: skip
    if config.sends == "model":
        return upload
    return go(
        Upload, f"{baseline}_materialise", f"{prefix}{device}", upload=upload, ancestor=model, **sent_by(config),
        priority=LAST,
    )  # fmt: skip
