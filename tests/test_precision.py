import pytest
import torch

from deepfusion import precision
from deepfusion.config import Recipe
from deepfusion.precision import fitted, knows_bfloat16, told, usable
from tiny import recipe


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has no bfloat16."""
    monkeypatch.setattr(precision, "knows_bfloat16", lambda _: False)


def test_a_processor_is_asked() -> None:
    assert knows_bfloat16("cpu") in (True, False)
    assert knows_bfloat16("mps") is True


def test_cards_that_only_emulate_it_do_not_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert knows_bfloat16("cuda") is torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert knows_bfloat16("cuda") is False


def test_what_is_known_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "knows_bfloat16", lambda accelerator: accelerator == "cuda")
    assert usable("bfloat16", "cuda") == torch.bfloat16
    assert usable("bfloat16", "cpu") == torch.float32
    assert usable("float32", "cuda") == torch.float32
    real = Recipe.load("real_llms")
    assert fitted(real, "cuda") == (real, [])


@pytest.mark.usefixtures("without")
def test_all_that_is_computed_in_bfloat16_is_named() -> None:
    real = Recipe.load("real_llms")
    changed, keys = fitted(real, "cpu")
    assert set(keys) == {
        "device.training.compute", "device.training.dtype", "distill.training.compute", "tune.training.compute",
        "transfer.dtype", "evaluate.dtype",
    }  # fmt: skip
    assert "bfloat16" not in changed.model_dump_json()
    assert real.device.training.dtype == "bfloat16"  # left as it was
    assert told(keys, "cpu").startswith("this cpu has no instructions for bfloat16: float32 is used for device.")


@pytest.mark.usefixtures("without")
def test_what_is_saved_stays_as_it_was_asked_for() -> None:
    """Of models trained whole, the weights are what is saved."""
    given = recipe("device.training.dtype=bfloat16", "distill.training.dtype=bfloat16", "transfer.dtype=bfloat16")
    changed, keys = fitted(given, "cpu")
    assert keys == ["transfer.dtype"]
    assert changed.device.training.dtype == changed.distill.training.dtype == "bfloat16"
    made = recipe("models.base.make.training={compute: bfloat16}")
    assert fitted(made, "cpu")[1] == ["models.base.make.training.compute"]
