import random

import pytest

from deepfusion.comparison.statistics import estimate, paired


def test_mean_and_interval_by_hand() -> None:
    """t(.975, 2) = 4.302653; standard deviation 1."""
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert estimate([4.0]).half is None
    assert estimate([4.0, 4.0]).half == 0
    with pytest.raises(ValueError, match="no value"):
        estimate([])


def test_a_paired_test_by_hand() -> None:
    """Differences 1, 2, 3: t = 2·√3 with two degrees of freedom, of which p = .07418."""
    found = paired({0: 2.0, 1: 4.0, 2: 6.0, 9: 100.0}, {2: 3.0, 1: 2.0, 0: 1.0, 8: 7.0})
    assert found is not None
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert found.p == pytest.approx(0.0741799, rel=1e-5)


def test_pairing_sees_what_the_spread_of_seeds_hides() -> None:
    generator = random.Random(0)
    hard = {seed: generator.uniform(0, 10) for seed in range(6)}
    ours = {seed: value - 0.1 - generator.uniform(0, 0.02) for seed, value in hard.items()}
    found, back = paired(ours, hard), paired(hard, ours)
    assert found is not None
    assert back is not None
    assert found.p is not None
    assert found.p < 1e-4
    assert back.mean == -found.mean
    assert back.p == found.p
    assert (estimate(list(ours.values())).half or 0) > 1


def test_differences_that_are_all_equal() -> None:
    same, apart = paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}), paired({0: 1.5, 1: 2.5}, {0: 1.0, 1: 2.0})
    assert same is not None
    assert apart is not None
    assert (same.p, apart.p) == (1.0, None)  # of no spread, nothing can be said
    assert apart.half is None


def test_one_seed_has_a_difference_and_no_test() -> None:
    found = paired({3: 1.0}, {3: 0.5})
    assert found is not None
    assert (found.mean, found.half, found.p, found.count) == (0.5, None, None, 1)
    assert paired({3: 1.0}, {4: 1.0}) is None
