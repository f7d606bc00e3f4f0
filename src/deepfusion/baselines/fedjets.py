"""FedJETS (arXiv 2306.08586) in its form for language models: devices train pruned MoEs in rounds.

The global MoE starts as copies of the base, and gives a token's experts weights that add up to 1. In each round a
device is sent a compact one: n of the K experts, their router rows, and all else that an MoE has. *Anchors* know which
expert is their cluster's: they train it, and teach the router to send their text there. *Normal* devices take the
experts that the router prefers for their text, by what enters the FFNs of the frozen base (the paper's common expert),
and leave the router alone. The server averages each expert over who trained it, router rows over anchors, and all else
over everyone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig

from deepfusion import checkpoints, memory
from deepfusion.artifacts import Checkpoint, Client, Corpus, Round, TransferSet, Work
from deepfusion.config import PLAIN, DevicePhase, Runtime, TunePhase
from deepfusion.data.documents import Document, read_jsonl
from deepfusion.data.tokens import Tokenizer
from deepfusion.encoders import PROJECTION_SEED, embed
from deepfusion.families import TARGETS, Experts, Role, experts, family
from deepfusion.families.family import CLUSTERS
from deepfusion.families.target import MATRICES, MoE
from deepfusion.objectives import build_objective
from deepfusion.phases.device import device_text
from deepfusion.phases.proxy import means
from deepfusion.phases.router import ffn_inputs
from deepfusion.phases.tune import tune
from deepfusion.phases.upload import upload_bytes
from deepfusion.training import Learner, fit
from deepfusion.weights import Part, Stored, stored, write

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what configs call their number of experts
ROUTER: frozenset[Role] = frozenset({"router"})


# ── on a device ───────────────────────────────────────────────────────────────────────────────────────────────────────


def train_client(
    device: str,
    sent: Checkpoint,
    base: Checkpoint,
    corpus: Corpus,
    cluster: int,
    count: int,
    gate_weight: float,
    training: DevicePhase,
    *,
    anchor: bool,
    seed: int,
    sitting: int,
    into: Path,
    runtime: Runtime,
) -> Client:
    """One device's part in a round: choose experts, train the compact MoE, send it back.

    Args:
        device: its id.
        sent: the global MoE, of which the device gets its experts alone.
        base: the dense model that every device has, once; frozen.
        corpus: of it, `private/<device>.jsonl` and the public text are read.
        cluster: the device's; only an anchor makes use of it.
        count: clusters whose experts it is sent.
        gate_weight: what an anchor's loss of sending its text elsewhere weighs beside its cross-entropy.
        training: epochs and training; every weight of the compact MoE is trained, whatever the method says.
        anchor: whether the device knows its expert.
        seed: of the order of its text.
        sitting: which round, from 0: it goes on in its text where the last one ended.
        into: where `model/` goes.
        runtime: where it trains.
    """
    private = list(read_jsonl(corpus.private(device), Document))
    before = memory.resident()
    chosen = choose(preferences(base, sent, private, runtime), count, cluster if anchor else None)
    compact = into / ".compact"
    prune(sent.folder, chosen, into=compact)
    model = checkpoints.open_model(compact, getattr(torch, training.training.dtype))
    kind = family(model.config.model_type)
    if not anchor:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(kind.role(name) not in ROUTER)
    tokenizer = Tokenizer(checkpoints.open_tokenizer(compact))
    owner = chosen.index(cluster) if anchor else -1
    text = device_text(private, corpus, tokenizer, training, model.config, seed=seed, cluster=owner)
    schedule = text.schedule(training.training, packs=kind.packs, seed=seed, sitting=sitting)
    learner = Learner(model, build_objective(PLAIN, 0, 0, {}), ownership=gate_weight if anchor else 0.0)
    done = fit(learner, schedule, training.training, seed=seed, into=into, runtime=runtime)
    memory.note(into, before)
    checkpoints.save_model(model, tokenizer.raw, into / "model")
    active = kind.matrix_parameters(model.config)
    parameters = checkpoints.parameters(into / "model")
    # All router rows travel, for the device chooses by them; those of its experts are in the model already.
    rows = sum(one.shape[1] * one.dtype.itemsize for one in _routers(sent.folder))
    others = (experts(checkpoints.open_config(sent.folder)).count - experts(model.config).count) * rows
    unsent = _others(into / "model", owner) if anchor else 0  # of an anchor the server takes its own expert alone
    return Client(
        folder=into,
        device=device,
        ancestor="base",
        model_type=sent.model_type,
        lineage=sent.lineage,
        parameters=parameters,
        active_parameters=active,
        tokens=text.own_tokens,
        embedding=embed("hashing", [document.text for document in private], 8, PROJECTION_SEED).hex(),
        bytes=upload_bytes(into / "model", b"") - unsent,
        losses=done.losses,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        work=Work(tokens=done.tokens, forward=float(done.tokens * active), backward=2.0 * done.tokens * active),
        experts=tuple(chosen),
        owner=cluster if anchor else None,
        down_bytes=upload_bytes(compact, b"") + others,
    ).sealed()


def preferences(
    base: Checkpoint, sent: Checkpoint, text: Sequence[Document], runtime: Runtime
) -> Float[Tensor, " clusters"]:
    """How much of its weight the router would give each cluster's experts: Σ over tokens and layers, per token."""
    model = checkpoints.open_model(base.folder, accelerator=runtime.accelerator)
    tokenizer = Tokenizer(checkpoints.open_tokenizer(base.folder))
    context = getattr(model.config, "max_position_embeddings", None)
    ids = [[tokenizer.start, *tokenizer.encode(document.text)[0]][:context] for document in text]
    rows = [one.read().float() for one in _routers(sent.folder)]
    skipped = TARGETS[sent.model_type].dense_layers
    clusters = experts(checkpoints.open_config(sent.folder)).clusters
    total, count = torch.zeros(clusters), 0
    for states in ffn_inputs(model, [row for row in ids if len(row) > 1]):
        shares = torch.einsum("lth,leh->lte", states[skipped:], torch.stack(rows)).softmax(-1)
        total += shares.unflatten(-1, (clusters, -1)).sum(-1).sum((0, 1))
        count += states.shape[1] * len(rows)
    return total / max(1, count)


