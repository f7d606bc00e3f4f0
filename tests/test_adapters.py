import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from deepfusion import adapters, memory
from deepfusion.checkpoints import open_config, open_model
from deepfusion.config import LoRA
from deepfusion.families import skeleton
from deepfusion.weights import Part, stored, tensors, write
from pico import adapted, pico

SMALL = LoRA(rank=3, alpha=6.0)
IDS = torch.tensor([[0, 40, 41, 42, 43, 44, 45]])


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ── attached ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_the_parts_that_are_asked_for(tmp_path: Path) -> None:
    """GPT-2 calls a matrix of both parts `c_proj`."""
    ancestor = pico("gpt2", tmp_path / "ancestor")
    lora = SMALL.model_copy(update={"targets": ("attention",)})
    model = adapted(ancestor, lora)
    changed = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert changed == {f"transformer.h.{n}.attn.{part}" for n in (0, 1) for part in ("c_attn", "c_proj")}
    adapters.save(model, ancestor, lora, tmp_path / "adapter")
    adapters.validate(tmp_path / "adapter", ancestor, lora)
    adapters.merge(ancestor, tmp_path / "adapter", lora, into=tmp_path / "merged")
    same(logits(open_model(tmp_path / "merged")), logits(model))


def test_adapters_are_float32_beside_bfloat16(tmp_path: Path) -> None:
    model = adapted(pico("llama", tmp_path), SMALL, dtype=torch.bfloat16)
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


def test_the_seed_alone_decides_the_beginning(tmp_path: Path) -> None:
    ancestor = pico("llama", tmp_path)
    state = torch.get_rng_state()

    def begun(seed: int) -> Tensor:
        model = open_model(ancestor)
        adapters.attach(model, SMALL, seed=seed)
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])

    assert torch.equal(begun(0), begun(0))
    assert not torch.equal(begun(0), begun(1))
    assert torch.equal(torch.get_rng_state(), state)


# ── four bits ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradients_in_four_bits_are_those_of_the_dequantised_model(name: str, tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    ancestor = pico(name, tmp_path, hidden=64, ffn=128)
    quantised, plain = adapted(ancestor, SMALL, nf4=True).train(), adapted(ancestor, SMALL).train()
    replaced = 0
    for place, part in quantised.named_modules():
        if isinstance(part, Linear4bit):
            exact, base = dequantize_4bit(part.weight.data, part.weight.quant_state), plain.get_submodule(place)
            assert isinstance(base.weight, Tensor)
            exact = exact if isinstance(base, nn.Linear) else exact.T
            assert 0.05 < float((exact - base.weight).norm() / base.weight.norm()) < 0.15  # what four bits lose
            base.weight.data = exact.contiguous()
            replaced += 1
    assert replaced == len(adapters.sites(skeleton(open_config(ancestor)), SMALL))
    gradients: list[dict[str, Tensor]] = []
    for model in (quantised, plain):
        predicted = model(IDS).logits[0, :-1]
        nn.functional.cross_entropy(predicted, IDS[0, 1:]).backward()
        found = {place: p.grad for place, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        gradients.append(found)
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 2 * replaced
    for place, gradient in gradients[0].items():
        assert float(gradient.abs().max()) > 0, place
        torch.testing.assert_close(gradient, gradients[1][place], rtol=1e-4, atol=1e-6)


def test_four_bits_take_less(tmp_path: Path) -> None:
    """Embedding, head and norms stay as they are."""
    ancestor = pico("llama", tmp_path, hidden=64)
    plain, quantised = open_model(ancestor), open_model(ancestor, nf4=True)
    held = [sum(p.nbytes for p in model.parameters()) for model in (plain, quantised)]
    layers = sum(4 * site.inputs * site.outputs for site in adapters.sites(plain, SMALL).values())
    assert held[0] - held[1] == layers - layers // 8
    assert not quantised.training


def test_rows_that_end_within_a_block_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"blocks of 64, and model\.layers\.0\.mlp\.down_proj has 96 inputs: use device\."
    ):
        open_model(pico("llama", tmp_path, hidden=64, ffn=96), nf4=True)


def test_without_bitsandbytes_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepfusion.checkpoints.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match=r"need bitsandbytes: pip install 'deepfusion-moe\[nf4\]'"):
        open_model(pico("llama", tmp_path), nf4=True)


# ── on disk ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """An ancestor and an adapter of it."""
    ancestor = pico("gpt2", tmp_path / "ancestor")
    adapters.save(adapted(ancestor, SMALL), ancestor, SMALL, tmp_path / "adapter")
    return ancestor, tmp_path / "adapter"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks by an old name
