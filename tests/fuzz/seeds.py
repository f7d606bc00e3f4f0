"""What the fuzzers' inputs are made from: a faultless upload of each kind, and what the server holds it against."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.torch import load_file, save_file

from deepfusion import adapters, codecs
from deepfusion.artifacts import RECORD, Checkpoint, Upload
from deepfusion.config import Codec, LoRA
from pico import adapted, pico_checkpoint

DEVICE = "north"
EMBEDDING = bytes([1, 2, 3, 4, 5, 6, 7, 8])
LORA = LoRA(rank=2)


@dataclass(frozen=True)
class Kind:
    """A recipe's answer to what devices send."""

    ancestor: str
    lora: LoRA | None = None
    codec: Codec | None = None
    sharded: bool = False
    dtype: torch.dtype = torch.float32


KINDS: dict[str, Kind] = {
    "gpt2": Kind("gpt2"),
    "llama in bfloat16": Kind("llama", dtype=torch.bfloat16),
    "sharded": Kind("gpt2", sharded=True),
    "adapter": Kind("llama", LORA),
    "int8": Kind("gpt2", codec=Codec(numbers="int8")),
    "nf4": Kind("llama", codec=Codec(numbers="nf4")),
    "delta": Kind("llama", codec=Codec(numbers="int8", delta=True)),
    "low rank": Kind("gpt2", codec=Codec(numbers="bfloat16", delta=True, rank=2)),
    "float32": Kind("gpt2", codec=Codec(numbers="float32")),
    "packed adapter": Kind("gpt2", LORA, Codec(numbers="int8")),
}


class World:
    """Ancestors, a device's key, and one faultless upload of each kind; made once for a process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "keys").mkdir()
        self.key = ec.generate_private_key(ec.SECP256R1())
        public = self.key.public_key()
        line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        (root / "keys" / f"{DEVICE}.pub").write_bytes(line)
        self.ancestors = {name: self._ancestor(name) for name in ("gpt2", "llama")}
        self.files: dict[str, dict[str, bytes]] = {}
        self.records: dict[str, dict[str, Any]] = {}
        for name, kind in KINDS.items():
            upload = self._upload(name, kind)
            self.files[name] = {
                path.relative_to(upload.folder).as_posix(): path.read_bytes() for path in sorted(upload.sent.rglob("*"))
            }
            self.records[name] = upload.model_dump(mode="json", exclude=Upload.not_recorded)

    def sign(self, content: bytes) -> bytes:
        return self.key.sign(content, ec.ECDSA(hashes.SHA256()))

    def _ancestor(self, name: str) -> Checkpoint:
        return pico_checkpoint(name, self.root / "ancestors" / name, hidden=16, ffn=32, layers=1, heads=2, vocab=300)

    def _upload(self, name: str, kind: Kind) -> Upload:
        folder, ancestor, model = self.root / "uploads" / name, self.ancestors[kind.ancestor], "model"
        shutil.copytree(ancestor.folder, folder / "model")
        (folder / "model" / RECORD).unlink()
        file = folder / "model" / "model.safetensors"
        held = {key: (1.01 * tensor).to(kind.dtype) for key, tensor in load_file(file).items()}
        save_file(held, file, metadata={"format": "pt"})
        if kind.sharded:
            names = sorted(held)
            shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
            for shard, those in shards.items():
                save_file({name: held[name] for name in those}, folder / "model" / shard, metadata={"format": "pt"})
            places = {name: shard for shard, those in shards.items() for name in those}
            index = json.dumps({"metadata": {}, "weight_map": places})
            (folder / "model" / "model.safetensors.index.json").write_text(index)
            file.unlink()
        if kind.lora is not None:
            model = "adapter"
            adapters.save(adapted(ancestor.folder, kind.lora), ancestor.folder, kind.lora, folder / model)
        packing = None
        if kind.codec is not None:
            packing = codecs.pack(folder / model, ancestor.folder, kind.codec, kind.lora, into=folder / "packed")
            model = "packed"
        facts = {fact: getattr(ancestor, fact) for fact in ("model_type", "lineage", "parameters", "active_parameters")}
        size = sum(path.stat().st_size for path in (folder / model).iterdir()) + len(EMBEDDING)
        return Upload(
            folder=folder, device=DEVICE, ancestor=kind.ancestor, tokens=1, embedding=EMBEDDING.hex(), bytes=size,
            sends=model, packing=packing, **facts,
        )  # fmt: skip


@cache
def world() -> World:
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return World(root)
