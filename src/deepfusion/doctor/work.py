"""What each phase of a run will have to do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from deepfusion.baselines.fedjets import pruned
from deepfusion.config import DevicePhase, Training, VAAObjective
from deepfusion.doctor.extent import Extent
from deepfusion.doctor.models import Start, adapter
from deepfusion.doctor.shapes import Shape
from deepfusion.phases.assemble import shape_of
from deepfusion.phases.judge import AT_ONCE, chosen
from deepfusion.roles import tunes_fedjets

SIGNAL, SIGNAL_TOKEN = 6, 14  # bytes on disk of a kept alternative, and of a token beside them
Kind = Literal["train", "write", "read", "files"]


@dataclass(frozen=True)
class Task:
    """Steps of a phase that are all alike; every number is one step's."""

    phase: str
    steps: int
    kind: Kind = "files"
    shape: Shape | None = None
    tokens: float = 0  # that pass through models
    forward: float = 0  # token-parameters
    backward: float = 0
    dtype: str = "float32"  # of a model that writes or reads
    training: Training | None = None
    adapter: int = 0  # weights that are trained, where it is not all of them
    batch: int = 0  # texts written at a time, or tokens read at a time
    turns: float = 0  # times that a batch is continued by one token each
    lessons: float = 0  # tokens of text held in memory
    taught: float = 0  # … of which a teacher's probabilities are held besides
    kept: int = 0  # of these for each token
    disk: float = 0  # bytes that it leaves
    own: bool = True  # part of the method; else it only stands beside

    @property
    def flops(self) -> float:
        """Two a token-parameter."""
        return 2 * (self.forward + self.backward)


def size_of(dtype: str) -> int:
    """Bytes of a number."""
    return getattr(torch, dtype).itemsize


def worked_out(of: Extent) -> list[Task]:
    """Every step of a run, phase by phase in the order of the method."""
    return [*_before(of), *_devices(of), *_transfer(of), *_students(of), *_beside(of)]


# ── the run itself ────────────────────────────────────────────────────────────────────────────────────────────────────


def _before(of: Extent) -> Iterator[Task]:
    size = sum(path.stat().st_size for path in of.text.corpus.folder.rglob("*") if path.is_file())
    yield Task("public" if of.text.elsewhere else "data", 1, disk=size)
    for start in of.starts.values():
        shape = start.shape
        if start.made is None:
            yield Task("take", 1, shape=shape)  # by hard links, where the disk is the same
            continue
        made, public = start.made, of.known(start).tokens(of.text.public)
        yield _training(of, "make", shape, made.training, made.tokens, lessons=public)


def _devices(of: Extent) -> Iterator[Task]:
    if not of.text.elsewhere:
        yield from _taught(of)
    largest = max((start.shape for start in of.by_device().values()), key=lambda shape: shape.parameters)
    yield Task("upload", 1, shape=largest)
    for name, start in of.by_device().items():
        if of.recipe.device.of(name).sends != "model":
            yield Task("materialise", 1, shape=start.shape, disk=4 * start.shape.parameters)
    yield Task("cluster", 1)
    count, members = of.proxies()
    weights = of.mean(lambda start: start.shape.parameters * size_of(of.sent))
    yield Task("proxy", count, shape=largest, disk=weights if members > 1 else 0)


def _taught(of: Extent) -> Iterator[Task]:
    """What devices learn."""
    known = {start.key: of.known(start).tokens(of.text.public) for start in of.starts.values()}
    for name, start in of.by_device().items():
        device = of.recipe.device.of(name)
        own, public = of.known(start).tokens(of.text.private[name]), known[start.key]
        tokens = _passed(device, own, public)
        task = _training(of, "device", start.shape, device.training, tokens, lessons=own + public)
        yield _sent(task, start, device)


