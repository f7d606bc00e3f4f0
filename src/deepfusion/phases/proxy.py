"""One proxy per cluster and lineage: the mean of its members' weights (Fig. 4), or what they agree on (TIES)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from deepfusion.artifacts import Checkpoint, Proxy, Upload
from deepfusion.checkpoints import copy_description, named_as
from deepfusion.config import ProxyPhase
from deepfusion.encoders import cosine, decode
from deepfusion.merging import merged
from deepfusion.roles import by_lineage
from deepfusion.store import link_tree
from deepfusion.weights import Part, Stored, blocks, stored, write

MOST_NAMED = 3  # pairs of strangers in one proxy
Combine = Callable[[str, Sequence[Stored], Sequence[float]], Iterator[Tensor]]
"""A tensor's name, the tensor in every checkpoint, and their weights → what becomes of them, block by block."""

__all__ = ["average", "average_folders", "by_lineage", "mean", "means", "name_of"]


def mean(tensors: Iterable[Shaped[Tensor, "*shape"]], weights: Sequence[float]) -> Shaped[Tensor, "*shape"]:
    """Weighted mean, in float32 and in the order given; equal tensors give exactly that tensor back.

    Args:
        tensors: as many as `weights`, of one shape, all floating or all of integers. Each is looked at once and let go.
        weights: not negative, and not all zero.

    Raises:
        ValueError: integers that are not the same everywhere.
    """
    # A running sum: a cluster of 1B models does not fit in memory.
    result, total = torch.empty(0), 0.0
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight
        if weight == total:  # the first that counts
            result = tensor if not tensor.is_floating_point() else tensor.to(torch.float32, copy=True)
        elif tensor.is_floating_point():
            if weight:
                result += tensor.to(torch.float32, copy=True).sub_(result).mul_(weight / total)
        elif not torch.equal(result, tensor):
            raise ValueError("tensors of integers differ, and have no mean")
    return result


def means(members: Sequence[Stored], weights: Sequence[float], rows: slice = slice(None)) -> Iterator[Tensor]:
    """`mean` of tensors on disk, or of some of their rows, block by block, whatever their number and size.

    Raises:
        ValueError: as `mean`.
    """
    if len({member.place for member in members}) == 1:  # links of one file: two say what all say, to the last bit
        members, weights = members[:2], sorted(weights)[-2:]
    for block in blocks(members[0].shape, rows):
        yield mean((member.read(block) for member in members), weights)


def name_of(proxy: Proxy) -> str:
    """What a proxy is called as a writer and teacher."""
    return f"cluster-{proxy.cluster}-{proxy.lineage}"


def average(
    uploads: Sequence[Upload],
    cluster: int,
    config: ProxyPhase,
    *,
    ancestor: Checkpoint | None = None,
    into: Path,
    resume: bool = False,
) -> Proxy:
    """The proxy of one cluster's uploads of one lineage; a single member is its own proxy.

    Memory holds blocks of a few tensors, whatever the number and size of members.

    Args:
        uploads: of one lineage.
        cluster: their cluster's number.
        config: how members are merged and weighted, and when to warn.
        ancestor: what they started from; `ties` needs it.
        into: where the proxy goes.
        resume: go on from what an interrupted attempt with the same arguments left in `into`.

    Raises:
        ValueError: the uploads are not of one lineage; names two that differ.
    """
    _refuse_mixed(uploads, cluster)
    counts = [upload.tokens if config.weights == "tokens" else 1 for upload in uploads]
    if not sum(counts):
        raise ValueError(f"no member of cluster {cluster} was trained on any token: set proxy.weights: uniform")
    weights = [count / sum(counts) for count in counts]
    target, distance = into / "model", 0.0
    if len(uploads) == 1:
        link_tree(uploads[0].model, target)
    else:
        folders = [upload.model for upload in uploads]
        combine = None
        if config.method == "ties":
            assert ancestor is not None
            combine = _agreed(folders, ancestor.folder, config.density)
        distance = average_folders(folders, weights, combine=combine, into=target, resume=resume)
    first = uploads[0]
    return Proxy(
        folder=into,
        cluster=cluster,
        lineage=first.lineage,
        model_type=first.model_type,
        members=tuple(upload.device for upload in uploads),
        weights=tuple(weights),
        distance=distance,
        parameters=first.parameters,
        active_parameters=first.active_parameters,
        warnings=tuple(_strangers(uploads, cluster, config.warn_below)),
    ).sealed()


