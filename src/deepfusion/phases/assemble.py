"""Phase III, assembly: K dense students become one MoE (Fig. 6).

Expert i of layer l is the FFN of layer l of student i (Eq. 12), whole or cut into several; everything else is the
students' mean (Eq. 13). `layouts` says which part becomes which expert, `families` what the MoE is, `parts` makes each
tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig

from deepfusion.artifacts import Checkpoint, TransferSet, Work
from deepfusion.checkpoints import (
    as_checkpoint,
    copy_description,
    lineage,
    open_config,
    open_tokenizer,
    tokenizer_fingerprint,
)
from deepfusion.config import AssemblePhase, Runtime
from deepfusion.config.targets import target_of
from deepfusion.data.documents import Document, TransferDocument, read_jsonl
from deepfusion.families import TARGETS, experts, family
from deepfusion.families.target import MATRICES, MoE, moe_config
from deepfusion.layouts import Layout, plan, router_rows
from deepfusion.phases.parts import Plan, parts
from deepfusion.phases.router import measure_router
from deepfusion.weights import Stored, stored, write

ROUTER_STD = 0.02


class Shape(NamedTuple):
    """What students are to become, known before anything is read of them but their configs."""

    dense: PreTrainedConfig
    moe: MoE
    config: PreTrainedConfig
    layout: Layout


def shape(students: Sequence[Checkpoint], config: AssemblePhase) -> Shape:
    """The MoE that a recipe makes of students.

    Raises:
        ValueError: the students are not of one lineage, no MoE is made of their type, or they set what it cannot carry.
    """
    return shape_of(open_config(_first_of_one_lineage(students).folder), len(students), config)


def shape_of(dense: PreTrainedConfig, students: int, config: AssemblePhase) -> Shape:
    """The MoE that a recipe makes of so many students with this config.

    Raises:
        ValueError: no MoE is made of their type, or they set what it cannot carry.
    """
    moe = TARGETS[target_of(dense.model_type, config.target)]
    layout = plan(config, clusters=students, channels=dense.intermediate_size, shared=moe.common)
    return Shape(dense, moe, moe_config(moe, dense, layout, config.shared_width), layout)


def assemble(
    students: Sequence[Checkpoint],
    config: AssemblePhase,
    router_rows: Path | None,
    *,
    seed: int,
    into: Path,
    work: Work | None = None,
    resume: bool = False,
) -> Checkpoint:
    """Merge students, in the order of their clusters, into an MoE checkpoint that transformers opens by itself.

    Memory holds a few matrices of an FFN, or blocks of other tensors, whatever the number and size of students.

    Args:
        students: K dense checkpoints of one lineage, of a type that has an MoE (`config.targets.KIN`).
        config: what they become, how their FFNs are laid out, and how the router starts.
        router_rows: safetensors file with `rows` [L, K, H], for `router: hidden_means` (see `measure_router`).
        seed: of the random router.
        into: where the checkpoint goes.
        work: what measuring them took.
        resume: keep the files of weights that an interrupted call with the same arguments has finished.

    Raises:
        ValueError: as `shape`, or the rows are not theirs.
    """
    wanted = shape(students, config)
    first, layout = students[0], wanted.layout
    rows, factors = _router(config, router_rows, wanted, seed)
    shared = wanted.moe.width_of_shared(layout, config.shared_width)
    made = Plan(family(first.model_type), wanted.moe, layout, shared, factors)
    write(into, parts(_of_equal_shapes(students), made, rows), resume=resume)
    merged = wanted.config
    merged.dtype = wanted.dense.dtype
    copy_description(first.folder, into)
    merged.save_pretrained(into)  # in place of the dense one
    tokenizer = tokenizer_fingerprint(open_tokenizer(first.folder))
    return as_checkpoint(into, lineage_of=lineage(merged, tokenizer, first.lineage), work=work)


def upcycle(
    base: Checkpoint, k: int, config: AssemblePhase, *, seed: int, into: Path, router_rows: Path | None = None
) -> Checkpoint:
    """A MoE of k copies of one dense model: the same function, until it is trained."""
    return assemble([base] * k, config, router_rows, seed=seed, into=into)


def expert_difference(folder: Path) -> list[float]:
    """Per MoE layer: mean over all pairs of students of ‖a − b‖ / ½(‖a‖ + ‖b‖), over all experts that each of them has.

    0 where there is a single one.

    Raises:
        ValueError: the folder holds no MoE.
    """
    config = open_config(folder)
    moe = TARGETS.get(config.model_type)
    if moe is None:
        raise ValueError(f"{folder} holds a {config.model_type}, which has no experts")
    places, held = stored(folder), experts(config)
    differences: list[float] = []
    for layer in range(moe.dense_layers, config.num_hidden_layers):
        students = [
            torch.cat(
                [
                    places[name].read().float().flatten()
                    for expert in held.of(cluster)
                    for name in (moe.expert(layer, expert, matrix) for matrix in MATRICES)
                ]
            )
            for cluster in range(held.clusters)
        ]
        norms = [float(torch.linalg.vector_norm(student)) for student in students]
        apart = [
            2 * float(torch.linalg.vector_norm(students[a] - students[b])) / (norms[a] + norms[b])
            for a, b in itertools.combinations(range(len(students)), 2)
        ]
        differences.append(sum(apart) / len(apart) if apart else 0.0)
    return differences


def _router(
    config: AssemblePhase, path: Path | None, wanted: Shape, seed: int
) -> tuple[Float[Tensor, "layers experts hidden"], list[float]]:
    """The router's rows, and per layer what experts are multiplied by."""
    layout, layers, hidden = wanted.layout, wanted.dense.num_hidden_layers, wanted.dense.hidden_size
    size = (layers, layout.clusters, hidden)
    if config.router == "random":
        # Not renormalised, experts are scaled for a router without preferences: then it must hardly have any.
        std = ROUTER_STD if layout.renormalised else ROUTER_STD / hidden**0.5
        rows = std * torch.randn(size, generator=torch.Generator().manual_seed(seed))
        return router_rows(rows, layout, seed), [layout.factor(layout.uniform())] * layers
    if path is None:
        raise ValueError(
            "assemble.router is hidden_means, but no router rows were measured: set assemble.router: random"
        )
    found = load_file(path)
    if tuple(found["rows"].shape) != size:
        raise ValueError(
            f"{path}: rows have shape {tuple(found['rows'].shape)} instead of {size} (layers, students, hidden)"
        )
    measured = found["probability"].tolist() if "probability" in found else [layout.uniform()] * layers
    return router_rows(found["rows"], layout, seed), [layout.factor(probability) for probability in measured]


