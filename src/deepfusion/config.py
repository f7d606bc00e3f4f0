"""The recipe: every choice that changes the answer, one frozen section per phase; and `Runtime`, which changes the
speed.

A recipe is a YAML file. Unknown keys are refused by name; defaults are what measured best (`docs/decisions.md` says
where).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

ModelType = Literal["gpt2", "llama", "opt", "bloom", "gpt_neox", "qwen2", "qwen3", "olmo2", "gemma3_text"]


class Section(BaseModel):
    """A part of a recipe: immutable, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class SyntheticData(Section):
    """The embedded benchmark: invented domains, entities and facts, of which only devices know the private ones."""

    kind: Literal["synthetic"]
    domains: int = Field(default=4, ge=1, le=8)
    """Number of invented domains (medicine, finance, law, travel, …)."""
    private_facts: int = Field(default=40, ge=1)
    """Private facts per domain: no public text states them."""
    public_facts: int = Field(default=16, ge=0)
    """Public facts per domain: stated in the public text."""
    values: int = Field(default=16, ge=2, le=64)
    """Number of possible answers to each kind of question; a fact carries log2(values) bits, chance is 1/values."""
    private_documents_per_fact: int = Field(default=10, ge=1)
    """Documents that a device holds about each fact it knows (different templates)."""
    public_documents_per_fact: int = Field(default=10, ge=0)
    """Public documents about each public fact."""
    filler_documents: int = Field(default=200, ge=0)
    """Public documents per domain that use the domain's words but state no fact."""
    question_coverage: float = Field(default=0.5, ge=0, le=1)
    """Share of the private facts about which the public text holds a question, without its answer."""
    options: int = Field(default=4, ge=2)
    """Length of the option list of a test question (choice accuracy)."""


class TextSource(Section):
    """One file or `datasets` name with real text."""

    path: str | None = None
    """A `.jsonl` or `.txt` file, relative to the recipe's folder unless absolute."""
    dataset: str | None = None
    """Anything `datasets.load_dataset` opens: a hub name or a builder such as `json`, `csv` or `parquet`."""
    arguments: dict[str, Any] = {}
    """Further arguments of `datasets.load_dataset` (`name`, `split`, `data_files`, …)."""
    columns: dict[str, str] = {}
    """Our field → the source's column, where they differ (fields: id, domain, context, question, options, answer,
    answer_idx, group, private_group, split, device, source)."""
    where: dict[str, str] = {}
    """Keep only rows whose columns have these values, e.g. `{source: FiQA}` (a prefix match)."""
    domain: str | None = None
    """Domain of every row (overrides the column)."""
    split: Literal["private", "public", "test"] | None = None
    """Split of every row (overrides the column)."""
    device: str | None = None
    """The device that holds every private row of this source (only with `partition.mode: given`)."""
    max_rows: int | None = Field(default=None, ge=1)
    """Keep at most this many rows per split, chosen by a seeded shuffle of whole groups."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give exactly one of `path` and `dataset`")
        return self


class FileData(Section):
    """Real text from files or datasets."""

    kind: Literal["files"]
    sources: tuple[TextSource, ...] = Field(min_length=1)
    """Where the rows come from."""
    domains: tuple[str, ...] | None = None
    """Keep only rows of these domains; none: all."""
    prompt: str = "{context}\n{question}\n"
    """Template of a prompt; an absent context takes its line with it."""
    max_answer_bytes: int | None = Field(default=None, ge=1)
    """Leave out rows whose answer is longer than this many UTF-8 bytes (counted in the report); none: keep all."""
    heldout_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the private rows kept aside to tell when training has converged (never trained on, never reported)."""


class Partition(Section):
    """Who holds what."""

    mode: Literal["by_domain", "uneven", "given"] = "by_domain"
    """by_domain: each device's domain mixture is drawn from a Dirichlet; uneven: random shares of everything, as in the
    paper; given: the rows' own `device` column."""
    devices: int = Field(default=16, ge=1)
    """Number of devices N."""
    alpha: float = Field(default=0.05, gt=0)
    """Dirichlet concentration: small means each device lives in one domain."""
    holders: int = Field(default=2, ge=1)
    """How many devices hold each fact or group (capped by N)."""


