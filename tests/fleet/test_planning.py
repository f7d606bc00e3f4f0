"""Fleets of tiny models, and FedJETS beside them."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig

from deepfusion.fleet import Assumptions, Model, planned

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "tie_word_embeddings": True,
}
ONE, TWO = (Model.of(f"{n} layers", AutoConfig.for_model("llama", num_hidden_layers=n, **TINY)) for n in (1, 2))
MIXTRAL = Model.of("moe", AutoConfig.for_model("mixtral", num_hidden_layers=1, num_local_experts=4, **TINY))
PLAIN = Assumptions(method="full", upload="bfloat16", experts=2, rounds=3)


def test_models_are_equally_frequent() -> None:
    plan = planned("fleet", [ONE, TWO], None, [2, 5], PLAIN)
    assert [member.parameters for member in plan.members] == [9264, 9264 + 4096 + 32]
    assert [total.up_bytes for total in plan.totals] == [2 * (9264 + 13392), 5 * (9264 + 13392)]
    assert plan.client is None
    assert plan.totals[0].ratio is None


def test_fedjets_sends_parts_both_ways_every_round() -> None:
    """Of four experts of 3 · 16 · 64 weights two, and their rows of the router; the two others' rows come down."""
    plan = planned("fleet", [ONE], MIXTRAL, [10], PLAIN)
    part = 4 * 16 * 16 + 2 * 3 * 16 * 64 + 2 * 16 + 320 * 16 + 3 * 16
    assert plan.client is not None
    assert (plan.client.parameters, plan.client.experts, plan.client.of_experts) == (part, 2, 4)
    assert (plan.client.up_bytes, plan.client.down_bytes) == (2 * part, 2 * (part + 2 * 16))
    [total] = plan.totals
    assert (total.fedjets_up_bytes, total.fedjets_down_bytes) == (10 * 3 * 2 * part, 10 * 3 * 2 * (part + 32))
    assert total.ratio == pytest.approx(3 * (2 * part + 32) / 9264)
    assert plan.tree()["totals"][0]["ratio"] == total.ratio


def test_a_device_of_fedjets_trains_all_it_has_whatever_others_do() -> None:
    clients = [
        planned("fleet", [ONE], MIXTRAL, [1], replace(PLAIN, method=method, adapter=adapter)).client
        for method, adapter in (("full", "beside"), ("qlora", "beside"), ("lora", "alone"))
    ]
    assert clients[0] == clients[1] == clients[2]


def test_models_in_the_wrong_place_are_told() -> None:
    with pytest.raises(ValueError, match="moe is an MoE, and devices train dense models: give it as --moe"):
        planned("fleet", [MIXTRAL], None, [1], PLAIN)
    with pytest.raises(ValueError, match="1 layers has no experts: give an MoE as --moe"):
        planned("fleet", [ONE], ONE, [1], PLAIN)
    with pytest.raises(ValueError, match="moe has 4 experts: set --experts to that or less, not 5"):
        planned("fleet", [ONE], MIXTRAL, [1], replace(PLAIN, experts=5))