def _transfer(of: Extent) -> Iterator[Task]:
    transfer, k = of.recipe.transfer, of.recipe.cluster.k
    sampled, answered = (texts / k for texts in of.texts())
    largest = max(of.by_device().values(), key=lambda start: start.shape.active)
    if sampled + answered:
        writers = _fluent(of) / k
        sampled /= transfer.keep_agreed
        tokens = of.drafted() / k
        asked = of.mean(lambda start: of.known(start).tokens(of.text.questions)) / k
        scored = 2 * writers * asked if answered else 0  # by each writer, and by its ancestor
        passed = tokens + scored + tokens  # the last: what the ancestor thinks of what was written
        longest = min(transfer.max_new_tokens, of.longest(largest))
        batches = math.ceil(sampled / writers / transfer.batch) + math.ceil(answered / writers / transfer.batch)
        yield Task(
            "write", k, "write", largest.shape, passed,
            forward=passed * of.mean(lambda start: start.shape.active), batch=transfer.batch,
            turns=writers * batches * longest, taught=tokens, kept=transfer.top_k, disk=_signals(of, tokens),
            dtype=transfer.dtype,
        )  # fmt: skip
    yield Task("transfer", 1)
    if transfer.reads:
        shape, tokens = largest.shape, of.drafted()
        readers = _fluent(of) + len(of.recipe.models.ancestors)
        yield Task("read", readers, "read", shape, tokens, forward=tokens * shape.active, batch=2**13)
        yield Task("agree", 1)
    if of.recipe.distill.shifted:
        shape, tokens = of.base.shape, of.taught()
        yield Task(
            "shift", 1, "read", shape, tokens, forward=tokens * shape.active, batch=64 * transfer.max_new_tokens,
            taught=tokens, kept=transfer.top_k, disk=_signals(of, tokens), dtype=transfer.dtype,
        )  # fmt: skip
    if of.recipe.distill.mixed:
        tokens, active = _mixing(of), of.mean(lambda start: start.shape.active)
        yield Task(
            "mix", 1, "read", largest.shape, tokens, forward=tokens * active, batch=64 * transfer.max_new_tokens,
            taught=of.taught(), kept=transfer.top_k, disk=_signals(of, of.taught()), dtype=transfer.dtype,
        )  # fmt: skip
    if of.task_vectors:
        yield Task("task_vectors", 1, shape=of.base.shape, disk=of.base.shape.parameters * of.widest)
    yield from _consulted(of, largest)


def _mixing(of: Extent) -> float:
    """Tokens of written text that writers, others and one ancestor pass again where they teach together, at most."""
    return of.taught() * (min(of.recipe.distill.mixed, len(of.text.private) - 1) + 2)


def _fluent(of: Extent) -> int:
    """How many models write, or could."""
    transfer, devices = of.recipe.transfer, len(of.text.private)
    own = transfer.writers == "devices" and devices / of.recipe.cluster.k <= transfer.max_writers
    return devices if own else of.proxies()[0]


def _consulted(of: Extent, largest: Start) -> Iterator[Task]:
    distill, k = of.recipe.distill, of.recipe.cluster.k
    shape = largest.shape
    if distill.teachers == "likeliest":
        yield from _chosen(of, largest, distill.teacher_top_k)
        return
    kept = min(distill.teacher_top_k or shape.vocabulary, shape.vocabulary)
    written = of.taught() / k
    if distill.teachers == "proxies":
        count, _ = of.proxies()
        tokens = of.mean(lambda start: of.known(start).tokens(of.text.public)) + written
    elif isinstance(distill.objective, VAAObjective):
        own = of.recipe.transfer.writers == "devices"
        count = len(of.text.private) if own else of.proxies()[0]
        tokens = written * k / count
    else:
        return
    disk = tokens * (kept * SIGNAL + SIGNAL_TOKEN)
    yield Task(
        "consult", count, "read", shape, tokens, forward=tokens * shape.active, batch=2**13, taught=tokens,
        kept=kept, disk=disk,
    )  # fmt: skip


def _chosen(of: Extent, largest: Start, top_k: int | None, prefix: str = "", *, own: bool = True) -> Iterator[Task]:
    """All that write find out how likely they find all text, and so does the student; each speaks of its share."""
    everything = of.mean(lambda start: of.known(start).tokens(of.text.public)) + of.taught()
    asked = _fluent(of)
    for steps, shape, tokens, phase in (
        (asked, largest.shape, everything, "likelihoods"),
        (1, of.base.shape, everything, "likelihoods"),
        (asked, largest.shape, everything / asked, "consult"),
    ):
        kept = min(top_k or shape.vocabulary, shape.vocabulary) if phase == "consult" else 0
        held = tokens if kept else 0
        yield Task(
            f"{prefix}{phase}", steps, "read", shape, tokens, forward=tokens * shape.active, batch=2**13, taught=held,
            kept=kept, disk=held * (kept * SIGNAL + SIGNAL_TOKEN), own=own,
        )  # fmt: skip