class Data(Section):
    """The text: public, private per device, test."""

    source: Annotated[SyntheticData | FileData, Field(discriminator="kind")]
    partition: Partition = Partition()


# ── models and training ───────────────────────────────────────────────────────────────────────────────────────────────


class Training(Section):
    """How anything is trained: through transformers' Trainer, AdamW, one pass of warm-up then decay."""

    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Decay after warm-up."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps that warm up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    clip: float = Field(default=1.0, gt=0)
    """Gradient norm limit."""
    context: int = Field(default=128, ge=8)
    """Tokens in one packed row; also the longest document."""
    rows: int = Field(default=16, ge=1)
    """Packed rows in one optimiser step."""
    answer_weight: float = Field(default=1.0, ge=0)
    """Weight of an answer's tokens in the cross-entropy; every other token weighs 1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the trained weights."""


class MadeModel(Section):
    """A tiny ancestor made on the spot: initialised, then pre-trained on the public text."""

    type: ModelType
    """transformers' model type."""
    hidden: int = Field(default=64, ge=8)
    """Width."""
    ffn: int = Field(default=192, ge=8)
    """Width of the feed-forward layer."""
    layers: int = Field(default=3, ge=1)
    """Number of layers."""
    heads: int = Field(default=4, ge=1)
    """Attention heads."""
    vocab: int = Field(default=512, ge=300)
    """Size of the byte-level BPE tokenizer trained on the public text; equal sizes give equal tokenizers."""
    context: int = Field(default=256, ge=8)
    """Longest sequence the model accepts."""
    tokens: int = Field(default=200_000, ge=0)
    """Tokens of public pre-training."""
    training: Training = Training()


class ModelSource(Section):
    """Where a model comes from: a checkpoint folder, or made on the spot."""

    path: str | None = None
    """A Hugging Face checkpoint folder (safetensors), relative to the recipe's folder unless absolute."""
    make: MadeModel | None = None
    """Make a tiny one."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.make is None):
            raise ValueError("give exactly one of `path` and `make`")
        return self


class Models(Section):
    """The base model of the MoE, and the ancestors that devices start from."""

    base: ModelSource
    """The dense model whose copies become experts."""
    ancestors: dict[str, ModelSource] = Field(min_length=1)
    """Name → model; each device starts from one."""
    assign: Literal["round_robin", "random"] = "round_robin"
    """How devices get their ancestor: in turn, shifted by one every round so that devices of one domain differ; or
    drawn at random (the paper)."""


# ── phases ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class DevicePhase(Section):
    """Training on each device, and the embedding that it uploads."""

    epochs: float = Field(default=30, gt=0)
    """Passes over the device's private text."""
    replay: float = Field(default=0.25, ge=0)
    """Public tokens mixed in per private token, so that a device does not forget how to write."""
    training: Training = Training()
    encoder: str = "hashing"
    """`hashing` (stateless, scikit-learn), or the folder of a sentence encoder such as MiniLM."""
    embedding_bytes: int = Field(default=64, ge=8, le=64)
    """Size of e_n: a shared seeded projection to this many int8 numbers."""


class ClusterPhase(Section):
    """Phase I: grouping devices by what they know (Eq. 6)."""

    mode: Literal["by_domain", "by_type"] = "by_domain"
    """by_domain: over all devices, one teacher per lineage in a cluster; by_type: type-pure clusters, as published."""
    k: int = Field(default=4, ge=1)
    """Number of clusters K, and so of experts."""


