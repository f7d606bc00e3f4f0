"""Who holds what: each group of private text (a fact, a company, a topic) goes to a few devices, whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from deepfusion.config import Partition

SMALLEST_WEIGHT = 1e-12  # a Dirichlet of small concentration underflows to 0, and a group may need all devices


def device_ids(count: int) -> tuple[str, ...]:
    """`device-00`, `device-01`, …: padded so that they sort in order."""
    width = max(2, len(str(count - 1)))
    return tuple(f"device-{index:0{width}d}" for index in range(count))


def assign(groups: Mapping[str, Sequence[str]], partition: Partition, seed: int) -> dict[str, tuple[str, ...]]:
    """Group → the devices that hold it: exactly `min(holders, devices)` distinct ones, in order of id.

    A group of domain d draws its holders without replacement, with chances in proportion to the devices' weights on
    d (`mixtures`). A device left with nothing then takes over one place of a device that holds the most, in a domain as
    close to its own mixture as can be; so no device is empty when there are at least as many places as devices.

    Args:
        groups: domain → its groups; no group stands in two domains.
        partition: mode `by_domain` or `uneven`.
        seed: everything is drawn from it.
    """
    ids = device_ids(partition.devices)
    generator = np.random.default_rng([seed, 0x9A27])
    weights = mixtures(len(groups), partition, generator)
    holders: dict[str, set[int]] = {}
    domain_of: dict[str, int] = {}
    for domain, names in enumerate(groups.values()):
        for name in names:
            # Efraimidis and Spirakis (2006): the smallest Exp(1)/w are a weighted draw without replacement.
            keys = generator.exponential(size=len(ids)) / weights[:, domain]
            holders[name] = set(np.argsort(keys, kind="stable")[: partition.holders].tolist())
            domain_of[name] = domain
    _fill_empty(holders, domain_of, weights)
    return {name: tuple(ids[device] for device in sorted(held)) for name, held in holders.items()}


def mixtures(
    domains: int, partition: Partition, generator: np.random.Generator
) -> Float[np.ndarray, "devices domains"]:
    """Each device's weight on each domain, positive.

    by_domain: device n draws a mixture from a symmetric Dirichlet(alpha) whose largest entry is then swapped onto
    domain n mod D. Small alpha puts a device into one domain, large alpha into all alike; each domain is home to N/D
    devices.
    uneven: one Dirichlet(1) over the devices gives each its share of everything, whatever the domain.
    """
    if partition.mode == "uneven":
        shares = generator.dirichlet(np.ones(partition.devices))
        weights = np.repeat(shares[:, None], domains, axis=1)
    else:
        weights = generator.dirichlet(np.full(domains, partition.alpha), size=partition.devices)
        for device, row in enumerate(weights):
            home, largest = device % domains, int(row.argmax())
            row[[home, largest]] = row[[largest, home]]
    return np.maximum(weights, SMALLEST_WEIGHT)


def _fill_empty(
    holders: dict[str, set[int]], domain_of: dict[str, int], weights: Float[np.ndarray, "devices domains"]
) -> None:
    """Give each device that holds nothing one place of a device that holds several, in place."""
    counts = [0] * len(weights)
    for held in holders.values():
        for device in held:
            counts[device] += 1
    for device, count in enumerate(counts):
        if count:
            continue
        places = [(name, giver) for name, held in holders.items() for giver in sorted(held) if counts[giver] > 1]
        if not places:
            return
        name, giver = max(places, key=lambda place: (weights[device, domain_of[place[0]]], counts[place[1]]))
        holders[name] = holders[name] - {giver} | {device}
        counts[device] += 1
        counts[giver] -= 1
