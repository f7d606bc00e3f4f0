"""Numbers in fewer bits: block-wise, with a scale for every 64 numbers of a row; and matrices as products of thin ones.

A run of a row is scaled by its largest absolute value s, so that its numbers lie within [-1, 1]. `int8` rounds them to
multiples of 1/127; `nf4` to the nearest of sixteen levels, two in a byte (arXiv 2305.14314, appendix E). s is kept in
bfloat16, and it is the kept one that numbers are scaled by, so that packing and unpacking mean the same levels. Rows
do not know of each other: what becomes of a block of rows does not depend on the block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from jaxtyping import BFloat16, Float, Shaped
from torch import Tensor

from deepfusion.config.device import RUN

Integers = Literal["int8", "nf4"]
STEPS = 127  # of int8, on either side of zero
OVERSAMPLED, PASSES = 8, 4  # of the search for a matrix's largest directions


def _levels() -> Float[Tensor, " 16"]:
    """The levels of NF4: quantiles of the normal distribution at equal distances, seven below zero and eight above.

    The outermost ones are at the quantile δ = 1/2 · (1/32 + 1/30) from the ends, and become -1 and 1.
    """
    delta = (1 / 32 + 1 / 30) / 2
    below = torch.linspace(delta, 0.5, 8, dtype=torch.float64)  # each ends with zero
    above = torch.linspace(0.5, 1 - delta, 9, dtype=torch.float64)
    quantiles = torch.special.ndtri(torch.cat([below, above[1:]]))
    return (quantiles / quantiles[-1]).float()


LEVELS = _levels()
_ZERO = 7  # its place among the levels
_BETWEEN = (LEVELS[1:] + LEVELS[:-1]) / 2


def width(count: int, numbers: Integers) -> int:
    """Bytes that a row of so many numbers takes, without scales."""
    return count if numbers == "int8" else math.ceil(count / 2)


def runs(count: int) -> int:
    """Scales that a row of so many numbers has."""
    return math.ceil(count / RUN)


def quantise(
    values: Float[Tensor, "*rows count"], numbers: Integers
) -> tuple[Shaped[Tensor, "*rows width"], BFloat16[Tensor, "*rows runs"]]:
    """Rows of float32 as integers (int8, or uint8 that holds two numbers, the first in its high bits), and scales.

    A number is off by at most 1/254 of its scale (int8), or .152 of it (nf4). Zero stays zero.
    """
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % RUN)).unflatten(-1, (-1, RUN))
    scales = padded.abs().amax(-1).bfloat16() if padded.numel() else padded.new_empty(padded.shape[:-1]).bfloat16()
    scaled = (padded / scales.float().unsqueeze(-1)).flatten(-2)[..., : values.shape[-1]]
    # A scale is 0 where all is, or too small for bfloat16; others may be a little smaller than the largest number.
    scaled = scaled.nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1)
    if numbers == "int8":
        return (scaled * STEPS).round().to(torch.int8), scales
    places = torch.bucketize(scaled, _BETWEEN).to(torch.uint8)
    if values.shape[-1] % 2:
        places = torch.nn.functional.pad(places, (0, 1), value=_ZERO)
    return places[..., ::2] * 16 + places[..., 1::2], scales


def dequantise(
    integers: Shaped[Tensor, "*rows width"], scales: BFloat16[Tensor, "*rows runs"], count: int, numbers: Integers
) -> Float[Tensor, "*rows count"]:
    """What `quantise` made of rows of `count` numbers, in float32."""
    if numbers == "int8":
        scaled = integers.float() / STEPS
    else:
        places = torch.stack([integers >> 4, integers & 15], -1).flatten(-2)
        scaled = LEVELS[places.long()]
    return scaled[..., :count] * scales.float().repeat_interleave(RUN, -1)[..., :count]


def factors(
    matrix: Callable[[], Iterable[Float[Tensor, "rows columns"]]], shape: tuple[int, int], rank: int
) -> tuple[Float[Tensor, "rank columns"], Float[Tensor, "rank rows"]]:
    """A and B whose product Bᵀ·A is the nearest of its rank to a matrix, which is asked for block by block five times.

    A's rows have length 1, and those of B the singular values: each row is one direction, and quantised by itself. To
    float32 exact for a matrix of no higher rank. Block power iteration with Rayleigh-Ritz (arXiv 0909.4061), in float64
    and from directions that are always the same; memory holds a block, and `rank` + 8 numbers for each row and column.
    """
    generator = torch.Generator().manual_seed(0)
    most = min(rank + OVERSAMPLED, *shape)
    inner = torch.randn(shape[1], most, generator=generator, dtype=torch.float64)
    for _ in range(PASSES):
        turned = torch.zeros_like(inner)
        for block in matrix():
            exact = block.double()
            turned += exact.T @ (exact @ inner)
        inner = torch.linalg.qr(turned)[0]
    outer = torch.cat([block.double() @ inner for block in matrix()])
    turn = torch.linalg.svd(outer, full_matrices=False)[2][:rank].T
    a, b = (inner @ turn).T, (outer @ turn).T
    used = b.abs().amax(1, keepdim=True) > 0  # the rest are any directions at all
    return (a * used).float().contiguous(), b.float().contiguous()