def choose(preferred: Float[Tensor, " clusters"], count: int, own: int | None) -> list[int]:
    """The clusters whose experts a device gets, in order: the preferred ones, and an anchor's own among them."""
    order = preferred.argsort(descending=True, stable=True).tolist()
    if own is not None:
        order = [own, *(cluster for cluster in order if cluster != own)]
    return sorted(order[:count])


def prune(folder: Path, chosen: Sequence[int], *, into: Path) -> None:
    """Write the MoE that has the chosen clusters' experts alone, and their router rows."""
    into.mkdir(parents=True, exist_ok=True)
    config = checkpoints.open_config(folder)
    grid = _Grid.of(config.model_type, experts(config))
    places = {cluster: number for number, cluster in enumerate(chosen)}
    parts: list[Part] = []
    for name, one in stored(folder).items():
        found = grid.expert(name)
        if found is not None:
            if found.cluster in places:
                renamed = grid.renamed(found, places[found.cluster])
                parts.append(Part(renamed, one.dtype, one.shape, one.through))
        elif grid.is_router(name):
            rows = torch.cat([one.read(grid.rows(cluster)) for cluster in chosen])
            parts.append(Part.of(name, rows))
        else:
            parts.append(Part(name, one.dtype, one.shape, one.through))
    write(into, parts)
    checkpoints.copy_description(folder, into)
    pruned(config, len(chosen)).save_pretrained(into)


def pruned(config: PreTrainedConfig, clusters: int) -> PreTrainedConfig:
    """The config of the same MoE with the experts of so many clusters; a token uses as many as it did, if there are."""
    made, held = deepcopy(config), experts(config)
    count = held.count // held.clusters * clusters
    for field in COUNTS:
        if getattr(made, field, None):
            setattr(made, field, count)
    if getattr(made, CLUSTERS, None):
        setattr(made, CLUSTERS, clusters)
    made.num_experts_per_tok = min(held.chosen, count)
    return made


# ── at the server ─────────────────────────────────────────────────────────────────────────────────────────────────────


def average_experts(
    sent: Checkpoint, clients: Sequence[Client], base: Checkpoint, *, into: Path, resume: bool = False
) -> Round:
    """The next global MoE, every tensor weighted by tokens: each expert over who trained it, an anchor's own alone;
    router rows over the anchors that hold them; all else over everyone. What nobody trained stays.

    Args:
        sent: what devices were sent parts of; a `Round` hands on what came before it.
        clients: what they made of it, one each.
        base: what each device was sent once, before the first round.
        into: where it goes.
        resume: keep what an interrupted call with the same arguments has finished.

    Raises:
        ValueError: there is no client.
    """
    if not clients:
        raise ValueError("no device has sent a model: there is nothing to average")
    grid = _Grid.of(sent.model_type, experts(checkpoints.open_config(sent.folder)))
    held = [stored(client.model) for client in clients]
    parts: list[Part] = []
    for name, one in stored(sent.folder).items():
        found = grid.expert(name)
        if found is not None:
            having = [
                (of[grid.renamed(found, client.experts.index(found.cluster))], client.tokens)
                for client, of in zip(clients, held, strict=True)
                if found.cluster in client.experts and client.owner in (None, found.cluster)
            ]
            parts.append(Part(name, one.dtype, one.shape, partial(_mean, one, having)))
        elif grid.is_router(name):
            rows = [
                _mean_rows(one, grid.rows(cluster), _anchors(name, cluster, clients, held, grid))
                for cluster in range(grid.experts.clusters)
            ]
            parts.append(Part.of(name, torch.cat(rows)))
        else:
            having = [(of[name], client.tokens) for client, of in zip(clients, held, strict=True)]
            parts.append(Part(name, one.dtype, one.shape, partial(_mean, one, having)))
    write(into, parts, resume=resume)
    checkpoints.copy_description(sent.folder, into)
    before = sent if isinstance(sent, Round) else None
    made = checkpoints.as_checkpoint(into, lineage_of=sent.lineage)
    down = before.down_bytes if before else len(clients) * upload_bytes(base.folder, b"")
    return Round(
        **made.model_dump(exclude={"digest"}),
        number=1 + (before.number if before else 0),
        down_bytes=down + sum(client.down_bytes for client in clients),
        up_bytes=sum(client.bytes for client in clients) + (before.up_bytes if before else 0),
    ).sealed()


