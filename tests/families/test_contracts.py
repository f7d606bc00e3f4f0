"""Every family goes through every question of the questionnaire."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from deepfusion.checkpoints import as_checkpoint, open_config, open_model, open_tokenizer, parameters, validate
from deepfusion.config import LogitsObjective, MadeModel, Runtime, Training
from deepfusion.data.documents import Document
from deepfusion.data.lessons import lessons
from deepfusion.data.tokens import Tokenizer
from deepfusion.families import FAMILIES, family
from deepfusion.phases.proxy import average_folders
from deepfusion.students import learn
from deepfusion.writing import write
from pico import DENSE, TEXTS, pad_vocabulary, pico

pytestmark = pytest.mark.contracts
ALL = tuple(FAMILIES)
PACKING = tuple(name for name, answers in FAMILIES.items() if answers.packs)
ROLES = {"embedding", "attention", "ffn", "norm", "head"}
A, B = [0, 40, 41, 42, 43, 44, 45], [0, 50, 40, 51]


def opened(name: str, folder: Path, **overrides: int) -> PreTrainedModel:
    return open_model(pico(name, folder, **overrides))


def packed(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Isolation mask [1, 1, T, T] and position ids [1, T] of documents packed in one row."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    together = document[:, None] == document[None, :]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return (together & torch.ones_like(together).tril())[None, None], positions[None]


@pytest.mark.parametrize("name", ALL)
def test_roles_cover_every_tensor(name: str, tmp_path: Path) -> None:
    model = opened(name, tmp_path)
    roles = {tensor: family(name).role(tensor) for tensor in model.state_dict()}
    unusual = {"mixtral": ROLES | {"router"}, "olmo": ROLES - {"norm"}}  # olmo's norms have no weights
    assert set(roles.values()) == unusual.get(name, ROLES)
    assert len(family(name).layer_list(model)) == 2
    with pytest.raises(ValueError, match=r"has no tensor 'classifier\.weight'"):
        family(name).role("classifier.weight")


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_random_in_training(name: str, tmp_path: Path) -> None:
    model = opened(name, tmp_path).train()
    ids = torch.tensor([A])
    torch.testing.assert_close(model(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert not any(isinstance(part, torch.nn.Dropout) and part.p for part in model.modules())


@pytest.mark.parametrize("name", ALL)
def test_start_token_has_an_embedding_that_learns(name: str, tmp_path: Path) -> None:
    embedding = opened(name, tmp_path).get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    assert embedding.padding_idx is None
    assert embedding.weight[0].abs().sum() > 0


@pytest.mark.parametrize("name", PACKING)
def test_packed_documents_are_alone(name: str, tmp_path: Path) -> None:
    model = opened(name, tmp_path)
    mask, positions = packed(len(A), len(B))
    masks = family(name).attention_masks(model.config, mask)
    with torch.inference_mode():
        row = model(torch.tensor([A + B]), attention_mask=masks, position_ids=positions, use_cache=False).logits[0]
        alone = torch.cat([model(torch.tensor([ids])).logits[0] for ids in (A, B)])
        leaking = model(torch.tensor([A + B])).logits[0]
    torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
    assert (leaking[len(A) :] - alone[len(A) :]).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in PACKING if FAMILIES[name].windows != "none"])
def test_packing_keeps_sliding_windows(name: str, tmp_path: Path) -> None:
    model = opened(name, tmp_path)
    model.config.sliding_window = 3
    if family(name).windows == "by_layer":
        model.config.layer_types = ["sliding_attention", "full_attention"]
    model = type(model)(model.config).eval()  # layers note their kind when they are built
    mask, positions = packed(len(A), len(B))
    masks = family(name).attention_masks(model.config, mask)
    with torch.inference_mode():
        row = model(torch.tensor([A + B]), attention_mask=masks, position_ids=positions, use_cache=False).logits[0]
        alone = torch.cat([model(torch.tensor([ids])).logits[0] for ids in (A, B)])
        blind = model(torch.tensor([A + B]), attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
    torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
    assert (blind - alone).abs().max() > 1e-5  # without our masks the window would be lost


def test_bloom_refuses_to_pack(tmp_path: Path) -> None:
    config = opened("bloom", tmp_path).config
    with pytest.raises(ValueError, match="bloom cannot hold several documents in one row"):
        family("bloom").attention_masks(config, packed(2, 2)[0])


@pytest.mark.parametrize("name", ALL)
def test_checkpoint_survives_disk(name: str, tmp_path: Path) -> None:
    folder = pico(name, tmp_path / "one")
    validate(folder)
    model = open_model(folder)
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == ("sdpa" if family(name).packs else "eager")
    assert parameters(model) == parameters(folder)
    again = open_model(pico(name, tmp_path / "two"))
    ids = torch.tensor([A])
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


# By hand, hidden 32, FFN 64 (BLOOM 128), 2 layers, vocabulary 320: head + layers · (attention + FFN matrices).
PLAIN, GATED = 320 * 32 + 2 * (4 * 32 * 32 + 2 * 32 * 64), 320 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64)
BY_HAND = {
    "gpt2": PLAIN,
    "opt": PLAIN,
    "gpt_neox": PLAIN,
    "phi": PLAIN,
    "bloom": 320 * 32 + 2 * (4 * 32 * 32 + 2 * 32 * 128),
    "mixtral": 320 * 32 + 2 * (4 * 32 * 32 + 4 * 32 + 2 * 3 * 32 * 64),  # router 4 × 32, two experts of four
}


@pytest.mark.parametrize("name", ALL)
def test_matrix_parameters(name: str, tmp_path: Path) -> None:
    assert family(name).matrix_parameters(open_config(pico(name, tmp_path))) == BY_HAND.get(name, GATED)


@pytest.mark.parametrize("name", DENSE)
def test_made_config_is_as_asked(name: str, tmp_path: Path) -> None:
    config = open_config(pico(name, tmp_path, hidden=48, heads=6, layers=3, context=64))
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (48, 6, 3)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, None)
    assert config.tie_word_embeddings
    if name != "bloom":
        assert config.max_position_embeddings == 64
    assert getattr(config, "head_dim", 8) == 8


def restored(name: str, folder: Path, **fields: object) -> PreTrainedModel:
    """A fresh model of a pico's config with other fields, written over it."""
    config = open_config(pico(name, folder))
    for field, value in fields.items():
        setattr(config, field, value)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", DENSE)
