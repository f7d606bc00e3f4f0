"""What a run has to deal with: its models, its text in their tokens, and what they will write, as far as one can know.

What only a run tells is assumed: devices fall into clusters of equal size, a cluster has as many lineages as it can,
and models write texts as long as those that they have learned, or where only devices elsewhere have these, as long as
public ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from deepfusion.config import Recipe
from deepfusion.doctor.lengths import EDGES, Lengths
from deepfusion.doctor.models import BASE, Start
from deepfusion.doctor.shapes import Shape
from deepfusion.doctor.text import Reading
from deepfusion.phases.assemble import shape_of
from deepfusion.roles import starting_points
from deepfusion.weights import shapes


@dataclass(frozen=True)
class Extent:
    """Everything that the work of a run is worked out from."""

    recipe: Recipe
    text: Reading
    starts: Mapping[str, Start]
    lengths: Mapping[str, Lengths]

    @property
    def base(self) -> Start:
        """The model whose copies become experts."""
        return self.starts[BASE]

    def known(self, start: Start) -> Lengths:
        """How long texts are in a model's tokens."""
        return self.lengths[start.tokenizer.fingerprint]

    @cached_property
    def moe(self) -> Shape:
        """The MoE that comes out."""
        return Shape.of(shape_of(self.base.config, self.recipe.cluster.k, self.recipe.assemble).config)

    def by_device(self) -> dict[str, Start]:
        """Device → the model that it starts from."""
        of = starting_points(list(self.text.private), self.recipe.models, self.recipe.seed)
        return {device: self.starts[f"models.ancestors.{name}"] for device, name in of.items()}

    def mean(self, value: Callable[[Start], float]) -> float:
        """Of a property of ancestors, over devices."""
        values = [value(start) for start in self.by_device().values()]
        return sum(values) / len(values)

    @property
    def sent(self) -> str:
        """Precision of devices' models: sums of a model and its adapter, and what was packed, are kept in float32."""
        device = self.recipe.device
        whole = all(way.method == "full" and way.codec is None for way in device.ways)
        return device.training.dtype if whole else "float32"

    @property
    def kin(self) -> int:
        """How many devices start from the base itself."""
        return sum(start.lineage == self.base.lineage for start in self.by_device().values())

    @property
    def widest(self) -> int:
        """Bytes of a number of the base with task vectors: the widest of its own and of devices'."""
        held = shapes(self.base.folder).values() if self.base.folder else []
        return max([getattr(torch, self.sent).itemsize, *(dtype.itemsize for dtype, _ in held)])

    @property
    def task_vectors(self) -> bool:
        """Whether students start from the base with what devices have learned in its own weights."""
        return self.kin > 0 and self.recipe.distill.task_vectors > 0

    def proxies(self) -> tuple[int, float]:
        """How many there are, and how many members each has."""
        n, k = len(self.text.private), self.recipe.cluster.k
        lineages = len({start.lineage for start in self.by_device().values()})
        each = max(1, min(lineages, n // k)) if self.recipe.cluster.mode == "by_domain" else 1
        return k * each, n / (k * each)

    def written(self, start: Start) -> float:
        """Tokens of a text that a model writes from nothing."""
        whole = [length.whole + EDGES for length in self.known(start).measure(self.text.learned)]
        limit = self.recipe.transfer.max_new_tokens
        return sum(min(length, limit) for length in whole) / max(1, len(whole))

    def answered(self, start: Start) -> float:
        """Tokens of a question that a model answers, answer included."""
        asked = [length.whole + EDGES for length in self.known(start).measure(self.text.questions)]
        answers = [length.answer for length in self.known(start).measure(self.text.learned)]
        answer = min(sum(answers) / max(1, len(answers)), self.recipe.transfer.max_new_tokens)
        return (sum(asked) / len(asked) if asked else 0.0) + answer

    def texts(self) -> tuple[float, float]:
        """Texts that are written from nothing, and questions that are answered, over all clusters."""
        transfer = self.recipe.transfer
        sampled = transfer.sampled_per_cluster * self.recipe.cluster.k if "sampled" in transfer.kinds else 0
        answered = len(self.text.questions) * transfer.answers_per_question if "answered" in transfer.kinds else 0
        return float(sampled), float(answered)

    def drafted(self) -> float:
        """Tokens of all that is written, of which `taught` are kept."""
        sampled, answered = self.texts()
        sampled /= self.recipe.transfer.keep_agreed
        return sampled * self.mean(self.written) + answered * self.mean(self.answered)

    def taught(self) -> float:
        """Tokens of all written text, as its writers count them."""
        sampled, answered = self.texts()
        return sampled * self.mean(self.written) + answered * self.mean(self.answered)

    def held(self, *, only_public: bool = False) -> tuple[float, float]:
        """Tokens of a student's lessons, and those of them whose writers' probabilities are held besides."""
        public = "public" in self.recipe.transfer.kinds
        known = float(self.known(self.base).tokens(self.text.public)) if public else 0.0
        taught = 0.0 if only_public else self.taught()
        return known + taught, taught

    def routed(self) -> float:
        """Tokens that pass through models while the router's first rows are measured."""
        k, assemble = self.recipe.cluster.k, self.recipe.assemble
        if assemble.router == "random":
            return 0.0
        passes = 2 if assemble.renormalise else 3
        return passes * min(k * assemble.router_tokens, self.held()[0])

    def left(self, share: float, base: Shape, moe: Shape) -> float:
        """Tokens that a MoE is trained on within a share of the budget, of which measuring its router is part."""
        budget = 3 * share * self.recipe.distill.budget_tokens * base.active
        return max(0.0, budget - self.routed() * base.active) / (3 * moe.active)

    def longest(self, start: Start) -> int:
        """Tokens of the longest text that devices learn, with its end."""
        whole: Sequence[int] = [length.whole + 1 for length in self.known(start).measure(self.text.learned)]
        return max(whole, default=1)