def tune_round(
    moe: Round, transfer: TransferSet, config: TunePhase, *, budget: float, seed: int, into: Path, runtime: Runtime
) -> Round:
    """A round's MoE, tuned on public text, of which alone its server has any."""
    public = config.model_copy(update={"text": "public", "objective": PLAIN, "ownership": 0.0})
    made = tune(moe, transfer, [], public, budget=budget, seed=seed, into=into, runtime=runtime)
    passed = moe.model_dump(include={"number", "down_bytes", "up_bytes"})
    return Round(**made.model_dump(exclude={"digest"}), **passed).sealed()


Having = Sequence[tuple[Stored, int]]  # a tensor as somebody made it, and by how much that counts


def _mean(before: Stored, having: Having) -> Iterator[Tensor]:
    """The mean, block by block; of nobody, what was there before."""
    if not having:
        yield from before.through()
        return
    places, counts = zip(*having, strict=True)
    for block in means(places, [count / sum(counts) for count in counts]):
        yield block.to(before.dtype)


def _mean_rows(before: Stored, rows: slice, having: Sequence[tuple[Tensor, int]]) -> Tensor:
    if not having:
        return before.read(rows)
    total = sum(count for _, count in having)
    mean = torch.stack([tensor.float() * (count / total) for tensor, count in having]).sum(0)
    return mean.to(before.dtype)


def _anchors(
    name: str, cluster: int, clients: Sequence[Client], held: Sequence[dict[str, Stored]], grid: _Grid
) -> list[tuple[Tensor, int]]:
    """A cluster's rows of a router, as anchors made them."""
    return [
        (of[name].read(grid.rows(client.experts.index(cluster))), client.tokens)
        for client, of in zip(clients, held, strict=True)
        if client.owner is not None and cluster in client.experts
    ]


# ── which tensor is what ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Expert:
    """A matrix of an expert."""

    layer: int
    cluster: int
    shard: int  # of the cluster's experts
    matrix: str


@dataclass(frozen=True)
class _Grid:
    """The experts of an MoE by the names of their tensors on disk."""

    moe: MoE
    experts: Experts
    pattern: re.Pattern[str]

    @classmethod
    def of(cls, model_type: str, held: Experts) -> _Grid:
        moe = TARGETS[model_type]
        matrices = "|".join(re.escape(moe.parts[matrix]) for matrix in MATRICES)
        pattern = rf"model\.layers\.(\d+)\.{re.escape(moe.block)}\.experts\.(\d+)\.({matrices})\.weight"
        return cls(moe, held, re.compile(pattern))

    @property
    def each(self) -> int:
        """Experts of a cluster."""
        return self.experts.count // self.experts.clusters

    def expert(self, name: str) -> _Expert | None:
        found = self.pattern.fullmatch(name)
        if found is None:
            return None
        matrix = next(matrix for matrix in MATRICES if self.moe.parts[matrix] == found[3])
        return _Expert(int(found[1]), int(found[2]) // self.each, int(found[2]) % self.each, matrix)

    def renamed(self, expert: _Expert, cluster: int) -> str:
        """The same matrix where its cluster has another number."""
        return self.moe.expert(expert.layer, cluster * self.each + expert.shard, expert.matrix)

    def is_router(self, name: str) -> bool:
        return re.fullmatch(rf"model\.layers\.\d+\.{re.escape(self.moe.block)}\.gate\.weight", name) is not None

    def rows(self, cluster: int) -> slice:
        """A cluster's rows of a router."""
        return slice(cluster * self.each, (cluster + 1) * self.each)


def _others(folder: Path, own: int) -> int:
    """Bytes of the experts of other clusters than one."""
    config = checkpoints.open_config(folder)
    grid = _Grid.of(config.model_type, experts(config))
    found = ((grid.expert(name), one) for name, one in stored(folder).items())
    return sum(math.prod(one.shape) * one.dtype.itemsize for of, one in found if of is not None and of.cluster != own)


def _routers(folder: Path) -> list[Stored]:
    """Every layer's router, in order."""
    config = checkpoints.open_config(folder)
    moe, held = TARGETS[config.model_type], stored(folder)
    return [held[moe.router(layer)] for layer in range(moe.dense_layers, config.num_hidden_layers)]