def test_head_of_its_own(name: str, tmp_path: Path) -> None:
    model = restored(name, tmp_path, tie_word_embeddings=False)
    validate(tmp_path)
    again, ids = open_model(tmp_path), torch.tensor([A])
    assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert parameters(tmp_path) == parameters(model)
    assert family(name).matrix_parameters(again.config) == BY_HAND.get(name, GATED)


@pytest.mark.parametrize("name", ALL)
def test_several_files(name: str, tmp_path: Path) -> None:
    whole = as_checkpoint(pico(name, tmp_path / "whole"))
    model = open_model(whole.folder)
    shutil.copytree(whole.folder, tmp_path / "cut", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    validate(tmp_path / "cut")
    cut, ids = as_checkpoint(tmp_path / "cut"), torch.tensor([A])
    torch.testing.assert_close(open_model(cut.folder)(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert (cut.parameters, cut.active_parameters) == (whole.parameters, whole.active_parameters)
    assert average_folders([whole.folder, cut.folder], [1.0, 1.0], into=tmp_path / "mean") == 0
    torch.testing.assert_close(open_model(tmp_path / "mean")(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_what_it_writes_is_what_it_thinks(name: str, padded: bool, tmp_path: Path) -> None:
    """Cached, batched and padded writing has the probabilities of one plain pass, over the tokenizer's tokens alone."""
    folder = pico(name, tmp_path)
    if padded:
        validate(pad_vocabulary(folder))
    model, tokenizer = open_model(folder), Tokenizer(open_tokenizer(folder))
    made = write(model, tokenizer, ["", "Doctors prescribe"], max_new_tokens=9, temperature=1.0, top_k=4,
                 generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert model.config.vocab_size == len(tokenizer.table) + 8 * padded
    for one in made:
        ids = torch.from_numpy(one.signal.ids).long()
        with torch.inference_mode():
            log_p = model(ids[None]).logits[0, :, : len(tokenizer.table)].log_softmax(-1)
        thought = torch.cat([torch.zeros(1), log_p[:-1].gather(1, ids[1:, None])[:, 0]])
        told = torch.from_numpy(one.signal.logprobs)
        torch.testing.assert_close(told[told.isfinite()], thought[told.isfinite()], rtol=1e-4, atol=1e-4)
        assert ids.max() < len(tokenizer.table)
        assert one.signal.topk_ids.max() < len(tokenizer.table)


@pytest.mark.parametrize("name", DENSE)
def test_it_learns(name: str, tmp_path: Path) -> None:
    before = as_checkpoint(pico(name, tmp_path / "before"))
    training = Training(learning_rate=1e-2, context=96, rows=2)
    tokenizer = Tokenizer(open_tokenizer(before.folder))
    text = lessons([Document(id=str(n), domain="d", answer=text) for n, text in enumerate(TEXTS)], tokenizer, training)
    after = learn(before, text, LogitsObjective(beta=0), training, tokens=4_000, seed=0, into=tmp_path / "after",
                  runtime=Runtime())  # fmt: skip
    validate(after.folder)
    assert after.lineage == before.lineage
    assert after.losses[-1][1] < 0.8 * after.losses[0][1]


def test_impossible_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hidden 32 and 5 heads"):
        pico("llama", tmp_path, heads=5)
    with pytest.raises(ValueError, match="make hidden a multiple of 64, or change heads"):
        pico("phi", tmp_path, heads=16)
    with pytest.raises(ValueError, match="set ffn to 128, not 64"):
        pico("bloom", tmp_path, ffn=64)
    with pytest.raises(ValueError, match="choose llama as the base"):
        family("mixtral").config(MadeModel(type="llama"), 320, end=0)


def test_unknown_model_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model type 't5' \(in x/y\) is not supported: choose from gpt2, llama"):
        family("t5", Path("x/y"))
    with pytest.raises(ValueError, match="takes images"):
        family("gemma3")
