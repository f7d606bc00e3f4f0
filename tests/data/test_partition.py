from collections import Counter
from typing import Literal

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfusion.config import Partition
from deepfusion.data.partition import assign, device_ids, mixtures


def groups(*sizes: int) -> dict[str, list[str]]:
    return {f"domain{d}": [f"d{d}/g{g}" for g in range(size)] for d, size in enumerate(sizes)}


def test_ids_sort_in_order() -> None:
    assert device_ids(3) == ("device-00", "device-01", "device-02")
    assert device_ids(101)[7] == "device-007"


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(["by_domain", "uneven"]),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    devices=st.integers(1, 20),
    holders=st.integers(1, 6),
    alpha=st.sampled_from([1e-4, 0.05, 1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_invariants(
    mode: Literal["by_domain", "uneven"], sizes: list[int], devices: int, holders: int, alpha: float, seed: int
) -> None:
    partition = Partition(mode=mode, devices=devices, holders=holders, alpha=alpha)
    held = assign(groups(*sizes), partition, seed)
    each = min(holders, devices)
    assert len(held) == sum(sizes)
    assert all(len(set(ids)) == len(ids) == each for ids in held.values())
    counts = Counter(device for ids in held.values() for device in ids)
    assert set(counts) <= set(device_ids(devices))
    if sum(sizes) * each >= devices:
        assert set(counts) == set(device_ids(devices))
    else:
        assert max(counts.values()) == 1


def test_determinism() -> None:
    partition = Partition(devices=8)
    assert assign(groups(10, 10), partition, 1) == assign(groups(10, 10), partition, 1)
    assert assign(groups(10, 10), partition, 1) != assign(groups(10, 10), partition, 2)


def test_small_alpha_puts_each_device_into_its_own_domain() -> None:
    held = assign(groups(40, 40, 40, 40), Partition(devices=16, alpha=1e-4, holders=2), 0)
    domains = {device: {group[:2] for group in held if device in held[group]} for device in device_ids(16)}
    assert domains == {device: {f"d{index % 4}"} for index, device in enumerate(device_ids(16))}


def test_large_alpha_mixes() -> None:
    held = assign(groups(100, 100), Partition(devices=2, alpha=1e4, holders=1), 0)
    counts = Counter((ids[0], group[:2]) for group, ids in held.items())
    assert all(35 <= count <= 65 for count in counts.values())


def test_mixtures_are_largest_at_home() -> None:
    weights = mixtures(3, Partition(devices=7, alpha=0.5), np.random.default_rng(0))
    assert weights.argmax(axis=1).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert np.allclose(weights.sum(axis=1), 1)


def test_uneven_shares_do_not_depend_on_the_domain() -> None:
    weights = mixtures(3, Partition(mode="uneven", devices=5), np.random.default_rng(0))
    assert (weights == weights[:, :1]).all()
    assert np.isclose(weights[:, 0].sum(), 1)


def test_holders_follow_the_weights() -> None:
    partition = Partition(mode="uneven", devices=2, holders=1)
    held = assign(groups(4000), partition, 5)
    share = mixtures(1, partition, np.random.default_rng([5, 0x9A27]))[0, 0]
    assert abs(sum(ids == ("device-00",) for ids in held.values()) / 4000 - share) < 0.03
