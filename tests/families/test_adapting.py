"""Every family: adapters are put beside its matrices, and added to them on disk."""

from pathlib import Path

import pytest
import torch

from cases import CASES, Made
from deepfusion import adapters
from deepfusion.checkpoints import open_model, parameters, validate
from deepfusion.config import LoRA
from pico import adapted

pytestmark = pytest.mark.contracts
DENSE = [name for name, case in CASES.items() if not case.family.routes]
ROUTED = [name for name in CASES if name not in DENSE]
SMALL = LoRA(rank=3, alpha=6.0)
TEXT = [0, 40, 41, 42, 43, 44, 45]


def says(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([TEXT])).logits[0]


@pytest.mark.parametrize("made", ROUTED, indirect=True)
def test_experts_take_no_adapter(made: Made) -> None:
    with pytest.raises(ValueError, match=rf"experts of a {made.family.model_type}: set device\.method: full"):
        adapters.attach(open_model(made.folder), SMALL, seed=0)


@pytest.mark.parametrize("made", DENSE, indirect=True)
def test_every_matrix_of_the_layers_is_adapted(made: Made) -> None:
    model = open_model(made.folder)
    matrices = [
        tensor.shape
        for name, tensor in model.state_dict().items()
        if tensor.ndim == 2 and made.family.role(name) in ("attention", "ffn")
    ]
    adapters.attach(model, SMALL, seed=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(matrices) > 0
    assert sum(parameter.numel() for parameter in trained) == sum(SMALL.rank * sum(shape) for shape in matrices)
    assert torch.equal(says(model), made.logits(TEXT))  # until it is trained


@pytest.mark.parametrize("made", DENSE, indirect=True)
def test_what_is_merged_is_what_was_trained(made: Made, tmp_path: Path) -> None:
    model = adapted(made.folder, SMALL)
    assert (says(model) - made.logits(TEXT)).abs().max() > 1e-2
    adapters.save(model, made.folder, SMALL, tmp_path / "adapter")
    adapters.validate(tmp_path / "adapter", made.folder, SMALL)
    adapters.merge(made.folder, tmp_path / "adapter", SMALL, into=tmp_path / "merged")
    validate(tmp_path / "merged")
    torch.testing.assert_close(says(open_model(tmp_path / "merged")), says(model), rtol=1e-3, atol=1e-3)
    assert parameters(tmp_path / "merged") == parameters(made.folder)