def average_folders(
    folders: Sequence[Path],
    weights: Sequence[float],
    *,
    combine: Combine | None = None,
    into: Path,
    resume: bool = False,
) -> float:
    """Write the mean of checkpoints that have equal tensors, with the first one's config and tokenizer.

    Args:
        folders: of the checkpoints.
        weights: as many.
        combine: what to write instead of the mean.
        into: where the mean goes.
        resume: keep what an interrupted call with the same arguments has finished.

    Returns:
        The largest L2 distance of a checkpoint from the mean as written, relative to the mean's norm.

    Raises:
        ValueError: the checkpoints' tensors differ in name or shape.
    """
    into.mkdir(parents=True, exist_ok=True)
    held = [stored(folder) for folder in folders]
    expected = {name: one.shape for name, one in held[0].items()}
    for folder, other in zip(folders[1:], held[1:], strict=True):
        if {name: one.shape for name, one in other.items()} != expected:
            raise ValueError(f"{folders[0]} and {folder} have tensors of different names or shapes")
    squares: dict[str, list[float]] = {}

    def made(name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        members, found = [member[name] for member in held], list[list[float]]()
        try:
            combined = means(members, weights) if combine is None else combine(name, members, weights)
            for rows, middle in zip(blocks(expected[name]), combined, strict=True):
                yield (block := middle.to(dtype))
                found.append(_squares(block, members, rows))
        except ValueError as error:
            raise ValueError(f"{folders[0]} and its like: {name}: {error}") from None
        squares[name] = _sums(found)

    parts: list[Part] = []
    for name, shape in expected.items():
        dtype = reduce(torch.promote_types, (member[name].dtype for member in held))
        parts.append(Part(name, dtype, shape, partial(made, name, dtype)))
    write(into, parts, resume=resume)
    copy_description(folders[0], into)
    for name, one in stored(into).items():
        if name not in squares:  # in a file that an interrupted attempt has finished
            members = [member[name] for member in held]
            squares[name] = _sums(_squares(one.read(rows), members, rows) for rows in blocks(one.shape))
    norm, *apart = _sums(squares[name] for name in expected)
    return math.sqrt(max(apart) / norm) if norm else 0.0


def _agreed(folders: Sequence[Path], ancestor: Path, density: float) -> Combine:
    """TIES, from the weights that the members started from.

    Raises:
        ValueError: the ancestor lacks a tensor that the members have.
    """
    expected = {name: one.shape for name, one in stored(folders[0]).items()}
    before = named_as(expected, ancestor)
    for name, shape in expected.items():
        if name not in before or before[name].shape != shape:
            raise ValueError(f"{ancestor} has no tensor {name} of shape {shape}, which its descendants have")
    return lambda name, members, weights: merged(before[name], members, weights, density)


def _squares(middle: Tensor, members: Sequence[Stored], rows: slice | None) -> list[float]:
    """Squared L2 norms of a block of the mean, and of each member's difference from it; integers count as nothing."""
    if not middle.is_floating_point():
        return [0.0] * (1 + len(members))
    middle = middle.to(torch.float32)
    apart = (member.read(rows).to(torch.float32, copy=True).sub_(middle) for member in members)
    return [_squared(middle), *map(_squared, apart)]


def _sums(rows: Iterable[list[float]]) -> list[float]:
    """Sums of columns, added in the order of the rows: it decides the last bits."""
    return reduce(lambda total, row: [a + b for a, b in zip(total, row, strict=True)], rows)


def _squared(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2


def _refuse_mixed(uploads: Sequence[Upload], cluster: int) -> None:
    if not uploads:
        raise ValueError(f"cluster {cluster} has no models to average")
    first = uploads[0]
    for other in uploads[1:]:
        if other.lineage == first.lineage:
            continue
        if other.model_type != first.model_type:
            raise ValueError(
                f"cluster {cluster} mixes {first.model_type} ({first.device}) and {other.model_type} ({other.device}); "
                "their weights cannot be averaged. Set cluster.mode: by_domain."
            )
        if other.ancestor != first.ancestor:
            raise ValueError(
                f"{first.device} and {other.device} are both {first.model_type} but come from different ancestors "
                f"({first.ancestor}, {other.ancestor}); their weights cannot be averaged. Set cluster.mode: by_domain."
            )
        raise ValueError(
            f"{first.device} and {other.device} both come from {first.ancestor} but differ in shapes, tokenizer or "
            f"the weights they started from ({first.lineage}, {other.lineage}); their weights cannot be averaged. "
            "Set cluster.mode: by_domain."
        )


def _strangers(uploads: Sequence[Upload], cluster: int, below: float) -> list[str]:
    """Warnings about members whose texts differ too much: averaging strangers destroys what they know.

    Of many pairs, the strangest are named, and the others counted: there are as many as members squared.
    """
    vectors = [decode(upload.embedding) for upload in uploads]
    pairs = itertools.combinations(zip(uploads, vectors, strict=True), 2)
    alike = [(cosine(e_one, e_other), one.device, other.device) for (one, e_one), (other, e_other) in pairs]
    strange = sorted(pair for pair in alike if pair[0] < below)
    warnings = [
        f"cluster {cluster}: {one} and {other} have texts of cosine {similarity:.2f}, below {below:g}: averaging their "
        "weights may destroy what each knows"
        for similarity, one, other in strange[:MOST_NAMED]
    ]
    if more := len(strange) - len(warnings):
        kind = uploads[0].model_type
        warnings.append(f"cluster {cluster}: so have {more} more of the {len(alike)} pairs of its {kind} devices")
    return warnings
