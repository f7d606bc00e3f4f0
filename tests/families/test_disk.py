"""Every family: checkpoints in all the forms that published ones have, refused or read for what they are."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cases import Made
from deepfusion.checkpoints import (
    as_checkpoint,
    open_config,
    open_model,
    open_tokenizer,
    parameters,
    save_model,
    validate,
)
from deepfusion.families import Role
from deepfusion.phases.proxy import average_folders
from deepfusion.weights import WEIGHTS, Part, shapes, tensors, write

pytestmark = pytest.mark.contracts
TABLES = {
    "gpt2": ("attn.bias", "attn.masked_bias"),
    "gpt_neox": ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    "opt": (),
    "bloom": (),
}
TEXT = [0, 40, 41, 42, 43, 44, 45]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def other(made: Made, into: Path, change: dict[str, Tensor | None], **options: int) -> Path:
    """The checkpoint with some tensors exchanged, or (none) left out."""
    shutil.copytree(made.folder, into)
    held = dict(tensors(into)) | change
    write(into, [Part.of(name, tensor) for name, tensor in held.items() if tensor is not None], **options)
    return into


@torch.inference_mode()
def says(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    return open_model(folder, dtype)(torch.tensor([TEXT])).logits[0]


def assert_same(one: Tensor, other: Tensor) -> None:
    """But for the last bits: where a tensor begins in a file can decide in which order its sums are taken."""
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_checkpoint_survives_disk(made: Made, tmp_path: Path) -> None:
    validate(made.folder)
    assert not made.model.training
    assert made.model.dtype == torch.float32
    eager = made.case.model_type in ("bloom", "gemma2")
    assert made.model.config._attn_implementation == ("eager" if eager else "sdpa")
    save_model(made.model, open_tokenizer(made.folder), tmp_path)
    assert files(tmp_path) == files(made.folder)
    assert torch.equal(says(tmp_path), made.logits(TEXT))


def test_a_tensor_of_every_role_must_be_there_and_fit(made: Made, tmp_path: Path) -> None:
    chosen: dict[Role, str] = {}
    for name in shapes(made.folder):
        chosen[made.family.role(name)] = name
    assert set(chosen) | {"head"} == made.case.roles  # a tied head is not there
    held = dict(tensors(made.folder))
    for role, name in chosen.items():
        with pytest.raises(ValueError, match=f"tensor {name} is missing"):
            validate(other(made, tmp_path / f"without {role}", {name: None}))
        longer = torch.cat([held[name], held[name][:1]])
        with pytest.raises(ValueError, match=rf"tensor {name} has shape \({len(longer)},"):
            validate(other(made, tmp_path / f"longer {role}", {name: longer}))
    with pytest.raises(ValueError, match=f"a {made.case.model_type} model has no tensor adapter"):
        validate(other(made, tmp_path / "with more", {"adapter": torch.ones(3)}))


def test_published_names_are_known(made: Made, tmp_path: Path) -> None:
    """A model that was saved without its head has no prefix; older ones hold tables that follow from the config."""
    prefix = made.model.base_model_prefix + "."
    held = dict(tensors(made.folder))
    change = dict.fromkeys(held) | {name.removeprefix(prefix): tensor for name, tensor in held.items()}
    layer = made.family.layers.removeprefix(prefix) + ".0."
    tables = TABLES.get(made.case.model_type, ("self_attn.rotary_emb.inv_freq",))
    folder = other(made, tmp_path / "plain", change | {layer + name: torch.ones(4) for name in tables})
    validate(folder)
    assert {made.family.role(name) for name in shapes(folder)} == {made.family.role(name) for name in held}
    assert_same(says(folder), made.logits(TEXT))


def test_heads_may_be_tied_or_not(made: Made, tmp_path: Path) -> None:
    tied = not made.model.config.tie_word_embeddings  # the other way round than the case
    folder = made.case.write(tmp_path, tie_word_embeddings=tied)
    validate(folder)
    model = open_model(folder)
    into, out_of = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(into, torch.nn.Embedding)
    assert isinstance(out_of, torch.nn.Linear)
    assert (into.weight is out_of.weight) == tied
    assert made.family.matrix_parameters(model.config) == made.case.matrices
    assert parameters(folder) == parameters(model) == parameters(made.model) + (-1 if tied else 1) * into.weight.numel()


def test_weights_may_lie_in_several_files(made: Made, tmp_path: Path) -> None:
    """Cut as transformers cuts them. They are the same weights: of one lineage, and averaged with the whole."""
    whole = as_checkpoint(shutil.copytree(made.folder, tmp_path / "whole"))
    shutil.copytree(made.folder, tmp_path / "cut", ignore=shutil.ignore_patterns(WEIGHTS))
    made.model.save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    validate(tmp_path / "cut")
    cut = as_checkpoint(tmp_path / "cut")
    assert cut.model_copy(update={"folder": whole.folder, "digest": whole.digest}) == whole
    assert_same(says(cut.folder), made.logits(TEXT))
    assert average_folders([cut.folder, whole.folder], [1.0, 1.0], into=tmp_path / "mean") == 0
    assert_same(says(tmp_path / "mean"), made.logits(TEXT))


def test_lineage_is_of_shape_and_weights(made: Made, tmp_path: Path) -> None:
    once, again, others = (made.case.write(tmp_path / str(n), seed=n // 2) for n in range(3))
    lineages = [as_checkpoint(folder).lineage for folder in (once, again, others)]
    assert lineages[0] == lineages[1] != lineages[2]
    assert lineages[0].startswith(f"{made.case.model_type}-h32-l2-")
    assert as_checkpoint(others, lineage_of=lineages[0]).lineage == lineages[0]


def test_equal_models_are_their_own_mean(made: Made, tmp_path: Path) -> None:
    assert average_folders([made.folder] * 3, [0.2, 0.3, 0.5], into=tmp_path / "mean") == 0
    before, after = dict(tensors(made.folder)), dict(tensors(tmp_path / "mean"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    validate(tmp_path / "mean")
    twin = other(made, tmp_path / "twin", {name: 3 * tensor for name, tensor in before.items()})
    average_folders([made.folder, twin], [0.5, 0.5], into=tmp_path / "middle")
    for name, tensor in tensors(tmp_path / "middle"):
        torch.testing.assert_close(tensor, 2 * before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_kept(dtype: torch.dtype, made: Made, tmp_path: Path) -> None:
    halves = {name: tensor.to(dtype) for name, tensor in tensors(made.folder)}
    folder = other(made, tmp_path / "half", halves)
    validate(folder)
    wide = other(made, tmp_path / "wide", {name: tensor.float() for name, tensor in halves.items()})
    assert_same(says(folder), says(wide))
    roughly = says(folder, dtype)
    assert roughly.dtype == dtype
    assert (roughly.float() - says(wide)).abs().mean() < 0.1
    assert parameters(folder) == parameters(made.folder)
    assert average_folders([folder, folder], [1.0, 1.0], into=tmp_path / "mean") == 0
    assert all(torch.equal(tensor, halves[name]) for name, tensor in tensors(tmp_path / "mean"))
    assert open_config(folder).model_type == made.case.model_type
