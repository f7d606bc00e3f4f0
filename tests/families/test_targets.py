"""Every MoE that students can become, in every layout, through every question."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from deepfusion.artifacts import Checkpoint
from deepfusion.checkpoints import open_config, open_model, validate
from deepfusion.config import AssemblePhase, EvaluatePhase, LogitsObjective, Runtime, Training
from deepfusion.config.targets import KIN, PRESETS, Target, target_of
from deepfusion.data.documents import Document, Question, write_jsonl
from deepfusion.data.lessons import lessons
from deepfusion.data.tokens import Tokenizer
from deepfusion.families import TARGETS, experts, family, skeleton
from deepfusion.families.target import moe_config
from deepfusion.layouts import grouped, plan, probability
from deepfusion.phases.assemble import assemble, expert_difference, upcycle
from deepfusion.phases.evaluate import evaluate
from deepfusion.phases.report import parameter_split
from deepfusion.phases.tune import NOT_EXPERTS
from deepfusion.routing import recorded, routers, without_experts
from deepfusion.students import learn
from deepfusion.weights import WEIGHTS, shapes, stored
from pico import pico_checkpoint, pico_tokenizer

pytestmark = pytest.mark.contracts
IDS = torch.randint(1, 300, (3, 24), generator=torch.Generator().manual_seed(0))
RUN = Runtime(workers=0)
LAYERS, STUDENTS, HIDDEN, FFN, GRANULARITY = 3, 3, 32, 64, 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "coarse": {"layout": "coarse"},
    "fine_grained": {"layout": "fine_grained", "granularity": GRANULARITY, "expert_width": 20},
}


@dataclass(frozen=True)
class Case:
    target: Target
    base: str
    layout: str

    @property
    def fine(self) -> bool:
        return self.layout == "fine_grained"

    def config(self, **more: Any) -> AssemblePhase:
        top = {} if "top_k" in more else {"top_k": 1 if self.target == "deepseek" else 2}
        return AssemblePhase(target=self.target, router="random", **LAYOUTS[self.layout], **top, **more)


CASES = [Case(target, base, layout) for target, bases in KIN.items() for base in bases for layout in LAYOUTS]
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.base}-{case.target}-{case.layout}")


@pytest.fixture(scope="module", autouse=True)
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where checkpoints that several tests look at are kept."""
    folder = tmp_path_factory.mktemp("shelf")

    @cache
    def base(kind: str, seed: int = 0) -> Checkpoint:
        return pico_checkpoint(kind, folder / f"{kind}-{seed}", seed=seed, layers=LAYERS)

    @cache
    def copies(case: Case) -> Checkpoint:
        into = folder / f"{case.base}-{case.target}-{case.layout}"
        into.mkdir()
        return upcycle(base(case.base), STUDENTS, case.config(), seed=0, into=into)

    @cache
    def different(case: Case) -> tuple[list[Checkpoint], Checkpoint]:
        into = folder / f"{case.base}-{case.target}-{case.layout}-different"
        into.mkdir()
        first = base(case.base)
        given = [base(case.base, seed).model_copy(update={"lineage": first.lineage}) for seed in range(STUDENTS)]
        return given, assemble(given, case.config(), None, seed=0, into=into)

    return type(
        "Shelf", (), {"base": staticmethod(base), "copies": staticmethod(copies), "different": staticmethod(different)}
    )


def logits(folder: Path) -> Tensor:
    with torch.inference_mode():
        return open_model(folder)(IDS).logits


def preferring(case: Case, shelf: Any, into: Path, scale: float, **more: Any) -> Checkpoint:
    """Copies under a router that has preferences: rows from a file, of logits about this large."""
    rows = torch.randn(LAYERS, STUDENTS, HIDDEN, generator=torch.Generator().manual_seed(1))
    rows = scale * (rows - rows.mean(1, keepdim=True)) / HIDDEN**0.5
    save_file({"rows": rows}, into / "rows.safetensors")
    (into / "moe").mkdir()
    config = case.config(**more).model_copy(update={"router": "hidden_means"})
    return upcycle(
        shelf.base(case.base), STUDENTS, config, seed=0, into=into / "moe", router_rows=into / "rows.safetensors"
    )


