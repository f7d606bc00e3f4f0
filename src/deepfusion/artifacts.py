"""What each phase hands to the next: a folder, its digest, and a few typed facts about it.

An artifact never holds tensors or text itself. Its `digest` is computed from the content of its folder and its
fields, so two artifacts with one digest are interchangeable; `folder` is where it happens to lie and is not part of
it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

RECORD = "record.json"  # an artifact's own fields
MANIFEST = "manifest.json"  # what the store wrote about the step


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_digest(folder: Path, fields: dict[str, Any]) -> str:
    """SHA-256 over an artifact's fields and its folder's files, by name and content; not hidden ones or records."""
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in (RECORD, MANIFEST) or name.startswith("."):
            continue
        digest.update(f"\n{name} {file_digest(path)}".encode())
    return digest.hexdigest()


class Work(BaseModel):
    """Compute that a step took, independent of the machine: parameters touched, summed over tokens.

    A forward pass of one token through a model with A active matrix parameters counts A, a backward pass 2·A.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int = Field(default=0, ge=0)
    forward: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    backward: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    @property
    def token_parameters(self) -> float:
        """Forward and backward together."""
        return self.forward + self.backward

    @property
    def flops(self) -> float:
        """The usual estimate: two floating-point operations per token-parameter."""
        return 2 * self.token_parameters

    def __add__(self, other: Work) -> Work:
        return Work(
            tokens=self.tokens + other.tokens,
            forward=self.forward + other.forward,
            backward=self.backward + other.backward,
        )


class Artifact(BaseModel):
    """A finished folder; subclasses add the facts that later phases need."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    not_recorded: ClassVar[set[str]] = {"folder", "digest"}

    folder: Path
    digest: str = ""
    work: Work = Work()

    def sealed(self) -> Self:
        """Write `RECORD` into the folder and return the artifact with its digest."""
        fields = self.model_dump(mode="json", exclude=self.not_recorded)
        (self.folder / RECORD).write_text(json.dumps(fields, indent=1, sort_keys=True), encoding="utf-8")
        return self.model_copy(update={"digest": folder_digest(self.folder, fields)})

    @classmethod
    def load(cls, folder: str | Path, digest: str | None = None) -> Self:
        """Open a sealed folder; without `digest` its content is read once to compute it.

        Raises:
            ValueError: the folder holds no such artifact.
        """
        folder = Path(folder)
        try:
            fields = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{folder} is not a finished {cls.__name__}: it has no {RECORD}") from None
        return cls(folder=folder, digest=digest or folder_digest(folder, fields), **fields)


# ── text, and models on disk ──────────────────────────────────────────────────────────────────────────────────────────


class DeviceInfo(BaseModel):
    """One device as the partition made it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    domains: dict[str, int]  # domain → number of private documents
    documents: int
    bytes: int  # UTF-8 bytes of private text


class Corpus(Artifact):
    """The text of a run.

    Files: `public.jsonl`, `questions.jsonl` (public prompts with no answer), `heldout.jsonl`, `private/<device>.jsonl`
    (all of `Document`s) and `test.jsonl` (of `Question`s).
    """

    domains: tuple[str, ...]
    devices: tuple[DeviceInfo, ...]
    counts: dict[str, int] = {}  # what was read, kept and left out, by name

    @property
    def public(self) -> Path:
        """The server's own text."""
        return self.folder / "public.jsonl"

    @property
    def questions(self) -> Path:
        """Public questions without answers."""
        return self.folder / "questions.jsonl"

    @property
    def heldout(self) -> Path:
        """Private text kept aside to tell when training has converged."""
        return self.folder / "heldout.jsonl"

    @property
    def test(self) -> Path:
        """Test questions."""
        return self.folder / "test.jsonl"

    def private(self, device: str) -> Path:
        """One device's own text."""
        return self.folder / "private" / f"{device}.jsonl"