def _students(of: Extent) -> Iterator[Task]:
    recipe, k = of.recipe, of.recipe.cluster.k
    base, moe, distill = of.base.shape, of.moe, recipe.distill
    budget, shares = distill.budget_tokens, distill.shares
    lessons, taught = of.held()
    paid = taught / 3 if distill.shifted else 0  # a pass forward, of three that a trained token counts
    if distill.mixed:
        paid = _mixing(of) * of.mean(lambda start: start.shape.active) / base.active / 3
    if shares.joint:
        tokens = max(0, shares.joint * budget - paid)
        yield _training(of, "joint", base, distill.training, tokens, lessons, taught)
    if of.task_vectors and distill.own_task_vectors:
        yield Task("own_vector", min(k, of.kin), shape=base, disk=base.parameters * of.widest)
    if shares.branch:
        tokens = shares.branch * budget / k
        yield _training(of, "branch", base, distill.training, tokens, lessons / k, taught / k, steps=k)
    yield _assembly(of, "assemble", base, moe)
    if shares.tune:
        held = of.held(only_public=recipe.tune.text == "public")
        tokens = of.left(shares.tune, base, moe)
        yield _training(of, "tune", moe, recipe.tune.training, tokens, *held)


def _assembly(of: Extent, phase: str, base: Shape, moe: Shape, *, own: bool = True) -> Task:
    assemble, tokens = of.recipe.assemble, of.routed()
    disk = moe.parameters * size_of(of.recipe.distill.training.dtype)
    batch = 16 * min(assemble.router_tokens, of.recipe.distill.training.context)
    return Task(
        phase, 1, "read", base, tokens, forward=tokens * base.active, batch=batch, disk=disk, own=own
    )  # fmt: skip


# ── what it is compared with ──────────────────────────────────────────────────────────────────────────────────────────


def _beside(of: Extent) -> Iterator[Task]:
    recipe = of.recipe
    base, moe, distill, wanted = of.base.shape, of.moe, recipe.distill, recipe.evaluate.references
    lessons, taught = of.held()
    if {"pooled_text", "centralized"} & set(wanted):
        yield _assembly(of, "upcycle", base, moe, own=False)
    for name in dict.fromkeys(wanted):
        if name in ("ofa_kd", "fedmkt"):
            short = name.removesuffix("_kd")
            if name == "fedmkt":
                largest = max(of.by_device().values(), key=lambda start: start.shape.active)
                yield from _chosen(of, largest, recipe.baselines.fedmkt.top_k, "fedmkt_", own=False)
            otherwise = {"shifted": False} if name == "ofa_kd" else {"shifted": False, "mixed": 0}
            plain = replace(of, recipe=of.recipe.model_copy(update={"distill": distill.model_copy(update=otherwise)}))
            yield from (replace(task, phase=f"{short}_{task.phase}", own=False) for task in _students(plain))
            continue
        if name == "fedjets":
            yield from _fedjets(of)
            continue
        if name in ("fedavg_dense", "btx"):
            yield from _federated(of, name)
            continue
        shape = moe if name in ("pooled_text", "centralized") else base
        tokens = of.left(1, base, moe) if name == "pooled_text" else distill.budget_tokens
        if name == "centralized":
            tokens = recipe.evaluate.centralized_tokens
            held = float(of.known(of.base).tokens([*of.text.everyones, *of.text.public]))
            yield _training(of, name, shape, distill.training, tokens, held, own=False)
        else:
            kept = taught if name == "dense_kd" else 0.0
            yield _training(of, name, shape, distill.training, tokens, lessons, kept, own=False)
    yield from _evaluations(of, base, moe)
    if recipe.judge is not None:
        dense = {"base", "pooled_text_dense", "dense_kd", "fedavg_dense"} & {"base", *wanted}
        yield _answers(of, base, len(dense))
        yield _answers(of, moe, 2 + len(set(wanted)) - len(dense))
    yield Task("report", 1)