class ProxyPhase(Section):
    """Averaging each cluster's models of one lineage (Fig. 4)."""

    weights: Literal["uniform", "tokens"] = "uniform"
    """Every member alike, or by its number of private tokens."""
    warn_below: float = Field(default=0.8, ge=-1, le=1)
    """Warn when two members' embeddings have a cosine below this: averaging strangers destroys what they know."""


class TransferPhase(Section):
    """The text that carries knowledge from devices to students."""

    kinds: tuple[Literal["public", "answered", "sampled"], ...] = ("public", "answered", "sampled")
    """public: the server's own text; answered: teachers answer public questions of their own subjects; sampled:
    teachers write text. The last two can repeat private facts word for word: a privacy cost, stated in log, report and
    model card."""
    writers: Literal["devices", "proxies"] = "devices"
    """Whose models write: the devices' own, or the averaged proxies."""
    max_writers: int = Field(default=64, ge=1)
    """A cluster with more devices than this is written for by its proxies, so that the server's work stays bounded."""
    max_copies: int = Field(default=3, ge=1)
    """Identical written texts are kept at most this often; the others are dropped and counted."""
    sampled_per_cluster: int = Field(default=600, ge=0)
    """Documents written per cluster, shared among its writers: the server's work does not grow with N."""
    answers_per_question: int = Field(default=1, ge=1)
    """How many of a cluster's writers answer a question (those most at home in its words)."""
    temperature: float = Field(default=0.7, gt=0)
    """Sampling temperature of written text: below 1, models write less that they do not know."""
    answer_temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature of answers; 0 is greedy."""
    max_new_tokens: int = Field(default=48, ge=1)
    """Longest text written, in the writer's tokens; what does not end by itself within it is dropped and counted."""
    min_bytes: int = Field(default=8, ge=0)
    """Shorter written documents are dropped and counted."""
    top_k: int = Field(default=32, ge=1)
    """Probabilities kept with each written token: the teacher of that document."""
    batch: int = Field(default=64, ge=1)
    """Documents written at a time."""


class LogitsObjective(Section):
    """CE + β·KL (Eq. 11 with α = 0)."""

    kind: Literal["logits"] = "logits"
    beta: float = Field(default=3.0, ge=0)
    """Weight of the KL to the teachers (β, Eq. 11)."""
    focus: float = Field(default=1.0, ge=0)
    """Extra weight of a written token for each nat by which its writer finds it likelier than the writer's public
    ancestor did: what devices have learned in private weighs more than words that anyone could have guessed. All
    written text together weighs the same as without."""
    label_teaches: bool = True
    """Where no teacher's distribution fits the student's tokens, let the label stand in for one (the KL to a one-hot
    distribution), so that β does not drown public text, or text from other tokenizers, in the rest."""
    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature of the KL; other than 1 only for teachers asked after the fact."""
    span_weight: float = Field(default=1.0, ge=0)
    """Weight, within β, of the span likelihood that stands in for KL where tokenizers differ."""
    span_temperature: float = Field(default=10.0, gt=0)
    """τ of the span likelihood (arXiv 2503.20083)."""


class VAAObjective(LogitsObjective):
    """CE + α·feature matching through View-Aligned Attention + β·KL (Eq. 7-11)."""

    kind: Literal["vaa"] = "vaa"  # pyright: ignore[reportIncompatibleVariableOverride]
    alpha: float = Field(default=1.0, ge=0)
    """Weight of the feature-matching loss (α, Eq. 11)."""
    stages: int = Field(default=2, ge=1)
    """Number of representation stages J."""
    patches: int = Field(default=8, ge=1)
    """Patches per stage and document: P_q = J × patches."""
    width: int = Field(default=64, ge=1)
    """Attention width d."""
    heads: int = Field(default=4, ge=1)
    """Attention heads."""
    attention: bool = True
    """False leaves out Eq. 8: projection alone."""
    standardise: bool = True
    """Standardise teacher features per dimension; they reach 30,000 in some families."""


Objective = Annotated[LogitsObjective | VAAObjective, Field(discriminator="kind")]


class Shares(Section):
    """How the server's budget is split."""

    joint: float = Field(default=0.92, ge=0, le=1)
    """One student learns from all documents."""
    branch: float = Field(default=0.04, ge=0, le=1)
    """K copies go on, each on its own domain; this is the sum over the copies."""
    tune: float = Field(default=0.04, ge=0, le=1)
    """The assembled MoE."""

    @model_validator(mode="after")
    def _sum_to_one(self) -> Self:
        if abs(self.joint + self.branch + self.tune - 1) > 1e-6:
            raise ValueError(f"joint + branch + tune must be 1, not {self.joint + self.branch + self.tune:g}")
        return self