class Checkpoint(Artifact):
    """A Hugging Face checkpoint folder: config.json, *.safetensors, tokenizer files."""

    model_type: str
    lineage: str  # architecture + shapes + ancestor + tokenizer; equal lineages may be averaged
    parameters: int
    active_parameters: int  # matrix parameters that one token passes through (no embedding look-up)
    losses: tuple[tuple[int, float], ...] = ()  # (step, training loss) of the training that made it


class Round(Checkpoint):
    """A model averaged from what devices made of the one that they were sent, and what that took so far."""

    number: int  # how often devices have been sent a model
    down_bytes: int  # sent to all devices in all rounds
    up_bytes: int  # sent by all devices in all rounds
    heldout: tuple[tuple[int, float], ...] = ()  # of the best round: each round's number and loss on held-out text


# ── what devices send ─────────────────────────────────────────────────────────────────────────────────────────────────


class Packing(BaseModel):
    """How an upload is packed, and what is lost by it, as measured where it was packed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    codec: str  # the label of the recipe's codec
    error: float = Field(ge=0)  # L2 distance of what the server unpacks from what was trained, relative to the latter
    lost: float = Field(ge=0)  # the same distance relative to what training changed; 0 if that was nothing


class Upload(Artifact):
    """What one device sends, once: `model/`, `adapter/` or `packed/`, and an embedding of its text (m_n, e_n).

    An adapter that the server has added to its ancestor is an upload with `model/` like any other, and so is what was
    packed.
    """

    device: str
    ancestor: str  # the recipe's name of the ancestor
    model_type: str
    lineage: str
    parameters: int
    active_parameters: int
    tokens: int = Field(ge=0)  # private tokens it was trained on, counted once
    embedding: str  # e_n, int8, hex
    bytes: int  # size of what is sent plus e_n (Eq. 5)
    losses: tuple[tuple[int, float], ...] = ()
    method: Literal["full", "lora", "qlora"] = "full"  # how it was trained
    trained_parameters: int = 0  # weights that training changed
    sends: Literal["model", "adapter", "packed"] = "model"
    # Absent from the records, and so from the digests, of uploads that are sent as they are.
    packing: Packing | None = Field(default=None, exclude_if=lambda packing: packing is None)

    @property
    def model(self) -> Path:
        """The trained checkpoint."""
        return self.folder / "model"

    @property
    def sent(self) -> Path:
        """What the device sends beside its embedding."""
        return self.folder / self.sends


class Client(Upload):
    """What a device makes of the part of an MoE that it is sent, in a round of FedJETS."""

    experts: tuple[int, ...]  # clusters whose experts it has, in order
    owner: int | None  # of an anchor, its cluster
    down_bytes: int  # that it was sent for it


class Rejection(BaseModel):
    """A device that was left out, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    reason: str


class Wire(BaseModel):
    """Bytes of the messages that a federation's server and one device have sent each other, what came to nothing too.

    A message counts as Flower carries it, with its own facts and digests, once; what HTTP, TLS and Flower's own
    repetitions add is not there, nor is a reply that came when it was no longer waited for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    up: int = Field(default=0, ge=0)  # to the server
    down: int = Field(default=0, ge=0)  # to the device


class Intake(Artifact):
    """The server's verdict on all uploads."""

    accepted: tuple[str, ...]  # device ids, in order
    rejected: tuple[Rejection, ...] = ()
    bytes: dict[str, int] = {}  # device → bytes uploaded (Eq. 5)


# ── what the server makes of it ───────────────────────────────────────────────────────────────────────────────────────


class Clusters(Artifact):
    """K groups of devices; a group may be empty only when there are fewer distinct devices than K."""

    k: int
    members: tuple[tuple[str, ...], ...]  # per cluster: device ids
    similarity: tuple[tuple[float, ...], ...]  # Π (Eq. 6), rows and columns in the order of `devices`
    devices: tuple[str, ...]
    centroids: tuple[str, ...]  # per cluster: mean embedding, int8, hex ("" if empty)
    warnings: tuple[str, ...] = ()

    def of(self, device: str) -> int:
        """The cluster of a device."""
        return next(i for i, group in enumerate(self.members) if device in group)


