"""What phases take from one another, as small as it can be, without running the phases before."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from deepfusion.artifacts import Checkpoint, Clusters, Corpus, DeviceInfo, Teaching, TransferSet, Upload
from deepfusion.checkpoints import as_checkpoint, open_model, open_tokenizer
from deepfusion.config import ProxyPhase, Recipe, Runtime, Training
from deepfusion.data.documents import Document, Question, TransferDocument, write_jsonl
from deepfusion.data.hearing import keep_tokenizer
from deepfusion.data.tokens import Tokenizer
from deepfusion.encoders import embed
from deepfusion.phases.proxy import average
from deepfusion.signals import Signal, Signals
from pico import pico

HERE = Runtime(workers=0)
FAST = Training(learning_rate=1e-2, context=32, rows=2)
PRIVATE = {
    "d-law": [("Who hears appeals? ", "Judge Ann."), ("Who signs a deed? ", "Clerk Bo.")],
    "d-food": [("What goes into soup? ", "Leek."), ("What goes into bread? ", "Rye.")],
}
PUBLIC = [
    ("", "A deed is signed before a judge."),
    ("", "Soup and bread are eaten at noon."),
    ("Is rye good? ", "Yes."),
]


def folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def documents(pairs: Sequence[tuple[str, str]], domain: str) -> list[Document]:
    return [Document(id=f"{domain}-{n}", domain=domain, prompt=p, answer=a) for n, (p, a) in enumerate(pairs)]


def corpus(into: Path) -> Corpus:
    """Two devices, each with a subject of its own."""
    devices: list[DeviceInfo] = []
    for device, pairs in PRIVATE.items():
        domain = device.removeprefix("d-")
        write_jsonl(into / "private" / f"{device}.jsonl", documents(pairs, domain))
        devices.append(DeviceInfo(id=device, domains={domain: len(pairs)}, documents=len(pairs), bytes=1))
    write_jsonl(into / "public.jsonl", documents(PUBLIC, "public"))
    asked = [(prompt, "") for pairs in PRIVATE.values() for prompt, _ in pairs]
    write_jsonl(into / "questions.jsonl", documents(asked, "asked"))
    write_jsonl(into / "heldout.jsonl", documents([("", "Clerk Bo signs a deed.")], "law"))
    write_jsonl(
        into / "test.jsonl", [Question(id="t", domain="law", prompt="Who hears appeals? ", answer="Judge Ann.")]
    )
    return Corpus(folder=into, domains=("law", "food"), devices=tuple(devices)).sealed()


def checkpoint(model_type: str, into: Path, seed: int = 0, lineage_of: str | None = None, **shape: Any) -> Checkpoint:
    return as_checkpoint(
        pico(model_type, into, seed, **{"hidden": 16, "layers": 1, "heads": 2} | shape), lineage_of=lineage_of
    )


def upload(device: str, ancestor: Checkpoint, into: Path) -> Upload:
    """A device that uploads its ancestor as it is."""
    texts = [prompt + answer for prompt, answer in PRIVATE[device]]
    pico(ancestor.model_type, into / "model", hidden=16, layers=1, heads=2)
    return Upload(
        folder=into,
        device=device,
        ancestor=ancestor.model_type,
        model_type=ancestor.model_type,
        lineage=ancestor.lineage,
        parameters=ancestor.parameters,
        active_parameters=ancestor.active_parameters,
        tokens=30,
        embedding=embed("hashing", texts, 64).hex(),
        bytes=1,
    ).sealed()


def clusters(into: Path) -> Clusters:
    """One cluster for each of the two devices."""
    centroids = [embed("hashing", ["".join(pair) for pair in pairs], 64).hex() for pairs in PRIVATE.values()]
    names = tuple(PRIVATE)
    return Clusters(
        folder=folder(into),
        k=2,
        members=tuple((name,) for name in names),
        similarity=((1.0, 0.0), (0.0, 1.0)),
        devices=names,
        centroids=tuple(centroids),
    ).sealed()


def said(text: str, tokenizer: Tokenizer, model: torch.nn.Module | None = None, k: int = 4, prompt: str = "") -> Signal:
    """What a model (or else nobody in particular) thinks of each token of a text, as if it had written it."""
    inner, ends = tokenizer.encode(text)
    ids = torch.tensor([tokenizer.start, *inner, tokenizer.end])
    with torch.inference_mode():
        log_p = torch.zeros(len(ids) - 1, len(tokenizer.table)) if model is None else model(ids[None]).logits[0, :-1]
    log_p = log_p.log_softmax(-1)
    best = log_p.topk(k, -1)
    given = 1 + len(tokenizer.encode(prompt)[0])
    logprobs = torch.cat([torch.zeros(1), log_p.gather(1, ids[1:, None])[:, 0]])
    values = torch.cat([torch.zeros(1, k), best.values])
    logprobs[:given], values[:given] = -torch.inf, -torch.inf
    return Signal(
        ids=ids.int().numpy(),
        ends=np.array([0, *ends, ends[-1]], np.int32),
        logprobs=logprobs.numpy(),
        topk_ids=torch.cat([torch.zeros(1, k), best.indices]).int().numpy(),
        topk_logprobs=values.half().numpy(),
    )


def transfer(into: Path, writer: Checkpoint | None = None, public: bool = True) -> TransferSet:
    """The public text, known by one cluster each, and all private questions answered by their devices."""
    found = [
        TransferDocument(**document.model_dump(), kind="public", cluster=number % 2)
        for number, document in enumerate(documents(PUBLIC if public else [], "public"))
    ]
    for cluster, (device, pairs) in enumerate(PRIVATE.items()):
        own = [
            TransferDocument(
                id=f"{device}/a{n}", domain="x", prompt=p, answer=a, kind="answered", writer=device, cluster=cluster
            )
            for n, (p, a) in enumerate(pairs)
        ]
        found += own if writer else []
        if writer:
            tokenizer, model = Tokenizer(open_tokenizer(writer.folder)), open_model(writer.folder)
            of = {one.id: said(one.text, tokenizer, model, prompt=one.prompt) for one in own}
            path = into / "signals" / f"{device}.safetensors"
            Signals(tokenizer.fingerprint, writer.lineage, of).save(path)
            keep_tokenizer(tokenizer.fingerprint, writer.folder, into / "tokenizers")
    write_jsonl(into / "documents.jsonl", found)
    return TransferSet(folder=into, counts={}, per_cluster=(2, 2), by_writer={}, private_text_risk=True).sealed()


def teaching(teacher: str, cluster: int, of: dict[str, str], by: Checkpoint, into: Path) -> Teaching:
    """What a checkpoint says of texts (id → text) when it is asked."""
    tokenizer, model = Tokenizer(open_tokenizer(by.folder)), open_model(by.folder)
    signals = {name: said(text, tokenizer, model) for name, text in of.items()}
    Signals(tokenizer.fingerprint, by.lineage, signals).save(folder(into) / "signals.safetensors")
    keep_tokenizer(tokenizer.fingerprint, by.folder, into / "tokenizers")
    return Teaching(folder=into, teacher=teacher, cluster=cluster, lineage=by.lineage, width=16).sealed()


def weights(place: Path) -> dict[str, bytes]:
    """A checkpoint's tensors in memory, bit by bit."""
    return {name: tensor.numpy().tobytes() for name, tensor in open_model(place).state_dict().items()}


