from pathlib import Path
from typing import Any

import pytest
import torch

from deepfusion import precision
from deepfusion.config import Recipe
from deepfusion.precision import fitted, knows_bfloat16, noted, notices, usable
from tiny import recipe


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has no bfloat16."""
    monkeypatch.setattr(precision, "knows_bfloat16", lambda _: False)


@pytest.mark.parametrize(
    ("instructions", "known"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bw": True, "avx512_bf16": False}, False),  # only emulates it
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True, "bf16": False}, False),
    ],
)
def test_a_processor_knows_it_by_its_instructions(
    instructions: dict[str, Any], known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert knows_bfloat16("cpu") is known


def test_this_processor_is_asked() -> None:
    assert knows_bfloat16("cpu") in (True, False)
    assert "architecture" in torch.cpu.get_capabilities()


def test_cards_that_only_emulate_it_do_not_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert knows_bfloat16("cuda") is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert knows_bfloat16("cuda") is False


def test_what_is_known_is_used_and_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(precision, "knows_bfloat16", lambda accelerator: accelerator == "cuda")
    assert noted(tmp_path) is None
    assert usable("float32", "cuda", tmp_path) == torch.float32
    assert noted(tmp_path) is None
    assert usable("bfloat16", "cuda", tmp_path) == torch.bfloat16
    assert noted(tmp_path) == "bfloat16"
    assert usable("bfloat16", "cpu", tmp_path) == torch.float32
    assert noted(tmp_path) == "float32"
    real = Recipe.load("real_llms")
    assert fitted(real, "cuda") == (real, [], [])


def test_the_report_says_what_was_computed_otherwise() -> None:
    assert notices([("device", None), ("evaluate", "bfloat16")]) == []
    [told] = notices([("device", "float32"), ("evaluate", "float32"), ("device", "float32")])
    assert told.endswith("were the steps of device and evaluate")
    _, mixed = notices([("evaluate", "float32"), ("evaluate", "bfloat16"), ("evaluate", None)])
    assert mixed.startswith("some systems were evaluated in bfloat16 and some")


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_all_that_is_computed_in_bfloat16_is_named(method: str) -> None:
    real = Recipe.load("real_llms", [f"device.method={method}"])
    changed, keys, slow = fitted(real, "cpu")
    assert set(keys) == {
        "device.training.compute", "device.training.dtype", "distill.training.compute", "tune.training.compute",
        "transfer.dtype", "evaluate.dtype",
    }  # fmt: skip
    assert slow == []
    assert "bfloat16" not in changed.model_dump_json()
    assert real.device.training.dtype == "bfloat16"  # left as it was


@pytest.mark.usefixtures("without")
def test_what_is_saved_stays_as_it_was_asked_for() -> None:
    """Of models trained whole, the weights are what is saved, and products are in their precision."""
    given = recipe(
        "device.training={dtype: bfloat16, compute: bfloat16}", "distill.training={dtype: bfloat16}",
        "transfer.dtype=bfloat16", "tune.training={compute: bfloat16}",
    )  # fmt: skip
    changed, keys, slow = fitted(given, "cpu")
    assert keys == ["tune.training.compute", "transfer.dtype"]
    assert set(slow) == {"device.training.dtype", "distill.training.dtype"}
    assert changed.device.training.dtype == changed.distill.training.dtype == "bfloat16"
    made = recipe("models.base.make.training={compute: bfloat16}")
    assert fitted(made, "cpu")[1] == ["models.base.make.training.compute"]
