"""Every family: which tensors there are, what they are for, and how large."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from cases import CASES, Made
from deepfusion.checkpoints import open_config, parameters, shapes
from deepfusion.config import MadeModel
from deepfusion.config.targets import KIN
from deepfusion.families import FAMILIES, family
from pico import DENSE, pico

pytestmark = pytest.mark.contracts


def test_every_family_is_a_case() -> None:
    assert {case.model_type for case in CASES.values()} == set(FAMILIES)


def test_every_tensor_has_a_role(made: Made) -> None:
    """In memory and on disk, where the names can be others; and both say the same of how large each role is."""
    in_memory, on_disk = Counter[str](), Counter[str]()
    for name, tensor in made.model.named_parameters():  # a tied head is no parameter of its own
        in_memory[made.family.role(name)] += tensor.numel()
    for name, (_, shape) in shapes(made.folder).items():
        on_disk[made.family.role(name)] += torch.Size(shape).numel()
    assert on_disk == in_memory
    assert {made.family.role(name) for name in made.model.state_dict()} == made.case.roles
    assert made.family.routes == ("router" in made.case.roles)
    with pytest.raises(ValueError, match=r"has no tensor 'classifier\.weight'"):
        made.family.role("classifier.weight")


def test_parameters_are_counted(made: Made) -> None:
    assert made.family.matrix_parameters(open_config(made.folder)) == made.case.matrices
    assert parameters(made.folder) == parameters(made.model)


def test_layers_are_listed(made: Made) -> None:
    layers = made.family.layer_list(made.model)
    assert len(layers) == made.model.config.num_hidden_layers == 2
    held = {name for name, _ in made.model.named_parameters()}
    in_layers = {f"{made.family.layers}.{name}" for name, _ in layers.named_parameters()}
    assert in_layers < held
    assert {made.family.role(name) for name in in_layers} == made.case.roles - {"embedding", "head"}


@pytest.mark.parametrize("name", DENSE)
def test_a_made_model_is_as_asked(name: str, tmp_path: Path) -> None:
    config = open_config(pico(name, tmp_path, hidden=48, heads=6, layers=3, context=64))
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (48, 6, 3)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, None)
    assert config.tie_word_embeddings
    assert getattr(config, "max_position_embeddings", 64) == 64
    assert getattr(config, "head_dim", 8) == 8


def test_the_start_token_has_an_embedding_that_learns(made: Made) -> None:
    embedding = made.model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    assert embedding.padding_idx is None
    assert embedding.weight[0].abs().sum() > 0


def test_impossible_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hidden 32 and 5 heads"):
        pico("llama", tmp_path, heads=5)
    with pytest.raises(ValueError, match="make hidden a multiple of 64, or change heads"):
        pico("phi", tmp_path, heads=16)
    with pytest.raises(ValueError, match="set ffn to 128, not 64"):
        pico("bloom", tmp_path, ffn=64)
    for target, bases in KIN.items():
        with pytest.raises(ValueError, match=f"choose {' or '.join(bases)} as the base"):
            family(target).config(MadeModel(type="llama"), 320, end=0)


def test_unknown_model_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model type 't5' \(in x/y\) is not supported: choose from gpt2, llama"):
        family("t5", Path("x/y"))
    with pytest.raises(ValueError, match=r"'gemma3' \(in x/y\) takes images: use .* alone, of type 'gemma3_text'"):
        family("gemma3", Path("x/y"))
