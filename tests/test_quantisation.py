"""Numbers in fewer bits, by hand and by their bounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepfusion.quantisation import LEVELS, Integers, dequantise, factors, quantise, runs, width

WIDEST = float((LEVELS[1:] - LEVELS[:-1]).max())
BOUNDS: dict[Integers, float] = {"int8": 1 / 254, "nf4": WIDEST / 2}  # of a number, relative to its run's scale


def there_and_back(values: Tensor, numbers: Integers) -> Tensor:
    return dequantise(*quantise(values, numbers), values.shape[-1], numbers)


# ── by hand ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_int8_by_hand() -> None:
    """The largest is 2: a step is 2/127, and 1 is 63.5 of them, of which rounding makes the even 64."""
    integers, scales = quantise(torch.tensor([[2.0, -2.0, 1.0, 0.0, 0.01]]), "int8")
    assert scales.tolist() == [[2.0]]
    assert integers.tolist() == [[127, -127, 64, 0, 1]]
    found = dequantise(integers, scales, 5, "int8")
    torch.testing.assert_close(found, torch.tensor([[2.0, -2.0, 128 / 127, 0.0, 2 / 127]]))


def test_nf4_by_hand() -> None:
    """-1 is level 0, 0 level 7, 1 level 15: halves of bytes, and one that is not there counts as zero."""
    integers, scales = quantise(torch.tensor([[-3.0, 0.0, 3.0]]), "nf4")
    assert scales.tolist() == [[3.0]]
    assert integers.tolist() == [[0 * 16 + 7, 15 * 16 + 7]]
    assert dequantise(integers, scales, 3, "nf4").tolist() == [[-3.0, 0.0, 3.0]]


def test_a_scale_is_of_64_numbers() -> None:
    values = torch.cat([torch.full((64,), 1.0), torch.full((64,), 100.0), torch.full((2,), 0.5)])[None]
    integers, scales = quantise(values, "int8")
    assert scales.tolist() == [[1.0, 100.0, 0.5]]
    assert integers.unique().tolist() == [127]


def test_scaling_is_by_the_scale_that_is_kept() -> None:
    """1.003 is 1 in bfloat16, so the largest number is cut to 1, and half of it is 64 steps of 1/127."""
    integers, scales = quantise(torch.tensor([[1.003, 0.5015]]), "int8")
    assert scales.tolist() == [[1.0]]
    assert integers.tolist() == [[127, 64]]


def test_the_levels_are_those_of_bitsandbytes() -> None:
    from bitsandbytes.functional import get_4bit_type

    torch.testing.assert_close(LEVELS, get_4bit_type("nf4", device="cpu"), rtol=0, atol=1e-6)
    assert LEVELS[[0, 7, 15]].tolist() == [-1.0, 0.0, 1.0]


# ── whatever the numbers ──────────────────────────────────────────────────────────────────────────────────────────────

ROWS = st.integers(0, 3)
COUNTS = st.sampled_from([0, 1, 2, 63, 64, 65, 130])


@pytest.mark.parametrize("numbers", BOUNDS)
@settings(deadline=None, max_examples=60)
@given(rows=ROWS, count=COUNTS, seed=st.integers(0, 10**6), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_every_number_is_near_enough(rows: int, count: int, seed: int, scale: float, numbers: Integers) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(rows, count, generator=generator) ** 3
    values[torch.rand(rows, count, generator=generator) < 0.2] = 0.0
    integers, scales = quantise(values, numbers)
    assert integers.shape == (rows, width(count, numbers))
    assert scales.shape == (rows, runs(count))
    found = dequantise(integers, scales, count, numbers)
    of = scales.float().repeat_interleave(64, -1)[:, :count]
    assert bool(((found - values).abs() <= of * BOUNDS[numbers] * (1 + 1e-5)).all())
    assert bool((found[values == 0] == 0).all())


@pytest.mark.parametrize("numbers", BOUNDS)
@given(rows=st.integers(1, 5), cut=st.integers(0, 5), count=COUNTS)
@settings(deadline=None, max_examples=30)
def test_rows_do_not_know_of_each_other(rows: int, cut: int, count: int, numbers: Integers) -> None:
    values = torch.randn(rows, count, generator=torch.Generator().manual_seed(rows))
    whole = there_and_back(values, numbers)
    parts = [there_and_back(part, numbers) for part in (values[:cut], values[cut:])]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("numbers", BOUNDS)
def test_numbers_too_small_for_a_scale_become_zero(numbers: Integers) -> None:
    assert there_and_back(torch.tensor([[1e-45, 0.0]]), numbers).tolist() == [[0.0, 0.0]]


def test_more_dimensions_are_rows_too() -> None:
    values = torch.randn(2, 3, 70)
    assert torch.equal(there_and_back(values, "nf4"), there_and_back(values.flatten(0, 1), "nf4").view(2, 3, 70))


# ── low rank ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (20, 20), (1, 5)])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_matrix_of_that_rank_is_exact(shape: tuple[int, int], rank: int) -> None:
    """Although its singular values are far apart."""
    rank = min(rank, *shape)
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, rank, generator=generator) for size in shape)
    matrix = left * 10.0 ** -torch.arange(rank) @ right.T
    a, b = factors(lambda: matrix.split(3), shape, rank)
    assert (a.shape, b.shape) == ((rank, shape[1]), (rank, shape[0]))
    torch.testing.assert_close(b.T @ a, matrix, rtol=1e-5, atol=1e-6)


def test_the_nearest_matrix_of_a_lower_rank() -> None:
    """By Eckart and Young it misses the other singular values."""
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(60, 30, generator=generator)
    a, b = factors(lambda: [matrix], (60, 30), 3)
    missed = math.sqrt(float((torch.linalg.svdvals(matrix)[3:] ** 2).sum()))
    assert float((matrix - b.T @ a).norm()) == pytest.approx(missed, rel=0.02)
    torch.testing.assert_close(a.norm(dim=1), torch.ones(3))


def test_no_change_has_no_directions() -> None:
    a, b = factors(lambda: [torch.zeros(6, 4)], (6, 4), 2)
    assert not a.any()
    assert not b.any()
