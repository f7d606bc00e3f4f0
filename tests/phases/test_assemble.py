import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from deepfusion.artifacts import Checkpoint, TransferSet, Work
from deepfusion.checkpoints import open_config, open_model, validate
from deepfusion.config import AssemblePhase, Runtime
from deepfusion.data.documents import TransferDocument, write_jsonl
from deepfusion.families import TARGETS
from deepfusion.families.target import moe_config
from deepfusion.layouts import plan
from deepfusion.phases.assemble import assemble, expert_difference, merge, upcycle
from deepfusion.weights import WEIGHTS, tensors
from fuse import Blown, Fuse, contents, written
from pico import pico_checkpoint, pico_tokenizer

IDS = torch.tensor([[0, 40, 41, 42, 43, 44, 45, 60]])
RANDOM = AssemblePhase(router="random")


def students(folder: Path, count: int) -> list[Checkpoint]:
    """Different models that say they are of one lineage."""
    made = [pico_checkpoint("llama", folder / f"student-{n}", seed=n) for n in range(count)]
    return [student.model_copy(update={"lineage": made[0].lineage}) for student in made]


def held(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return dict(tensors(checkpoint.folder))


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_copies_compute_the_base_model(top_k: int, tmp_path: Path) -> None:
    base = pico_checkpoint("llama", tmp_path / "base")
    moe = upcycle(base, 3, AssemblePhase(router="random", top_k=top_k), seed=0, into=made(tmp_path / "moe"))
    with torch.inference_mode():
        dense, merged = open_model(base.folder)(IDS).logits, open_model(moe.folder)(IDS).logits
    torch.testing.assert_close(merged, dense, rtol=0, atol=1e-5)
    assert expert_difference(moe.folder) == [0.0, 0.0]


def test_plain_transformers_opens_and_runs_it(tmp_path: Path) -> None:
    moe = assemble(students(tmp_path, 3), RANDOM, None, seed=0, into=made(tmp_path / "moe"))
    validate(moe.folder)
    model, told = AutoModelForCausalLM.from_pretrained(moe.folder, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.model_type == moe.model_type == "mixtral"
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (3, 2)
    assert model.generate(IDS, max_new_tokens=5, do_sample=False).shape[1] <= IDS.shape[1] + 5
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (moe.folder / WEIGHTS).read_bytes()
    torch.testing.assert_close(open_model(tmp_path / "again")(IDS).logits, model.eval()(IDS).logits, rtol=0, atol=0)


def test_experts_are_the_students_and_the_rest_their_mean(tmp_path: Path) -> None:
    given = students(tmp_path, 2)
    moe = assemble(given, RANDOM, None, seed=0, into=made(tmp_path / "moe"))
    found, parts = held(moe), [held(student) for student in given]
    for name, tensor in parts[0].items():
        if ".mlp." not in name:
            torch.testing.assert_close(found.pop(name), (tensor + parts[1][name]) / 2)
    for layer in (0, 1):
        block = f"model.layers.{layer}.block_sparse_moe"
        assert found.pop(f"{block}.gate.weight").shape == (2, 32)
        for expert in (0, 1):
            for theirs, ours in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
                source = parts[expert][f"model.layers.{layer}.mlp.{theirs}.weight"]
                assert torch.equal(found.pop(f"{block}.experts.{expert}.{ours}.weight"), source)
    assert not found
    # In memory the experts are fused; expert 1 alone must compute student 1's FFN.
    model, student = open_model(moe.folder), open_model(given[1].folder)
    experts, ffn = model.get_submodule("model.layers.0.mlp.experts"), student.get_submodule("model.layers.0.mlp")
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    chosen = experts(states, torch.ones(5, 1, dtype=torch.long), torch.ones(5, 1))
    torch.testing.assert_close(chosen, ffn(states), rtol=1e-5, atol=1e-6)


def test_everything_is_deterministic(tmp_path: Path) -> None:
    given = students(tmp_path, 2)
    one, same, other = (
        assemble(given, RANDOM, None, seed=seed, into=made(tmp_path / f"moe-{n}")) for n, seed in enumerate((1, 1, 2))
    )
    assert one.digest == same.digest != other.digest
    assert one.lineage == other.lineage != given[0].lineage
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    assert 0.01 < float(held(one)[gate].std()) < 0.03


def test_active_parameters_count_the_chosen_experts(tmp_path: Path) -> None:
    base = pico_checkpoint("llama", tmp_path / "base")
    moe = upcycle(base, 4, AssemblePhase(router="random", top_k=2), seed=0, into=made(tmp_path / "moe"))
    ffn = 2 * 3 * 32 * 64
    assert moe.active_parameters == base.active_parameters + ffn + 2 * 4 * 32
    assert moe.parameters == base.parameters + 3 * ffn + 2 * 4 * 32


@pytest.mark.parametrize("router", ["random", "hidden_means"])
def test_an_interrupted_assembly_is_gone_on_from(
    router: Literal["random", "hidden_means"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, folder, fuse = students(tmp_path, 3), made(tmp_path / "transfer"), Fuse(2**16)
    known = [TransferDocument(id=f"{i}", domain="x", answer="abc"[i] * 9, kind="sampled", cluster=i) for i in range(3)]
    write_jsonl(folder / "documents.jsonl", known)
    transfer = TransferSet(folder=folder, counts={}, per_cluster=(1,) * 3, by_writer={}, private_text_risk=True)
    monkeypatch.setattr("deepfusion.phases.assemble.write", fuse.write)

    def attempt(into: Path) -> Checkpoint:
        config = AssemblePhase(router=router)
        return merge(given, transfer, config, seed=0, into=into, runtime=Runtime(workers=0), resume=True)

    undisturbed = attempt(made(tmp_path / "undisturbed"))
    everything, into = list(fuse.made), made(tmp_path / "disturbed")
    fuse.lasts = len(everything) // 2
    with pytest.raises(Blown):
        attempt(into)
    before = {path: written(path) for path in into.glob("*.safetensors")}
    assert len(before) > 1
    fuse.lasts = len(everything)
    monkeypatch.setattr("deepfusion.phases.router.hidden_means", None)  # it is not measured again
    assert attempt(into).digest == undisturbed.digest
    assert 0 < len(fuse.made) < len(everything) - 5
    assert {path: written(path) for path in before if path.exists()}.items() <= before.items()
    assert contents(into) == contents(undisturbed.folder)


def test_router_rows_come_from_the_file(tmp_path: Path) -> None:
    given, path = students(tmp_path, 2), tmp_path / "rows.safetensors"
    rows = torch.arange(2 * 2 * 32.0).reshape(2, 2, 32)
    save_file({"rows": rows}, path)
    moe = assemble(given, AssemblePhase(), path, seed=0, into=made(tmp_path / "moe"), work=Work(tokens=3))
    for layer in (0, 1):
        assert torch.equal(held(moe)[f"model.layers.{layer}.block_sparse_moe.gate.weight"], rows[layer])
    assert moe.work.tokens == 3
    save_file({"rows": rows[:, :1].clone()}, path)
    with pytest.raises(ValueError, match=r"shape \(2, 1, 32\) instead of \(2, 2, 32\)"):
        assemble(given, AssemblePhase(), path, seed=0, into=tmp_path)
    with pytest.raises(ValueError, match="no router rows were measured"):
        assemble(given, AssemblePhase(), None, seed=0, into=tmp_path)


def test_expert_difference_by_hand(tmp_path: Path) -> None:
    given = students(tmp_path, 3)
    moe = assemble(given, RANDOM, None, seed=0, into=made(tmp_path / "moe"))
    flat = [torch.cat([t.flatten() for n, t in held(s).items() if ".layers.1.mlp." in n]) for s in given]
    pairs = [
        2 * (a - b).norm() / (a.norm() + b.norm())
        for a, b in ((flat[0], flat[1]), (flat[0], flat[2]), (flat[1], flat[2]))
    ]
    assert expert_difference(moe.folder)[1] == pytest.approx(float(sum(pairs) / 3), rel=1e-5)
    single = upcycle(given[0], 1, AssemblePhase(router="random", top_k=1), seed=0, into=made(tmp_path / "one"))
    assert expert_difference(single.folder) == [0.0, 0.0]
    with pytest.raises(ValueError, match="holds a llama, which has no experts"):
        expert_difference(given[0].folder)


def test_what_cannot_be_assembled_is_refused(tmp_path: Path) -> None:
    given = students(tmp_path, 2)
    foreign = given[1].model_copy(update={"lineage": "llama-other"})
    with pytest.raises(ValueError, match="students 0 and 1 are of different lineages"):
        assemble([given[0], foreign], RANDOM, None, seed=0, into=tmp_path)
    with pytest.raises(ValueError, match="no students"):
        assemble([], RANDOM, None, seed=0, into=tmp_path)
    wider = pico_checkpoint("llama", tmp_path / "wide", ffn=96).model_copy(update={"lineage": given[0].lineage})
    with pytest.raises(ValueError, match="tensors of different names, shapes or dtypes"):
        assemble([given[0], wider], RANDOM, None, seed=0, into=tmp_path)
    gpt2 = pico_checkpoint("gpt2", tmp_path / "gpt2")
    with pytest.raises(
        ValueError, match="no MoE is assembled from gpt2 models: choose a base of type llama, mistral, qwen2"
    ):
        assemble([gpt2, gpt2], RANDOM, None, seed=0, into=tmp_path)


def test_moe_config_carries_or_refuses() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    dense = LlamaConfig(rms_norm_eps=1e-4, hidden_act="gelu", rope_parameters=rope, head_dim=64, pretraining_tp=2)
    layout = plan(RANDOM, clusters=4, channels=dense.intermediate_size)
    merged = moe_config(TARGETS["mixtral"], dense, layout)
    assert (merged.rms_norm_eps, merged.hidden_act, merged.head_dim) == (1e-4, "gelu", 64)
    assert merged.rope_parameters == dense.rope_parameters
    assert merged.sliding_window is None
    for field in ("attention_bias", "mlp_bias", "some_new_trick"):
        with pytest.raises(ValueError, match=f"sets {field} to True, which a mixtral cannot carry"):
            moe_config(TARGETS["mixtral"], LlamaConfig(**{field: True}), layout)


def test_merge_measures_the_router_on_what_clusters_know(tmp_path: Path) -> None:
    given, folder = students(tmp_path, 2), made(tmp_path / "transfer")
    texts = ("the lazy dog", "amber and jade")
    documents = [
        TransferDocument(id=f"{i}-{n}", domain="x", answer=text * (n + 1), kind="sampled", cluster=i)
        for i, text in enumerate(texts)
        for n in range(2)
    ]
    write_jsonl(folder / "documents.jsonl", documents)
    transfer = TransferSet(folder=folder, counts={}, per_cluster=(2, 2), by_writer={}, private_text_risk=True)
    run = Runtime(workers=0)
    moe = merge(given, transfer, AssemblePhase(), seed=0, into=made(tmp_path / "moe"), runtime=run)
    assert sorted(path.name for path in moe.folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "record.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    passes = 2 * sum(1 + len(pico_tokenizer()(document.text).input_ids) for document in documents)
    assert moe.work == Work(tokens=passes, forward=passes * given[0].active_parameters)
    assert Checkpoint.load(moe.folder) == moe
    with torch.inference_mode():
        told = open_model(moe.folder)
        chosen: list[Tensor] = []
        gate = told.get_submodule("model.layers.1.mlp.gate")
        gate.register_forward_hook(lambda _m, _i, output: chosen.append(output[0].softmax(-1)))
        for text in texts:
            told(torch.tensor([[0, *pico_tokenizer()(text).input_ids]]))
    own = [float(part[1:, cluster].mean()) for cluster, part in enumerate(chosen)]
    assert min(own) > 0.5  # of two experts
    assert json.loads((moe.folder / "config.json").read_text())["dtype"] == "float32"
    plain = merge(given, transfer, RANDOM, seed=0, into=made(tmp_path / "random"), runtime=run)
    assert plain.work == Work()
    assert open_config(plain.folder).model_type == "mixtral"
