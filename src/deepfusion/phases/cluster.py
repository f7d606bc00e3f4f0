"""Phase I: devices whose text is alike share a cluster (Eq. 6 of arXiv 2602.14301).

Π[n, m] = cos(e_n, e_m); KMeans on the rows of Π groups the devices into K clusters, one for each expert. Either all
devices together (one teacher per lineage inside a cluster), or lineage by lineage, as published: then every cluster
holds models of one lineage, and each lineage gets its share of the K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from deepfusion.artifacts import Clusters, Upload
from deepfusion.config import ClusterPhase
from deepfusion.encoders import decode, quantise


def cluster(uploads: Sequence[Upload], config: ClusterPhase, *, seed: int, into: Path) -> Clusters:
    """Group the accepted devices into `config.k` clusters; cluster 0 holds the first device, empty clusters come last.

    Raises:
        ValueError: K exceeds the number of devices, or (by_type) falls short of the number of lineages.
    """
    if config.k > len(uploads):
        raise ValueError(
            f"cluster.k is {config.k} but there are only {len(uploads)} accepted devices: lower k or admit more devices"
        )
    embeddings = np.stack([decode(upload.embedding) for upload in uploads])
    similarity = similarity_matrix(embeddings)
    groups: list[list[int]] = []
    warnings: list[str] = []
    for pool, share, whose in _pools(uploads, config):
        labels = group(similarity[pool], share, seed)
        found = [[device for device, label in zip(pool, labels, strict=True) if label == c] for c in range(share)]
        groups += found
        warnings += [f"is empty: only {len(set(labels))} distinct devices{whose}" for members in found if not members]
    groups = sorted(filter(None, groups))
    warnings = [f"cluster {number} {text}" for number, text in enumerate(warnings, len(groups))]
    return Clusters(
        folder=into,
        k=config.k,
        members=tuple(tuple(uploads[n].device for n in members) for members in groups) + ((),) * len(warnings),
        similarity=tuple(tuple(row) for row in similarity.tolist()),
        devices=tuple(upload.device for upload in uploads),
        centroids=tuple(_centroid(embeddings[members]) for members in groups) + ("",) * len(warnings),
        warnings=tuple(warnings),
    ).sealed()


def similarity_matrix(embeddings: Float[ndarray, "devices size"]) -> Float[ndarray, "devices devices"]:
    """Π: the cosine of every pair of embeddings (Eq. 6); float64, symmetric, 1 on the diagonal.

    Rounded to six decimals: far below int8's own error, and equal embeddings then have equal rows on every machine.
    """
    rows = np.asarray(embeddings, dtype=np.float64)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = np.round(np.clip(rows @ rows.T, -1, 1), 6) + 0.0  # + 0.0 turns -0.0 into 0.0
    np.fill_diagonal(similarity, 1.0)
    return similarity


def group(rows: Float[ndarray, "devices features"], k: int, seed: int) -> list[int]:
    """KMeans labels of the rows, numbered in the order in which they first appear.

    Fewer distinct rows than `k` give as many labels as there are distinct rows.
    """
    k = min(k, len(np.unique(rows, axis=0)))
    kmeans = KMeans(n_clusters=k, n_init=20, random_state=seed)  # pyright: ignore[reportArgumentType] (n_init: int or str)
    labels = kmeans.fit_predict(rows)
    names: dict[int, int] = {}
    return [names.setdefault(int(label), len(names)) for label in labels]


def share_out(k: int, sizes: Sequence[int]) -> list[int]:
    """Split `k` clusters over pools of devices: one each, the rest by largest remainder; sums to `k`.

    The rest is shared in proportion to the devices beyond each pool's first, which never gives a pool more clusters
    than it has devices. Equal remainders favour the earlier pool.

    Raises:
        ValueError: `k` is smaller than the number of pools or larger than the number of devices.
    """
    rest, spare = k - len(sizes), sum(sizes) - len(sizes)
    if not 0 <= rest <= spare:
        raise ValueError(f"{k} clusters cannot be split over {len(sizes)} pools of {sum(sizes)} devices")
    if rest == 0:
        return [1] * len(sizes)
    quotas = [divmod(rest * (size - 1), spare) for size in sizes]
    shares = [1 + whole for whole, _ in quotas]
    by_remainder = sorted(range(len(sizes)), key=lambda pool: -quotas[pool][1])
    for pool in by_remainder[: k - sum(shares)]:
        shares[pool] += 1
    return shares


def purity(clusters: Clusters, device_domains: Mapping[str, str]) -> float:
    """Share of devices whose domain is the most common one in their cluster; 1 when no cluster mixes domains."""
    agreeing = 0
    for members in filter(None, clusters.members):
        domains = [device_domains[device] for device in members]
        agreeing += max(domains.count(domain) for domain in set(domains))
    return agreeing / len(clusters.devices)


def adjusted_rand(clusters: Clusters, device_domains: Mapping[str, str]) -> float:
    """Adjusted Rand index of clusters against domains: 1 is the same grouping, 0 is chance."""
    domains = [device_domains[device] for device in clusters.devices]
    return float(adjusted_rand_score(domains, [clusters.of(device) for device in clusters.devices]))


def _pools(uploads: Sequence[Upload], config: ClusterPhase) -> list[tuple[list[int], int, str]]:
    """What is clustered apart: (devices by number, how many clusters they get, whose they are in words)."""
    if config.mode == "by_domain":
        return [(list(range(len(uploads))), config.k, "")]
    pools: dict[str, list[int]] = {}
    for number, upload in enumerate(uploads):
        pools.setdefault(upload.lineage, []).append(number)
    if config.k < len(pools):
        raise ValueError(
            f"cluster.k is {config.k} but the devices have {len(pools)} lineages ({', '.join(pools)}): "
            f"type-pure clusters need at least {len(pools)}; raise k or set cluster.mode: by_domain"
        )
    shares = share_out(config.k, [len(pool) for pool in pools.values()])
    return [
        (pool, share, f" of lineage {lineage}") for (lineage, pool), share in zip(pools.items(), shares, strict=True)
    ]


def _centroid(embeddings: Float[ndarray, "members size"]) -> str:
    """The members' mean direction as int8, in hex."""
    mean = embeddings.mean(axis=0, dtype=np.float64)
    if not mean.any():
        raise ValueError("the embeddings of a cluster's devices cancel out, so it has no centroid: raise cluster.k")
    return quantise(mean).hex()
