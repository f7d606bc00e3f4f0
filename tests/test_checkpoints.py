import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig

from deepfusion.artifacts import Checkpoint
from deepfusion.checkpoints import (
    as_checkpoint,
    lineage,
    make_tokenizer,
    open_config,
    open_model,
    open_tokenizer,
    save_model,
    tokenizer_fingerprint,
    validate,
)
from deepfusion.weights import WEIGHTS, Part, tensors, write
from pico import TEXTS, pico, pico_checkpoint, pico_tokenizer


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ── making ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tokenizer_writes_any_text_and_is_deterministic() -> None:
    tokenizer = pico_tokenizer()
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (320, 0, 0, 0)
    for text in (*TEXTS, "\x00\x7f never seen: ŧ ✓\n\n\t", ""):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer_fingerprint(make_tokenizer(TEXTS, 320)) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(pico_tokenizer(310)) != tokenizer_fingerprint(tokenizer)


def test_short_text_gives_a_smaller_vocabulary() -> None:
    assert len(make_tokenizer(["ab"], 500)) == 258  # END, 256 bytes, "ab"


def test_fingerprint_ignores_what_a_call_left_behind() -> None:
    tokenizer = make_tokenizer(TEXTS, 320)
    tokenizer(list(TEXTS), padding=True, truncation=True, max_length=8)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(pico_tokenizer())


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "mixtral"])
def test_saving_is_deterministic_and_a_tokenizer_survives(name: str, tmp_path: Path) -> None:
    folder = pico(name, tmp_path / "one")
    written = files(folder)
    assert files(pico(name, tmp_path / "two")) == written
    model, tokenizer = open_model(folder), open_tokenizer(folder)
    tokenizer(list(TEXTS), padding=True)
    save_model(model, tokenizer, tmp_path / "three")
    assert files(tmp_path / "three") == written
    # AutoTokenizer would give qwen2 another normaliser.
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(pico_tokenizer())


def test_seed_decides_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, other = pico("llama", tmp_path / "one", seed=1), pico("llama", tmp_path / "two", seed=2)
    assert (one / WEIGHTS).read_bytes() != (other / WEIGHTS).read_bytes()
    assert torch.equal(torch.random.get_rng_state(), before)


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    held = load_file(folder / WEIGHTS)
    change(held)
    save_file(held, folder / WEIGHTS, metadata={"format": "pt"})


def spoil(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda held: held["model.norm.weight"].__setitem__(3, value)


NORM = "model.norm.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "config no object": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
    "type": (lambda f: change_config(f, model_type="t5"), r"model type 't5' \(in .*/llama\) is not supported"),
    "absurd": (lambda f: change_config(f, hidden_size="wide"), "config.json is not a valid config"),
    "endless": (lambda f: change_config(f, num_hidden_layers=10**12), "claims 1000000000000 layers"),
    "negative": (lambda f: change_config(f, intermediate_size=-1), "describes no model"),
    "wider": (lambda f: change_config(f, intermediate_size=65), r"has shape \(32, 64\) instead of \(32, 65\)"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "broken": (lambda f: (f / WEIGHTS).write_bytes(b"x" * 50), "has a header of .* bytes, and may have"),
    "missing": (lambda f: change_weights(f, lambda held: held.pop(NORM)), f"tensor {NORM} is missing"),
    "extra": (lambda f: change_weights(f, lambda held: held.update(x=torch.ones(1))), "has no tensor x"),
    "integers": (
        lambda f: change_weights(f, lambda held: held.update({NORM: torch.ones(32, dtype=torch.int32)})),
        f"tensor {NORM} is torch.int32",
    ),
    "nan": (lambda f: change_weights(f, spoil(float("nan"))), f"tensor {NORM} holds NaN or infinity"),
    "inf": (lambda f: change_weights(f, spoil(float("-inf"))), f"tensor {NORM} holds NaN or infinity"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str, tmp_path: Path) -> None:
    folder = pico("llama", tmp_path / "llama")
    spoiled, message = FAULTS[fault]
    spoiled(folder)
    with pytest.raises(ValueError, match=message):
        validate(folder)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    folder = pico("llama", tmp_path)
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    for opening in (validate, open_model):
        with pytest.raises(ValueError, match=r"as pickles only \(pytorch_model.bin\)"):
            opening(folder)


def test_opening_refuses_missing_tensors(tmp_path: Path) -> None:
    folder = pico("llama", tmp_path)
    change_weights(folder, lambda held: held.pop(NORM))
    with pytest.raises(ValueError, match=f"missing keys: {NORM}"):
        open_model(folder)


def test_tokenizer_faults_are_named(tmp_path: Path) -> None:
    folder = pico("llama", tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="has no end token"):
        open_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="has no usable tokenizer"):
        open_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        open_tokenizer(folder)


def test_hub_layouts_are_valid(tmp_path: Path) -> None:
    """GPT-2 on the hub: no prefix, masks as buffers. Others: several shards, a tied head written out."""
    folder = pico("gpt2", tmp_path / "gpt2")
    held = {name.removeprefix("transformer."): tensor for name, tensor in tensors(folder)}
    held["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    save_file(held, folder / WEIGHTS, metadata={"format": "pt"})
    validate(folder)
    sharded = pico("llama", tmp_path / "llama")
    held = dict(tensors(sharded))
    (sharded / WEIGHTS).unlink()
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    write(sharded, [Part.of(*item) for item in held.items()], shard_bytes=50_000)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    validate(sharded)


# ── identity ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lineage_tells_apart_what_must_not_be_averaged() -> None:
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    one = lineage(LlamaConfig(**small), "tokens", "ancestor")
    assert one.startswith("llama-h64-l3-")
    assert len(one) == len("llama-h64-l3-") + 8
    others = (
        lineage(LlamaConfig(**small | {"intermediate_size": 97}), "tokens", "ancestor"),
        lineage(LlamaConfig(**small | {"rms_norm_eps": 1e-4}), "tokens", "ancestor"),
        lineage(LlamaConfig(**small), "other tokens", "ancestor"),
        lineage(LlamaConfig(**small), "tokens", "other ancestor"),
        lineage(GPT2Config(n_embd=64, n_layer=3), "tokens", "ancestor"),
    )
    assert len({one, *others}) == 6
    assert lineage(LlamaConfig(**small, dtype="bfloat16", use_cache=False), "tokens", "ancestor") == one


def test_as_checkpoint(tmp_path: Path) -> None:
    ancestor = pico_checkpoint("llama", tmp_path / "one")
    assert ancestor.model_type == "llama"
    assert ancestor.parameters == 320 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32  # tied head: once
    assert ancestor.active_parameters == ancestor.parameters - 5 * 32  # norms
    assert Checkpoint.load(tmp_path / "one") == ancestor
    assert pico_checkpoint("llama", tmp_path / "same").lineage == ancestor.lineage
    assert pico_checkpoint("llama", tmp_path / "other", seed=1).lineage != ancestor.lineage
    shutil.copytree(pico("llama", tmp_path / "raw", seed=2), tmp_path / "trained")
    trained = as_checkpoint(tmp_path / "trained", lineage_of=ancestor.lineage, losses=((1, 0.5),))
    assert (trained.lineage, trained.losses) == (ancestor.lineage, ((1, 0.5),))
    assert open_config(trained.folder).model_type == "llama"
