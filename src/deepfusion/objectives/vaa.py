"""View-Aligned Attention: feature matching between models that share neither depth, width nor tokenizer (Eq. 7-9).

Our reading of arXiv 2602.14301: patches are equal parts of a document's *bytes*, so teacher and student are compared
on the same text under any two tokenizers. The hidden states at the end of a stage are averaged over a patch's tokens,
which does the striding of Eq. 7's convolution; the convolution itself then runs over the sequence of patches. Eq. 8 is
read without output projection, and without mask and residual unless asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from deepfusion.config import Features, VAAObjective
from deepfusion.losses import feature_cosine, feature_mse, feature_relations
from deepfusion.objectives.base import Objective, Predictions
from deepfusion.objectives.logits import Logits

KERNEL = 1
"""Patches that one step of Eq. 7's convolution sees (odd); the patches are already pooled, so one."""


def stage_ends(layers: int, stages: int) -> list[int]:
    """The layer, counted from 1, that ends each of `stages` blocks of consecutive layers, as equal as can be.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    if layers < stages:
        raise ValueError(f"a model of {layers} layers cannot be cut into {stages} stages: lower objective.stages")
    return [(stage + 1) * layers // stages for stage in range(stages)]


def teacher_layers(layers: int, features: Features) -> list[int]:
    """The layer of a teacher that each stage is matched with, counted from 1.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    ends = stage_ends(layers, features.stages)
    return ends if features.teacher_layers == "stage_ends" else [layers] * features.stages


def pool(
    hidden: Float[Tensor, "tokens width"], token: Int[Tensor, " members"], slot: Int[Tensor, " members"], slots: int
) -> Float[Tensor, "slots width"]:
    """Mean hidden state of each slot's tokens, in float32; `hidden[token[i]]` counts for `slot[i]`.

    A slot without tokens, which `patch_membership` never gives, is 0.
    """
    count = torch.bincount(slot, minlength=slots).clamp(min=1).unsqueeze(-1)
    total = hidden.new_zeros(slots, hidden.shape[-1], dtype=torch.float32)
    return total.index_add(0, slot, hidden[token].float()) / count


def pool_patches(
    hidden: Float[Tensor, "tokens width"], membership: Sequence[tuple[int, int]], patches: int
) -> Float[Tensor, "patches width"]:
    """Mean hidden state of each patch of one document: a teacher's features of one stage (F_j^T).

    Args:
        hidden: the document's hidden states at the end of a stage, in the token order of `membership`.
        membership: (token, patch), from `alignment.patch_membership`.
        patches: number of patches.
    """
    token, slot = torch.tensor(membership, dtype=torch.int64, device=hidden.device).reshape(-1, 2).unbind(-1)
    return pool(hidden, token, slot, patches)


def standardise(
    features: Float[Tensor, "documents stages patches width"],
) -> tuple[Float[Tensor, "documents stages patches width"], Float[Tensor, "stages 1 width"], Tensor]:
    """Features with mean 0 and variance 1 in every dimension of every stage, and the (mean, deviation) that did it.

    A dimension that never varies becomes 0 (its deviation is given as 1).
    """
    features = features.float()
    deviation, mean = torch.std_mean(features, dim=(0, 2), correction=0)
    mean, deviation = mean.unsqueeze(1), deviation.unsqueeze(1)
    # Rounding leaves a constant large dimension with a tiny deviation; dividing by it would blow noise up to size 1.
    deviation = torch.where(deviation > 1e-6 * (1 + mean.abs()), deviation, 1.0)
    return (features - mean) / deviation, mean, deviation


def prepared(
    features: Float[Tensor, "documents stages patches width"], how: str
) -> Float[Tensor, "documents stages patches width"]:
    """A teacher's features as they are kept: as they are (`none`), by `dimension`, or by patch (`layer_norm`).

    Raises:
        ValueError: they do not fit into float16, in which they are kept.
    """
    if how == "dimension":
        features = standardise(features)[0]
    elif how == "layer_norm":
        features = layer_norm(features.float(), features.shape[-1:])
    largest = float(features.abs().max())
    if largest > torch.finfo(torch.float16).max:
        raise ValueError(
            f"a teacher's features reach {largest:.3g}, too much for float16: set objective.standardise: dimension"
        )
    return features


