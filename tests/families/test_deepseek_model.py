"""DeepSeek-MoE v1: its published config, its router, and its head."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import deepfusion.families  # noqa: F401  # registers the type
from deepfusion.families.deepseek_model import DeepseekConfig, DeepseekTopKRouter

# deepseek-ai/deepseek-moe-16b-base, but for who wrote it.
PUBLISHED = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 102400,
}
TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}


def test_the_published_config_is_read_and_written(tmp_path: Path) -> None:
    config = AutoConfig.for_model(**PUBLISHED)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, DeepseekConfig)
    for read in (config, again):
        assert read.mlp_layer_types == ["dense"] + ["sparse"] * 27
        read.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert {field: written.get(field) for field in PUBLISHED} == PUBLISHED
        assert set(written) - set(PUBLISHED) == {"pad_token_id", "rope_parameters", "transformers_version"}


def test_another_score_is_refused() -> None:
    with pytest.raises(ValueError, match="v1 knows softmax alone"):
        DeepseekConfig(**TINY, scoring_func="sigmoid")


def test_layers_with_experts_are_as_often_as_the_config_says() -> None:
    config = DeepseekConfig(**TINY | {"num_hidden_layers": 5, "moe_layer_freq": 2})
    assert config.mlp_layer_types == ["dense", "dense", "sparse", "dense", "sparse"]


@pytest.mark.parametrize("normalised", [False, True])
def test_router_by_hand(normalised: bool) -> None:
    router = DeepseekTopKRouter(DeepseekConfig(**TINY, norm_topk_prob=normalised))
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0]).log()
    state = torch.zeros(1, 16)
    state[0, 0] = 1
    logits, weights, chosen = router(state)
    torch.testing.assert_close(logits.exp(), torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    assert set(chosen[0].tolist()) == {0, 1}
    expected = torch.tensor([4 / 7, 3 / 7] if normalised else [0.4, 0.3])
    torch.testing.assert_close(weights[0].sort(descending=True).values, expected)


def test_head_and_loss() -> None:
    model = AutoModelForCausalLM.from_config(DeepseekConfig(**TINY))
    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    whole = model(ids, labels=ids, output_router_logits=True)
    assert whole.logits.shape == (2, 7, 50)
    by_hand = torch.nn.functional.cross_entropy(whole.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(whole.loss, by_hand)
    assert [logits.shape for logits in whole.router_logits] == [(14, 4)]
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole.logits[:, -2:])
    assert model.model.layers[1].mlp.gate.weight.std() > 0
    cached = model(ids[:, :5], use_cache=True)
    last = model(ids[:, 5:], past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(last, whole.logits[:, 5:], rtol=1e-4, atol=1e-5)
