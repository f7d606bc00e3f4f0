"""One section of the recipe per phase of the server, in the order in which they run."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from deepfusion.config.models import Training
from deepfusion.config.section import Section
from deepfusion.config.targets import COMMON_SHARDS, PRESETS, Preset, Target


class ClusterPhase(Section):
    """Phase I: grouping devices by what they know (Eq. 6)."""

    mode: Literal["by_domain", "by_type"] = "by_domain"
    """by_domain: over all devices, one teacher per lineage in a cluster; by_type: type-pure clusters, as published."""
    k: int = Field(default=4, ge=1)
    """Number of clusters K, and so of experts."""


class ProxyPhase(Section):
    """Averaging each cluster's models of one lineage (Fig. 4)."""

    method: Literal["mean", "ties"] = "mean"
    """mean: of weights, as published; ties: the ancestor, and the mean of those changes in it that are large and of the
    sign that most of them have (arXiv 2306.01708)."""
    density: float = Field(default=0.2, gt=0, le=1)
    """Share of each tensor's changes that count with `ties`, the largest."""
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
    keep_agreed: float = Field(default=1.0, gt=0, le=1)
    """Share of the written documents that is kept: of each cluster's, those that another writer finds much likelier
    than its own public ancestor does. So many more are written that sampled_per_cluster are kept, and all writers read
    them. For devices that share what they know: of what one device alone knows, it drops most. 1: all are kept."""
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
    answer_after: str | None = Field(default=None, min_length=1)
    """What ends the question in devices' text, such as "?\\n": a written text is an answer, with the weight of answers,
    from behind the first place where it stands, and a prompt before. None: a written text is all answer."""
    top_k: int = Field(default=32, ge=1)
    """Probabilities kept with each written token: the teacher of that document."""
    batch: int = Field(default=64, ge=1)
    """Documents written at a time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which models write and are asked what they think. bfloat16 is several times faster where the
    processor or accelerator has instructions for it; where it has none, float32 is used."""

    @property
    def written_per_cluster(self) -> int:
        """Documents written per cluster, of which `sampled_per_cluster` are kept."""
        return math.ceil(self.sampled_per_cluster / self.keep_agreed)

    @property
    def reads(self) -> bool:
        """Whether all writers read what each has written."""
        return self.keep_agreed < 1 and "sampled" in self.kinds


Across = Literal["auto", "span_likelihood", "projected_kl", "hybrid_kl", "mined", "uld"]


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
    across: Across = "auto"
    """How a teacher is heard whose tokenizer cuts text differently from the student's. auto: span_likelihood, but
    projected_kl of teachers most of whose tokens the student's tokenizer has, if both have 10,000 or more or few runs
    of bytes in common, and unless they are shifted; `deepfusion doctor` tells. span_likelihood: by the likelihood of
    each run of bytes that both tokenize as a whole (arXiv 2503.20083). The others by its probabilities
    wherever both begin a token. projected_kl: KL over the finest outcomes that both vocabularies can tell apart (P-KL
    of arXiv 2605.21699); hybrid_kl: over the teacher's tokens (H-KL of the same); mined: each of the teacher's tokens
    stands for the student's at the least edit distance (arXiv 2406.02224); uld: sorted probabilities (arXiv
    2402.12030)."""
    span_weight: float = Field(default=1.0, ge=0)
    """Weight, within β, of the span likelihood."""
    span_temperature: float = Field(default=10.0, gt=0)
    """τ of the span likelihood (arXiv 2503.20083)."""


PLAIN = LogitsObjective(beta=0, focus=0, across="span_likelihood")
"""Cross-entropy alone."""


class Features(Section):
    """What is kept of a teacher's hidden states; `VAAObjective` has a sentence on each."""

    stages: int
    patches: int
    teacher_layers: Literal["stage_ends", "last"]
    standardise: Literal["none", "dimension", "layer_norm"]


