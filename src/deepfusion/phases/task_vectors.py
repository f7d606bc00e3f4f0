"""Task vectors: what devices learned in the base's own weights is added to them, before anything is distilled.

A device whose public ancestor is the base itself has learned in the base's own coordinates: its proxy's weights minus
the base's are a task vector, and task vectors add up (task arithmetic, arXiv 2212.04089). Whatever else devices know
has to be distilled, across architectures and tokenizers; this comes without a token of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from deepfusion.artifacts import Checkpoint, Proxy
from deepfusion.checkpoints import as_checkpoint, named_as, write_descendant
from deepfusion.families import family
from deepfusion.weights import Part, blocks, stored


def add_task_vectors(
    base: Checkpoint, proxies: Sequence[Proxy], scale: float, *, into: Path, resume: bool = False
) -> Checkpoint:
    """The base plus scale · Σ (proxy − base), summed in float32 and kept in the widest dtype of them all.

    Its tensors are the proxies'.

    Memory holds blocks of a few tensors, whatever the number and size of proxies.

    Args:
        base: the dense model whose copies become experts.
        proxies: of its lineage.
        scale: how much of each task vector is added; 0 gives the base.
        into: where the sum goes.
        resume: keep what an interrupted call with the same arguments has finished.

    Raises:
        ValueError: a proxy is of another lineage, or its tensors differ from the base's in name or shape.
    """
    return _add(base, base, proxies, lambda name: [scale] * len(proxies), into, resume)


def own_task_vector(
    student: Checkpoint,
    base: Checkpoint,
    proxies: Sequence[Proxy],
    cluster: int,
    scale: float,
    *,
    into: Path,
    resume: bool = False,
) -> Checkpoint:
    """A student whose FFNs have a cluster's own task vectors, whole, in place of the share of everyone's they had.

    FFN tensors become student + Σ own (proxy − base) − scale · Σ all (proxy − base), as `add_task_vectors` sums; all
    others stay as they are. What the student has learned since it began is kept.

    Args:
        student: what became of `add_task_vectors(base, proxies, scale)`, trained or not.
        base: as there.
        proxies: as there, those of the cluster among them.
        cluster: whose FFNs they will be.
        scale: as there.
        into: where the student goes.
        resume: keep what an interrupted call with the same arguments has finished.

    Raises:
        ValueError: as `add_task_vectors`, or the student is not of the base's lineage, or no proxy is the cluster's.
    """
    if student.lineage != base.lineage:
        raise ValueError(f"{student.folder} is of lineage {student.lineage} and not of the base's, {base.lineage}")
    own = [float(proxy.cluster == cluster) for proxy in proxies]
    if not any(own):
        raise ValueError(f"no proxy of cluster {cluster} is of the base's lineage: there is nothing to add for it")
    role = family(base.model_type).role
    changes, nothing = [one - scale for one in own], [0.0] * len(proxies)
    return _add(student, base, proxies, lambda name: changes if role(name) == "ffn" else nothing, into, resume)


def _add(
    onto: Checkpoint,
    base: Checkpoint,
    proxies: Sequence[Proxy],
    scales: Callable[[str], Sequence[float]],
    into: Path,
    resume: bool,
) -> Checkpoint:
    """`onto` plus Σ scale · (proxy − base), where `scales` tells a tensor's, one for each proxy."""
    for proxy in proxies:
        if proxy.lineage != base.lineage:
            raise ValueError(
                f"a proxy of cluster {proxy.cluster} is of lineage {proxy.lineage} and not of the base's, "
                f"{base.lineage}: what its devices learned cannot be added to the base's weights"
            )
    after = [stored(proxy.model) for proxy in proxies]
    before, start = (named_as(after[0], one.folder) if after else stored(one.folder) for one in (base, onto))
    expected = {name: one.shape for name, one in before.items()}
    for folder, held in ((onto.folder, start), *((p.model, a) for p, a in zip(proxies, after, strict=True))):
        if {name: one.shape for name, one in held.items()} != expected:
            raise ValueError(f"{base.folder} and {folder} have tensors of different names or shapes")

    def added(name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        wanted = [(scale, held[name]) for scale, held in zip(scales(name), after, strict=True) if scale]
        for rows in blocks(expected[name]):
            total = start[name].read(rows)
            if wanted and total.is_floating_point():
                origin = before[name].read(rows).to(torch.float32)
                total = total.to(torch.float32, copy=True)
                for scale, held in wanted:
                    total += scale * (held.read(rows).to(torch.float32) - origin)
            yield total.to(dtype) if total.is_floating_point() else total

    parts: list[Part] = []
    for name, one in start.items():
        dtype = reduce(torch.promote_types, (held[name].dtype for held in after), one.dtype)
        parts.append(Part(name, dtype, one.shape, partial(added, name, dtype)))
    write_descendant(base.folder, parts, into=into, resume=resume)
    return as_checkpoint(into, lineage_of=base.lineage)