class ViewAlignedAttention(nn.Module):
    """Student features of J stages, mapped to what each teacher lineage's features should be (Eq. 7-9)."""

    def __init__(self, config: VAAObjective, student_width: int, teacher_widths: Mapping[str, int]) -> None:
        super().__init__()
        if config.width % config.heads:
            raise ValueError(
                f"objective.width {config.width} is not a multiple of objective.heads {config.heads}: change either"
            )
        width, stages = config.width, config.stages
        self.config = config
        self.lineages = sorted(teacher_widths)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(student_width, width, KERNEL, padding=KERNEL // 2) for _ in range(stages)
        )
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False) if config.attention else None
        self.projections = nn.ModuleList(  # a list, for a lineage's name need not be a valid module name
            nn.ModuleList(nn.Linear(width, teacher_widths[name]) for _ in range(stages)) for name in self.lineages
        )

    def forward(self, stages: Sequence[Float[Tensor, "documents patches width"]]) -> list[Tensor]:
        """Aligned features F_j^S' of each stage, `[documents, patches, d]`; `project` fits them to a teacher."""
        projected = [  # Eq. 7
            convolution(stage.transpose(1, 2)).transpose(1, 2)
            for convolution, stage in zip(self.convolutions, stages, strict=True)
        ]
        if self.queries_keys_values is None:
            return projected
        features = torch.cat(projected, 1)
        mask = self._mask(stages[0].shape[1], features.device) if self.config.causal else None
        query, key, value = (  # Eq. 8, in `heads` heads
            part.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)
            for part in self.queries_keys_values(features).chunk(3, -1)
        )
        attended = scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(-2)
        if self.config.residual:
            attended = attended + features
        return list(attended.chunk(len(stages), 1))

    def _mask(self, patches: int, device: torch.device) -> Bool[Tensor, "queries queries"]:
        """Which of all stages' patches each may see: those of its own part of the text, and of earlier ones."""
        place = torch.arange(patches, device=device).repeat(self.config.stages)
        return place.unsqueeze(1) >= place

    def project(self, aligned: Sequence[Tensor], lineage: str) -> list[Tensor]:
        """The aligned features of each stage in the width of a teacher lineage."""
        layers = self.projections[self.lineages.index(lineage)]
        assert isinstance(layers, nn.ModuleList)
        return [layer(stage) for layer, stage in zip(layers, aligned, strict=True)]


class VAA(Objective):
    """CE + α·FM + β·KL (Eq. 11).

    Batch fields, beside those of `Logits` (D documents are pooled; a batch without them trains without FM):
        patch_documents `[D]`: which documents of the batch those are; only their number is used.
        pool_token, pool_slot `[M]`: token `b·T + t` of the batch belongs to patch `document·P + p`, document in 0..D-1.
        features:<lineage> `[n, J, P, W]`, features_document:<lineage> `[n]`: a teacher's (standardised) features, and
            which of the D documents each row is of. Zero, one or several lineages may have features of a document.

    FM is Eq. 9's sum over stages, mean over all (document, teacher) pairs of the batch. Relations are between all
    patches of the batch of which teachers of one lineage have features; lineages count by their pairs.
    """

    needs_hidden_states: bool = True

    def __init__(
        self, config: VAAObjective, student_width: int, teacher_widths: Mapping[str, int], student_layers: int
    ) -> None:
        super().__init__()
        self.config = config
        self.ends = stage_ends(student_layers, config.stages)
        self.layers = student_layers
        self.logits = Logits(config)
        self.attention = (
            None if config.matching == "relational" else ViewAlignedAttention(config, student_width, teacher_widths)
        )
        self.taken: Tensor
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))  # steps; a resumed training goes on counting

    def forward(
        self, batch: Mapping[str, Tensor], predictions: Predictions, hidden_states: tuple[Tensor, ...] | None = None
    ) -> dict[str, Tensor]:
        """Terms of `Logits`, `fm` (before α) and `loss`."""
        if hidden_states is None or len(hidden_states) != self.layers + 1:
            given = "none" if hidden_states is None else str(len(hidden_states))
            raise ValueError(f"VAA needs the {self.layers + 1} hidden states of {self.layers} layers, not {given}")
        terms = self.logits(batch, predictions)
        if self._warms():
            hidden_states = tuple(states.detach() for states in hidden_states)
        fm = self.feature_matching(batch, hidden_states)
        return {**terms, "fm": fm, "loss": terms["loss"] + self.config.alpha * fm}

    def _warms(self) -> bool:
        """Whether this is one of the first steps, which it counts."""
        if not self.config.warmup or not self.training:
            return False
        self.taken += 1
        return int(self.taken) <= self.config.warmup

    def feature_matching(self, batch: Mapping[str, Tensor], hidden_states: Sequence[Tensor]) -> Float[Tensor, ""]:
        """L_FM (Eq. 9)."""
        total = hidden_states[-1].new_zeros((), dtype=torch.float32)
        names = sorted(key.removeprefix("features:") for key in batch if key.startswith("features:"))
        if self.attention is not None and (unknown := set(names) - set(self.attention.lineages)):
            raise ValueError(f"no projection for teacher lineage {min(unknown)}: name it in `teacher_widths`")
        pairs = sum(len(batch[f"features:{name}"]) for name in names)
        if not pairs:
            return total
        stages = self._stages(batch, hidden_states)
        aligned = stages if self.attention is None else self.attention(stages)
        for name in names:
            documents, teacher = batch[f"features_document:{name}"], batch[f"features:{name}"]
            student = [stage[documents] for stage in aligned]
            if self.attention is not None:
                student = self.attention.project(student, name)
            for stage, features in zip(student, teacher.unbind(1), strict=True):
                total = total + self._difference(stage, features) * (len(documents) / pairs)
        return total

    def _difference(
        self,
        student: Float[Tensor, "documents patches width"],
        teacher: Float[Tensor, "documents patches teacher_width"],
    ) -> Float[Tensor, ""]:
        """Of one stage's features."""
        if self.config.matching == "relational":
            return feature_relations(student.flatten(0, 1), teacher.flatten(0, 1))
        return (feature_mse if self.config.matching == "mse" else feature_cosine)(student, teacher)

    def _stages(self, batch: Mapping[str, Tensor], hidden_states: Sequence[Tensor]) -> list[Tensor]:
        documents, patches = len(batch["patch_documents"]), self.config.patches
        return [
            pool(
                hidden_states[end].flatten(0, 1), batch["pool_token"], batch["pool_slot"], documents * patches
            ).unflatten(0, (documents, patches))
            for end in self.ends
        ]