SHAPE = {"hidden": 16, "ffn": 16, "layers": 1, "heads": 2, "context": 128, "tokens": 3000}
QUICK = {"context": 96, "rows": 4, "learning_rate": 1e-2}
TREE: dict[str, Any] = {
    "name": "tiny",
    "data": {
        "source": {
            "kind": "synthetic",
            "domains": 2,
            "private_facts": 4,
            "public_facts": 2,
            "private_documents_per_fact": 4,
            "public_documents_per_fact": 4,
            "filler_documents": 10,
        },
        "partition": {"devices": 4},
    },
    "models": {
        "base": {"make": SHAPE | {"type": "llama", "vocab": 300, "training": QUICK}},
        "ancestors": {
            "gpt2": {"make": SHAPE | {"type": "gpt2", "vocab": 300, "training": QUICK}},
            "neox": {"make": SHAPE | {"type": "gpt_neox", "vocab": 310, "training": QUICK}},
        },
    },
    "device": {"epochs": 10, "training": QUICK},
    "cluster": {"k": 2},
    "transfer": {"sampled_per_cluster": 10, "min_bytes": 1, "max_new_tokens": 64},
    "distill": {"budget_tokens": 6000, "training": QUICK},
    "assemble": {"router_tokens": 500},
    "tune": {"training": QUICK},
    "evaluate": {"centralized_tokens": 4000},
}


def recipe(*overrides: str) -> Recipe:
    """A recipe with everything in it, of which a run takes seconds."""
    tree = deepcopy(TREE)
    for override in overrides:
        key, _, value = override.partition("=")
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = yaml.safe_load(value)
    return Recipe.parse(tree)


class World:
    """A base model, a device of another architecture, its proxy, and text that the device answered."""

    def __init__(self, root: Path) -> None:
        self.base = checkpoint("llama", root / "llama")
        self.ancestor = checkpoint("gpt2", root / "gpt2", seed=5)
        self.device = upload("d-law", self.ancestor, root / "d-law")
        self.proxy = average([self.device], 0, ProxyPhase(), into=folder(root / "proxy"))
        writer = self.ancestor.model_copy(update={"folder": self.device.model})
        self.transfer = transfer(folder(root / "transfer"), writer)
