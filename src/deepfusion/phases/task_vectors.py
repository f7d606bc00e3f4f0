"""Task vectors: what devices learned in the base's own weights is added to them, before anything is distilled.

A device whose public ancestor is the base itself has learned in the base's own coordinates: its proxy's weights minus
the base's are a task vector, and task vectors add up (task arithmetic, arXiv 2212.04089). Whatever else devices know
has to be distilled, across architectures and tokenizers; this comes without a token of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from deepfusion.artifacts import Checkpoint, Proxy
from deepfusion.checkpoints import as_checkpoint, copy_description, open_config
from deepfusion.families import skeleton
from deepfusion.weights import Part, Stored, blocks, stored, write


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
    for proxy in proxies:
        if proxy.lineage != base.lineage:
            raise ValueError(
                f"a proxy of cluster {proxy.cluster} is of lineage {proxy.lineage} and not of the base's, "
                f"{base.lineage}: what its devices learned cannot be added to the base's weights"
            )
    after = [stored(proxy.model) for proxy in proxies]
    before = _as_in(after[0], base) if after else stored(base.folder)
    expected = {name: one.shape for name, one in before.items()}
    for proxy, held in zip(proxies, after, strict=True):
        if {name: one.shape for name, one in held.items()} != expected:
            raise ValueError(f"{base.folder} and {proxy.model} have tensors of different names or shapes")

    def added(name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        for rows in blocks(expected[name]):
            start = before[name].read(rows)
            if not start.is_floating_point():
                yield start
                continue
            start = start.to(torch.float32)
            total = start.clone()
            for held in after:
                total += scale * (held[name].read(rows).to(torch.float32) - start)
            yield total.to(dtype)

    parts: list[Part] = []
    for name, one in before.items():
        dtype = reduce(torch.promote_types, (held[name].dtype for held in after), one.dtype)
        parts.append(Part(name, dtype, one.shape, partial(added, name, dtype)))
    write(into, parts, resume=resume)
    copy_description(base.folder, into)
    config = open_config(base.folder)
    config.dtype = max((part.dtype for part in parts if part.dtype.is_floating_point), key=lambda dtype: dtype.itemsize)
    config.save_pretrained(into)
    return as_checkpoint(into, lineage_of=base.lineage)


def _as_in(learned: Mapping[str, Stored], base: Checkpoint) -> dict[str, Stored]:
    """The base's tensors by the names that a model trained from it has.

    Training saves what the model needs. A folder from elsewhere may leave out the prefix of a model without its head,
    and hold more: a head that is tied, rotary tables of old.
    """
    held = stored(base.folder)
    prefix = f"{skeleton(open_config(base.folder)).base_model_prefix}."
    found = {name: held.get(name) or held.get(name.removeprefix(prefix)) for name in learned}
    return {name: one for name, one in found.items() if one is not None}
