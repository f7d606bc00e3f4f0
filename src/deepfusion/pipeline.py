"""The method on one screen: device, upload, cluster, proxy, transfer, distill, assemble, tune, evaluate, report.

Each line takes what earlier lines returned. Steps start as soon as what they need is there, and are looked up in the
run's store first; so the order below is the order of the method, not of the clock.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Generator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from deepfusion import precision, roles
from deepfusion.artifacts import (
    Artifact,
    Checkpoint,
    Clusters,
    Corpus,
    Intake,
    Judgements,
    Likelihoods,
    Proxy,
    Report,
    Scores,
    Teaching,
    TransferSet,
    Upload,
    Wire,
    Writing,
)
from deepfusion.config import ModelSource, Recipe, Runtime
from deepfusion.config.targets import target_of
from deepfusion.elsewhere import devices_elsewhere, no_run_here, refuse_what_needs_text
from deepfusion.engine import Engine, StepError, Watcher, futures, resolved
from deepfusion.errors import InputError, concerns_all
from deepfusion.inputs import by_content
from deepfusion.judging import check
from deepfusion.labels import left_out
from deepfusion.learning import Given, choose, students
from deepfusion.outlook import waiting
from deepfusion.planner import NotYetRunError, PlannedStep, Planner
from deepfusion.references import references
from deepfusion.roles import NO_KIN, WITHOUT_KIN, Teacher
from deepfusion.steps import FIRST, LAST, STEPS, placed, sent_by
from deepfusion.store import Store, link_tree

A = TypeVar("A", bound=Artifact)
ROUTED = {
    "merged",
    "deepfusion",
    "pooled_text",
    "centralized",
    "btx",
    "ofa_kd",
    "fedmkt",
    "fedjets",
}  # systems that are MoEs


@dataclass(frozen=True)
class Received:
    """What devices elsewhere sent."""

    uploads: Mapping[str, Upload] = field(default_factory=dict[str, Upload])  # by device
    failures: Mapping[str, str] = field(default_factory=dict[str, str])  # device → why there is no upload of it
    wire: Mapping[str, Wire] = field(default_factory=dict[str, Wire])  # device → what the messages with it came to


@dataclass(frozen=True)
class Order:
    """What one device elsewhere is to do."""

    device: str
    seed: int
    name: str  # of the ancestor in the recipe
    ancestor: Checkpoint
    made_seed: int  # of the ancestor, if it is made on the spot


@dataclass(frozen=True)
class Fleet:
    """What all devices elsewhere are to do, and what public text there is."""

    corpus: Corpus
    orders: tuple[Order, ...]


@dataclass(frozen=True)
class _Ground:
    """What there is before devices train."""

    corpus: Future[Corpus]
    base: Future[Checkpoint]
    ancestors: dict[str, Future[Checkpoint]]
    names: list[str]  # of the devices


def run(
    recipe: Recipe,
    out: str | Path | None = None,
    runtime: Runtime | None = None,
    watch: Watcher | None = None,
    *,
    steps: Path | None = None,
    received: Received | None = None,
    only: Collection[str] | None = None,
) -> Report:
    """Run a recipe, or what is left of it, in `out` (default `runs/<name>`), and return its report.

    `out` then holds `moe/` (an ordinary checkpoint with its model card), `report.html`, `results.json` and `steps/`.

    Args:
        recipe: what to run.
        out: where.
        runtime: how.
        watch: told of every step.
        steps: where steps are kept, if not in `out`: recipes that differ in their last phases share the first.
        received: uploads of devices elsewhere, which then train nothing here.
        only: devices that take part; the others are left out as if they had never sent anything. None: all.

    Raises:
        ValueError: one line about what in the recipe or its inputs is wrong.
    """
    if recipe.judge is not None:
        check(recipe.judge)
    if received is None and (devices := devices_elsewhere(recipe)):
        raise no_run_here(recipe, devices)
    out = _folder(recipe, out)
    with _running(recipe, out, steps, runtime, watch) as (keyed, engine):
        return _publish(_Method(recipe, keyed, engine, received, only), out)


def prepare(
    recipe: Recipe, out: str | Path | None = None, runtime: Runtime | None = None, watch: Watcher | None = None
) -> Fleet:
    """Run the steps of a federation's server that come before its devices, and say what each of these is to do.

    Raises:
        InputError: the recipe has no federation, asks for what only private text could give, or its inputs are wrong.
    """
    out = _folder(recipe, out)
    with _running(recipe, out, None, runtime, watch) as (keyed, engine):
        method = _Method(recipe, keyed, engine, Received())
        ground = method.ground()
        ancestors = {name: model.result() for name, model in ground.ancestors.items()}
        places = roles.starting_points(ground.names, recipe.models, recipe.seed)
        orders = tuple(
            Order(device, _device_seed(recipe, number), name, ancestors[name], _made_seed(recipe, name))
            for number, (device, name) in enumerate(places.items())
        )
        return Fleet(ground.corpus.result(), orders)


@contextmanager
def _running(
    recipe: Recipe, out: Path, steps: Path | None, runtime: Runtime | None, watch: Watcher | None
) -> Generator[tuple[Recipe, Engine]]:
    """The recipe by which steps are keyed, and an engine over the steps of a folder that nobody else works in."""
    from filelock import FileLock, Timeout

    keyed = by_content(recipe)  # first of all: it finds what is missing
    store = Store(steps or out / "steps")
    at = store.root.parent
    try:
        at.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(at / ".lock")
        with lock.acquire(timeout=0), Engine(store, runtime or Runtime(), watch) as engine:
            yield keyed, engine
    except Timeout:
        raise InputError(f"{at} is in use by another run: wait for it, or give --out another folder") from None


def _device_seed(recipe: Recipe, number: int) -> int:
    """The seed of the device in this place, wherever it trains."""
    return recipe.seed + 1000 + number


def _made_seed(recipe: Recipe, ancestor: str) -> int:
    """The seed of an ancestor that is made on the spot, wherever it is made."""
    return recipe.seed + 1 + list(recipe.models.ancestors).index(ancestor)


def plan(recipe: Recipe, out: str | Path | None = None) -> list[PlannedStep]:
    """What `run` would find done, run, or still has to wait for; runs nothing.

    Of a recipe whose devices are elsewhere, what their server would; all but its first steps wait for uploads.
    """
    keyed = by_content(recipe)
    elsewhere = devices_elsewhere(recipe)
    planner = Planner(Store(_folder(recipe, out) / "steps"), Runtime())
    try:
        if not elsewhere:
            _Method(recipe, keyed, planner).report()
            return planner.steps
        _Method(recipe, keyed, planner, Received()).ground()
    except NotYetRunError:
        pass
    return planner.steps + waiting(keyed, {step.phase for step in planner.steps}, elsewhere)


def _folder(recipe: Recipe, out: str | Path | None) -> Path:
    """The folder of a run.

    Raises:
        InputError: there can be no such folder.
    """
    out = Path(out) if out is not None else Path("runs") / recipe.name
    file = next((part for part in (out, *out.parents) if part.exists() and not part.is_dir()), None)
    if file is not None:
        raise InputError(f"--out {out} cannot be a folder, for {file} is a file: give another one")
    return out


class _Method:
    """The phases of one run, in order. `keyed` is the recipe by which steps are keyed: contents stand for paths."""

    def __init__(
        self,
        recipe: Recipe,
        keyed: Recipe,
        engine: Engine,
        received: Received | None = None,
        only: Collection[str] | None = None,
    ) -> None:
        self.recipe, self.keyed, self.engine, self.seed = recipe, keyed, engine, recipe.seed
        self.received, self.only = received, only

    def go(self, gives: type[A], phase: str, item: str | None = None, /, **arguments: Any) -> Future[A]:
        """Submit one step of the table of steps; raises at once what is known already to stop the run."""
        function, result, version = STEPS[phase]
        assert result is gives
        step = self.engine.submit(phase, function, version, result, item, **arguments)
        error = step.exception() if step.done() else None
        if error is None or isinstance(error, NotYetRunError):
            return cast("Future[A]", step)
        if arguments.get("expendable") and not concerns_all(error):
            return cast("Future[A]", step)
        raise error

    def report(self) -> Report:
        """Everything; the last step's artifact."""
        recipe, keyed, seed = self.recipe, self.keyed, self.seed
        encoder = placed(encoder=(recipe.device.encoder, keyed.device.encoder))
        ground = self.ground()
        corpus, base, ancestors = ground.corpus, ground.base, ground.ancestors

        # Devices: each trains its own model on its own text, and uploads it with an embedding, once.
        arrived, failures = self.devices(ground)
        intake = self.go(
            Intake, "upload", uploads=list(arrived.values()), failures=failures, ancestors=ancestors,
            embedding_bytes=recipe.device.embedding_bytes, **sent_by(recipe.device),
        )  # fmt: skip
        for rejection in intake.result().rejected:
            if rejection.device not in failures:  # of which the watcher has been told
                self.engine.watch.message(left_out(rejection.device, rejection.reason))
        accepted = [arrived[device] for device in intake.result().accepted]
        whole = {
            upload.device: self.go(
                Upload, "materialise", upload.device, upload=upload, ancestor=ancestors[upload.ancestor],
                **sent_by(recipe.device.of(upload.device)),
            )
            for upload in accepted
            if upload.sends != "model"
        }  # fmt: skip
        accepted = [whole[one.device].result() if one.device in whole else one for one in accepted]

        # Phase I: group the devices by what they know; average within a cluster what may be averaged.
        clusters = self.go(Clusters, "cluster", uploads=accepted, config=recipe.cluster, seed=seed)
        members = clusters.result()
        own = [Teacher(upload.device, members.of(upload.device), upload) for upload in accepted]
        groups = roles.averaged(accepted, members)
        origins = {upload.lineage: ancestors[upload.ancestor] for upload in accepted}
        averages = [
            self.go(
                Proxy, "proxy", name, uploads=group, ancestor=origins[group[0].lineage], cluster=n, config=recipe.proxy
            )
            for name, n, group in groups
        ]  # fmt: skip
        proxies = [Teacher(name, n, average) for (name, n, _), average in zip(groups, averages, strict=True)]

        # Transfer: public text, and what devices' models say about their own subjects.
        before = {"keep_before": True} if recipe.distill.shifted else {}
        writings = [
            self.go(
                Writing, "write", f"cluster-{cluster}", cluster=cluster, models=writers, ancestors=origins,
                clusters=clusters, corpus=corpus, config=recipe.transfer, seed=seed, priority=FIRST, **before,
                **encoder,
            )
            for cluster, writers in roles.writers(own, proxies, members, recipe.transfer)
        ]  # fmt: skip
        transfer = self.go(
            TransferSet, "transfer", writings=writings, clusters=clusters, corpus=corpus, config=recipe.transfer,
            priority=FIRST, **encoder,
        )  # fmt: skip
        fluent = roles.fluent(own, proxies, members, recipe.transfer)
        if recipe.transfer.reads:
            transfer = self.agreed(transfer, fluent, origins)
        lessons = transfer
        if recipe.distill.shifted:
            lessons = self.go(
                TransferSet, "shift", base=base, transfer=transfer, config=recipe.transfer, priority=FIRST
            )  # fmt: skip
        if recipe.distill.mixed:
            lessons = self.go(
                TransferSet, "mix", transfer=transfer, uploads=accepted, ancestors=origins, clusters=clusters,
                config=recipe.transfer, others=recipe.distill.mixed, priority=FIRST,
            )  # fmt: skip

        # Phases II and III: one student learns from everyone, copies of it in their own domains; they become one MoE.
        start = base
        related = roles.of_lineage(base.result().lineage, proxies, groups) if recipe.distill.task_vectors else []
        kin = {proxy.cluster: cast("Future[Proxy]", proxy.model) for proxy in related}
        warned = [f"{NO_KIN}; {WITHOUT_KIN}"] if recipe.distill.task_vectors and not kin else []
        if kin:
            start = self.go(
                Checkpoint, "task_vectors", base=base, proxies=list(kin.values()), scale=recipe.distill.task_vectors,
                priority=FIRST,
            )  # fmt: skip
        teachings = [
            self.go(
                Teaching, "consult", teacher.name, teacher=teacher.model, cluster=teacher.cluster, transfer=transfer,
                config=recipe.distill.consultation, priority=FIRST,
            )
            for teacher in roles.consulted(own, proxies, recipe)
        ]  # fmt: skip
        budget = 3.0 * base.result().active_parameters * recipe.distill.budget_tokens
        given = Given(recipe, corpus, base, start, kin, accepted, fluent, members, transfer, lessons, teachings, budget)
        if recipe.distill.teachers == "likeliest":
            teachings = choose(self.go, given, recipe.distill, priority=FIRST)
            given = replace(given, teachings=teachings)
        ours = students(self.go, given, recipe.distill, priority=FIRST)

        beside = references(self.go, given)
        systems: list[tuple[str, str | None, Future[Any] | Artifact]] = [
            ("base", None, base),
            *(("device", upload.device, upload) for upload in accepted),
            *(("proxy", proxy.name, proxy.model) for proxy in proxies),
            *([("task_vectors", None, start)] if kin else []),
            ("joint_student", None, ours.joint),
            *(("branch", f"cluster-{cluster}", branch) for cluster, branch in enumerate(ours.branches)),
            ("merged", None, ours.merged),
            ("deepfusion", None, ours.moe),
            *((name, None, model) for name, model in beside.models.items()),
        ]
        # One model may have several names (a proxy of one member, branches without a budget): it is measured once.
        alone = {
            id(proxy.model): group[0] for proxy, (_, _, group) in zip(proxies, groups, strict=True) if not group[1:]
        }
        first: dict[int, Future[Scores]] = {}
        scores: list[Future[Scores]] = []
        for system, item, model in systems:
            which = id(alone.get(id(model), model))
            known = {"known": first[which]} if which in first else {}
            step = self.go(
                Scores, "evaluate", _label(system, item), model=model, corpus=corpus, config=recipe.evaluate.scoring,
                system=system, item=item, priority=LAST + 1,
                routing=system in ROUTED, **known,
            )  # fmt: skip
            first.setdefault(which, step)
            scores.append(step)
        graded: dict[str, Any] = {}
        if (judge := recipe.judge) is not None:
            answering = {"base": base, "deepfusion": ours.moe, **beside.models}
            graded["judgements"] = [
                self.go(
                    Judgements, "judge", system, model=model, corpus=corpus, config=judge, system=system,
                    dtype=recipe.evaluate.dtype, priority=LAST + 1,
                    unkeyed={"cache": self.engine.store.root.parent / "judged"},
                )
                for system, model in answering.items()
            ]  # fmt: skip
        return self.write_report(
            corpus=corpus, uploads=accepted, intake=intake, clusters=clusters,
            proxies=[proxy.model for proxy in proxies], transfer=transfer, teachings=teachings,
            students={
                "joint_student": ours.joint, "merged": ours.merged, "deepfusion": ours.moe, **beside.models
            },
            branches=ours.branches, scores=scores, parts=beside.parts, rounds=beside.rounds,
            changed=None if lessons is transfer else lessons, warned=warned, **graded,
        )  # fmt: skip

    def ground(self) -> _Ground:
        """Text, the base, and where devices start from; a broken checkpoint is told before devices train for nothing.

        Raises:
            InputError: also if devices are elsewhere, and the recipe asks for what only their text could give.
        """
        recipe, keyed, seed = self.recipe, self.keyed, self.seed
        data = placed(config=(recipe.data, keyed.data))
        if self.received is None:
            corpus = self.go(Corpus, "data", seed=seed, **data)
        else:
            refuse_what_needs_text(recipe)
            assert recipe.federation is not None
            corpus = self.go(Corpus, "public", devices=list(recipe.federation.devices), seed=seed, **data)
        base = self.ancestor("base", recipe.models.base, keyed.models.base, corpus, seed)
        ancestors = {
            name: self.ancestor(name, source, keyed.models.ancestors[name], corpus, _made_seed(recipe, name))
            for name, source in recipe.models.ancestors.items()
        }
        names = [device.id for device in corpus.result().devices]
        recipe.device.only_of(names)
        for model in self.given(base, ancestors):
            model.result()
        if recipe.models.base.path is not None:
            try:
                target_of(base.result().model_type, recipe.assemble.target)
            except ValueError as error:
                raise InputError(f"models.base: {error}") from None
        return _Ground(corpus, base, ancestors, names)

    def devices(self, ground: _Ground) -> tuple[dict[str, Upload], dict[str, str]]:
        """What devices sent, and why others did not: those that train here, or those elsewhere."""
        recipe, keyed, seed = self.recipe, self.keyed, self.seed
        if self.received is not None:
            held = self.received.uploads
            return {name: held[name] for name in ground.names if name in held}, dict(self.received.failures)
        uploads = {
            device: self.go(
                Upload, "device", device, device=device, ancestor=ground.ancestors[name], ancestor_name=name,
                corpus=ground.corpus, seed=_device_seed(recipe, number), expendable=True,
                **placed(config=(recipe.device.of(device), keyed.device.of(device))),
            )
            for number, (device, name) in enumerate(roles.starting_points(ground.names, recipe.models, seed).items())
            if self.only is None or device in self.only
        }  # fmt: skip
        return self.arrivals(uploads)

    def ancestor(
        self, name: str, source: ModelSource, keyed: ModelSource, corpus: Future[Corpus], seed: int
    ) -> Future[Checkpoint]:
        """A given checkpoint, or one made on the spot."""
        if source.path is not None:
            return self.go(Checkpoint, "take", name, **placed(path=(source.path, keyed.path)))
        return self.go(Checkpoint, "make", name, made=source.make, corpus=corpus, seed=seed)

    def agreed(
        self, transfer: Future[TransferSet], fluent: Sequence[Teacher], origins: dict[str, Future[Checkpoint]]
    ) -> Future[TransferSet]:
        """The transfer set, of whose written texts those are left that others agree with."""
        asked: dict[str, Any] = {"transfer": transfer, "kinds": ("sampled",), "priority": FIRST}
        found = {one.name: self.go(Likelihoods, "read", one.name, model=one.model, **asked) for one in fluent}
        before = {
            lineage: self.go(Likelihoods, "read", lineage, model=ancestor, **asked)
            for lineage, ancestor in origins.items()
        }
        return self.go(
            TransferSet, "agree", transfer=transfer, models=[one.model for one in fluent], found=found, before=before,
            config=self.recipe.transfer, priority=FIRST,
        )  # fmt: skip

    def given(self, base: Future[Checkpoint], ancestors: dict[str, Future[Checkpoint]]) -> list[Future[Checkpoint]]:
        """The models that were not made here."""
        models = self.recipe.models
        named = [(models.base, base), *((models.ancestors[name], model) for name, model in ancestors.items())]
        return [model for source, model in named if source.path is not None]

    def arrivals(self, uploads: dict[str, Future[Upload]]) -> tuple[dict[str, Upload], dict[str, str]]:
        """What devices sent, and why others did not.

        A broken device never takes the run down; a fault of what all were given does, and so does the disk.
        """
        devices = {upload: device for device, upload in uploads.items()}
        arrived: dict[str, Upload] = {}
        failures: dict[str, str] = {}
        for upload in as_completed(devices):
            try:
                arrived[devices[upload]] = upload.result()
            except NotYetRunError:
                raise
            except Exception as error:
                if concerns_all(error):
                    raise
                reason = error.reason if isinstance(error, StepError) else str(error)
                failures[devices[upload]] = reason.replace(f"{self.engine.store.root}{os.sep}", "")
        return {device: arrived[device] for device in uploads if device in arrived}, failures

    def write_report(self, warned: Sequence[str], **found: Any) -> Report:
        """Wait for everything, but for nothing more once something has failed, and write it down."""
        for future in as_completed(futures(found)):
            future.result()
        done: dict[str, Any] = resolved(found)
        of_groups = [w for part in (done["clusters"], *done["proxies"]) for w in part.warnings]
        of_run = [*warned, *precision.notices([(d.step.phase, d.facts.precision) for d in self.engine.done])]
        for notice in (*of_run, *done["transfer"].notices, *of_groups):
            self.engine.watch.message(notice)
        phases = [
            {
                "name": d.step.phase,
                "item": d.step.item,
                "seconds": d.facts.seconds,
                "cpu_seconds": d.facts.cpu_seconds,
                "cached": d.cached,
                "tokens": d.artifact.work.tokens or None,
                "flops": d.artifact.work.flops or None,
                "peak_bytes": d.facts.peak_bytes,
                "training": d.facts.training and asdict(d.facts.training),
            }
            for d in self.engine.done
        ]
        unkeyed = {"phases": phases, "warnings": of_run}
        if self.received is not None:
            done["wire"] = dict(self.received.wire)
        return self.go(Report, "report", recipe=self.keyed, **done, unkeyed=unkeyed).result()


def _publish(method: _Method, out: Path) -> Report:
    """Put what people look for at the top of the run's folder."""
    report = method.report()
    moe = next(d.artifact for d in method.engine.done if d.artifact.digest == report.moe_digest)
    target, fresh = out / "moe", out / ".moe.partial"
    shutil.rmtree(fresh, ignore_errors=True)
    link_tree(moe.folder, fresh)
    shutil.copyfile(report.folder / "README.md", fresh / "README.md")
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    for name in ("results.json", "report.html"):
        shutil.copyfile(report.folder / name, out / f".{name}.partial")
        (out / f".{name}.partial").replace(out / name)
    return report


def _label(system: str, item: str | None) -> str:
    """What the evaluation of a system is called."""
    return system if item is None else item if system == "device" else f"{system}-{item}"
