"""The method on one screen: device, upload, cluster, proxy, transfer, distill, assemble, tune, evaluate, report.

Each line takes what earlier lines returned. Steps start as soon as what they need is there, and are looked up in the
run's store first; so the order below is the order of the method, not of the clock.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar, cast

from deepfusion.artifacts import (
    Artifact,
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
    Writing,
    file_digest,
)
from deepfusion.config import FileData, ModelSource, Recipe, Runtime, VAAObjective
from deepfusion.engine import Engine, NotYetRunError, PlannedStep, Planner, StepError, Watcher
from deepfusion.store import Store, link_tree

A = TypeVar("A", bound=Artifact)

# Phase → what runs it, what it gives, and a number to raise when the same inputs would give something else.
STEPS: dict[str, tuple[str, type[Artifact], int]] = {
    "data": ("deepfusion.phases.data:build_corpus", Corpus, 1),
    "make": ("deepfusion.ancestors:make", Checkpoint, 1),
    "take": ("deepfusion.ancestors:take", Checkpoint, 1),
    "device": ("deepfusion.phases.device:train_device", Upload, 1),
    "upload": ("deepfusion.phases.upload:receive", Intake, 1),
    "cluster": ("deepfusion.phases.cluster:cluster", Clusters, 1),
    "proxy": ("deepfusion.phases.proxy:average", Proxy, 1),
    "write": ("deepfusion.phases.transfer:write_cluster", Writing, 1),
    "transfer": ("deepfusion.phases.transfer:gather", TransferSet, 1),
    "consult": ("deepfusion.phases.distill:consult", Teaching, 1),
    "joint": ("deepfusion.phases.distill:distill", Checkpoint, 2),
    "branch": ("deepfusion.phases.distill:distill", Checkpoint, 2),
    "assemble": ("deepfusion.phases.assemble:merge", Checkpoint, 1),
    "tune": ("deepfusion.phases.tune:tune", Checkpoint, 2),
    "upcycle": ("deepfusion.phases.assemble:merge", Checkpoint, 1),
    "pooled_text": ("deepfusion.baselines.controls:pooled_text", Checkpoint, 1),
    "pooled_text_dense": ("deepfusion.baselines.controls:pooled_text", Checkpoint, 1),
    "dense_kd": ("deepfusion.baselines.controls:dense_kd", Checkpoint, 2),
    "centralized": ("deepfusion.baselines.controls:centralized", Checkpoint, 1),
    "evaluate": ("deepfusion.phases.evaluate:evaluate", Scores, 1),
    "report": ("deepfusion.conclusion:conclude", Report, 1),
}
FIRST, LAST = -10, 10  # priorities: the run's own critical path, and what only stands beside it


def run(
    recipe: Recipe, out: str | Path | None = None, runtime: Runtime | None = None, watch: Watcher | None = None
) -> Report:
    """Run a recipe, or what is left of it, in `out` (default `runs/<name>`), and return its report.

    `out` then holds `moe/` (an ordinary checkpoint with its model card), `report.html`, `results.json` and `steps/`.

    Raises:
        ValueError: one line about what in the recipe or its inputs is wrong.
    """
    out = Path(out) if out is not None else Path("runs") / recipe.name
    out.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock, Timeout

    lock = FileLock(out / ".lock")
    try:
        with lock.acquire(timeout=0), Engine(Store(out / "steps"), runtime or Runtime(), watch) as engine:
            return _publish(_Method(recipe, engine), out)
    except Timeout:
        raise ValueError(f"{out} is in use by another run: wait for it, or give --out another folder") from None


def plan(recipe: Recipe, out: str | Path | None = None) -> list[PlannedStep]:
    """What `run` would find done, run, or still has to wait for; runs nothing."""
    out = Path(out) if out is not None else Path("runs") / recipe.name
    planner = Planner(Store(out / "steps"), Runtime())
    try:
        _Method(recipe, planner).report()
    except NotYetRunError:
        planner.steps.append(PlannedStep("…", None, "wait", "which further steps there are depends on those above"))
    return planner.steps


class _Method:
    """The phases of one run, in order."""

    def __init__(self, recipe: Recipe, engine: Engine) -> None:
        self.recipe, self.engine, self.seed = recipe, engine, recipe.seed

    def go(self, gives: type[A], phase: str, item: str | None = None, /, **arguments: Any) -> Future[A]:
        """Submit one step of the table above."""
        function, result, version = STEPS[phase]
        assert result is gives
        return cast("Future[A]", self.engine.submit(phase, function, version, result, item, **arguments))

    def report(self) -> Report:
        """Everything; the last step's artifact."""
        recipe, seed = self.recipe, self.seed
        encoder = recipe.device.encoder
        corpus = self.go(Corpus, "data", config=recipe.data, seed=seed, also_keyed_by=_inputs(recipe))
        base = self.ancestor("base", recipe.models.base, corpus, seed)
        ancestors = {
            name: self.ancestor(name, source, corpus, seed + 1 + number)
            for number, (name, source) in enumerate(recipe.models.ancestors.items())
        }

        # Devices: each trains its own model on its own text, and uploads it with an embedding, once.
        encoder_files = None if encoder == "hashing" else _folder_inputs(encoder)
        for model in self.given(base, ancestors):
            model.result()  # a broken checkpoint is told before devices train for nothing
        starts_from = _assigned([device.id for device in corpus.result().devices], recipe)
        uploads = {
            device: self.go(
                Upload, "device", device, device=device, ancestor=ancestors[name], ancestor_name=name, corpus=corpus,
                config=recipe.device, seed=seed + 1000 + number, also_keyed_by=encoder_files,
            )
            for number, (device, name) in enumerate(starts_from.items())
        }  # fmt: skip
        arrived, failures = self.arrivals(uploads)
        intake = self.go(
            Intake, "upload", uploads=list(arrived.values()), failures=failures,
            embedding_bytes=recipe.device.embedding_bytes,
        )  # fmt: skip
        accepted = [arrived[device] for device in intake.result().accepted]

        # Phase I: group the devices by what they know; average within a cluster what may be averaged.
        clusters = self.go(Clusters, "cluster", uploads=accepted, config=recipe.cluster, seed=seed)
        groups = _by_cluster_and_lineage(accepted, clusters.result(), by_type=recipe.cluster.mode == "by_type")
        proxies = [
            self.go(Proxy, "proxy", f"{cluster}-{number}", uploads=members, cluster=cluster, config=recipe.proxy)
            for number, (cluster, members) in enumerate(groups)
        ]

        # Transfer: public text, and what devices' models say about their own subjects.
        origins = {upload.lineage: ancestors[upload.ancestor] for upload in accepted}
        writings = [
            self.go(
                Writing, "write", f"cluster-{cluster}", cluster=cluster, models=writers, ancestors=origins,
                clusters=clusters, corpus=corpus, config=recipe.transfer, encoder=encoder, seed=seed, priority=FIRST,
            )
            for cluster, writers in self.writers(accepted, clusters.result(), proxies)
        ]  # fmt: skip
        transfer = self.go(
            TransferSet, "transfer", writings=writings, clusters=clusters, corpus=corpus, config=recipe.transfer,
            encoder=encoder, priority=FIRST,
        )  # fmt: skip

        # Phase II: one student learns from everyone; copies of it go on, each in its own domain.
        teachings = self.teachings(accepted, clusters.result(), proxies, transfer)
        active = base.result().active_parameters
        budget = 3.0 * active * recipe.distill.budget_tokens
        shares = recipe.distill.shares
        k = recipe.cluster.k
        joint = base
        if shares.joint:
            joint = self.go(
                Checkpoint, "joint", student=base, transfer=transfer, teachings=teachings, config=recipe.distill,
                budget=shares.joint * budget, seed=seed, priority=FIRST,
            )  # fmt: skip
        branches = [joint] * k
        if shares.branch:
            branches = [
                self.go(
                    Checkpoint, "branch", f"cluster-{cluster}", student=joint, transfer=transfer, teachings=teachings,
                    config=recipe.distill, budget=shares.branch * budget / k, cluster=cluster, seed=seed + cluster,
                    priority=FIRST,
                )
                for cluster in range(k)
            ]  # fmt: skip

        # Phase III: the copies' FFNs become experts of one MoE, which is tuned.
        merged = self.go(
            Checkpoint, "assemble", students=branches, transfer=transfer, config=recipe.assemble, seed=seed,
            priority=FIRST,
        )  # fmt: skip
        moe = merged
        if shares.tune:
            moe = self.go(
                Checkpoint, "tune", moe=merged, transfer=transfer, teachings=teachings, config=recipe.tune,
                ask=recipe.distill.teachers, budget=shares.tune * budget, seed=seed, priority=FIRST,
            )  # fmt: skip

        controls = self.controls(base, corpus, transfer, teachings, budget)
        systems: list[tuple[str, str | None, Future[Any] | Artifact]] = [
            ("base", None, base),
            *(("device", upload.device, upload) for upload in accepted),
            *(("proxy", f"{number}", proxy) for number, proxy in enumerate(proxies)),
            ("joint_student", None, joint),
            *(("branch", f"cluster-{cluster}", branch) for cluster, branch in enumerate(branches)),
            ("merged", None, merged),
            ("deepfusion", None, moe),
            *((name, None, model) for name, model in controls.items()),
        ]
        scores = [
            self.go(
                Scores, "evaluate", system if item is None else f"{system}-{item}", model=model, corpus=corpus,
                config=recipe.evaluate, system=system, item=item, priority=LAST + 1,
                routing=system in ("merged", "deepfusion", "pooled_text", "centralized"),
            )
            for system, item, model in systems
        ]  # fmt: skip
        return self.write_report(
            corpus=corpus, uploads=accepted, intake=intake, clusters=clusters, proxies=proxies, transfer=transfer,
            teachings=teachings, students={"joint_student": joint, "merged": merged, "deepfusion": moe, **controls},
            branches=branches, scores=scores,
        )  # fmt: skip

    def ancestor(self, name: str, source: ModelSource, corpus: Future[Corpus], seed: int) -> Future[Checkpoint]:
        """A given checkpoint, or one made on the spot."""
        if source.path is not None:
            return self.go(Checkpoint, "take", name, path=source.path, also_keyed_by=_folder_inputs(source.path))
        return self.go(Checkpoint, "make", name, made=source.make, corpus=corpus, seed=seed)

    def given(self, base: Future[Checkpoint], ancestors: dict[str, Future[Checkpoint]]) -> list[Future[Checkpoint]]:
        """The models that were not made here."""
        models = self.recipe.models
        named = [(models.base, base), *((models.ancestors[name], model) for name, model in ancestors.items())]
        return [model for source, model in named if source.path is not None]

    def arrivals(self, uploads: dict[str, Future[Upload]]) -> tuple[dict[str, Upload], dict[str, str]]:
        """What devices sent, and why others did not: a broken device never takes the run down, a wrong recipe does."""
        arrived: dict[str, Upload] = {}
        failures: dict[str, str] = {}
        for device, upload in uploads.items():
            try:
                arrived[device] = upload.result()
            except (ValueError, OSError, NotYetRunError):
                raise
            except Exception as error:
                failures[device] = error.reason if isinstance(error, StepError) else str(error)
                self.engine.watch.message(f"{device} is left out: {error}")
        return arrived, failures

    def writers(
        self, accepted: list[Upload], clusters: Clusters, proxies: list[Future[Proxy]]
    ) -> list[tuple[int, list[Upload] | list[Proxy]]]:
        """Per cluster the models that write: its devices', or its proxies."""
        transfer = self.recipe.transfer
        if not {"answered", "sampled"} & set(transfer.kinds):
            return []
        result: list[tuple[int, list[Upload] | list[Proxy]]] = []
        for cluster, members in enumerate(clusters.members):
            if transfer.writers == "devices" and len(members) <= transfer.max_writers:
                result.append((cluster, [upload for upload in accepted if upload.device in members]))
            else:
                result.append((cluster, [p for p in (f.result() for f in proxies) if p.cluster == cluster]))
        return [(cluster, writers) for cluster, writers in result if writers]

    def teachings(
        self, accepted: list[Upload], clusters: Clusters, proxies: list[Future[Proxy]], transfer: Future[TransferSet]
    ) -> list[Future[Teaching]]:
        """Teachers asked after the fact; with writers as teachers only VAA needs more than they said while writing."""
        config = self.recipe.distill
        teachers: list[tuple[str, int, Upload | Proxy]]
        if config.teachers == "proxies":
            teachers = [(f"proxy-{n}", p.cluster, p) for n, p in enumerate(f.result() for f in proxies)]
        elif isinstance(config.objective, VAAObjective) and self.recipe.transfer.writers == "devices":
            teachers = [(upload.device, clusters.of(upload.device), upload) for upload in accepted]
        elif isinstance(config.objective, VAAObjective):
            teachers = [(f"proxy-{n}", p.cluster, p) for n, p in enumerate(f.result() for f in proxies)]
        else:
            return []
        return [
            self.go(
                Teaching, "consult", name, teacher=teacher, cluster=cluster, transfer=transfer, config=config,
                priority=FIRST,
            )
            for name, cluster, teacher in teachers
        ]  # fmt: skip

    def controls(
        self,
        base: Future[Checkpoint],
        corpus: Future[Corpus],
        transfer: Future[TransferSet],
        teachings: list[Future[Teaching]],
        budget: float,
    ) -> dict[str, Future[Checkpoint]]:
        """References on the same text at equal server compute, and the one that sees everything."""
        recipe, wanted = self.recipe, dict.fromkeys(self.recipe.evaluate.references)
        common = {"transfer": transfer, "teachings": teachings, "config": recipe.distill, "seed": self.seed}
        copies: Future[Checkpoint] | None = None
        if {"pooled_text", "centralized"} & wanted.keys():
            copies = self.go(
                Checkpoint, "upcycle", students=[base] * recipe.cluster.k, transfer=transfer, config=recipe.assemble,
                seed=self.seed, priority=LAST,
            )  # fmt: skip
        result: dict[str, Future[Checkpoint]] = {}
        for name in wanted:
            if name == "centralized":
                result[name] = self.go(
                    Checkpoint, name, moe=copies, corpus=corpus, distilling=recipe.distill, config=recipe.evaluate,
                    balance=recipe.tune.balance, seed=self.seed, priority=LAST - 1,
                )  # fmt: skip
            elif name == "dense_kd":
                result[name] = self.go(Checkpoint, name, base=base, budget=budget, priority=LAST, **common)
            else:
                result[name] = self.go(
                    Checkpoint, name, model=copies if name == "pooled_text" else base, budget=budget,
                    balance=recipe.tune.balance if name == "pooled_text" else 0.0, priority=LAST, **common,
                )  # fmt: skip
        return result

    def write_report(self, **found: Any) -> Report:
        """Wait for everything and write it down."""
        done: dict[str, Any] = {name: _await(value) for name, value in found.items()}
        warned = [w for part in (done["clusters"], *done["proxies"]) for w in part.warnings]
        for notice in (*done["transfer"].notices, *warned):
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
            }
            for d in self.engine.done
        ]
        return self.go(Report, "report", recipe=self.recipe, **done, unkeyed={"phases": phases}).result()


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