def test_peft_reads_an_adapter_and_merges_to_the_same(name: str, tmp_path: Path) -> None:
    ancestor = pico(name, tmp_path / "ancestor")
    adapters.save(adapted(ancestor, SMALL), ancestor, SMALL, tmp_path / "adapter")
    adapters.merge(ancestor, tmp_path / "adapter", SMALL, into=tmp_path / "merged")
    theirs: Any = PeftModel.from_pretrained(open_model(ancestor), tmp_path / "adapter")
    merged = theirs.merge_and_unload().state_dict()
    for place, tensor in open_model(tmp_path / "merged").state_dict().items():
        same(tensor, merged[place])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_merged_weight_by_hand(name: str, tmp_path: Path) -> None:
    """alpha / rank · B·A with one number in each: output 2 hears input 1 by 5 / 2 · 3 · 4 more."""
    ancestor, lora = pico(name, tmp_path / "ancestor"), LoRA(rank=2, alpha=5.0)
    model = open_model(ancestor)
    adapters.attach(model, lora, seed=0)
    place = "transformer.h.1.mlp.c_fc" if name == "gpt2" else "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        for tensor_name, parameter in model.named_parameters():
            if "lora_" in tensor_name:
                parameter.zero_()
        model.get_parameter(f"{place}.lora_A.default.weight")[1, 1] = 3.0
        model.get_parameter(f"{place}.lora_B.default.weight")[2, 1] = 4.0
    adapters.save(model, ancestor, lora, tmp_path / "adapter")
    adapters.merge(ancestor, tmp_path / "adapter", lora, into=tmp_path / "merged")
    before, after = dict(tensors(ancestor)), dict(tensors(tmp_path / "merged"))
    where = (1, 2) if name == "gpt2" else (2, 1)  # GPT-2 stores [inputs, outputs]
    before[f"{place}.weight"][where] += 30.0
    for tensor_name, tensor in before.items():
        assert torch.equal(after[tensor_name], tensor), tensor_name


