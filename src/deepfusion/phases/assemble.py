"""Phase III, assembly: K dense Llama students become one Mixtral (Fig. 6).

Expert i of layer l is the FFN of layer l of student i (Eq. 12); everything else is the students' mean (Eq. 13).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

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
from deepfusion.data.documents import Document, TransferDocument, read_jsonl
from deepfusion.families import family
from deepfusion.families.mixtral import moe_config
from deepfusion.phases.proxy import means
from deepfusion.phases.router import measure_router
from deepfusion.weights import Part, Stored, stored, write

ROUTER_STD = 0.02
# Names on disk: the FFN's matrices in a Llama layer → in a Mixtral expert.
_EXPERT = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


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
    """Merge students, in the order of their clusters, into a Mixtral checkpoint that transformers opens by itself.

    Memory holds an expert's matrix, or blocks of a few other tensors, whatever the number and size of students.

    Args:
        students: K dense Llama-type checkpoints of one lineage.
        config: experts per token, and how the router starts.
        router_rows: safetensors file with `rows` [L, K, H], for `router: hidden_means` (see `measure_router`).
        seed: of the random router.
        into: where the checkpoint goes.
        work: what measuring them took.
        resume: keep the files of weights that an interrupted call with the same arguments has finished.

    Raises:
        ValueError: the students are not of one lineage, are no Llama, or set what a Mixtral cannot carry.
    """
    first = _first_of_one_lineage(students)
    dense = open_config(first.folder)
    merged = moe_config(dense, len(students), config.top_k)
    rows = _router(config, router_rows, dense, len(students), seed)
    write(into, _merged(_of_equal_shapes(students), rows), resume=resume)
    merged.dtype = dense.dtype
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
    """Per layer: mean over all pairs of experts of ‖a − b‖ / ½(‖a‖ + ‖b‖); 0 for a single expert.

    Raises:
        ValueError: the folder holds no Mixtral.
    """
    config = open_config(folder)
    if config.model_type != "mixtral":
        raise ValueError(f"{folder} holds a {config.model_type}, which has no experts")
    held = stored(folder)
    differences: list[float] = []
    for layer in range(config.num_hidden_layers):
        experts = [
            torch.cat([held[name].read().float().flatten() for name in _expert_names(layer, expert)])
            for expert in range(config.num_local_experts)
        ]
        norms = [float(torch.linalg.vector_norm(expert)) for expert in experts]
        apart = [
            2 * float(torch.linalg.vector_norm(experts[a] - experts[b])) / (norms[a] + norms[b])
            for a, b in itertools.combinations(range(len(experts)), 2)
        ]
        differences.append(sum(apart) / len(apart) if apart else 0.0)
    return differences


def _expert_names(layer: int, expert: int) -> list[str]:
    return [f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight" for part in _EXPERT.values()]


def _merged(students: Sequence[dict[str, Stored]], rows: Float[Tensor, "layers experts hidden"]) -> Iterator[Part]:
    """The Mixtral's tensors by their names on disk: each a mean, an expert's matrix, or a layer's router."""
    role = family("llama").role
    for name, one in students[0].items():
        if role(name) == "ffn":
            before, _, after = name.partition(".mlp.")
            part = _EXPERT[after.removesuffix(".weight")]
            for expert, student in enumerate(students):
                matrix = f"{before}.block_sparse_moe.experts.{expert}.{part}.weight"
                yield Part(matrix, one.dtype, one.shape, student[name].read)
            continue
        yield Part(name, one.dtype, one.shape, partial(_mean, [student[name] for student in students]))
        if name.endswith(".post_attention_layernorm.weight"):
            layer = name.removesuffix(".post_attention_layernorm.weight")
            gate = rows[int(layer.rpartition(".")[2])].to(one.dtype)
            yield Part.of(f"{layer}.block_sparse_moe.gate.weight", gate)


def _mean(members: Sequence[Stored]) -> Iterator[Tensor]:
    for block in means(members, [1.0] * len(members)):
        yield block.to(members[0].dtype)


def _router(
    config: AssemblePhase, path: Path | None, dense: PreTrainedConfig, experts: int, seed: int
) -> Float[Tensor, "layers experts hidden"]:
    wanted = (dense.num_hidden_layers, experts, dense.hidden_size)
    if config.router == "random":
        return ROUTER_STD * torch.randn(wanted, generator=torch.Generator().manual_seed(seed))
    if path is None:
        raise ValueError(
            "assemble.router is hidden_means, but no router rows were measured: set assemble.router: random"
        )
    rows = load_file(path)["rows"]
    if tuple(rows.shape) != wanted:
        raise ValueError(f"{path}: rows have shape {tuple(rows.shape)} instead of {wanted} (layers, experts, hidden)")
    return rows


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
    known: list[list[Document]] = [[] for _ in students]
    # What devices wrote tells more of a cluster than public text that merely resembles it.
    documents = sorted(read_jsonl(transfer.documents, TransferDocument), key=lambda document: document.kind == "public")
    for document in documents:
        if document.cluster is not None:
            known[document.cluster].append(document)
    rows, work = measure_router(
        students, known, config, max_tokens=config.router_tokens, into=into, runtime=runtime, resume=resume
    )
    moe = assemble(students, config, rows, seed=seed, into=into, work=work, resume=resume)
    rows.unlink()
    return moe
