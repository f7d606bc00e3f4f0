"""Phase III, assembly: K dense Llama students become one Mixtral (Fig. 6).

Expert i of layer l is the FFN of layer l of student i (Eq. 12); everything else is the students' mean (Eq. 13).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
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
from deepfusion.phases.proxy import mean
from deepfusion.phases.router import measure_router
from deepfusion.weights import index, read, shapes, write

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
) -> Checkpoint:
    """Merge students, in the order of their clusters, into a Mixtral checkpoint that transformers opens by itself.

    Memory holds a few tensors more than the shard that is being written.

    Args:
        students: K dense Llama-type checkpoints of one lineage.
        config: experts per token, and how the router starts.
        router_rows: safetensors file with `rows` [L, K, H], for `router: hidden_means` (see `measure_router`).
        seed: of the random router.
        into: where the checkpoint goes.
        work: what measuring them took.

    Raises:
        ValueError: the students are not of one lineage, are no Llama, or set what a Mixtral cannot carry.
    """
    first = _first_of_one_lineage(students)
    dense = open_config(first.folder)
    merged = moe_config(dense, len(students), config.top_k)
    rows = _router(config, router_rows, dense, len(students), seed)
    _check_shapes(students)
    write(into, _merged(students, rows))
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
    places = index(folder)
    differences: list[float] = []
    for layer in range(config.num_hidden_layers):
        experts = [
            torch.cat([read(places[name], name).float().flatten() for name in _expert_names(layer, expert)])
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


def _merged(
    students: Sequence[Checkpoint], rows: Float[Tensor, "layers experts hidden"]
) -> Iterator[tuple[str, Tensor]]:
    """The Mixtral's tensors by their names on disk: one `mean`, or one expert's matrix, at a time."""
    role = family("llama").role
    places, kinds = [index(student.folder) for student in students], shapes(students[0].folder)
    for name in places[0]:
        if role(name) == "ffn":
            before, _, after = name.partition(".mlp.")
            part = _EXPERT[after.removesuffix(".weight")]
            for expert, place in enumerate(places):
                yield f"{before}.block_sparse_moe.experts.{expert}.{part}.weight", read(place[name], name)
            continue
        dtype = kinds[name][0]
        yield name, mean((read(place[name], name) for place in places), [1.0] * len(places)).to(dtype)
        if name.endswith(".post_attention_layernorm.weight"):
            layer = name.removesuffix(".post_attention_layernorm.weight")
            yield f"{layer}.block_sparse_moe.gate.weight", rows[int(layer.rpartition(".")[2])].to(dtype)


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


def _check_shapes(students: Sequence[Checkpoint]) -> None:
    expected = shapes(students[0].folder)
    for student in students[1:]:
        if shapes(student.folder) != expected:
            raise ValueError(
                f"{students[0].folder} and {student.folder} have tensors of different names, shapes or dtypes"
            )


def merge(
    students: Sequence[Checkpoint],
    transfer: TransferSet,
    config: AssemblePhase,
    *,
    seed: int,
    into: Path,
    runtime: Runtime,
) -> Checkpoint:
    """The phase as a run does it: measure the router on what each cluster knows, if it is wanted, then `assemble`.

    Raises:
        ValueError: as `assemble` and `measure_router`.
    """
    if config.router == "random":
        return assemble(students, config, None, seed=seed, into=into)
    known: list[list[Document]] = [[] for _ in students]
    # What devices wrote tells more of a cluster than public text that merely resembles it.
    documents = sorted(read_jsonl(transfer.documents, TransferDocument), key=lambda document: document.kind == "public")
    for document in documents:
        if document.cluster is not None:
            known[document.cluster].append(document)
    rows, work = measure_router(students, known, config, max_tokens=config.router_tokens, into=into, runtime=runtime)
    moe = assemble(students, config, rows, seed=seed, into=into, work=work)
    rows.unlink()
    return moe
