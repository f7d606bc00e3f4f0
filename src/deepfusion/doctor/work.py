"""What each phase of a run will have to do, from the recipe, the models' shapes and the text's lengths alone.

What only a run tells is assumed: devices fall into clusters of equal size, a cluster has as many lineages as it can,
and models write texts as long as those that they have learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from deepfusion.config import Recipe, Training, VAAObjective
from deepfusion.doctor.lengths import EDGES, Lengths
from deepfusion.doctor.models import BASE, Start, trained
from deepfusion.doctor.shapes import Shape
from deepfusion.doctor.text import Reading
from deepfusion.phases.assemble import shape_of
from deepfusion.roles import starting_points

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


@dataclass(frozen=True)
class Workload:
    """Everything that the tasks are worked out from."""

    recipe: Recipe
    text: Reading
    starts: Mapping[str, Start]
    lengths: Mapping[str, Lengths]

    def tasks(self) -> list[Task]:
        """Every step of the run, phase by phase in the order of the method."""
        return [*self._before(), *self._devices(), *self._transfer(), *self._students(), *self._beside()]

    # ── what everything else counts on ────────────────────────────────────────────────────────────────────────────────

    @property
    def _base(self) -> Start:
        return self.starts[BASE]

    def _known(self, start: Start) -> Lengths:
        return self.lengths[start.tokenizer.fingerprint]

    @cached_property
    def _moe(self) -> Shape:
        return Shape.of(shape_of(self._base.config, self.recipe.cluster.k, self.recipe.assemble).config)

    def _by_device(self) -> dict[str, Start]:
        of = starting_points(list(self.text.private), self.recipe.models, self.recipe.seed)
        return {device: self.starts[f"models.ancestors.{name}"] for device, name in of.items()}

    def _mean(self, value: Callable[[Start], float]) -> float:
        """Of a property of ancestors, over devices."""
        values = [value(start) for start in self._by_device().values()]
        return sum(values) / len(values)

    @property
    def _sent(self) -> str:
        """Precision of devices' models: the sum of a model and its adapter is kept in float32."""
        device = self.recipe.device
        return device.training.dtype if device.method == "full" else "float32"

    def _proxies(self) -> tuple[int, float]:
        """How many there are, and how many members each has."""
        n, k = len(self.text.private), self.recipe.cluster.k
        lineages = len({start.lineage for start in self._by_device().values()})
        each = max(1, min(lineages, n // k)) if self.recipe.cluster.mode == "by_domain" else 1
        return k * each, n / (k * each)

    def _written(self, start: Start) -> float:
        """Tokens of a text that a model writes from nothing."""
        whole = [length.whole + EDGES for length in self._known(start).measure(self.text.everyones)]
        limit = self.recipe.transfer.max_new_tokens
        return sum(min(length, limit) for length in whole) / max(1, len(whole))

    def _answered(self, start: Start) -> float:
        """Tokens of a question that a model answers, answer included."""
        asked = [length.whole + EDGES for length in self._known(start).measure(self.text.questions)]
        answers = [length.answer for length in self._known(start).measure(self.text.everyones)]
        answer = min(sum(answers) / max(1, len(answers)), self.recipe.transfer.max_new_tokens)
        return (sum(asked) / len(asked) if asked else 0.0) + answer

    def _texts(self) -> tuple[float, float]:
        """Texts that are written from nothing, and questions that are answered, over all clusters."""
        transfer = self.recipe.transfer
        sampled = transfer.sampled_per_cluster * self.recipe.cluster.k if "sampled" in transfer.kinds else 0
        answered = len(self.text.questions) * transfer.answers_per_question if "answered" in transfer.kinds else 0
        return float(sampled), float(answered)

    def _taught(self) -> float:
        """Tokens of all written text, as its writers count them."""
        sampled, answered = self._texts()
        return sampled * self._mean(self._written) + answered * self._mean(self._answered)

    def _held(self, *, only_public: bool = False) -> tuple[float, float]:
        """Tokens of a student's lessons, and those of them whose writers' probabilities are held besides."""
        public = "public" in self.recipe.transfer.kinds
        known = float(self._known(self._base).tokens(self.text.public)) if public else 0.0
        taught = 0.0 if only_public else self._taught()
        return known + taught, taught

    # ── phases ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _before(self) -> Iterator[Task]:
        size = sum(path.stat().st_size for path in self.text.corpus.folder.rglob("*") if path.is_file())
        yield Task("data", 1, disk=size)
        for start in self.starts.values():
            shape = start.shape
            if start.made is None:
                yield Task("take", 1, shape=shape)  # by hard links, where the disk is the same
                continue
            made, public = start.made, self._known(start).tokens(self.text.public)
            yield self._training("make", shape, made.training, made.tokens, lessons=public)

    def _devices(self) -> Iterator[Task]:
        device = self.recipe.device
        for name, start in self._by_device().items():
            own = self._known(start).tokens(self.text.private[name])
            public = self._known(start).tokens(self.text.public)
            replay = min(public, own * device.replay)
            tokens = device.epochs * (own + replay)
            task = self._training("device", start.shape, device.training, tokens, lessons=own + public)
            yield task if device.method == "full" else self._adapting(task, trained(start, self.recipe))
        largest = max((start.shape for start in self._by_device().values()), key=lambda shape: shape.parameters)
        yield Task("upload", 1, shape=largest)
        if device.upload == "adapter":
            for start in self._by_device().values():
                yield Task("materialise", 1, shape=start.shape, disk=4 * start.shape.parameters)
        yield Task("cluster", 1)
        count, members = self._proxies()
        weights = self._mean(lambda start: start.shape.parameters * size_of(self._sent))
        yield Task("proxy", count, shape=largest, disk=weights if members > 1 else 0)

    def _transfer(self) -> Iterator[Task]:
        transfer, k = self.recipe.transfer, self.recipe.cluster.k
        sampled, answered = (texts / k for texts in self._texts())
        largest = max(self._by_device().values(), key=lambda start: start.shape.active)
        if sampled + answered:
            writers = len(self.text.private) / k
            if transfer.writers == "proxies" or writers > transfer.max_writers:
                writers = self._proxies()[0] / k
            tokens = self._taught() / k
            asked = self._mean(lambda start: self._known(start).tokens(self.text.questions)) / k
            scored = 2 * writers * asked if answered else 0  # by each writer, and by its ancestor
            passed = tokens + scored + tokens  # the last: what the ancestor thinks of what was written
            longest = min(transfer.max_new_tokens, self._longest(largest))
            batches = math.ceil(sampled / writers / transfer.batch) + math.ceil(answered / writers / transfer.batch)
            yield Task(
                "write", k, "write", largest.shape, passed,
                forward=passed * self._mean(lambda start: start.shape.active), batch=transfer.batch,
                turns=writers * batches * longest, taught=tokens, kept=transfer.top_k, disk=self._signals(tokens),
            )  # fmt: skip
        yield Task("transfer", 1)
        if self.recipe.distill.shifted:
            shape, tokens = self._base.shape, self._taught()
            yield Task(
                "shift", 1, "read", shape, tokens, forward=tokens * shape.active, batch=64 * transfer.max_new_tokens,
                taught=tokens, kept=transfer.top_k, disk=self._signals(tokens),
            )  # fmt: skip
        yield from self._consulted(largest)

    def _consulted(self, largest: Start) -> Iterator[Task]:
        distill, k = self.recipe.distill, self.recipe.cluster.k
        shape = largest.shape
        kept = min(distill.teacher_top_k or shape.vocabulary, shape.vocabulary)
        written = self._taught() / k
        if distill.teachers == "proxies":
            count, _ = self._proxies()
            tokens = self._mean(lambda start: self._known(start).tokens(self.text.public)) + written
        elif isinstance(distill.objective, VAAObjective):
            own = self.recipe.transfer.writers == "devices"
            count = len(self.text.private) if own else self._proxies()[0]
            tokens = written * k / count
        else:
            return
        disk = tokens * (kept * SIGNAL + SIGNAL_TOKEN)
        yield Task(
            "consult", count, "read", shape, tokens, forward=tokens * shape.active, batch=2**13, taught=tokens,
            kept=kept, disk=disk,
        )  # fmt: skip

    def _students(self) -> Iterator[Task]:
        recipe, k = self.recipe, self.recipe.cluster.k
        base, moe, distill = self._base.shape, self._moe, recipe.distill
        budget, shares = distill.budget_tokens, distill.shares
        lessons, taught = self._held()
        shifted = taught / 3 if distill.shifted else 0  # a pass forward, of three that a trained token counts
        if shares.joint:
            tokens = max(0, shares.joint * budget - shifted)
            yield self._training("joint", base, distill.training, tokens, lessons, taught)
        if shares.branch:
            tokens = shares.branch * budget / k
            yield self._training("branch", base, distill.training, tokens, lessons / k, taught / k, steps=k)
        yield self._assembly("assemble", base, moe)
        if shares.tune:
            held = self._held(only_public=recipe.tune.text == "public")
            tokens = self._left(shares.tune, base, moe)
            yield self._training("tune", moe, recipe.tune.training, tokens, *held)

    def _assembly(self, phase: str, base: Shape, moe: Shape, *, own: bool = True) -> Task:
        assemble, tokens = self.recipe.assemble, self._routed()
        disk = moe.parameters * size_of(self.recipe.distill.training.dtype)
        batch = 16 * min(assemble.router_tokens, self.recipe.distill.training.context)
        return Task(
            phase, 1, "read", base, tokens, forward=tokens * base.active, batch=batch, disk=disk, own=own
        )  # fmt: skip

    def _routed(self) -> float:
        """Tokens that the router's first rows are measured on, twice."""
        k, assemble = self.recipe.cluster.k, self.recipe.assemble
        if assemble.router == "random":
            return 0.0
        passes = 2 if assemble.renormalise else 3
        return passes * min(k * assemble.router_tokens, self._held()[0])

    def _left(self, share: float, base: Shape, moe: Shape) -> float:
        """Tokens that a MoE is trained on within a share of the budget, of which measuring its router is part."""
        budget = 3 * share * self.recipe.distill.budget_tokens * base.active
        return max(0.0, budget - self._routed() * base.active) / (3 * moe.active)

    def _beside(self) -> Iterator[Task]:
        recipe = self.recipe
        base, moe, distill, wanted = self._base.shape, self._moe, recipe.distill, recipe.evaluate.references
        lessons, taught = self._held()
        if {"pooled_text", "centralized"} & set(wanted):
            yield self._assembly("upcycle", base, moe, own=False)
        for name in dict.fromkeys(wanted):
            shape = moe if name in ("pooled_text", "centralized") else base
            tokens = self._left(1, base, moe) if name == "pooled_text" else distill.budget_tokens
            if name == "centralized":
                tokens = recipe.evaluate.centralized_tokens
                held = float(self._known(self._base).tokens([*self.text.everyones, *self.text.public]))
                yield self._training(name, shape, distill.training, tokens, held, own=False)
            else:
                kept = taught if name == "dense_kd" else 0.0
                yield self._training(name, shape, distill.training, tokens, lessons, kept, own=False)
        yield from self._evaluations(base, moe)
        yield Task("report", 1)

    def _evaluations(self, base: Shape, moe: Shape) -> Iterator[Task]:
        recipe, k = self.recipe, self.recipe.cluster.k
        wanted = recipe.evaluate.references
        students = 2 + k + len({"pooled_text_dense", "dense_kd"} & set(wanted))  # base and joint student besides
        routed = 2 + len({"pooled_text", "centralized"} & set(wanted))  # merged and tuned
        count, _ = self._proxies()
        yield self._evaluation(self._base, base, students)
        yield self._evaluation(self._base, moe, routed, passes=1 + k)
        by_start: dict[str, list[Start]] = {}
        for start in self._by_device().values():
            by_start.setdefault(start.key, []).append(start)
        for held in by_start.values():
            share = round(count * len(held) / len(self.text.private))
            yield self._evaluation(held[0], held[0].shape, len(held) + share)

    def _evaluation(self, start: Start, shape: Shape, steps: int, passes: int = 1) -> Task:
        known, test = self._known(start), self.text.test
        answers = sum(length.whole for length in known.measure(test))
        options = sum(
            length.whole
            for question in test
            for option in question.options or ()
            if option != question.answer
            for length in known.measure([question.model_copy(update={"answer": option})])
        )
        tokens = float(answers * passes + options)
        batch = min(self.recipe.evaluate.batch_tokens, max(answers, options))
        return Task(
            "evaluate", steps, "read", shape, tokens, forward=tokens * shape.active, batch=batch, own=False
        )  # fmt: skip

    # ── parts of tasks ────────────────────────────────────────────────────────────────────────────────────────────────

    def _training(
        self,
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
            training=training, lessons=lessons, taught=taught, kept=self.recipe.transfer.top_k,
            disk=shape.parameters * size_of(training.dtype), own=own,
        )  # fmt: skip

    def _adapting(self, task: Task, adapter: int) -> Task:
        """A device's training, of an adapter alone: the way back needs the gradients of its weights only."""
        assert task.shape is not None
        sent = adapter if self.recipe.device.upload == "adapter" else task.shape.parameters
        return replace(
            task,
            adapter=adapter,
            forward=task.tokens * (task.shape.active + adapter),
            backward=task.tokens * (task.shape.active + 2 * adapter),
            disk=4 * sent,
        )

    def _signals(self, tokens: float) -> float:
        return tokens * (self.recipe.transfer.top_k * SIGNAL + SIGNAL_TOKEN)

    def _longest(self, start: Start) -> int:
        whole: Sequence[int] = [length.whole + 1 for length in self._known(start).measure(self.text.everyones)]
        return max(whole, default=1)
