from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepfusion.artifacts import Checkpoint, Proxy
from deepfusion.checkpoints import as_checkpoint, open_model
from deepfusion.phases.task_vectors import add_task_vectors, own_task_vector
from deepfusion.weights import WEIGHTS, shapes
from fuse import Blown, Fuse, contents
from pico import pico, pico_checkpoint
from tiny import folder


def proxy(base: Checkpoint, into: Path, seed: int, **changes: object) -> Proxy:
    """A proxy whose weights have nothing to do with the base's."""
    made = as_checkpoint(pico(base.model_type, into / "model", seed))
    facts = {"cluster": seed, "lineage": base.lineage, "members": (f"d{seed}",), "weights": (1.0,)} | changes
    return Proxy(
        folder=into, model_type=base.model_type, distance=0.0, parameters=made.parameters,
        active_parameters=made.active_parameters, **facts,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def rounded(folder: Path) -> None:
    """The checkpoint's weights in bfloat16."""
    held = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(held, folder / WEIGHTS, metadata={"format": "pt"})


def test_by_hand(tmp_path: Path) -> None:
    base = pico_checkpoint("llama", tmp_path / "base")
    two = [proxy(base, tmp_path / f"p{seed}", seed) for seed in (1, 2)]
    made = add_task_vectors(base, two, 0.25, into=folder(tmp_path / "made"))
    before = load_file(base.folder / WEIGHTS)
    one, other = (load_file(held.model / WEIGHTS) for held in two)
    for name, tensor in load_file(made.folder / WEIGHTS).items():
        expected = before[name] + 0.25 * (one[name] - before[name]) + 0.25 * (other[name] - before[name])
        torch.testing.assert_close(tensor, expected)
    assert (made.lineage, made.work.tokens, made.model_type) == (base.lineage, 0, "llama")
    open_model(made.folder)


@settings(deadline=None, max_examples=5)
@given(st.floats(0, 2), st.integers(1, 3))
def test_what_has_not_changed_stays(tmp_path_factory: pytest.TempPathFactory, scale: float, count: int) -> None:
    """Devices that learned nothing leave the base as it is, to the last bit."""
    tmp_path = tmp_path_factory.mktemp("same")
    base = pico_checkpoint("llama", tmp_path / "base", seed=5)
    same = [proxy(base, tmp_path / f"p{n}", 5) for n in range(count)]
    made = add_task_vectors(base, same, scale, into=folder(tmp_path / "made"))
    before = load_file(base.folder / WEIGHTS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(made.folder / WEIGHTS).items())


def test_all_of_one_vector_is_the_proxy(tmp_path: Path) -> None:
    base = pico_checkpoint("llama", tmp_path / "base")
    one = proxy(base, tmp_path / "p", 1)
    made = add_task_vectors(base, [one], 1.0, into=folder(tmp_path / "made"))
    after = load_file(one.model / WEIGHTS)
    for name, tensor in load_file(made.folder / WEIGHTS).items():
        torch.testing.assert_close(tensor, after[name])


def test_small_changes_to_a_coarse_base_are_kept(tmp_path: Path) -> None:
    """An ancestor in bfloat16 and an adapter's sum in float32: back on the grid most of what was learned is gone."""
    made = pico("llama", tmp_path / "base")
    rounded(made)
    base = as_checkpoint(made)
    one = proxy(base, tmp_path / "p", 1)
    before = load_file(base.folder / WEIGHTS)
    learned = {name: tensor.float() + 1e-5 for name, tensor in before.items()}
    save_file(learned, one.model / WEIGHTS, metadata={"format": "pt"})
    summed = add_task_vectors(base, [one], 0.5, into=folder(tmp_path / "made"))
    assert {dtype for dtype, _ in shapes(summed.folder).values()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(summed.folder, dtype="auto").dtype == torch.float32
    for name, tensor in load_file(summed.folder / WEIGHTS).items():
        torch.testing.assert_close(tensor, before[name].float() + 5e-6, rtol=0, atol=1e-6)


def test_a_base_from_elsewhere_has_its_own_names(tmp_path: Path) -> None:
    """Rotary tables of old, and no prefix: what is trained from it is saved without the ones and with the other."""
    base = pico_checkpoint("llama", tmp_path / "base")
    one = proxy(base, tmp_path / "p", 1)
    usual = add_task_vectors(base, [one], 0.5, into=folder(tmp_path / "usual"))
    held = load_file(base.folder / WEIGHTS)
    elsewhere = {name.removeprefix("model."): tensor for name, tensor in held.items()}
    elsewhere["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(elsewhere, base.folder / WEIGHTS, metadata={"format": "pt"})
    made = add_task_vectors(base, [one], 0.5, into=folder(tmp_path / "made"))
    assert contents(made.folder) == contents(usual.folder)


def test_a_branch_gets_its_own_vectors_in_its_ffns(tmp_path: Path) -> None:
    """By hand: after training, what was learned since is kept; all but FFNs stay bit for bit."""
    base = pico_checkpoint("llama", tmp_path / "base")
    two = [proxy(base, tmp_path / f"p{seed}", seed) for seed in (1, 2)]
    start = add_task_vectors(base, two, 0.25, into=folder(tmp_path / "start"))
    learned = {name: tensor + 0.5 for name, tensor in load_file(start.folder / WEIGHTS).items()}
    save_file(learned, start.folder / WEIGHTS, metadata={"format": "pt"})
    made = own_task_vector(start, base, two, 2, 0.25, into=folder(tmp_path / "made"))
    before = load_file(base.folder / WEIGHTS)
    one, other = (load_file(held.model / WEIGHTS) for held in two)
    after = load_file(made.folder / WEIGHTS)
    assert after.keys() == learned.keys()
    for name, tensor in after.items():
        if ".mlp." in name:
            expected = learned[name] + 0.75 * (other[name] - before[name]) - 0.25 * (one[name] - before[name])
            torch.testing.assert_close(tensor, expected)
        else:
            assert torch.equal(tensor, learned[name])
    assert (made.lineage, made.work.tokens) == (base.lineage, 0)
    open_model(made.folder)


def test_untrained_ffns_are_the_own_proxys(tmp_path: Path) -> None:
    base = pico_checkpoint("llama", tmp_path / "base")
    two = [proxy(base, tmp_path / f"p{seed}", seed) for seed in (1, 2)]
    start = add_task_vectors(base, two, 0.5, into=folder(tmp_path / "start"))
    made = own_task_vector(start, base, two, 1, 0.5, into=folder(tmp_path / "made"))
    own = load_file(two[0].model / WEIGHTS)
    for name, tensor in load_file(made.folder / WEIGHTS).items():
        if ".mlp." in name:
            torch.testing.assert_close(tensor, own[name])


def test_a_cluster_without_kin_has_nothing_of_its_own(tmp_path: Path) -> None:
    base = pico_checkpoint("llama", tmp_path / "base")
    one = proxy(base, tmp_path / "p", 1)
    with pytest.raises(ValueError, match="no proxy of cluster 3 is of the base's lineage"):
        own_task_vector(base, base, [one], 3, 0.5, into=folder(tmp_path / "made"))
    stranger = base.model_copy(update={"lineage": "llama-other"})
    with pytest.raises(ValueError, match="is of lineage llama-other and not of the base's"):
        own_task_vector(stranger, base, [one], 1, 0.5, into=folder(tmp_path / "made"))


def test_of_another_lineage(tmp_path: Path) -> None:
    base = pico_checkpoint("llama", tmp_path / "base")
    stranger = proxy(base, tmp_path / "p", 3, lineage="llama-other")
    with pytest.raises(ValueError, match="a proxy of cluster 3 is of lineage llama-other and not of the base's"):
        add_task_vectors(base, [stranger], 0.5, into=folder(tmp_path / "made"))


def test_of_other_shapes(tmp_path: Path) -> None:
    base = pico_checkpoint("llama", tmp_path / "base")
    wide = proxy(base, tmp_path / "p", 1)
    pico("llama", wide.model, hidden=64)
    with pytest.raises(ValueError, match="tensors of different names or shapes"):
        add_task_vectors(base, [wide], 0.5, into=folder(tmp_path / "made"))


def test_it_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, fuse = pico_checkpoint("llama", tmp_path / "base"), Fuse(2**14)
    monkeypatch.setattr("deepfusion.checkpoints.write", fuse.write)
    one = proxy(base, tmp_path / "p", 1)
    whole = add_task_vectors(base, [one], 0.5, into=folder(tmp_path / "whole"))
    tensors, fuse.lasts = len(fuse.made), 10
    with pytest.raises(Blown):
        add_task_vectors(base, [one], 0.5, into=folder(tmp_path / "cut"))
    fuse.lasts = 10**6
    again = add_task_vectors(base, [one], 0.5, into=tmp_path / "cut", resume=True)
    assert len(fuse.made) < tensors
    assert contents(again.folder) == contents(whole.folder)
