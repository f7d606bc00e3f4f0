from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from deepfusion.checkpoints import open_model
from deepfusion.config import AssemblePhase, Runtime
from deepfusion.data.documents import Document
from deepfusion.layouts import plan, probability
from deepfusion.phases.router import (
    centred,
    hidden_means,
    logit_spread,
    mean_probability,
    measure_router,
    router_from_means,
)
from pico import pico, pico_checkpoint

TEXT = [[[0, 40, 41, 42], [0, 50]], [[0, 60, 61]]]  # two clusters


def test_rows_by_hand() -> None:
    means = torch.tensor([[[3.0, 1.0], [3.0, -1.0]]])  # common part (3, 0); apart: ±(0, 1)
    torch.testing.assert_close(centred(means), torch.tensor([[[0.0, 1.0], [0.0, -1.0]]]))
    rows = router_from_means(means, torch.tensor([0.5]), scale=2.0)
    torch.testing.assert_close(rows, torch.tensor([[[0.0, 4.0], [0.0, -4.0]]]))
    # What both have in common, however unequal in length, is scored 0.
    torch.testing.assert_close(centred(torch.tensor([[[4.0, 0.0], [2.0, 0.0]]])), torch.zeros(1, 2, 2))


def test_clusters_that_look_alike_get_rows_of_zeros() -> None:
    rows = router_from_means(torch.ones(1, 3, 4), torch.zeros(1), scale=1.0)
    assert torch.equal(rows, torch.zeros(1, 3, 4))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(2, 5))
def test_no_expert_is_favoured_on_average(seed: int, clusters: int) -> None:
    means = 5 + torch.randn(2, clusters, 8, generator=torch.Generator().manual_seed(seed))
    apart = centred(means)
    torch.testing.assert_close(apart.sum(dim=1), torch.zeros(2, 8), rtol=0, atol=1e-4)
    scores = torch.einsum("lkh,lh->lk", apart, means.mean(dim=1))
    torch.testing.assert_close(scores, torch.zeros(2, clusters), rtol=0, atol=1e-3)


def test_means_are_of_what_enters_the_ffn(tmp_path: Path) -> None:
    model = open_model(pico("llama", tmp_path))
    means = hidden_means(model, TEXT)
    assert means.shape == (2, 2, 32)
    seen: list[torch.Tensor] = []
    norm = model.get_submodule("model.layers.1.post_attention_layernorm")
    hook = norm.register_forward_hook(lambda _m, _i, output: seen.append(output[0, 1:]))
    with torch.inference_mode():
        for ids in TEXT[0]:  # one at a time: no padding
            model(torch.tensor([ids]))
    hook.remove()
    torch.testing.assert_close(means[1, 0], torch.cat(seen).mean(dim=0), rtol=1e-4, atol=1e-5)
    rows = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    spread = logit_spread(model, TEXT[:1], rows)
    torch.testing.assert_close(spread[1], (torch.cat(seen) @ rows[1].T).std(correction=0), rtol=1e-4, atol=1e-5)


def test_nobody_asks_for_logits(tmp_path: Path) -> None:
    """With a large vocabulary they would be most of the work, and of the memory."""
    model = open_model(pico("llama", tmp_path))

    def refuse(*_: object) -> None:
        raise AssertionError("the head was run")

    model.get_output_embeddings().register_forward_pre_hook(refuse)  # pyright: ignore[reportOptionalMemberAccess]
    hidden_means(model, TEXT)
    logit_spread(model, TEXT, torch.zeros(2, 2, 32))


def test_cluster_without_text_says_nothing(tmp_path: Path) -> None:
    model = open_model(pico("llama", tmp_path))
    means = hidden_means(model, [*TEXT, []])
    torch.testing.assert_close(centred(means)[:, 2], torch.zeros(2, 32), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"set assemble\.router: random"):
        hidden_means(model, [[], []])


def test_measured_rows_have_the_scale_asked_for(tmp_path: Path) -> None:
    students = [pico_checkpoint("llama", tmp_path / f"{n}", seed=n) for n in range(2)]
    documents = [
        [Document(id=f"{word}{n}", domain="x", answer=f"the {word} " * (n + 1)) for n in range(30)]
        for word in ("fox", "jade")
    ]
    into, config = tmp_path / "moe", AssemblePhase(router_scale=0.7)
    into.mkdir()
    layout = plan(config, clusters=2, channels=64)
    path, work = measure_router(
        students, documents, config, layout, max_tokens=40, into=into, runtime=Runtime(workers=0)
    )
    assert [entry.name for entry in into.iterdir()] == [path.name]
    assert path.name.startswith(".")
    assert 2 * 2 * 40 <= work.tokens <= 2 * 2 * 80  # two passes over two clusters
    found = load_file(path)
    torch.testing.assert_close(found["rows"], router_from_means(found["means"], found["spread"], 0.7))
    assert (found["spread"] > 0).all()
    with pytest.raises(ValueError, match="2 students, but text of 1 clusters"):
        measure_router(students, documents[:1], config, layout, max_tokens=40, into=into, runtime=Runtime(workers=0))


@pytest.mark.parametrize("base", ["qwen2", "olmo2"])
def test_where_weights_are_not_renormalised_their_mean_is_measured(base: str, tmp_path: Path) -> None:
    students = [pico_checkpoint(base, tmp_path / f"{n}", seed=n) for n in range(2)]
    documents = [[Document(id=word, domain="x", answer=f"the {word} is here")] for word in ("fox", "jade")]
    config = AssemblePhase(layout="fine_grained", granularity=4, top_k=1, renormalise=False)
    assert config.router_scale == 0.1
    (tmp_path / "moe").mkdir()
    layout = plan(config, clusters=2, channels=64)
    path, work = measure_router(
        students, documents, config, layout, max_tokens=40, into=tmp_path / "moe", runtime=Runtime(workers=0)
    )
    found = load_file(path)
    # Between a router without preferences and one that is always sure, and a little above the first.
    assert ((found["probability"] > 1 / 8) & (found["probability"] < 1.2 / 8)).all()
    assert work.tokens % 3 == 0
    model = open_model(students[0].folder)
    seen: list[torch.Tensor] = []
    model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(
        lambda _m, states: seen.append(states[0][0, 1:])
    )
    with torch.inference_mode():
        for ids in TEXT[0]:
            model(torch.tensor([ids]))
        by_hand = probability(torch.cat(seen) @ found["rows"][1].T, layout).mean()
    measured = mean_probability(model, TEXT[:1], found["rows"], layout)
    torch.testing.assert_close(measured[1], by_hand.float(), rtol=1e-5, atol=0)
