"""DeepSeek-MoE, v1, for transformers 5, which has no class of that type: its parts are there, under another name.

DeepSeek-OCR-2's text model has v1's attention (multi-head, rotary), its layers with and without experts, its softmax
router without renormalisation and its shared experts. What is added here: the published config's names, a router that
heeds `norm_topk_prob` (as the published code does), a language head, and the Auto classes' knowledge of it all.
Checkpoints on disk have the published names, one tensor per expert's matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import (
    DeepseekOcr2TextAttention,
    DeepseekOcr2TextDecoderLayer,
    DeepseekOcr2TextModel,
    DeepseekOcr2TextMoe,
    DeepseekOcr2TextPreTrainedModel,
    DeepseekOcr2TextTopkRouter,
)
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

MODEL_TYPE = "deepseek"
# Fields of the class below that v1 does not have, or that follow from others.
_NOT_PUBLISHED = (
    "base_config_key",
    "head_dim",
    "mlp_bias",
    "mlp_layer_types",
    "n_group",
    "output_router_logits",
    "routed_scaling_factor",
    "topk_group",
    "topk_method",
)


class DeepseekConfig(DeepseekOcr2TextConfig):
    """The published config of `model_type: deepseek`."""

    model_type = MODEL_TYPE
    base_config_key = ""

    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.scoring_func != "softmax":
            raise ValueError(f"scoring_func is {self.scoring_func!r}, but DeepSeek-MoE v1 knows softmax alone")
        super().__post_init__(**kwargs)
        sparse = range(self.first_k_dense_replace, self.num_hidden_layers)
        self.mlp_layer_types = [
            "sparse" if layer in sparse and layer % self.moe_layer_freq == 0 else "dense"
            for layer in range(self.num_hidden_layers)
        ]

    def to_dict(self) -> dict[str, Any]:
        """As it is written: with the published names, `rope_theta` among them."""
        fields = {name: value for name, value in super().to_dict().items() if name not in _NOT_PUBLISHED}
        rope = fields.get("rope_parameters") or {}
        if rope.get("rope_type", "default") == "default":
            fields |= {"rope_theta": rope.get("rope_theta"), "rope_scaling": None}
        return fields


class DeepseekTopKRouter(DeepseekOcr2TextTopkRouter):
    """Softmax over all experts, then the largest; made to sum to 1 with `norm_topk_prob`."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.norm_topk_prob = config.norm_topk_prob

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [tokens, E], weights [tokens, k] and the chosen experts [tokens, k]."""
        logits, weights, chosen = cast("tuple[Tensor, Tensor, Tensor]", super().forward(hidden_states))
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, chosen


class DeepseekPreTrainedModel(DeepseekOcr2TextPreTrainedModel):
    """What the model with and without its head share."""

    config_class = DeepseekConfig
    _can_record_outputs = {  # noqa: RUF012 (as transformers declares it)
        "hidden_states": DeepseekOcr2TextDecoderLayer,
        "attentions": DeepseekOcr2TextAttention,
        "router_logits": OutputRecorder(DeepseekTopKRouter, index=0),
    }


class DeepseekModel(  # pyright: ignore[reportIncompatibleVariableOverride]
    DeepseekPreTrainedModel, DeepseekOcr2TextModel
):
    """The layers."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            if isinstance(layer.mlp, DeepseekOcr2TextMoe):
                layer.mlp.gate = DeepseekTopKRouter(config)
                self._init_weights(layer.mlp.gate)


class DeepseekForCausalLM(DeepseekPreTrainedModel, GenerationMixin):
    """The layers and a language head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (as transformers declares it)

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.model = DeepseekModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As of every causal model of transformers; `loss` is the cross-entropy alone."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits: Tensor = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss: Any = None
        if labels is not None:
            measure = cast("Callable[..., Any]", self.loss_function)
            loss = measure(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,  # pyright: ignore[reportArgumentType] (transformers means any tensor)
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def register() -> None:
    """Make the Auto classes open `model_type: deepseek`, experts named as published; again and again does no harm."""
    AutoConfig.register(MODEL_TYPE, DeepseekConfig, exist_ok=True)
    AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
    mapping: Any = get_checkpoint_conversion_mapping("qwen2_moe")  # experts.N.{gate,up,down}_proj, as in v1
    register_checkpoint_conversion_mapping(MODEL_TYPE, mapping, overwrite=True)
