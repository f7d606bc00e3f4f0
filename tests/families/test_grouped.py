"""Experts run in autocast's precision, and as ever without it."""

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from deepfusion.families import grouped


@pytest.fixture
def moe() -> nn.Module:
    """A pico Mixtral's first layer of experts."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return MixtralForCausalLM(config).model.layers[0].mlp.experts


@pytest.fixture
def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states of ten tokens, two experts each, and their weights."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(10)])
    return torch.randn(10, 16, generator=generator), chosen, torch.rand(10, 2, generator=generator)


def test_without_autocast_nothing_changes(moe, tokens):
    assert torch.equal(grouped.experts_forward(moe, *tokens), grouped_mm_experts_forward(moe, *tokens))


def test_products_are_taken_in_autocasts_precision(moe, tokens, monkeypatch):
    seen: list[torch.dtype] = []
    product = torch.nn.functional.grouped_mm
    monkeypatch.setattr(
        torch.nn.functional,
        "grouped_mm",
        lambda a, b, **k: seen.append(a.dtype) or seen.append(b.dtype) or product(a, b, **k),
    )
    exact = grouped.experts_forward(moe, *tokens)
    assert set(seen) == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        lowered = grouped.experts_forward(moe, *tokens)
    assert set(seen) == {torch.bfloat16}
    assert lowered.dtype == torch.float32
    assert not torch.equal(lowered, exact)
    assert torch.allclose(lowered, exact, atol=2e-3)


def test_gradients_reach_the_weights_in_their_own_precision(moe, tokens):
    with torch.autocast("cpu", torch.bfloat16):
        grouped.experts_forward(moe, *tokens).square().sum().backward()
    lowered = {name: parameter.grad.clone() for name, parameter in moe.named_parameters()}
    moe.zero_grad()
    grouped.experts_forward(moe, *tokens).square().sum().backward()
    for name, parameter in moe.named_parameters():
        assert lowered[name].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(lowered[name].flatten(), parameter.grad.flatten(), 0) > 0.999


def test_models_take_it_by_default(moe):
    assert ALL_EXPERTS_FUNCTIONS.get_interface("grouped_mm", None) is grouped.experts_forward


def test_rows_that_are_not_aligned_stay_in_float32() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=20, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    moe, chosen = MixtralForCausalLM(config).model.layers[0].mlp.experts, torch.tensor([[0, 1]] * 3)
    states, weights = torch.randn(3, 20), torch.rand(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = grouped.experts_forward(moe, states, chosen, weights)
    assert torch.equal(found, grouped_mm_experts_forward(moe, states, chosen, weights))
