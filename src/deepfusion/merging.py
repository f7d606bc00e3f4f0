"""TIES (arXiv 2306.01708): models of one ancestor are merged by what they agree to change in it.

A plain mean lets each model's small changes, most of which are noise, and changes of opposite signs wear down what
any of them learned. TIES trims each model's changes to the largest, elects a sign for every weight, and takes the mean
of the changes that have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from deepfusion.weights import Stored, blocks

HALF = 16  # bits of a float32 that are looked at in one pass


def ties(
    changes: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float], least: Sequence[float]
) -> Float[Tensor, "*shape"]:
    """What models of one ancestor agree to change in it.

    Args:
        changes: of each model, weights minus the ancestor's, float32.
        weights: of each model, not negative.
        least: of each model, the magnitude below which a change counts as none.

    Returns:
        For each weight, the weighted mean of the changes that are large enough and of the elected sign, which is that
        of their weighted sum; 0 where there are none, or where they cancel out.
    """
    trimmed = [
        torch.where(change.abs() >= smallest, change, 0.0) for change, smallest in zip(changes, least, strict=True)
    ]
    weighted = [one * weight for one, weight in zip(trimmed, weights, strict=True)]
    elected = torch.stack(weighted).sum(0).sign()
    total, heavy = torch.zeros_like(elected), torch.zeros_like(elected)
    for one, change, weight in zip(weighted, trimmed, weights, strict=True):
        agrees = (change.sign() == elected) & (change != 0)
        total += torch.where(agrees, one, 0.0)
        heavy += agrees * weight
    return torch.where(heavy > 0, total / heavy.clamp(min=torch.finfo(heavy.dtype).tiny), 0.0)


def threshold(parts: Callable[[], Iterable[Tensor]], share: float) -> float:
    """The smallest magnitude among the largest `share` of a tensor's elements, exactly, in two passes over its parts.

    Floats that are not negative are in the order of their bits: the first pass counts the upper half of these, the
    second the lower half where the upper one is that of the element that is looked for. No part is kept.

    Args:
        parts: gives the tensor's parts anew at each call, float32 and finite.
        share: above 0, at most 1; at least one element counts.
    """
    upper = _counted(_bits(part) >> HALF for part in parts())
    wanted = max(1, math.ceil(share * int(upper.sum())))
    top, above = _from_above(upper, wanted)
    lower = _counted(bits[bits >> HALF == top] & (2**HALF - 1) for bits in map(_bits, parts()))
    low, _ = _from_above(lower, wanted - above)
    return float(torch.tensor([top << HALF | low], dtype=torch.int32).view(torch.float32))


def merged(ancestor: Stored, members: Sequence[Stored], weights: Sequence[float], density: float) -> Iterator[Tensor]:
    """An ancestor's tensor plus what its descendants agree to change in it, block by block, in float32.

    Args:
        ancestor: the tensor on disk.
        members: the same one of each descendant.
        weights: of each, not negative.
        density: share of each descendant's changes of this tensor that count, its largest.
    """
    if not ancestor.dtype.is_floating_point:
        yield from members[0].through()
        return

    def changes(member: Stored) -> Iterator[Tensor]:
        for rows in blocks(ancestor.shape):
            yield _change(ancestor, member, rows)

    least = [threshold(lambda member=member: changes(member), density) for member in members]
    for rows in blocks(ancestor.shape):
        agreed = ties([_change(ancestor, member, rows) for member in members], weights, least)
        yield ancestor.read(rows).to(torch.float32) + agreed


def _change(ancestor: Stored, member: Stored, rows: slice | None) -> Tensor:
    return member.read(rows).to(torch.float32) - ancestor.read(rows).to(torch.float32)


def _bits(part: Tensor) -> Tensor:
    return part.to(torch.float32).abs().flatten().contiguous().view(torch.int32)


def _counted(halves: Iterable[Tensor]) -> Tensor:
    total = torch.zeros(2**HALF, dtype=torch.int64)
    for half in halves:
        total += torch.bincount(half, minlength=2**HALF)
    return total


def _from_above(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The place of the element that is the `wanted`-th from above, and how many lie in higher places."""
    upto = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(upto, wanted))
    return len(counts) - 1 - place, int(upto[place - 1]) if place else 0