def _fedjets(of: Extent) -> Iterator[Task]:
    """A baseline for which devices train parts of an MoE."""
    recipe, base, moe, known = of.recipe, of.base.shape, of.moe, of.known(of.base)
    config, device, devices = recipe.baselines.fedjets, recipe.device, len(of.text.private)
    whole = shape_of(of.base.config, recipe.cluster.k, recipe.assemble).config
    part = Shape.of(pruned(whole, config.experts))
    own, public = known.tokens(of.text.everyones) / devices, known.tokens(of.text.public)
    tokens = _sitting(of, device.sitting(config.rounds, config.epochs))
    size = moe.parameters * size_of(of.sent)
    yield Task("fedjets_start", 1, shape=base, disk=size, own=False)
    task = _training(
        of, "fedjets_device", part, device.training, tokens, own + public, steps=config.rounds * devices, own=False
    )  # fmt: skip
    yield replace(task, disk=2 * task.disk)  # what it was sent beside what it made of that
    yield Task("fedjets_round", config.rounds, shape=base, disk=size, own=False)
    batch, kept = device.training.rows * device.training.context, float(known.tokens(of.text.heldout))
    for phase, read in (("fedjets_best", config.rounds * kept), ("fedjets", 2 * kept)):
        yield Task(phase, 1, "read", moe, read, forward=read * moe.active, batch=batch, own=False)
    if tunes_fedjets(recipe):
        held, left = of.held(only_public=True), of.left(recipe.distill.shares.tune, base, moe)
        yield _training(of, "fedjets_tune", moe, recipe.tune.training, left, held[0], own=False)


def _federated(of: Extent, name: str) -> Iterator[Task]:
    """A baseline for which every device trains the base."""
    recipe, base, known = of.recipe, of.base.shape, of.known(of.base)
    device, devices = recipe.device, len(of.text.private)
    rounds = recipe.baselines.fedavg_dense.rounds if name == "fedavg_dense" else 1
    epochs = recipe.baselines.fedavg_dense.epochs if name == "fedavg_dense" else None
    own, public = known.tokens(of.text.everyones) / devices, known.tokens(of.text.public)
    tokens = _sitting(of, device.sitting(rounds, epochs))
    short = name.removesuffix("_dense")
    task = _training(
        of, f"{short}_device", base, device.training, tokens, own + public, steps=rounds * devices, own=False
    )  # fmt: skip
    yield _sent(task, of.base, device.ways[0])  # as most do
    whole = base.parameters * size_of(of.sent)
    if parts := sum(device.of(one).sends != "model" for one in of.text.private):
        yield Task(f"{short}_materialise", rounds * parts, shape=base, disk=whole, own=False)
    if name == "fedavg_dense":
        yield Task("fedavg_round", rounds, shape=base, disk=whole, own=False)
        kept = float(rounds * known.tokens(of.text.heldout))
        batch = device.training.rows * device.training.context
        yield Task(name, 1, "read", base, kept, forward=kept * base.active, batch=batch, own=False)
        return
    yield Task("btx_branch", recipe.cluster.k, shape=base, disk=whole, own=False)
    yield _assembly(of, "btx_merge", base, of.moe, own=False)
    held = of.held(only_public=recipe.tune.text == "public")
    yield _training(of, name, of.moe, recipe.tune.training, of.left(1, base, of.moe), held[0], own=False)


def _sitting(of: Extent, device: DevicePhase) -> float:
    """Tokens of the base that a device trains on in one sitting, in the mean."""
    known, private = of.known(of.base), of.text.private
    public = known.tokens(of.text.public)
    return sum(_passed(device, known.tokens(text), public) for text in private.values()) / len(private)


# ── looking at all of them ────────────────────────────────────────────────────────────────────────────────────────────


