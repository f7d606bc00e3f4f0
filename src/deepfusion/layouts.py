"""How K dense FFNs fill the experts of an MoE: pure arithmetic, no files and no models.

**Coarse**: expert i is the FFN of student i.

**Fine-grained** (virtual groups, arXiv 2410.07524): every FFN is cut along its channels into G shards. A gated FFN is a
sum over channels, y(x) = Σ_c down_c · act(gate_c·x) · (up_c·x), so it is the sum of its shards, and channels of zeros
add nothing. The G experts of student i are neighbours, and their router rows start equal: row r_i. Then a token's
largest logits are those of whole groups, and its `top · shards` chosen experts are all shards of `top` students.

*Weights.* Let z_i = r_i·x, and g the chosen groups. Where the chosen weights are renormalised, a shard of group i gets
e^{z_i} / (shards · Σ_{j∈g} e^{z_j}); multiplied by `shards` the block computes Σ_{i∈g} w_i FFN_i(x) with Σ w_i = 1, as
a coarse one does, and with equal students exactly FFN(x). Where they are not, the sum over the chosen groups of a
single shard's probability,

    P(x) = Σ_{i∈g} e^{z_i} / (shards · Σ_j e^{z_j} + spare),

depends on x: the block computes f·P(x)·FFN(x) with equal students, for whatever factor f. With f = 1 / mean P the error
is the relative spread of P over tokens; with z of standard deviation σ → 0 it vanishes as σ, for P → top / experts, of
which 1/P is the factor K·G/top (arXiv 2410.07524 has E·G²/T for it, where T = top·G are chosen of E copies).
Where the block's output is normalised after it (FlexOlmo), f·P(x) cancels and nothing is lost.

**Common shards.** DeepSeek-MoE has shared experts beside the routed ones, and its published shape (64 experts, top 6,
2 shared) cannot choose 8 shards of 8. The last `common` = 2 shards are therefore taken over by the shared experts, as
the students' mean (Eq. 13): 2 + 6 cover the FFN, exactly with equal students. The student's own versions stay among its
G experts, as `spare` ones: gate and up its own, down the difference from the mean's, so that what they would add is
what the mean lacks (nothing with equal students). Their router rows are zero and those of the others sum to zero over
students, so the largest z is positive, or all are equal: at first no token chooses a spare expert. That holds for the
largest alone, so `top` must be 1. Not renormalised, f·P(x) weighs the routed shards alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from deepfusion.config import AssemblePhase
from deepfusion.config.targets import expert_width

APART = 1e-3
"""Size, relative to a layer's rows, of the noise that keeps two groups of a fine-grained router from ever tying."""


@dataclass(frozen=True)
class Layout:
    """Which part of which FFN is which expert. Expert `cluster * granularity + shard` holds a shard of a student."""

    clusters: int
    """Students K."""
    channels: int
    """Of a student's FFN."""
    granularity: int
    """Shards G that an FFN is cut into, and experts that each student has; 1: coarse."""
    common: int
    """Shards, the last ones, that shared experts take over as the students' mean."""
    width: int
    """Channels of an expert."""
    top: int
    """Students whose FFN a token uses."""
    renormalised: bool
    """Whether the chosen experts' weights are made to sum to 1."""

    @property
    def shards(self) -> int:
        """Shards of an FFN that are chosen together."""
        return self.granularity - self.common

    @property
    def experts(self) -> int:
        """Routed experts."""
        return self.clusters * self.granularity

    @property
    def chosen(self) -> int:
        """Routed experts that a token uses."""
        return self.top * self.shards

    @property
    def spare(self) -> int:
        """Routed experts that no token uses at first."""
        return self.clusters * self.common

    @property
    def step(self) -> int:
        """Channels of a shard, but for the last."""
        return math.ceil(self.channels / self.granularity)

    def span(self, shard: int) -> slice:
        """The channels of an FFN that a shard has: `step` of them, the last one fewer, if not all divide evenly."""
        first = min(shard * self.step, self.channels)
        return slice(first, min(first + self.step, self.channels))

    def uniform(self) -> float:
        """P of a router whose logits are all equal."""
        return self.top / self.experts

    def factor(self, probability: float) -> float:
        """What experts' outputs are multiplied by, given the mean of P (which renormalised weights do not need)."""
        return float(self.shards) if self.renormalised else 1 / probability


def plan(config: AssemblePhase, *, clusters: int, channels: int, shared: int = 0) -> Layout:
    """The layout that a recipe asks for.

    Args:
        config: layout, granularity, top_k, expert_width, renormalise.
        clusters: number of students.
        channels: of their FFN.
        shared: shared experts of the target that can take over shards.

    Raises:
        ValueError: it cannot be; says what to change.
    """
    granularity = config.granularity or 1
    common = shared if granularity > 1 else 0
    if granularity <= common:
        raise ValueError(f"granularity is {granularity}, but {common} shards go to shared experts: set it higher")
    if config.top_k > clusters:
        raise ValueError(f"top_k is {config.top_k} but there are {clusters} students")
    if common and clusters == 1:
        raise ValueError("shared experts that take over shards need two students or more: set layout: coarse")
    if common and config.top_k > 1:
        raise ValueError("beside shared experts that take over shards, a token uses one student's FFN: set top_k: 1")
    width = expert_width(channels, granularity, config.expert_width)
    return Layout(clusters, channels, granularity, common, width, config.top_k, config.renormalise)


def padded(matrix: Tensor, width: int, *, axis: int) -> Tensor:
    """A matrix with channels of zeros added up to `width`."""
    missing = width - matrix.shape[axis]
    return pad(matrix, (0, missing) if axis == 1 else (0, 0, 0, missing)) if missing else matrix


def router_rows(rows: Float[Tensor, "layers clusters hidden"], layout: Layout, seed: int) -> Tensor:
    """The router's rows [layers, experts, hidden] from one row a student.

    Coarse, they are the rows themselves. Fine-grained, a student's shards share its row, with a little noise of its own
    so that no two students tie (then the chosen experts could be shards of several); where a layer's rows are all
    equal, noise is all there is. Spare experts get rows of zeros, and the others' sum over students is zero.
    """
    if layout.granularity == 1:
        return rows
    size = rows.std(dim=(1, 2), correction=0, keepdim=True)
    size = torch.where(size > 0, size, rows.shape[2] ** -0.5)
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
    rows = rows + APART * size * noise
    if layout.common:
        rows = rows - rows.mean(dim=1, keepdim=True)
    grouped = rows[:, :, None].repeat(1, 1, layout.granularity, 1)
    grouped[:, :, layout.shards :] = 0
    return grouped.flatten(1, 2)


def probability(logits: Float[Tensor, "*tokens clusters"], layout: Layout) -> Float[Tensor, "*tokens"]:
    """P(x): the softmax probability of one shard, summed over the chosen groups, where weights are not renormalised."""
    z = logits.double()
    highest = z.amax(-1, keepdim=True).clamp(min=0)
    shares = (z - highest).exp()
    everything = layout.shards * shares.sum(-1) + layout.spare * (-highest).exp().squeeze(-1)
    return shares.topk(layout.top, dim=-1).values.sum(-1) / everything


def grouped(logits: Float[Tensor, "tokens experts"], clusters: int) -> Float[Tensor, "tokens clusters"]:
    """Log of each student's share of the softmax, up to a constant: its experts' logits, added up as probabilities."""
    if logits.shape[-1] == clusters:
        return logits
    return logits.unflatten(-1, (clusters, -1)).logsumexp(-1)
