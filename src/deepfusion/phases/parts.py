"""Every tensor of an MoE, made when it is asked for: experts from students' FFNs, everything else their mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from deepfusion.families import Family
from deepfusion.families.target import MATRICES, MoE
from deepfusion.layouts import Layout, padded
from deepfusion.phases.proxy import means
from deepfusion.weights import Part, Stored, blocks

GATE_STD = 0.02  # of the logits of a shared expert's gate, for hidden states of unit mean square
ROUTER_AFTER = ".post_attention_layernorm.weight"  # a tensor that every layer of every kin has


class Plan(NamedTuple):
    """What becomes what."""

    dense: Family
    """Of the students."""
    moe: MoE
    layout: Layout
    shared_width: int
    """Channels of the shared experts together; 0: there are none."""
    factors: Sequence[float]
    """Per layer, what experts' outputs are multiplied by."""


def parts(
    students: Sequence[dict[str, Stored]], plan: Plan, rows: Float[Tensor, "layers experts hidden"]
) -> Iterator[Part]:
    """The MoE's tensors by their names on disk (Eq. 12, 13).

    Args:
        students: their tensors, in the order of their clusters; equal in names, dtypes and shapes.
        plan: target and layout.
        rows: the router's.
    """
    moe, source = plan.moe, _Experts(students, plan)
    for name, one in students[0].items():
        role = plan.dense.role(name)
        if role != "ffn" or _layer(name) < moe.dense_layers:
            yield Part(name, one.dtype, one.shape, partial(_mean, [student[name] for student in students]))
            if name.endswith(ROUTER_AFTER) and (layer := _layer(name)) >= moe.dense_layers:
                yield Part.of(moe.router(layer), rows[layer].to(one.dtype))
            continue
        layer, matrix = _layer(name), name.split(".")[-2]
        hidden, make = one.shape[1 - _axis(name)], source.down if _axis(name) else source.up
        for expert in range(plan.layout.experts):
            wanted, shape = moe.expert(layer, expert, matrix), _shape(name, plan.layout.width, hidden)
            yield Part(wanted, one.dtype, shape, partial(make, name, expert))
        if moe.shared:
            shared, shape = f"model.layers.{layer}.mlp.{moe.shared}", _shape(name, plan.shared_width, hidden)
            yield Part(f"{shared}.{matrix}.weight", one.dtype, shape, partial(source.shared, name))
            if moe.shared_gate and matrix == MATRICES[0]:
                # A sigmoid of nearly 1/2, whatever the token. Not of zeros: llama.cpp computes it as silu(z) / z.
                gate = torch.randn(1, hidden, generator=torch.Generator().manual_seed(layer)) * GATE_STD / hidden**0.5
                yield Part.of(f"{shared}_gate.weight", gate.to(one.dtype))


class _Experts:
    """What experts are made of. A down matrix is read whole, and kept for the next shard of it."""

    def __init__(self, students: Sequence[dict[str, Stored]], plan: Plan) -> None:
        self.students, self.layout, self.plan = students, plan.layout, plan
        self._own: tuple[Stored, Tensor] | None = None
        self._mean: tuple[str, Tensor] | None = None

    def up(self, name: str, expert: int) -> Iterator[Tensor]:
        """Gate or up of a routed expert: rows of its student's."""
        student, number = divmod(expert, self.layout.granularity)
        one, span = self.students[student][name], self.layout.span(number)
        yield from one.through(span)
        yield _zeros(one, self.layout.width - (span.stop - span.start))

    def down(self, name: str, expert: int) -> Iterator[Tensor]:
        """Down of a routed expert: columns of its student's, so scaled that weights sum to what they should."""
        student, number = divmod(expert, self.layout.granularity)
        one, span, factor = self.students[student][name], self.layout.span(number), self.plan.factors[_layer(name)]
        if self._own is None or self._own[0] is not one:
            self._own = (one, one.read())
        for rows in blocks(one.shape):
            own = self._own[1][rows, span]
            if number >= self.layout.shards:  # a spare expert adds what the shared ones, a mean, lack of its student
                own = ((own.float() - self._middle(name)[rows, span].float()) * factor).to(own.dtype)
            elif factor != 1:
                own = own * factor  # in float32 inside, rounded once
            yield padded(own, self.layout.width, axis=1)

    def shared(self, name: str) -> Iterator[Tensor]:
        """A matrix of the shared experts: the mean's last shards, or all of the mean with a down of zeros."""
        layout, members = self.layout, [student[name] for student in self.students]
        whole, last = slice(0, layout.channels), range(layout.shards, layout.granularity)
        spans = [layout.span(number) for number in last] if layout.common else [whole]
        width = layout.width if layout.common else self.plan.shared_width
        if not _axis(name):
            for span in spans:
                yield from _mean(members, span)
                yield _zeros(members[0], width - (span.stop - span.start))
            return
        middle = self._middle(name) if layout.common else torch.zeros(members[0].shape, dtype=members[0].dtype)
        for rows in blocks(members[0].shape):
            yield torch.cat([padded(middle[rows, span], width, axis=1) for span in spans], dim=1)

    def _middle(self, name: str) -> Tensor:
        """The mean of a down matrix."""
        if self._mean is None or self._mean[0] != name:
            self._mean = (name, torch.cat([*_mean([student[name] for student in self.students])]))
        return self._mean[1]


def _mean(members: Sequence[Stored], rows: slice = slice(None)) -> Iterator[Tensor]:
    """The students' mean (Eq. 13), or some rows of it, in their dtype, block by block."""
    for block in means(members, [1.0] * len(members), rows):
        yield block.to(members[0].dtype)


def _zeros(one: Stored, count: int) -> Tensor:
    """Rows of zeros, of channels that are not there."""
    return torch.zeros(count, *one.shape[1:], dtype=one.dtype)


def _layer(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def _shape(name: str, channels: int, hidden: int) -> tuple[int, int]:
    return (hidden, channels) if _axis(name) else (channels, hidden)


def _axis(name: str) -> int:
    """Where the channels of an FFN's matrix are."""
    return 1 if name.endswith(".down_proj.weight") else 0