def _evaluations(of: Extent, base: Shape, moe: Shape) -> Iterator[Task]:
    recipe, k = of.recipe, of.recipe.cluster.k
    wanted = recipe.evaluate.references
    students = 2 + of.task_vectors + k  # base and joint student
    students += len({"pooled_text_dense", "dense_kd", "fedavg_dense"} & set(wanted))
    routed = 2 + len(
        {"pooled_text", "centralized", "btx", "ofa_kd", "fedmkt", "fedjets"} & set(wanted)
    )  # merged and tuned
    count, members = of.proxies()
    yield _evaluation(of, of.base, base, students)
    yield _evaluation(of, of.base, moe, routed, passes=1 + k * (recipe.evaluate.removal and k > 1))
    by_start: dict[str, list[Start]] = {}
    for start in of.by_device().values():
        by_start.setdefault(start.key, []).append(start)
    for held in by_start.values():
        share = round(count * len(held) / len(of.text.private)) if members > 1 else 0  # one member is measured already
        yield _evaluation(of, held[0], held[0].shape, len(held) + share)


def _evaluation(of: Extent, start: Start, shape: Shape, steps: int, passes: int = 1) -> Task:
    known, test = of.known(start), of.text.test
    answers = sum(length.whole for length in known.measure(test))
    options = sum(
        length.whole
        for question in test
        for option in question.options or ()
        if option != question.answer
        for length in known.measure([question.model_copy(update={"answer": option})])
    )
    tokens = float(answers * passes + options)
    batch = min(of.recipe.evaluate.batch_tokens, max(answers, options))
    return Task(
        "evaluate", steps, "read", shape, tokens, forward=tokens * shape.active, batch=batch, own=False,
        dtype=of.recipe.evaluate.dtype,
    )  # fmt: skip


def _answers(of: Extent, shape: Shape, steps: int) -> Task:
    """What is written for a judge to grade; how long it takes to grade it is not known."""
    judge, known = of.recipe.judge, of.known(of.base)
    assert judge is not None
    questions = chosen(of.text.test, judge.questions)
    read = sum(len(known.tokenizer.encode(question.prompt)[0]) for question in questions)
    tokens = float(read + len(questions) * judge.max_new_tokens)
    return Task(
        "judge", steps, "write", shape, tokens, forward=tokens * shape.active, batch=AT_ONCE,
        turns=math.ceil(len(questions) / AT_ONCE) * judge.max_new_tokens, dtype=of.recipe.evaluate.dtype, own=False,
    )  # fmt: skip


# ── parts of tasks ────────────────────────────────────────────────────────────────────────────────────────────────


def _training(
    of: Extent,
    phase: str,
    shape: Shape,
    training: Training,
    tokens: float,
    lessons: float,
    taught: float = 0.0,
    *,
    steps: int = 1,
    own: bool = True,
) -> Task:
    # No training is shorter than one batch; and the last one is filled.
    tokens = max(tokens, training.rows * training.context) if tokens or phase != "make" else 0.0
    return Task(
        phase, steps, "train", shape, tokens, forward=tokens * shape.active, backward=2 * tokens * shape.active,
        training=training, lessons=lessons, taught=taught, kept=of.recipe.transfer.top_k,
        disk=shape.parameters * size_of(training.dtype), own=own,
    )  # fmt: skip


def _passed(device: DevicePhase, own: float, public: float) -> float:
    """Tokens that a device trains on: its own, and public ones mixed in, as long as there are any."""
    return device.tokens(own + min(public, own * device.replay))


def _sent(task: Task, start: Start, device: DevicePhase) -> Task:
    """A device's training of all weights, as what its way makes of it: an adapter's, and with what it leaves to send.

    The way back needs the gradients of an adapter's weights only. Of what is packed this is the most that it can be,
    without what rank and compression make of it.
    """
    assert task.shape is not None
    sent = task.shape.parameters
    if device.method != "full":
        weights = adapter(start, device.lora)
        sent = weights if device.upload == "adapter" else sent
        task = replace(
            task,
            adapter=weights,
            forward=task.tokens * (task.shape.active + weights),
            backward=task.tokens * (task.shape.active + 2 * weights),
            disk=4 * sent,
        )
    return task if device.codec is None else replace(task, disk=sent * device.codec.bytes_per_number)


def _signals(of: Extent, tokens: float) -> float:
    return tokens * (of.recipe.transfer.top_k * SIGNAL + SIGNAL_TOKEN)