def _assigned(devices: list[str], recipe: Recipe) -> dict[str, str]:
    """Device → the name of the ancestor that it starts from."""
    names = list(recipe.models.ancestors)
    if recipe.models.assign == "random":
        import random

        generator = random.Random(f"{recipe.seed}-ancestors")
        return {device: generator.choice(names) for device in devices}
    # Round by round, shifted by one each time, so that devices of one domain do not all get the same type.
    return {device: names[(n + n // len(names)) % len(names)] for n, device in enumerate(devices)}


def _by_cluster_and_lineage(uploads: list[Upload], clusters: Clusters, by_type: bool) -> list[tuple[int, list[Upload]]]:
    """Who is averaged with whom. Clusters that claim to be type-pure are not split: mixing is then refused by name."""
    groups: dict[tuple[int, str], list[Upload]] = {}
    for upload in uploads:
        cluster = clusters.of(upload.device)
        groups.setdefault((cluster, upload.model_type if by_type else upload.lineage), []).append(upload)
    return [(cluster, members) for (cluster, _), members in sorted(groups.items(), key=lambda group: group[0])]


def _inputs(recipe: Recipe) -> dict[str, str]:
    """Digests of the files that the recipe's data comes from."""
    source = recipe.data.source
    if not isinstance(source, FileData):
        return {}
    files = [Path(text.path) for text in source.sources if text.path is not None]
    for path in files:
        if not path.is_file():
            raise ValueError(f"data file {path} does not exist")
    named = [name for text in source.sources for name in _leaves(text.arguments.get("data_files"))]
    local = [path for path in map(Path, named) if path.is_file()]  # patterns and addresses are `datasets`' own business
    return {str(path): file_digest(path) for path in files + local}


def _leaves(tree: Any) -> list[str]:
    """Every string in a tree of mappings and lists."""
    if isinstance(tree, str):
        return [tree]
    parts = cast("Iterable[Any]", tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else [])
    return [leaf for part in parts for leaf in _leaves(part)]


def _folder_inputs(path: str) -> dict[str, str]:
    """Digests of the files of a model's folder."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"model folder {folder} does not exist")
    return {p.name: file_digest(p) for p in sorted(folder.iterdir()) if p.is_file()}


def _await(value: Any) -> Any:
    if isinstance(value, Future):
        return cast("Future[Any]", value).result()
    if isinstance(value, dict):
        return {k: _await(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_await(v) for v in value]
    return value