class DistillPhase(Section):
    """Phase II: the server's training, in tokens of the dense base (its budget covers distillation *and* tuning)."""

    budget_tokens: int = Field(default=1_000_000, ge=1)
    """Server training budget, as tokens through the dense base model; a MoE token counts by its active parameters."""
    shares: Shares = Shares()
    objective: Objective = LogitsObjective()
    teachers: Literal["writers", "proxies"] = "writers"
    """writers: each document's own writer, by the probabilities it kept while writing; proxies: the cluster's averaged
    models, asked about every document."""
    teacher_top_k: int | None = Field(default=32, ge=1)
    """Probabilities kept of teachers asked after the fact; none keeps all of them (dense KL)."""
    branch_trains: Literal["all", "ffn"] = "all"
    """What a branch may change: ffn keeps everything that assembly averages (Eq. 13) as it was."""
    training: Training = Training()
    branch_rate: float = Field(default=0.25, gt=0)
    """Branches train at this share of the learning rate: what the joint student knows is not to be unlearned."""

    @field_validator("objective", mode="before")
    @classmethod
    def _logits_unless_said(cls, value: Any) -> Any:
        return {"kind": "logits", **value} if isinstance(value, dict) else value


class AssemblePhase(Section):
    """Phase III, first half: K students become one MoE (Eq. 12, 13)."""

    top_k: int = Field(default=2, ge=1)
    """Experts per token (Eq. 4)."""
    router: Literal["hidden_means", "random"] = "hidden_means"
    """Initial router rows: the mean hidden state of each domain's text, or small random numbers."""
    router_scale: float = Field(default=1.0, gt=0)
    """Standard deviation over tokens of the initial router logits from hidden means."""
    router_tokens: int = Field(default=5_000, ge=1)
    """Tokens of each cluster's text that the hidden means are taken over."""


class TunePhase(Section):
    """Phase III, second half: tuning the assembled MoE."""

    freeze_experts: bool = True
    """Train only router, attention, embeddings, norms and head, as published."""
    text: Literal["all", "public"] = "all"
    """Tune on the whole transfer set, or on public text alone (the paper)."""
    objective: LogitsObjective = LogitsObjective()
    """CE and the KL to each document's writer."""
    balance: float = Field(default=0.01, ge=0)
    """Weight of the load-balance loss."""
    ownership: float = Field(default=0.0, ge=0)
    """Weight of a loss that sends each written document to its cluster's expert."""
    training: Training = Training(learning_rate=3e-4)


class EvaluatePhase(Section):
    """What is measured, and against which controls."""

    references: tuple[Literal["pooled_text", "pooled_text_dense", "dense_kd", "centralized"], ...] = (
        "pooled_text",
        "pooled_text_dense",
        "dense_kd",
        "centralized",
    )
    """Controls to train beside the run; the first three at equal server compute."""
    centralized_tokens: int = Field(default=3_000_000, ge=1)
    """Most tokens the centralised MoE may train on; it stops earlier when held-out text no longer improves."""
    patience: int = Field(default=3, ge=1)
    """Held-out evaluations without improvement before the centralised MoE stops."""
    batch_tokens: int = Field(default=8192, ge=64)
    """Tokens scored at a time."""