def test_equal_adapters_have_equal_bytes_and_no_paths(made: tuple[Path, Path], tmp_path: Path) -> None:
    ancestor, adapter = made
    shutil.copytree(ancestor, tmp_path / "elsewhere")
    adapters.save(adapted(tmp_path / "elsewhere", SMALL), tmp_path / "elsewhere", SMALL, tmp_path / "again")
    for name in (adapters.CONFIG, adapters.WEIGHTS):
        assert (adapter / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert str(tmp_path).encode() not in (adapter / name).read_bytes()


def test_names_without_the_models_prefix(made: tuple[Path, Path], tmp_path: Path) -> None:
    """As GPT-2's own checkpoint has them."""
    ancestor, adapter = made
    bare = tmp_path / "bare"
    shutil.copytree(ancestor, bare)
    write(bare, [Part.of(name.removeprefix("transformer."), tensor) for name, tensor in tensors(ancestor)])
    for folder in (ancestor, bare):
        adapters.merge(folder, adapter, SMALL, into=tmp_path / f"merged-{folder.name}")
    assert "h.0.attn.c_attn.weight" in stored(tmp_path / "merged-bare")
    whole, other = (logits(open_model(tmp_path / f"merged-{name}")) for name in ("ancestor", "bare"))
    torch.testing.assert_close(whole, other, rtol=0, atol=0)


def test_small_changes_outlast_an_ancestor_in_bfloat16(tmp_path: Path) -> None:
    """Rounded to the ancestor's grid, most of them would be none."""
    ancestor = pico("llama", tmp_path / "ancestor")
    open_model(ancestor, torch.bfloat16).save_pretrained(ancestor)
    model = open_model(ancestor)
    adapters.attach(model, SMALL, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1e-5)
    adapters.save(model, ancestor, SMALL, tmp_path / "adapter")
    adapters.merge(ancestor, tmp_path / "adapter", SMALL, into=tmp_path / "merged")
    assert {one.dtype for one in stored(tmp_path / "merged").values()} == {torch.float32}
    assert open_config(tmp_path / "merged").dtype == torch.float32
    place = "model.layers.0.mlp.up_proj.weight"
    own, merged = (dict(tensors(folder))[place].float() for folder in (ancestor, tmp_path / "merged"))
    assert bool((own != merged).all())
    assert float((merged.bfloat16().float() == own).float().mean()) > 0.9


def test_a_merge_goes_on_from_what_is_whole(made: tuple[Path, Path], tmp_path: Path) -> None:
    ancestor, adapter = made
    adapters.merge(ancestor, adapter, SMALL, into=tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    first, written = file.read_bytes(), file.stat().st_mtime_ns
    adapters.merge(ancestor, adapter, SMALL, into=tmp_path / "merged", resume=True)
    assert file.stat().st_mtime_ns == written
    file.write_bytes(first[:-1])
    adapters.merge(ancestor, adapter, SMALL, into=tmp_path / "merged", resume=True)
    assert file.read_bytes() == first


def test_merging_holds_no_model(tmp_path: Path) -> None:
    ancestor = pico("llama", tmp_path / "ancestor", hidden=512, ffn=4096, layers=3)
    adapters.save(adapted(ancestor, SMALL), ancestor, SMALL, tmp_path / "adapter")
    size = (ancestor / "model.safetensors").stat().st_size
    assert size > 80 * 2**20
    memory.forget()
    before = memory.resident()
    adapters.merge(ancestor, tmp_path / "adapter", SMALL, into=tmp_path / "merged")
    assert memory.peak() - before < size / 2


# ── from elsewhere ────────────────────────────────────────────────────────────────────────────────────────────────────


def settings(**fields: Any) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        path = folder / adapters.CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return harm


def weights(change: Callable[[dict[str, Tensor], str], object]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        held = load_file(folder / adapters.WEIGHTS)
        change(held, next(name for name in held if name.endswith("h.1.mlp.c_fc.lora_A.weight")))
        save_file(held, folder / adapters.WEIGHTS)

    return harm


def bytes_of(name: str, content: bytes) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return harm


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another rank": (settings(r=4), "r is 4 instead of 3"),
    "another scale": (settings(lora_alpha=600), "lora_alpha is 600 instead of 6.0"),
    "another kind": (settings(use_dora=True), "use_dora is True instead of None"),
    "unknown field": (settings(auto_mapping={"x": 1}, run_this="code"), "auto_mapping is {'x': 1} instead of None"),
    "other places": (settings(target_modules=["lm_head"]), r"target_modules is \['lm_head'\] instead of"),
    "no JSON": (bytes_of(adapters.CONFIG, b"{"), "adapter_config.json is not JSON"),
    "deep JSON": (bytes_of(adapters.CONFIG, b"[" * 99_999), "adapter_config.json is not JSON"),
    "no object": (bytes_of(adapters.CONFIG, b"[]"), "adapter_config.json is not a JSON object"),
    "long JSON": (bytes_of(adapters.CONFIG, b" " * (2**20 + 1)), "has more than 1048576 bytes"),
    "no settings": (lambda folder: (folder / adapters.CONFIG).unlink(), "adapter_config.json is missing"),
    "no weights": (lambda folder: (folder / adapters.WEIGHTS).unlink(), "is not a readable safetensors file"),
    "truncated": (bytes_of(adapters.WEIGHTS, b"\x00" * 40), "is not a readable safetensors file"),
    "pickle": (
        bytes_of("adapter_model.bin", b"\x80"),
        "holds adapter_model.bin: an adapter is adapter_config.json and",
    ),
    "code": (bytes_of("modeling.py", b"import os"), "holds modeling.py"),
    "missing": (weights(lambda held, name: held.pop(name)), r"h\.1\.mlp\.c_fc\.lora_A\.weight is missing"),
    "unknown": (
        weights(lambda held, name: held.update({"base_model.model.lm_head.lora_A.weight": held[name].clone()})),
        r"lm_head\.lora_A\.weight belongs to no matrix that was to be adapted",
    ),
    "other shape": (
        weights(lambda held, name: held.update({name: torch.zeros(3, 33)})),
        r"c_fc\.lora_A\.weight has shape \(3, 33\)",
    ),
    "integers": (
        weights(lambda held, name: held.update({name: torch.zeros(3, 32, dtype=torch.int32)})),
        r"c_fc\.lora_A\.weight is torch.int32: save it as float32",
    ),
    "room for more": (
        bytes_of(adapters.WEIGHTS, bytes(2**20)),
        "safetensors has .* bytes, and cannot need more than",
    ),
    "NaN": (weights(lambda held, name: held[name].fill_(torch.nan)), "c_fc.lora_A.weight holds NaN"),
    "huge": (
        weights(lambda held, name: held.update({name: torch.full((3, 32), 1e30)})),
        r"lora_B\.weight · .*lora_A\.weight may add more than 65504 to a weight: its training diverged",
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_broken_adapter_is_named(harm: str, made: tuple[Path, Path]) -> None:
    ancestor, adapter = made
    adapters.validate(adapter, ancestor, SMALL)
    change, words = HARMS[harm]
    change(adapter)
    with pytest.raises(ValueError, match=words):
        adapters.validate(adapter, ancestor, SMALL)


def test_later_versions_of_peft_are_welcome(made: tuple[Path, Path]) -> None:
    ancestor, adapter = made
    settings(peft_version="9.9.9", a_new_way=None, another=False)(adapter)
    adapters.validate(adapter, ancestor, SMALL)


def test_an_adapter_of_another_ancestor_does_not_fit(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"target_modules|has shape"):
        adapters.validate(made[1], pico("gpt2", tmp_path / "wide", hidden=48), SMALL)