class VAAObjective(LogitsObjective):
    """CE + α·feature matching through View-Aligned Attention + β·KL (Eq. 7-11)."""

    kind: Literal["vaa"] = "vaa"  # pyright: ignore[reportIncompatibleVariableOverride]
    alpha: float = Field(default=1.0, ge=0)
    """Weight of the feature-matching loss (α, Eq. 11)."""
    stages: int = Field(default=2, ge=1)
    """Number of representation stages J."""
    patches: int = Field(default=8, ge=1)
    """Patches per stage and document: P_q = J × patches."""
    teacher_layers: Literal["stage_ends", "last"] = "stage_ends"
    """The teacher's layer that stage j of the student is to match: the one that ends the teacher's own stage j, or its
    last one for every j."""
    standardise: Literal["none", "dimension", "layer_norm"] = "dimension"
    """What is done to a teacher's features, which reach 30,000 in some families: none (the paper); dimension: mean 0
    and deviation 1 of each dimension over all patches of all documents; layer_norm: the same of each patch over all
    dimensions."""
    matching: Literal["mse", "cosine", "relational"] = "mse"
    """mse: mean squared difference (Eq. 9); cosine: 1 − cosine of each patch; relational: squared difference between
    the cosines of all patches of a batch to each other, which takes no projection and no attention."""
    width: int = Field(default=64, ge=1)
    """Attention width d."""
    heads: int = Field(default=4, ge=1)
    """Attention heads."""
    attention: bool = True
    """False leaves out Eq. 8: projection alone."""
    causal: bool = False
    """In Eq. 8, a patch sees only patches that begin where it does or earlier in the text, of every stage."""
    residual: bool = False
    """Add to what Eq. 8 gives what it was given; the paper does not."""
    warmup: int = Field(default=0, ge=0)
    """Steps in which the projections learn to read the student's features, which do not change for them yet."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}: change either")
        if self.matching == "relational" and (self.attention or self.warmup):
            raise ValueError("matching relational has nothing to train: set attention: false and leave warmup out")
        for field in ("causal", "residual"):
            if getattr(self, field) and not self.attention:
                raise ValueError(f"{field} is about attention: set attention: true or leave {field} out")
        return self

    @property
    def features(self) -> Features:
        """What is wanted of teachers."""
        return Features(
            stages=self.stages,
            patches=self.patches,
            teacher_layers=self.teacher_layers,
            standardise=self.standardise,
        )


class OFAObjective(LogitsObjective):
    """CE + β · one-for-all distillation of the head and of exits within the student (OFA-KD, arXiv 2310.19444)."""

    kind: Literal["ofa"] = "ofa"  # pyright: ignore[reportIncompatibleVariableOverride]
    beta: float = Field(default=1.0, ge=0)
    """Weight of all OFA terms; each counts alike (the paper's is 1)."""
    across: Across = "projected_kl"
    """How a teacher with another tokenizer is heard: over the outcomes that both vocabularies tell apart, or as mined;
    an exit cannot be held against the likelihood of a run of bytes, nor against sorted probabilities."""
    stages: int = Field(default=4, ge=1)
    """Exits J: one at the end of each of so many blocks of the student's layers."""
    gamma: float = Field(default=1.4, ge=1)
    """γ: 1 is plain distillation; above, the label weighs the more, the surer the teacher is of it (the paper: 1 to
    1.5)."""

    @model_validator(mode="after")
    def _heard_by_outcomes(self) -> Self:
        if self.across not in ("projected_kl", "hybrid_kl", "mined"):
            raise ValueError(f"kind ofa cannot hear a teacher by across {self.across}: set projected_kl")
        if self.temperature != 1:
            raise ValueError("kind ofa has no temperature: leave it out")
        return self


Objective = Annotated[LogitsObjective | VAAObjective | OFAObjective, Field(discriminator="kind")]


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


class Consultation(Section):
    """What teachers are asked for: as much of `DistillPhase` as their answers depend on."""

    top_k: int | None
    features: Features | None


class DistillPhase(Section):
    """Phase II: the server's training, in tokens of the dense base (its budget covers distillation *and* tuning)."""

    budget_tokens: int = Field(default=1_000_000, ge=1)
    """Server training budget, as tokens through the dense base model; a MoE token counts by its active parameters."""
    shares: Shares = Shares()
    objective: Objective = LogitsObjective()
    teachers: Literal["writers", "proxies", "likeliest"] = "writers"
    """writers: each document's own writer, by the probabilities it kept while writing; proxies: the cluster's averaged
    models, asked about every document; likeliest: of all that write, in whatever cluster, the one that finds a document
    likeliest, and none where the student finds it likelier still (DualMinCE, arXiv 2406.02224)."""
    shifted: bool = False
    """Teachers' probabilities are taken as a shift of the base's own: base · writer / the writer's public ancestor. For
    bases that are better language models than the devices' (real text); costs a pass of the base over written text."""
    mixed: int = Field(default=0, ge=0)
    """A written text's teacher is a mixture of its writer and so many others that have its tokenizer, those whose text
    is most like the writer's. Each weighs, token by token, by how much likelier than its own public ancestor it finds
    the text so far: those are heard who have learned what is spoken of. Costs their passes over written text, which are
    taken out of the joint student's budget. 0: the writer alone."""
    task_vectors: float = Field(default=0.0, ge=0, le=2)
    """Where devices' public ancestor is the base itself, students start from the base plus this times what each
    cluster's average of these devices has changed in it (task arithmetic, arXiv 2212.04089), before anything is
    distilled. Without such devices it changes nothing."""
    own_task_vectors: bool = False
    """With `task_vectors`: a branch's FFNs start from what its own cluster's devices have changed in the base, whole,
    in place of the share of every cluster's that the joint student started from. Experts then differ before any branch
    has learned a thing. Clusters without such devices start from the joint student, as all do without."""
    teacher_top_k: int | None = Field(default=32, ge=1)
    """Probabilities kept of teachers asked after the fact; none keeps all of them (dense KL)."""
    branch_trains: Literal["all", "ffn"] = "all"
    """What a branch may change: ffn keeps everything that assembly averages (Eq. 13) as it was."""
    training: Training = Training()
    joint_rate: float = Field(default=1.0, gt=0)
    """The joint student trains at this share of the learning rate, and controls that start from the base at all of
    it. Lower it where the student starts from task vectors, and so has something to lose."""
    branch_rate: float = Field(default=0.25, gt=0)
    """Branches train at this share of the learning rate: what the joint student knows is not to be unlearned."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.shifted and self.teachers != "writers":
            raise ValueError("shifted needs teachers: writers, for others are asked without their ancestors")
        if self.shifted and isinstance(self.objective, VAAObjective):
            raise ValueError(
                "shifted needs objective.kind: logits, for VAA's teachers are asked without their ancestors"
            )
        if self.shifted and isinstance(self.objective, OFAObjective):
            raise ValueError("shifted needs objective.kind: logits, for ofa hears no runs of bytes, which are shifted")
        if self.shifted and self.objective.across not in ("auto", "span_likelihood"):
            raise ValueError(
                "shifted needs objective.across: auto or span_likelihood, the only one whose base can be shifted"
            )
        if self.own_task_vectors and not self.task_vectors:
            raise ValueError("own_task_vectors are a cluster's share of task_vectors: set task_vectors above 0")
        for field in ("shifted", "mixed"):
            if getattr(self, field) and not self.shares.joint:
                raise ValueError(f"{field} needs shares.joint above 0, whose budget pays for it")
        if self.mixed and self.teachers != "writers":
            raise ValueError("mixed needs teachers: writers, for it is about what they wrote")
        if self.mixed and self.shifted:
            raise ValueError("mixed and shifted both change what a writer teaches: set one of them")
        return self

    @property
    def consultation(self) -> Consultation:
        """What teachers are asked for."""
        features = self.objective.features if isinstance(self.objective, VAAObjective) else None
        return Consultation(top_k=self.teacher_top_k, features=features)

    @field_validator("objective", mode="before")
    @classmethod
    def _logits_unless_said(cls, value: Any) -> Any:
        return {"kind": "logits", **value} if isinstance(value, dict) else value


class AssemblePhase(Section):
    """Phase III, first half: K students become one MoE (Eq. 12, 13)."""

    preset: Literal["none", Preset] = "none"
    """A published MoE's shape: fills in the keys below, from `target` to `renormalise`, and asks for 15 clusters
    (qwen1.5-moe-a2.7b) or 8 (deepseek-moe-16b)."""
    target: Literal["auto", Target] = "auto"
    """What the MoE is. auto: llama and mistral become mixtral, qwen2 becomes qwen2_moe, qwen3 qwen3_moe, olmo2
    flex_olmo. A llama can also become a deepseek (DeepSeek-MoE, v1)."""
    layout: Literal["coarse", "fine_grained"] = "coarse"
    """coarse: K experts, each a student's whole FFN; fine_grained: each FFN is cut into smaller experts that are chosen
    together at first."""
    granularity: int | None = Field(default=None, ge=2)
    """Shards that an FFN is cut into: with `fine_grained`, and only there. A deepseek gives two of them to its shared
    experts."""
    top_k: int = Field(default=2, ge=1)
    """FFNs per token (Eq. 4): experts where they are coarse, else as many times the shards that an FFN is cut into."""
    expert_width: int | None = Field(default=None, ge=1)
    """Channels of an expert, to which FFN or shard is padded with zeros; none: no padding."""
    shared_width: int | None = Field(default=None, ge=1)
    """Channels of a qwen2_moe's shared expert; none: as the base's FFN."""
    renormalise: bool = True
    """Whether the weights of a token's experts are made to sum to 1 (`norm_topk_prob`), with which an MoE of equal
    students is exactly the student. Programs that ignore the setting want false; then experts are scaled instead, right
    on average."""
    router: Literal["hidden_means", "random"] = "hidden_means"
    """Initial router rows: the mean hidden state of each domain's text, or small random numbers."""
    router_scale: float = Field(default=1.0, gt=0)
    """Standard deviation over tokens of the initial router logits from hidden means; 0.1 if not said where
    `renormalise` is false, for the MoE is then the less like its students the larger it is."""
    router_tokens: int = Field(default=5_000, ge=1)
    """Tokens of each cluster's text that the hidden means are taken over."""

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        preset = given.get("preset")
        if isinstance(preset, str) and preset in PRESETS:
            for field, value in PRESETS[preset][1].items():
                if given.get(field, value) != value:
                    raise ValueError(f"preset {preset} has {field}: {value}, not {given[field]}: leave either out")
            given = {**PRESETS[preset][1], **given}
        return {"router_scale": 0.1, **given} if given.get("renormalise") is False else given

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if (self.layout == "fine_grained") != (self.granularity is not None):
            raise ValueError("layout: fine_grained and granularity go together: give both or none")
        if self.shared_width is not None and self.target not in ("auto", "qwen2_moe"):
            raise ValueError(f"a {self.target} has no shared_width: leave it out")
        if not self.renormalise and self.target == "mixtral":
            raise ValueError("a mixtral always renormalises: leave renormalise out, or choose another target")
        if self.target == "deepseek" and self.granularity is not None:
            if self.top_k > 1:
                raise ValueError("a fine-grained deepseek uses one student's FFN for a token: set top_k: 1")
            if self.granularity <= COMMON_SHARDS[self.target]:
                raise ValueError(f"a deepseek's granularity must be more than {COMMON_SHARDS[self.target]}")
        return self


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


Reference = Literal[
    "pooled_text", "pooled_text_dense", "dense_kd", "centralized", "ofa_kd", "fedmkt", "fedjets", "fedavg_dense", "btx"
]


class EvaluatePhase(Section):
    """What is measured, and against which controls."""

    references: tuple[Reference, ...] = (
        "pooled_text",
        "pooled_text_dense",
        "dense_kd",
        "centralized",
    )
    """What to train beside the run: the controls pooled_text, pooled_text_dense and dense_kd at equal server compute,
    the upper bound centralized, and the baselines ofa_kd (the run under another objective), fedmkt (the run with
    FedMKT's choice of teachers and its objective), fedjets (rounds of training parts of the MoE), fedavg_dense (rounds
    of averaging one dense model) and btx (Branch-Train-MiX), for which every device trains the base."""
    centralized_tokens: int = Field(default=3_000_000, ge=1)
    """Most tokens the centralised MoE may train on; it stops earlier when held-out text no longer improves."""
    patience: int = Field(default=3, ge=1)
    """Held-out evaluations without improvement before the centralised MoE stops."""
    removal: bool = True
    """Measure what a MoE loses without each expert: takes a further pass over the test text for every one of them."""
    batch_tokens: int = Field(default=8192, ge=64)
    """Tokens scored at a time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which every system is evaluated; where the machine has no instructions for bfloat16, float32."""

    @property
    def scoring(self) -> EvaluatePhase:
        """What a model's scores depend on: which others are trained beside it is not among that."""
        return EvaluatePhase(references=(), removal=self.removal, batch_tokens=self.batch_tokens, dtype=self.dtype)

    @property
    def convergence(self) -> EvaluatePhase:
        """What the centralised MoE's training depends on."""
        return EvaluatePhase(references=(), centralized_tokens=self.centralized_tokens, patience=self.patience)
