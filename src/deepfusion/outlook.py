"""What a plan can say of steps that depend on steps that have not run: how many there will be of each phase."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deepfusion.config import Recipe, VAAObjective
from deepfusion.planner import PlannedStep
from deepfusion.roles import of_the_base, tunes_fedjets
from deepfusion.steps import STEPS

ELSEWHERE = "of the devices elsewhere: they train where they are, and what follows waits for their uploads"


def waiting(recipe: Recipe, planned: set[str], elsewhere: Sequence[str] = ()) -> list[PlannedStep]:
    """A line for each phase that is still to come and of which no step is planned yet, in order.

    Args:
        recipe: with contents for paths.
        planned: phases of which steps are planned.
        elsewhere: devices that are on machines of their own, if they are; all are taken to send.
    """
    return [
        PlannedStep(phase, None, "wait", reason, count)
        for phase, count, reason in _phases(recipe, elsewhere)
        if count and phase not in planned
    ]


def _phases(recipe: Recipe, elsewhere: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """(phase, steps, why as many) of everything after the models that devices start from."""
    k, shares, references = recipe.cluster.k, recipe.distill.shares, set(recipe.evaluate.references)
    one = "depends on steps that have not run"
    given = recipe.data.partition.mode == "given" and not elsewhere
    devices = len(elsewhere) or (k if given else recipe.data.partition.devices)  # given: at least as many as clusters
    each = "for each " + ELSEWHERE if elsewhere else "for each device" + " that the text names" * given
    yield "device", devices, _several(devices, each, at_least=given)
    yield "upload", 1, one
    parts = _parts(recipe, devices)
    yield "materialise", parts, _several(parts, "for each accepted upload", at_least=given)
    yield "cluster", 1, one
    yield "proxy", k, _several(k, "for each lineage of each cluster", at_least=True)
    writing = bool({"answered", "sampled"} & set(recipe.transfer.kinds))
    yield "write", k * writing, _several(k, "for each cluster")
    yield "transfer", 1, one
    if recipe.transfer.reads:
        own = recipe.transfer.writers == "devices"
        asked, of = (devices, "for each device") if own else (k, "for each proxy")
        count = asked + len(recipe.models.ancestors)
        yield "read", count, _several(count, f"{of} and each ancestor", at_least=given or not own)
        yield "agree", 1, one
    yield "shift", int(recipe.distill.shifted), one
    yield "mix", int(recipe.distill.mixed > 0), one
    vectors = int(recipe.distill.task_vectors > 0 and of_the_base(recipe.models))
    yield "task_vectors", vectors, one
    if recipe.distill.teachers == "likeliest":
        yield from _chosen(recipe, devices, at_least=given)
    elif recipe.distill.teachers == "proxies":
        yield "consult", k, _several(k, "for each proxy", at_least=True)
    elif isinstance(recipe.distill.objective, VAAObjective):
        own = recipe.transfer.writers == "devices"
        asked, of = (devices, "for each device") if own else (k, "for each proxy")
        yield "consult", asked, _several(asked, of, at_least=given or not own)
    yield "joint", int(shares.joint > 0), one
    most = min(k, devices) * vectors * recipe.distill.own_task_vectors
    yield "own_vector", most, f"at most {most} steps, one for each cluster with devices that start from the base"
    yield "branch", k * (shares.branch > 0), _several(k, "for each cluster")
    yield "assemble", 1, one
    yield "tune", int(shares.tune > 0), one
    yield "upcycle", int(bool({"pooled_text", "centralized"} & references)), one
    for name in dict.fromkeys(recipe.evaluate.references):
        yield from _baseline(recipe, name, devices, given=given)
        if name in STEPS and (name != "fedjets" or tunes_fedjets(recipe)):
            yield name, 1, one
    models = 4 + vectors + devices + 2 * k + len(references)  # four: base, joint student, merged and tuned MoE
    yield "evaluate", models, _several(models, "for each model", at_least=True)
    graded = (2 + len(references)) * (recipe.judge is not None)
    yield "judge", graded, _several(graded, "for the base, the MoE and each reference")
    yield "report", 1, one


def _baseline(recipe: Recipe, name: str, devices: int, *, given: bool) -> Iterator[tuple[str, int, str]]:
    """What comes before a baseline for which devices train."""
    parts, one = _parts(recipe, devices), "depends on steps that have not run"
    if name == "fedmkt":
        yield from _chosen(recipe, devices, "fedmkt_", at_least=given)
    if name in ("ofa_kd", "fedmkt"):
        short = name.removesuffix("_kd")
        k, shares = recipe.cluster.k, recipe.distill.shares
        yield f"{short}_joint", int(shares.joint > 0), one
        most = k * recipe.distill.own_task_vectors * (recipe.distill.task_vectors > 0 and of_the_base(recipe.models))
        yield (
            f"{short}_own_vector",
            most,
            f"at most {most} steps, one for each cluster with devices that start from the base",
        )
        yield f"{short}_branch", k * (shares.branch > 0), _several(k, "for each cluster")
        yield f"{short}_assemble", 1, one
        yield f"{short}_tune", int(shares.tune > 0), one
    if name == "fedjets":
        rounds, tuned = recipe.baselines.fedjets.rounds, tunes_fedjets(recipe)
        yield "fedjets_start", 1, one
        trained = devices * rounds
        yield "fedjets_device", trained, _several(trained, "for each device and round", at_least=given)
        yield "fedjets_round", rounds, _several(rounds, "for each round")
        yield "fedjets_best", 1, one
        yield "fedjets_tune", int(tuned), one
    if name == "fedavg_dense":
        rounds = recipe.baselines.fedavg_dense.rounds
        trained = devices * rounds
        each = "for each device and round"
        yield "fedavg_device", trained, _several(trained, each, at_least=given)
        yield "fedavg_materialise", rounds * parts, _several(rounds * parts, each, at_least=given)
        yield "fedavg_round", rounds, _several(rounds, "for each round")
    if name == "btx":
        k = recipe.cluster.k
        yield "btx_device", devices, _several(devices, "for each device", at_least=given)
        yield "btx_materialise", parts, _several(parts, "for each device", at_least=given)
        yield "btx_branch", k, _several(k, "for each cluster")
        yield "btx_merge", 1, one


def _parts(recipe: Recipe, devices: int) -> int:
    """Devices that send less than a whole model."""
    own = [recipe.device.of(name).sends != "model" for name in recipe.device.own]
    return sum(own) + max(0, devices - len(own)) * (recipe.device.sends != "model")


def _chosen(recipe: Recipe, devices: int, prefix: str = "", *, at_least: bool) -> Iterator[tuple[str, int, str]]:
    """Where the likeliest teach: who finds what how likely, and what they say of it."""
    own = recipe.transfer.writers == "devices"
    asked, of = (devices, "for each device") if own else (recipe.cluster.k, "for each proxy")
    at_least = at_least or not own
    yield f"{prefix}likelihoods", asked + 1, _several(asked + 1, f"{of} and the student", at_least=at_least)
    yield f"{prefix}consult", asked, _several(asked, of, at_least=at_least)


def _several(count: int, each: str, *, at_least: bool = False) -> str:
    return f"{'at least ' * at_least}{count} steps, one {each}"