class Recipe(Section):
    """Everything that decides a run's result."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run; its folder unless `--out` says otherwise."""
    seed: int = Field(default=0, ge=0)
    """Seed of data, initialisation, order and sampling."""
    data: Data
    models: Models
    device: DevicePhase = DevicePhase()
    cluster: ClusterPhase = ClusterPhase()
    proxy: ProxyPhase = ProxyPhase()
    transfer: TransferPhase = TransferPhase()
    distill: DistillPhase = DistillPhase()
    assemble: AssemblePhase = AssemblePhase()
    tune: TunePhase = TunePhase()
    evaluate: EvaluatePhase = EvaluatePhase()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.data.partition.mode != "given" and self.cluster.k > self.data.partition.devices:
            raise ValueError(
                f"cluster.k is {self.cluster.k} but there are only {self.data.partition.devices} devices "
                "(data.partition.devices): lower k or add devices"
            )
        if self.models.base.make is not None and self.models.base.make.type != "llama":
            raise ValueError(f"models.base is a {self.models.base.make.type}: experts are cut from llama models so far")
        if self.assemble.top_k > self.cluster.k:
            raise ValueError(f"assemble.top_k is {self.assemble.top_k} but there are only {self.cluster.k} experts")
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
        """Read a recipe file and apply `key.subkey=value` overrides (values are YAML).

        Relative paths in the recipe are resolved against the file's folder.

        Raises:
            ValueError: one line that names the file and the field at fault.
        """
        path = Path(path)
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"recipe {path} does not exist") from None
        except IsADirectoryError:
            raise ValueError(f"recipe {path} is a folder, not a file") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"recipe {path} is not UTF-8: {error.reason} at byte {error.start}") from None
        except yaml.YAMLError as error:
            raise ValueError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict):
            raise ValueError(f"recipe {path} must be a mapping of sections")
        for override in overrides:
            _override(tree, override)
        _resolve_paths(tree, path.parent)
        return cls.parse(tree, origin=str(path))

    @classmethod
    def parse(cls, tree: dict[str, Any], origin: str = "recipe") -> Recipe:
        """Validate an already loaded tree; errors are one line per fault and name `origin`."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ValueError("; ".join(_explain(fault, origin) for fault in error.errors())) from None


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"--set takes key=value, not {override!r}")
    *parents, last = key.strip().split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ValueError(f"--set {key}: {parent!r} is not a section")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"--set {key}: {value!r} is not a YAML value") from None


def _resolve_paths(node: Any, folder: Path) -> None:
    """Make every `path`, and an `encoder` that is a folder, absolute, in place."""
    if isinstance(node, dict):
        for key, value in node.items():
            if isinstance(value, str) and (key == "path" or (key == "encoder" and value != "hashing")):
                # Not `resolve`: through a symlinked folder, `..` would lead elsewhere than the path says.
                node[key] = os.path.abspath(folder / Path(value).expanduser())  # noqa: PTH100
            else:
                _resolve_paths(value, folder)
    elif isinstance(node, list):
        for item in node:
            _resolve_paths(item, folder)


def _explain(fault: Any, origin: str) -> str:
    tags = {"synthetic", "files", "logits", "vaa"}
    where = ".".join(str(part) for part in fault["loc"] if part not in tags)
    if fault["type"] == "extra_forbidden":
        return f"{origin}: unknown key {where!r}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{origin}: {where}: {message}" if where else f"{origin}: {message}"


class Runtime(BaseModel):
    """What changes only the speed, never the result; no part of it enters a step's key."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    workers: int = Field(default_factory=lambda: max(1, min(os.cpu_count() or 1, 8)), ge=0)
    """Steps that run at the same time, each in a process of its own; 0 runs everything in this process."""
    threads: int = Field(default=1, ge=1)
    """Torch threads of each process."""
    accelerator: Literal["cpu", "cuda", "mps"] = "cpu"
    """Where tensors live."""
    checkpoint_seconds: float = Field(default=60.0, gt=0)
    """Training saves a resumable checkpoint about this often."""
