"""How FFNs fill experts: numbers by hand, and what must hold whatever the shapes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from deepfusion.config import AssemblePhase
from deepfusion.config.targets import PRESETS
from deepfusion.layouts import Layout, grouped, padded, plan, probability, router_rows

FINE = AssemblePhase(layout="fine_grained", granularity=4, top_k=1)


def layout(clusters: int = 2, granularity: int = 1, common: int = 0, top: int = 1, **more: int) -> Layout:
    return Layout(clusters, 64, granularity, common, more.get("width", 64), top, bool(more.get("renormalised", 1)))


def ffn(gate: Tensor, up: Tensor, down: Tensor, states: Tensor) -> Tensor:
    return (silu(states @ gate.T) * (states @ up.T)) @ down.T


def test_published_shapes() -> None:
    shapes = {"qwen1.5-moe-a2.7b": (5504, 0), "deepseek-moe-16b": (10944, 2)}
    found = {
        name: plan(AssemblePhase(preset=name), clusters=PRESETS[name][0], channels=channels, shared=shared)  # pyright: ignore[reportArgumentType]
        for name, (channels, shared) in shapes.items()
    }
    qwen, deepseek = found["qwen1.5-moe-a2.7b"], found["deepseek-moe-16b"]
    assert (qwen.experts, qwen.chosen, qwen.step, qwen.width, qwen.spare) == (60, 4, 1376, 1408, 0)
    assert (deepseek.experts, deepseek.chosen, deepseek.step, deepseek.width, deepseek.spare) == (64, 6, 1368, 1408, 16)
    assert not qwen.renormalised
    assert (qwen.factor(qwen.uniform()), deepseek.factor(deepseek.uniform())) == (60, 64)


@pytest.mark.parametrize(
    ("config", "clusters", "shared", "message"),
    [
        (AssemblePhase(top_k=3), 2, 0, "top_k is 3 but there are 2 students"),
        (AssemblePhase(expert_width=20), 2, 0, "expert_width is 20, but an FFN of 24 cut into 1 needs 24"),
        (FINE.model_copy(update={"granularity": 25}), 2, 0, "granularity is 25 but the FFN has only 24 channels"),
        (FINE.model_copy(update={"granularity": 2}), 2, 2, "granularity is 2, but 2 shards go to shared experts"),
        (FINE, 1, 2, "need two students or more"),
        (FINE.model_copy(update={"top_k": 2}), 2, 2, "a token uses one student's FFN: set top_k: 1"),
    ],
)
def test_impossible_layouts_are_refused(config: AssemblePhase, clusters: int, shared: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(config, clusters=clusters, channels=24, shared=shared)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5), st.integers(0, 1000))
def test_shards_add_up_to_the_ffn(channels: int, granularity: int, extra: int, seed: int) -> None:
    granularity = min(granularity, channels)
    width = math.ceil(channels / granularity) + extra
    cut = Layout(2, channels, granularity, 0, width, 1, True)
    generator = torch.Generator().manual_seed(seed)
    gate, up, states = (torch.randn(n, 6, generator=generator).double() for n in (channels, channels, 5))
    down = torch.randn(6, channels, generator=generator).double()
    pieces = [
        (padded(gate[span], width, axis=0), padded(up[span], width, axis=0), padded(down[:, span], width, axis=1))
        for span in map(cut.span, range(granularity))
    ]
    assert all(piece[0].shape == (width, 6) and piece[2].shape == (6, width) for piece in pieces)
    torch.testing.assert_close(sum(ffn(*piece, states) for piece in pieces), ffn(gate, up, down, states))


def test_padding_is_of_zeros() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert padded(matrix, 4, axis=1).tolist() == [[0, 1, 2, 0], [3, 4, 5, 0]]
    assert padded(matrix, 3, axis=0).tolist() == [[0, 1, 2], [3, 4, 5], [0, 0, 0]]


def test_a_coarse_router_has_its_rows_as_they_are() -> None:
    rows = torch.randn(2, 3, 4)
    assert router_rows(rows, layout(3), seed=0) is rows


@pytest.mark.parametrize("common", [0, 2])
def test_a_token_gets_all_shards_of_one_student(common: int) -> None:
    cut = layout(3, 4, common)
    generator = torch.Generator().manual_seed(0)
    rows, states = torch.randn(2, 3, 8, generator=generator), torch.randn(50, 8, generator=generator)
    found = router_rows(rows, cut, seed=0)
    assert found.shape == (2, 12, 8)
    for layer in range(2):
        chosen = (states @ found[layer].T).topk(cut.chosen, dim=-1).indices
        student = chosen // 4
        assert (student == student[:, :1]).all()
        assert (chosen % 4 < cut.shards).all()  # no spare expert
        assert len(student.unique()) == 3
    apart = (found[:, ::4] - rows).abs().max()
    assert (apart < 0.01) if not common else torch.equal(found[:, 3::4], torch.zeros(2, 3, 8))


def test_students_that_look_alike_do_not_tie() -> None:
    found = router_rows(torch.zeros(1, 4, 8), layout(4, 2, top=2), seed=0)[0]
    assert torch.equal(found[::2], found[1::2])
    assert len(found.unique(dim=0)) == 4


def test_probability_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0]])
    torch.testing.assert_close(probability(logits, layout(2)), torch.tensor([0.75], dtype=torch.float64))
    torch.testing.assert_close(probability(logits, layout(2, top=2)), torch.tensor([1.0], dtype=torch.float64))
    torch.testing.assert_close(probability(logits, layout(2, 2)), torch.tensor([0.375], dtype=torch.float64))
    # Two shards of three are chosen, and the two spare experts have logits of zero: 3 / (2 · 4 + 2).
    torch.testing.assert_close(probability(logits, layout(2, 3, 1)), torch.tensor([0.3], dtype=torch.float64))


@pytest.mark.parametrize(("granularity", "common", "top"), [(1, 0, 1), (1, 0, 3), (4, 0, 2), (8, 2, 1)])
def test_probability_of_a_router_without_preferences(granularity: int, common: int, top: int) -> None:
    cut = layout(5, granularity, common, top, renormalised=0)
    assert float(probability(torch.zeros(5), cut)) == pytest.approx(cut.uniform())
    assert cut.factor(cut.uniform()) == pytest.approx(5 * granularity / top)
    # arXiv 2410.07524: E·G²/T for E copies, T chosen of E·G, if there are no shared experts.
    if not common:
        assert cut.factor(cut.uniform()) == pytest.approx(5 * granularity**2 / (top * granularity))


def test_the_error_grows_with_the_router_s_scale() -> None:
    cut, z = layout(15, 4, renormalised=0), torch.randn(20_000, 15, generator=torch.Generator().manual_seed(0))
    spread: list[float] = []
    for scale in (0.01, 0.1, 1.0):
        found = probability(scale * z, cut)
        spread.append(float(found.std() / found.mean()))
    # To first order P = uniform · (1 + the largest z − their mean), which spreads by about half of z's deviation.
    assert spread[0] == pytest.approx(0.01 * float((z.amax(-1) - z.mean(-1)).std()), rel=0.05)
    assert spread[0] < 0.006 < spread[1] < 0.06 < spread[2]


def test_students_votes_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0), math.log(2.0), math.log(4.0)]])
    assert grouped(logits, 4) is logits
    torch.testing.assert_close(grouped(logits, 2), torch.log(torch.tensor([[4.0, 6.0]])))