class Proxy(Artifact):
    """The mean of one cluster's models of one lineage: a checkpoint in `model/`."""

    cluster: int
    lineage: str
    model_type: str
    members: tuple[str, ...]
    weights: tuple[float, ...]
    distance: float  # largest relative L2 distance of a member's weights from the mean
    parameters: int
    active_parameters: int
    warnings: tuple[str, ...] = ()

    @property
    def model(self) -> Path:
        """The averaged checkpoint."""
        return self.folder / "model"


class Writing(Artifact):
    """What one cluster's models wrote: `documents.jsonl`, and their probabilities: `signals/<writer>.safetensors`."""

    cluster: int
    counts: dict[str, int]  # kind → kept; "dropped …" → dropped
    by_writer: dict[str, int]  # writer → documents kept

    @property
    def documents(self) -> Path:
        """The written documents."""
        return self.folder / "documents.jsonl"

    @property
    def signals(self) -> Path:
        """What each writer thought while writing."""
        return self.folder / "signals"

    @property
    def tokenizers(self) -> Path:
        """The writers' tokenizers, each in a folder named by its fingerprint."""
        return self.folder / "tokenizers"


class TransferSet(Artifact):
    """All text that teaches: `documents.jsonl` (`TransferDocument`s) and `signals/<writer>.safetensors`."""

    counts: dict[str, int]
    per_cluster: tuple[int, ...]  # written documents that each cluster knows
    by_writer: dict[str, int]  # writer → documents
    private_text_risk: bool  # True when devices' models wrote any of it
    notices: tuple[str, ...] = ()
    shifted: bool = False  # the signals are shifts of a base's own probabilities

    @property
    def documents(self) -> Path:
        """The documents, public and written."""
        return self.folder / "documents.jsonl"

    @property
    def signals(self) -> Path:
        """Each writer's probabilities on its own documents."""
        return self.folder / "signals"

    @property
    def tokenizers(self) -> Path:
        """The writers' tokenizers, each in a folder named by its fingerprint."""
        return self.folder / "tokenizers"


class Likelihoods(Artifact):
    """How likely one model finds each document of the transfer set."""

    nats: dict[str, float]  # document → −log p of all of it; without those that the model cannot take


class Teaching(Artifact):
    """What one teacher says, asked after the fact, about documents of the transfer set: `signals.safetensors`."""

    teacher: str
    cluster: int
    lineage: str
    width: int  # of its hidden states

    @property
    def signals(self) -> Path:
        """The teacher's signals."""
        return self.folder / "signals.safetensors"

    @property
    def tokenizers(self) -> Path:
        """A folder with the teacher's tokenizer, named by its fingerprint."""
        return self.folder / "tokenizers"


# ── what is found ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Scores(Artifact):
    """One model's answers to the test questions: `rows.jsonl`, one `ScoredQuestion` a line."""

    system: str
    item: str | None = None
    routing: dict[str, Any] | None = None  # for a MoE: see phases/evaluate.py


class Judgements(Artifact):
    """What a judge thinks of one model's answers: `judged.jsonl`, one `Judged` a line."""

    system: str
    judge: str  # its name
    ungraded: int  # answers for which it gave no number


class Report(Artifact):
    """`results.json`, `report.html` and the model card of a run."""

    name: str
    headline: dict[str, float] = Field(default_factory=dict)
    moe_digest: str = ""  # of the checkpoint that the report is about

    @property
    def results(self) -> Path:
        """The machine-readable results."""
        return self.folder / "results.json"

    @property
    def page(self) -> Path:
        """The page for people."""
        return self.folder / "report.html"
