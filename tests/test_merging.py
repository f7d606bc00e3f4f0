import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from deepfusion import weights
from deepfusion.merging import merged, threshold, ties


def test_ties_by_hand() -> None:
    """Trimmed below 1; the signs of +3 −2 +0 is +, so −2 has no say; +1 and −1 cancel out."""
    changes = [torch.tensor([3.0, 1.0, 0.5, -4.0]), torch.tensor([-2.0, -1.0, 2.0, -2.0]), torch.tensor([0.9, 0, 4, 3])]
    agreed = ties(changes, [1, 1, 1], [1, 1, 1])
    torch.testing.assert_close(agreed, torch.tensor([3.0, 0.0, 3.0, -3.0]))


def test_weights_decide_signs_and_means() -> None:
    changes = [torch.tensor([3.0, 1.0]), torch.tensor([-2.0, 4.0])]
    torch.testing.assert_close(ties(changes, [1, 2], [0, 0]), torch.tensor([-2.0, 3.0]))
    torch.testing.assert_close(ties(changes, [1, 0], [0, 0]), changes[0])


def test_what_one_model_changed_is_kept() -> None:
    change = torch.tensor([[0.1, -2.0], [0.0, 5.0]])
    assert torch.equal(ties([change], [0.3], [0]), change)
    torch.testing.assert_close(ties([change, torch.zeros(2, 2)], [0.5, 0.5], [0, 0]), change)  # not halved


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=1, max_size=60),
    share=st.floats(0.01, 1),
    cut=st.integers(0, 60),
)
def test_the_threshold_is_that_of_a_sorted_list(values: list[float], share: float, cut: int) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)

    def parts() -> list[Tensor]:
        return [tensor[:cut], tensor[cut:]]

    wanted = max(1, math.ceil(share * len(values)))
    assert threshold(parts, share) == float(tensor.abs().sort(descending=True).values[wanted - 1])


def test_merged_goes_through_a_tensor_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK", 8)
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(6, 4, generator=generator)
    after = [before + torch.randn(6, 4, generator=generator) for _ in range(3)]
    for name, tensor in zip("abcd", [before, *after], strict=True):
        (tmp_path / name).mkdir()
        save_file({"x": tensor, "n": torch.arange(3)}, tmp_path / name / weights.WEIGHTS)
    held = [weights.stored(tmp_path / name) for name in "abcd"]
    made = list(merged(held[0]["x"], [one["x"] for one in held[1:]], [1, 2, 1], density=0.25))
    assert len(made) == 3
    changes = [one - before for one in after]
    least = [float(change.abs().flatten().sort(descending=True).values[5]) for change in changes]  # of 24, 6 count
    torch.testing.assert_close(torch.cat(made), before + ties(changes, [1, 2, 1], least))
    [integers] = merged(held[0]["n"], [one["n"] for one in held[1:]], [1, 1, 1], density=0.25)
    assert torch.equal(integers, torch.arange(3))