@EACH
def test_equal_students_make_the_student(case: Case, shelf: Any, tmp_path: Path) -> None:
    dense = logits(shelf.base(case.base).folder)
    torch.testing.assert_close(logits(shelf.copies(case).folder), dense, rtol=0, atol=1e-5)
    sure = preferring(case, shelf, tmp_path, scale=3.0)  # whatever the router prefers
    torch.testing.assert_close(logits(sure.folder), dense, rtol=0, atol=1e-5)
    assert expert_difference(sure.folder) == [0.0] * (LAYERS - TARGETS[case.target].dense_layers)


@EACH
def test_without_renormalisation_the_error_is_as_derived(case: Case, shelf: Any, tmp_path: Path) -> None:
    """A block computes factor · P(x) · FFN(x): exactly so, and so nearly the student where P hardly depends on x."""
    if case.target == "mixtral":
        with pytest.raises(ValueError, match="a mixtral always renormalises"):
            case.config(renormalise=False)
        return
    errors: list[float] = []
    dense = logits(shelf.base(case.base).folder)
    for scale in (0.01, 0.1, 1.0):
        into = tmp_path / str(scale)
        into.mkdir()
        moe = preferring(case, shelf, into, scale, renormalise=False, top_k=1)
        errors.append(float((logits(moe.folder) - dense).abs().max()))
    model, student = open_model(moe.folder), open_model(shelf.base(case.base).folder)
    layout = plan(
        case.config(top_k=1, renormalise=False), clusters=STUDENTS, channels=FFN, shared=TARGETS[case.target].common
    )
    states = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        block, ffn = model.get_submodule("model.layers.2.mlp"), student.get_submodule("model.layers.2.mlp")
        z = block.get_submodule("gate")(states)[0][:, :: layout.granularity]
        share = layout.factor(layout.uniform()) * probability(z, layout)[:, None].float()
        shared = ffn(states) * 0
        if layout.common:  # what the shared experts have of the FFN is not weighted
            shared = block.get_submodule("shared_experts")(states)
        torch.testing.assert_close(
            block(states[None])[0], shared + share * (ffn(states) - shared), rtol=1e-4, atol=1e-6
        )
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < 2e-3 < errors[2]


@EACH
def test_transformers_opens_saves_and_generates(case: Case, shelf: Any, tmp_path: Path) -> None:
    moe = shelf.copies(case)
    validate(moe.folder)
    model, told = AutoModelForCausalLM.from_pretrained(moe.folder, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.model_type == moe.model_type == case.target
    assert type(model).__name__ == TARGETS[case.target].architecture == model.config.architectures[0]
    assert type(model).__module__.startswith("transformers.models") == TARGETS[case.target].native
    model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (moe.folder / WEIGHTS).read_bytes()
    assert (tmp_path / "config.json").read_bytes() == (moe.folder / "config.json").read_bytes()
    torch.testing.assert_close(logits(tmp_path), logits(moe.folder), rtol=0, atol=0)
    base = open_model(shelf.base(case.base).folder)
    written = [
        one.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=12, do_sample=False)
        for one in (model.eval(), base)
    ]
    assert torch.equal(*written)


# Tensors of one layer, as published checkpoints of the type name them.
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
EXPERT = ("gate_proj", "up_proj", "down_proj")
PUBLISHED: dict[str, tuple[str, ...]] = {
    # mistralai/Mixtral-8x7B-v0.1
    "mixtral": (
        *(f"{name}.weight" for name in (*ATTENTION, *PRE_NORMS, "block_sparse_moe.gate")),
        *(f"block_sparse_moe.experts.{{}}.{part}.weight" for part in ("w1", "w2", "w3")),
    ),
    # Qwen/Qwen1.5-MoE-A2.7B
    "qwen2_moe": (
        *(f"{name}.weight" for name in (*ATTENTION, *PRE_NORMS, "mlp.gate", "mlp.shared_expert_gate")),
        *(f"self_attn.{name}_proj.bias" for name in "qkv"),
        *(f"mlp.shared_expert.{part}.weight" for part in EXPERT),
        *(f"mlp.experts.{{}}.{part}.weight" for part in EXPERT),
    ),
    # Qwen/Qwen3-30B-A3B
    "qwen3_moe": (
        *(f"{name}.weight" for name in (*ATTENTION, *PRE_NORMS, "self_attn.q_norm", "self_attn.k_norm", "mlp.gate")),
        *(f"mlp.experts.{{}}.{part}.weight" for part in EXPERT),
    ),
    # allenai/FlexOlmo-7x7B-1T
    "flex_olmo": (
        *(f"{name}.weight" for name in (*ATTENTION, "self_attn.q_norm", "self_attn.k_norm", "mlp.gate")),
        *("post_attention_layernorm.weight", "post_feedforward_layernorm.weight"),
        *(f"mlp.experts.{{}}.{part}.weight" for part in EXPERT),
    ),
    # deepseek-ai/deepseek-moe-16b-base
    "deepseek": (
        *(f"{name}.weight" for name in (*ATTENTION, *PRE_NORMS, "mlp.gate")),
        *(f"mlp.shared_experts.{part}.weight" for part in EXPERT),
        *(f"mlp.experts.{{}}.{part}.weight" for part in EXPERT),
    ),
}
DENSE_LAYER = tuple(f"{name}.weight" for name in (*ATTENTION, *PRE_NORMS, *(f"mlp.{part}" for part in EXPERT)))


