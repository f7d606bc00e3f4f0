"""Bytes and memory of a Llama of one layer, by hand.

Width 16: q, k, v and o of 16 by 16 and three matrices of 16 by 64 are 4,096 weights in the layer's matrices; beside
them 320 embeddings of 16, which are the head too, and three norms of 16: 5,168. An adapter of rank 2 has 2 · (4 · 32 +
3 · 80) = 736 weights.
"""

from dataclasses import replace

import pytest
from transformers import AutoConfig

from deepfusion.fleet import Assumptions, Model
from deepfusion.fleet.costs import memory, trained, upload

LLAMA = Model.of(
    "tiny",
    AutoConfig.for_model(
        "llama", hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=320,
        tie_word_embeddings=True,
    ),
)  # fmt: skip
FEW = Assumptions(rank=2, batch_tokens=10, fixed_gb=0)
ADAPTER = 736


def test_what_costs_depend_on() -> None:
    assert (LLAMA.shape.parameters, LLAMA.matrices, LLAMA.routers, LLAMA.experts) == (4096 + 5168, 4096, 0, 1)
    assert trained(LLAMA, FEW) == ADAPTER
    assert trained(LLAMA, replace(FEW, method="full")) == 9264


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 4096 * 0.5625 + 5168 * 2 + ADAPTER * 4),
        ({"adapter": "merged"}, 4096 * 0.5625 + 5168 * 2),
        ({"adapter": "alone"}, ADAPTER * 4),
        ({"method": "full"}, 4096 * 0.5625 + 5168 * 2),
        ({"adapter": "merged", "upload": "int8"}, 4096 + 5168 * 2),
        ({"adapter": "merged", "upload": "bfloat16"}, 9264 * 2),
        ({"adapter": "merged", "upload": "float32"}, 9264 * 4),
        ({"adapter": "merged", "unquantised": ("llama",)}, 9264 * 2),
    ],
)
def test_what_is_sent(changes: dict[str, object], expected: float) -> None:
    assert upload(LLAMA, replace(FEW, **changes)) == expected


# Ten tokens: the layer keeps 4 · 16 + 4 · 32 + 3 · 80 = 432 numbers of each; logits stand five times in float32.
KEPT, LOGITS = 10 * 432 * 2, 5 * 4 * 10 * 320


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 4096 * 0.5625 + 5168 * 2 + ADAPTER * 16 + KEPT + LOGITS),
        ({"unquantised": ("llama",)}, 9264 * 2 + ADAPTER * 16 + KEPT + LOGITS),
        ({"method": "lora"}, 9264 * 2 + ADAPTER * 16 + KEPT + LOGITS),
        ({"method": "full"}, 9264 * (2 + 2 + 1 + 1) + KEPT + LOGITS),
        ({"method": "full", "states": "bfloat16"}, 9264 * 8 + KEPT + LOGITS),
        ({"method": "full", "dtype": "float32", "states": "float32"}, 9264 * 16 + 2 * KEPT + LOGITS),
        ({"method": "full", "fixed_gb": 0.5}, 9264 * 6 + KEPT + LOGITS + 5e8),
    ],
)
def test_what_training_needs(changes: dict[str, object], expected: float) -> None:
    assert memory(LLAMA, replace(FEW, **changes)) == expected


def test_the_loss_never_sees_all_logits_at_once() -> None:
    many, more = (memory(LLAMA, replace(FEW, batch_tokens=count)) for count in (200_000, 300_000))
    assert more - many == 100_000 * 432 * 2


def test_no_adapter_is_sent_where_none_is_trained() -> None:
    with pytest.raises(ValueError, match="an adapter alone needs the method lora or qlora"):
        Assumptions(method="full", adapter="alone")
    with pytest.raises(ValueError, match="model type 'gpt' is not supported"):
        Assumptions(unquantised=("gpt",))