def _first_of_one_lineage(students: Sequence[Checkpoint]) -> Checkpoint:
    if not students:
        raise ValueError("there are no students to assemble")
    for number, student in enumerate(students):
        if student.lineage != students[0].lineage:
            raise ValueError(
                f"students 0 and {number} are of different lineages ({students[0].lineage}, {student.lineage}) "
                "and cannot be merged: distil them all from one base model"
            )
    return students[0]


def _of_equal_shapes(students: Sequence[Checkpoint]) -> list[dict[str, Stored]]:
    held = [stored(student.folder) for student in students]
    expected = {name: (one.dtype, one.shape) for name, one in held[0].items()}
    for student, other in zip(students[1:], held[1:], strict=True):
        if {name: (one.dtype, one.shape) for name, one in other.items()} != expected:
            raise ValueError(
                f"{students[0].folder} and {student.folder} have tensors of different names, shapes or dtypes"
            )
    return held


def merge(
    students: Sequence[Checkpoint],
    transfer: TransferSet,
    config: AssemblePhase,
    *,
    seed: int,
    into: Path,
    runtime: Runtime,
    resume: bool = False,
) -> Checkpoint:
    """The phase as a run does it: measure the router on what each cluster knows, if it is wanted, then `assemble`.

    With `resume`, what an interrupted attempt with the same arguments left in `into` is gone on from.

    Raises:
        ValueError: as `assemble` and `measure_router`.
    """
    if config.router == "random":
        return assemble(students, config, None, seed=seed, into=into, resume=resume)
    wanted = shape(students, config)  # before anything is measured: it may be impossible
    known: list[list[Document]] = [[] for _ in students]
    # What devices wrote tells more of a cluster than public text that merely resembles it.
    documents = sorted(read_jsonl(transfer.documents, TransferDocument), key=lambda document: document.kind == "public")
    for document in documents:
        if document.cluster is not None:
            known[document.cluster].append(document)
    rows, work = measure_router(
        students,
        known,
        config,
        wanted.layout,
        max_tokens=config.router_tokens,
        into=into,
        runtime=runtime,
        resume=resume,
    )
    moe = assemble(students, config, rows, seed=seed, into=into, work=work, resume=resume)
    rows.unlink()
    return moe