@EACH
def test_names_on_disk_are_the_published_ones(case: Case, shelf: Any) -> None:
    count = STUDENTS * (GRANULARITY if case.fine else 1)
    expected = {"model.embed_tokens.weight", "model.norm.weight"}  # the head is tied
    for layer in range(LAYERS):
        names = DENSE_LAYER if case.target == "deepseek" and layer == 0 else PUBLISHED[case.target]
        for name in names:
            expected |= {f"model.layers.{layer}.{name.format(expert)}" for expert in range(count)}
    assert set(shapes(shelf.copies(case).folder)) == expected


@EACH
def test_a_student_s_experts_are_its_ffn_and_the_rest_is_the_mean(case: Case, shelf: Any) -> None:
    given, moe = shelf.different(case)
    model, config = open_model(moe.folder), open_config(moe.folder)
    held = experts(config)
    states = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    common = TARGETS[case.target].common if case.fine else 0
    own = held.count // STUDENTS - common
    block = model.get_submodule("model.layers.1.mlp")
    means = {
        name: sum(stored(student.folder)[name].read() for student in given) / STUDENTS
        for name, (_, shape) in shapes(given[0].folder).items()
        if name in shapes(moe.folder)
    }
    found = {name: stored(moe.folder)[name].read() for name in means}
    assert len(means) == len(shapes(given[0].folder)) - 3 * (LAYERS - TARGETS[case.target].dense_layers)
    for name, mean in means.items():
        torch.testing.assert_close(found[name], mean, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        for number, student in enumerate(given):
            chosen = torch.tensor(list(held.of(number))[:own]).expand(5, own)
            weights = torch.full((5, own), 1 / own)  # as a router that is sure of the student gives, renormalised
            routed = block.get_submodule("experts")(states, chosen, weights)
            ffn = open_model(student.folder).get_submodule("model.layers.1.mlp")
            if not common:
                torch.testing.assert_close(routed, ffn(states), rtol=1e-4, atol=1e-6)
                continue
            shared = shards(ffn, states, slice(own * FFN // GRANULARITY, None))
            torch.testing.assert_close(routed, ffn(states) - shared, rtol=1e-4, atol=1e-6)
    if case.target == "qwen2_moe":
        assert not block.get_submodule("shared_expert")(states).any()
        assert 0 < block.get_submodule("shared_expert_gate")(states).abs().min() < 0.1  # of zeros it would be 0 / 0
        assert (block.get_submodule("shared_expert.gate_proj").weight != 0).any()


def shards(ffn: torch.nn.Module, states: Tensor, channels: slice) -> Tensor:
    gate, up, down = (ffn.get_submodule(part).weight for part in EXPERT)
    inner = torch.nn.functional.silu(states @ gate[channels].T) * (states @ up[channels].T)
    return inner @ down[:, channels].T


def test_shared_experts_are_the_mean_s_last_shards_and_spare_ones_what_it_lacks(shelf: Any) -> None:
    case = Case("deepseek", "llama", "fine_grained")
    given, moe = shelf.different(case)
    on_disk = stored(moe.folder)
    down = [stored(student.folder)["model.layers.2.mlp.down_proj.weight"].read() for student in given]
    mean = sum(down) / STUDENTS
    shared = on_disk["model.layers.2.mlp.shared_experts.down_proj.weight"].read()
    step = FFN // GRANULARITY
    for number in (0, 1):
        columns = slice((2 + number) * step, (3 + number) * step)
        torch.testing.assert_close(shared[:, 20 * number : 20 * number + step], mean[:, columns])
        assert not shared[:, 20 * number + step : 20 * (number + 1)].any()
        for student in range(STUDENTS):
            name = f"model.layers.2.mlp.experts.{student * GRANULARITY + 2 + number}.down_proj.weight"
            spare = on_disk[name].read()[:, :step] / 2  # two shards are chosen together
            torch.testing.assert_close(spare, down[student][:, columns] - mean[:, columns], rtol=1e-4, atol=1e-6)
    with torch.inference_mode():
        model = open_model(moe.folder)
        with recorded(model) as routed:
            model(IDS)
    assert all((chosen % GRANULARITY < 2).all() for _, _, chosen in routed)


@EACH
def test_tuning_leaves_experts_and_lowers_the_loss(case: Case, shelf: Any, tmp_path: Path) -> None:
    moe = shelf.copies(case)
    documents = [Document(id=str(n), domain="x", answer=f"the jade fox number {n % 3}") for n in range(12)]
    text = lessons(documents, Tokenizer(pico_tokenizer()), Training(context=32), cluster=1)
    training = Training(learning_rate=1e-2, context=32, rows=2, schedule="constant", warmup=0)
    tuned = learn(
        moe, text, LogitsObjective(beta=0, focus=0), training, tokens=1500, seed=0, into=tmp_path, runtime=RUN,
        trains=NOT_EXPERTS, balance=0.01, ownership=0.1,
    )  # fmt: skip
    assert tuned.losses[-1][1] < 0.8 * tuned.losses[0][1]
    kind, before, after = family(case.target), stored(moe.folder), stored(tuned.folder)
    changed = {kind.role(name) for name in before if not torch.equal(before[name].read(), after[name].read())}
    shared = {"shared"} if case.target in ("qwen2_moe", "deepseek") else set[str]()
    assert changed == {"embedding", "attention", "norm", "router"} | shared
    ids = torch.tensor([[0, *pico_tokenizer()(documents[0].answer).input_ids]])
    votes = [float(owners(folder, ids)[:, 1].mean()) for folder in (moe.folder, tuned.folder)]
    assert votes[0] + 0.1 < votes[1]


def owners(folder: Path, ids: Tensor) -> Tensor:
    """The router's probability of each student, [tokens, students], in the last layer."""
    model = open_model(folder)
    with torch.inference_mode(), recorded(model) as routed:
        model(ids)
    return grouped(routed[-1][0], STUDENTS).softmax(-1)


@EACH
def test_a_student_can_be_taken_out(case: Case, shelf: Any) -> None:
    moe = shelf.copies(case)
    model, held = open_model(moe.folder), experts(open_config(moe.folder))
    assert (held.clusters, len(routers(model))) == (STUDENTS, LAYERS - TARGETS[case.target].dense_layers)
    assert held.spare == ([3, 2, 7, 6, 11, 10] if case.target == "deepseek" and case.fine else [])
    gone = [*held.of(1), *held.spare]
    with torch.inference_mode(), without_experts(model, gone), recorded(model) as routed:
        without = model(IDS).logits
    assert not any(torch.isin(chosen, torch.tensor(gone)).any() for _, _, chosen in routed)
    torch.testing.assert_close(without, logits(moe.folder), rtol=0, atol=1e-5)  # the others are its equals


@EACH
def test_routing_and_parameters_are_reported(case: Case, shelf: Any, tmp_path: Path) -> None:
    moe = shelf.different(case)[1]
    asked = [
        Question(id=str(n), domain="ab"[n % 2], prompt="The fox", answer=" runs far", private=True) for n in range(4)
    ]
    write_jsonl(tmp_path / "asked.jsonl", asked)
    scores = evaluate(
        moe, tmp_path / "asked.jsonl", EvaluatePhase(), system="deepfusion", item=None, into=tmp_path, runtime=RUN,
        routing=True,
    )  # fmt: skip
    assert scores.routing is not None
    facts, held = scores.routing, experts(open_config(moe.folder))
    assert (facts["experts"], facts["clusters"]) == (held.count, STUDENTS)
    assert {cell["expert"] for cell in facts["removal"]} == set(range(STUDENTS))
    assert facts["expert_difference"]["layers"] == pytest.approx(expert_difference(moe.folder), rel=1e-4)
    assert all(sum(layer) == pytest.approx(1) for layer in facts["load"])
    split = parameter_split(moe.folder)
    assert sum(part.parameters for part in split) == moe.parameters
    matrices = sum(part.used for part in split if part.name != "norms")
    biases = LAYERS * 3 * HIDDEN if case.target == "qwen2_moe" else 0
    assert matrices == moe.active_parameters + biases


@EACH
def test_active_parameters_by_hand(case: Case, shelf: Any) -> None:
    top, attention, ffn = (1 if case.target == "deepseek" else 2), 4 * 32 * 32, 3 * 32 * 64
    routed, each = (top * 4 * 3 * 32 * 20, 12) if case.fine else (top * ffn, 3)  # shards of 16 channels, padded to 20
    layer = attention + routed + each * 32
    expected = 320 * 32 + 3 * layer
    if case.target == "qwen2_moe":
        expected += 3 * (ffn + 32)
    if case.target == "deepseek":  # the first layer is dense; two of four shards are shared
        shared = 2 * 3 * 32 * 20 if case.fine else ffn
        routed = 2 * 3 * 32 * 20 if case.fine else ffn
        expected = 320 * 32 + 3 * attention + ffn + 2 * (routed + shared + each * 32)
    assert shelf.copies(case).active_parameters == expected


# ── published shapes ──────────────────────────────────────────────────────────────────────────────────────────────────

BASES = {
    "qwen1.5-moe-a2.7b": Qwen2Config(
        hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16, intermediate_size=5504,
        vocab_size=151936,
    ),
    "deepseek-moe-16b": LlamaConfig(
        hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, intermediate_size=10944, vocab_size=102400,
    ),
}  # fmt: skip
SAID = {
    "qwen1.5-moe-a2.7b": {
        "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "norm_topk_prob": False,
        "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1, "model_type": "qwen2_moe",
    },
    "deepseek-moe-16b": {
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
        "intermediate_size": 10944, "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": False,
        "scoring_func": "softmax", "rope_theta": 10000, "rope_scaling": None, "model_type": "deepseek",
    },
}  # fmt: skip


@pytest.mark.parametrize("preset", BASES)
def test_presets_have_the_published_size(preset: Any) -> None:
    config, dense = AssemblePhase(preset=preset), BASES[preset]
    moe = TARGETS[target_of(dense.model_type, config.target)]
    layout = plan(config, clusters=PRESETS[preset][0], channels=dense.intermediate_size, shared=moe.common)
    merged = moe_config(moe, dense, layout, config.shared_width)
    parameters = sum(parameter.numel() for parameter in skeleton(merged).parameters())
    assert round(parameters / 1e9, 1) == {"qwen1.5-moe-a2.7b": 14.3, "deepseek-moe-16b": 16.4}[preset]
    said = merged.to_dict()
    assert {field: said[field] for field in SAID[preset]} == SAID[preset]
    assert config.router_scale == 0.1


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("target", "dense", "message"),
    [
        ("mixtral", LlamaConfig(attention_bias=True), "sets attention_bias to True, which a mixtral cannot carry"),
        ("qwen3_moe", Qwen3Config(use_sliding_window=True), "sliding windows, which a qwen3_moe cannot carry"),
        ("qwen2_moe", Qwen2Config(some_new_trick=1), "sets some_new_trick to 1, which a qwen2_moe cannot carry"),
        ("deepseek", LlamaConfig(head_dim=64), "sets head_dim to 64, which a deepseek cannot carry"),
        ("deepseek", LlamaConfig(mlp_bias=True), "sets mlp_bias to True, which a deepseek cannot carry"),
        ("flex_olmo", LlamaConfig(), "a flex_olmo is assembled from olmo2 models, not llama"),
    ],
)
def test_what_cannot_be_carried_is_refused(target: str, dense: Any, message: str) -> None:
    layout = plan(AssemblePhase(), clusters=2, channels=dense.intermediate_size)
    with pytest.raises(ValueError, match=message):
        moe_config(TARGETS[target], dense, layout)


def test_sliding_windows_are_carried() -> None:
    layout = plan(AssemblePhase(), clusters=2, channels=64)
    assert moe_config(TARGETS["mixtral"], MistralConfig(sliding_window=7), layout).sliding_window == 7
    dense = Qwen2Config(use_sliding_window=True, sliding_window=7, num_hidden_layers=4, max_window_layers=2)
    merged = moe_config(TARGETS["qwen2_moe"], dense, layout)
    assert (merged.sliding_window, merged.layer_types) == (7, dense.layer_types)


def test_a_narrow_shared_expert_is_refused(shelf: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shared_width is 8, but the base's FFN has 64 channels"):
        upcycle(shelf.base("qwen2"), 2, AssemblePhase(router="random", shared_width=8), seed=0, into=tmp_path)
