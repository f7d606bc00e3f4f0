"""Who does what in a run: which ancestor a device starts from, who is averaged, who writes, who teaches."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from deepfusion.artifacts import Clusters, Proxy, Upload
from deepfusion.config import Models, ModelSource, Recipe, TransferPhase, VAAObjective

NO_KIN = (
    "no device starts from the base itself, so that distill.task_vectors does nothing: a model of the same type with "
    "other weights, or with the same in another precision, is another model"
)
WITHOUT_KIN = (
    "make the base's own checkpoint an ancestor, or leave task_vectors and own_task_vectors out, and joint_rate, with "
    "which students learn the slower for nothing"
)


@dataclass(frozen=True)
class Teacher:
    """A model that may write and teach: a device's own, or a proxy, made or still to be made."""

    name: str
    cluster: int
    model: Upload | Future[Proxy]


def starting_points(devices: Sequence[str], models: Models, seed: int) -> dict[str, str]:
    """Device → the name of the ancestor that it starts from."""
    names = list(models.ancestors)
    if models.assign == "random":
        generator = random.Random(f"{seed}-ancestors")
        return {device: generator.choice(names) for device in devices}
    # Round by round, shifted by one each time, so that devices of one domain do not all get the same type.
    return {device: names[(n + n // len(names)) % len(names)] for n, device in enumerate(devices)}


def of_the_base(models: Models) -> bool:
    """Whether some ancestor is the very checkpoint that is the base: by content, if contents stand for paths."""

    def content(source: ModelSource) -> str | None:
        return source.path and source.path.rpartition("@")[2]

    base = content(models.base)
    return base is not None and base in map(content, models.ancestors.values())


def of_lineage(
    lineage: str, proxies: Sequence[Teacher], groups: Sequence[tuple[str, int, list[Upload]]]
) -> list[Teacher]:
    """Those proxies whose members, listed in `groups`, are of one lineage."""
    return [proxy for proxy, (_, _, members) in zip(proxies, groups, strict=True) if members[0].lineage == lineage]


def by_lineage(uploads: Sequence[Upload], clusters: Clusters) -> list[tuple[int, str, list[Upload]]]:
    """(cluster, lineage, members) of every proxy to make, in order; members in the cluster's order.

    Raises:
        ValueError: a cluster names a device without upload.
    """
    held = {upload.device: upload for upload in uploads}
    groups: dict[tuple[int, str], list[Upload]] = {}
    for cluster, devices in enumerate(clusters.members):
        for device in devices:
            if device not in held:
                raise ValueError(f"cluster {cluster} names {device}, which uploaded no model")
            groups.setdefault((cluster, held[device].lineage), []).append(held[device])
    return [(cluster, lineage, members) for (cluster, lineage), members in sorted(groups.items(), key=lambda g: g[0])]


def averaged(uploads: Sequence[Upload], clusters: Clusters) -> list[tuple[str, int, list[Upload]]]:
    """(name, cluster, members) of every proxy to make.

    A proxy is named after its cluster, and as far as that does not tell it from others, its type or its lineage.
    """
    groups = by_lineage(uploads, clusters)
    of_cluster = Counter(cluster for cluster, _, _ in groups)
    of_type = Counter((cluster, members[0].model_type) for cluster, _, members in groups)
    named: list[tuple[str, int, list[Upload]]] = []
    for cluster, lineage, members in groups:
        model_type = members[0].model_type
        suffix = model_type if of_type[cluster, model_type] == 1 else lineage
        named.append((f"cluster-{cluster}" + (f"-{suffix}" if of_cluster[cluster] > 1 else ""), cluster, members))
    return named


def writers(
    devices: Sequence[Teacher], proxies: Sequence[Teacher], clusters: Clusters, config: TransferPhase
) -> list[tuple[int, list[Upload | Future[Proxy]]]]:
    """Per cluster the models that write: its devices', or its proxies; without clusters that nobody writes for."""
    if not {"answered", "sampled"} & set(config.kinds):
        return []
    chosen: dict[int, list[Upload | Future[Proxy]]] = {}
    for one in fluent(devices, proxies, clusters, config):
        chosen.setdefault(one.cluster, []).append(one.model)
    return list(chosen.items())


def fluent(
    devices: Sequence[Teacher], proxies: Sequence[Teacher], clusters: Clusters, config: TransferPhase
) -> list[Teacher]:
    """Cluster by cluster the models that may write: its devices', or its proxies where it has too many devices."""
    found: list[Teacher] = []
    for cluster, members in enumerate(clusters.members):
        own = config.writers == "devices" and len(members) <= config.max_writers
        found += [one for one in (devices if own else proxies) if one.cluster == cluster]
    return found


def consulted(devices: Sequence[Teacher], proxies: Sequence[Teacher], recipe: Recipe) -> Sequence[Teacher]:
    """Teachers asked after the fact about text that is theirs; where writers teach, only VAA needs more than they said
    while writing. None where the likeliest teach, of whom the text decides.
    """
    if recipe.distill.teachers == "likeliest":
        return []
    if recipe.distill.teachers == "proxies":
        return proxies
    if not isinstance(recipe.distill.objective, VAAObjective):
        return []
    return devices if recipe.transfer.writers == "devices" else proxies


def tunes_fedjets(recipe: Recipe) -> bool:
    """Whether the server of the baseline FedJETS tunes: it has public text alone."""
    return recipe.distill.shares.tune > 0 and "public" in recipe.transfer.kinds
