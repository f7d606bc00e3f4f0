import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from deepfusion import adapters, precision
from deepfusion.checkpoints import open_model
from deepfusion.config import LogitsObjective, LoRA, Runtime, Training, VAAObjective
from deepfusion.data.batches import Schedule, collate
from deepfusion.data.lessons import Lesson
from deepfusion.families import family
from deepfusion.objectives import Objective, Predictions, build_objective
from deepfusion.progress import PROGRESS
from deepfusion.routing import routers
from deepfusion.training import COMPLETE, SCRATCH, Fit, Learner, fit, run
from pico import pico

ALWAYS, NEVER = Runtime(checkpoint_seconds=1e-9), Runtime(checkpoint_seconds=1e9)
TRAINING = Training(learning_rate=1e-2, context=16, rows=2, warmup=0.1)
STEPS = 110  # so that a line of the loss curve is the mean of two steps


class Interrupted(Exception):  # noqa: N818  (as from outside)
    pass


class Interrupting(Objective):
    """An objective that the power fails at some forward pass, counted from 1."""

    def __init__(self, inner: Objective, at: int | None) -> None:
        super().__init__()
        self.inner, self.left = inner, at
        self.needs_hidden_states = inner.needs_hidden_states

    def forward(
        self, batch: Mapping[str, Tensor], predictions: Predictions, hidden_states: tuple[Tensor, ...] | None = None
    ) -> dict[str, Tensor]:
        if self.left is not None and self.training:
            self.left -= 1
            if not self.left:
                raise Interrupted
        return self.inner(batch, predictions, hidden_states)


def text(count: int = 12, seed: int = 0) -> list[Lesson]:
    """Sentences over a few words, each of which always follows the same one."""
    made = np.random.default_rng(seed)
    result: list[Lesson] = []
    for _ in range(count):
        ids = [0, *((int(made.integers(0, 8)) + np.arange(int(made.integers(4, 9)))) % 8 + 40).tolist(), 0]
        result.append(Lesson(np.array(ids, np.int64), np.array([0.0] + [1.0] * (len(ids) - 1), np.float32)))
    return result


def trained(
    folder: Path,
    model_type: str = "llama",
    *,
    at: int | None = None,
    runtime: Runtime = NEVER,
    steps: int = STEPS,
    objective: LogitsObjective | None = None,
    training: Training = TRAINING,
    method: str = "full",
    **options: Any,
) -> tuple[PreTrainedModel, Fit]:
    """A fresh model, trained for some steps in `folder`."""
    source = folder.parent / model_type
    if not source.exists():
        # NF4 comes in blocks of 64, and beside narrow weights an adapter can do little.
        width = {"hidden": 16} if method == "full" else {"hidden": 64, "ffn": 256}
        pico(model_type, source, layers=1, heads=2, **width)
        config = json.loads((source / "config.json").read_text())
        if "resid_pdrop" in config:  # as GPT-2 has it: a resumed training must throw the same dice
            (source / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.1}))
    model = open_model(source, nf4=method == "qlora")
    if method != "full":
        adapters.attach(model, LoRA(dropout=0.1), seed=3)
    packs = family(model_type).packs
    lessons = text()
    schedule = Schedule(lessons, 1, training, packs=packs, seed=1)
    per_step = schedule.tokens
    schedule = Schedule(lessons, per_step * steps, training, packs=packs, seed=1)
    balance = options.pop("balance", 0.0)
    inner = build_objective(objective or LogitsObjective(beta=0), 16, 1, {"x": 8})
    learner = Learner(model, Interrupting(inner, at), balance=balance)
    folder.mkdir(exist_ok=True)
    return model, fit(learner, schedule, training, seed=3, into=folder, runtime=runtime, **options)


def weights(model: PreTrainedModel) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


# ── learning ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model_type", ["llama", "bloom", "mixtral"])
def test_the_loss_goes_down(model_type: str, tmp_path: Path) -> None:
    model, done = trained(tmp_path / "run", model_type, steps=40, balance=0.01 if model_type == "mixtral" else 0.0)
    assert done.losses[0][1] > 4
    assert done.losses[-1][1] < done.losses[0][1] / 2
    assert [step for step, _ in done.losses] == list(range(1, done.steps + 1))
    assert not model.training
    progress = json.loads((tmp_path / "run" / PROGRESS).read_text())
    assert progress["unit"] == "tokens"
    assert progress["total"] == pytest.approx(done.tokens)


@pytest.mark.parametrize(
    ("compute", "known", "products"),
    [
        ("float32", True, torch.float32),
        ("bfloat16", True, torch.bfloat16),
        ("bfloat16", False, torch.float32),
    ],
)
def test_low_precision_is_of_products_and_not_of_weights(
    compute: Literal["float32", "bfloat16"],
    known: bool,
    products: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And only where the processor knows it."""
    monkeypatch.setattr(precision, "knows_bfloat16", lambda _: known)
    model, told = open_model(pico("llama", tmp_path / "llama", hidden=16)), text()
    seen: set[torch.dtype] = set()
    model.get_submodule("model.layers.0.mlp.up_proj").register_forward_hook(lambda *a: seen.add(a[-1].dtype))
    training = TRAINING.model_copy(update={"compute": compute})
    learner = Learner(model, build_objective(LogitsObjective(beta=0), 16, 2, {}))
    (tmp_path / "run").mkdir()
    done = fit(learner, Schedule(told, 2000, training, packs=True, seed=1), training, seed=3, into=tmp_path / "run",
               runtime=NEVER)  # fmt: skip
    assert seen == {products}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert done.losses[-1][1] < done.losses[0][1] / 2


def test_frozen_weights_do_not_change_by_a_bit(tmp_path: Path) -> None:
    model = open_model(pico("mixtral", tmp_path / "mixtral", hidden=16))
    kind = family("mixtral")
    before = weights(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kind.role(name) != "ffn")
    learner = Learner(model, build_objective(LogitsObjective(beta=0), 16, 2, {}), balance=0.01)
    training = TRAINING.model_copy(update={"weight_decay": 0.1})
    schedule = Schedule(text(), 300, training, packs=True, seed=0)
    fit(learner, schedule, training, seed=0, into=tmp_path, runtime=NEVER)
    after = weights(model)
    assert {kind.role(name) for name in before if before[name] == after[name]} == {"ffn"}
    assert {kind.role(name) for name in before if before[name] != after[name]} >= {"router", "attention", "embedding"}


def test_what_helps_to_train_is_not_in_the_student(tmp_path: Path) -> None:
    objective = VAAObjective(stages=1, patches=2, width=8, heads=2)
    model, _ = trained(tmp_path / "run", steps=2, objective=objective)
    assert set(model.state_dict()) == set(open_model(tmp_path / "llama").state_dict())
    learner = Learner(model, build_objective(objective, 16, 1, {"x": 8}))
    assert set(learner.state_dict()) > {f"student.{name}" for name in dict(model.named_parameters())}


def test_the_objectives_own_parameters_learn(tmp_path: Path) -> None:
    """Else features would be matched to a projection that stays random."""
    objective = build_objective(VAAObjective(stages=1, patches=2, width=8, heads=2), 32, 2, {"x": 8})
    before = [parameter.detach().clone() for parameter in objective.parameters()]
    pool = np.array([(1, 0), (2, 1)])
    features = np.random.default_rng(0).normal(size=(1, 2, 8)).astype(np.float16)
    lessons = [
        Lesson(one.ids, one.weights, pool=pool, features=features * (1 + n), lineage="x")
        for n, one in enumerate(text())
    ]
    schedule = Schedule(lessons, 200, TRAINING, packs=True, seed=0)
    learner = Learner(open_model(pico("llama", tmp_path / "llama")), objective)
    fit(learner, schedule, TRAINING, seed=0, into=tmp_path, runtime=NEVER)
    after = list(objective.parameters())
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_ownership_sends_documents_to_their_expert(tmp_path: Path) -> None:
    model = open_model(pico("mixtral", tmp_path))
    lessons = [Lesson(one.ids, one.weights, cluster=n % 4 if n < 8 else -1) for n, one in enumerate(text())]
    batch = collate([Schedule(lessons, 1, Training(rows=8, context=32), packs=True, seed=0)[0]])
    objective = build_objective(LogitsObjective(beta=0), 0, 0, {})
    with torch.inference_mode():
        plain = float(Learner(model, objective)(**batch)["loss"])
        owned = float(Learner(model, objective, ownership=1.0)(**batch)["loss"])
        assert owned - plain == pytest.approx(np.log(4), rel=0.05)  # the router knows nothing yet
        batch["cluster"].fill_(-1)
        assert float(Learner(model, objective, ownership=1.0)(**batch)["loss"]) == pytest.approx(plain)


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_and_ownership_by_hand(top_k: int, tmp_path: Path) -> None:
    """Over real tokens alone, whatever the padding: E · Σ over experts of (share of tokens that choose it) · (its mean
    probability), both over all layers; and the mean over layers of −log p(owner).
    """
    model = open_model(pico("mixtral", tmp_path, experts=3, top_k=top_k))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if family("mixtral").role(name) == "router":
                parameter.mul_(50)  # unequal enough to tell
    lessons = [Lesson(one.ids, one.weights, cluster=(0, 2, -1)[n % 3]) for n, one in enumerate(text(5))]
    batch = collate([[lessons[:3], lessons[3:4]]])  # two rows, the second of them mostly padding
    probabilities: list[Tensor] = []
    hooks = [
        router.register_forward_hook(lambda _m, _i, output: probabilities.append(output[0].double().softmax(-1)))
        for router in routers(model)
    ]
    objective = build_objective(LogitsObjective(beta=0), 0, 0, {})
    with torch.inference_mode():
        plain = float(Learner(model, objective)(**batch)["loss"])
        probabilities.clear()
        balanced = float(Learner(model, objective, balance=1.0)(**batch)["loss"]) - plain
        owned = float(Learner(model, objective, ownership=1.0)(**batch)["loss"]) - plain
    for hook in hooks:
        hook.remove()
    layers, real = probabilities[:2], (batch["document"] >= 0).flatten()
    assert 0 < int(real.sum()) < len(real)
    chosen, mean = [0.0] * 3, [0.0] * 3
    for layer in layers:
        for row in layer[real].tolist():
            for expert in sorted(range(3), key=lambda e: -row[e])[:top_k]:
                chosen[expert] += 1 / (2 * int(real.sum()))
            mean = [m + p / (2 * int(real.sum())) for m, p in zip(mean, row, strict=True)]
    assert sum(chosen) == pytest.approx(top_k)
    assert balanced == pytest.approx(3 * sum(c * m for c, m in zip(chosen, mean, strict=True)), rel=1e-3)
    assert abs(balanced - top_k) > 0.01  # what even choices would give
    owner = batch["cluster"].flatten()
    votes = [-layer[owner >= 0].log()[range(int((owner >= 0).sum())), owner[owner >= 0]].mean() for layer in layers]
    assert owned == pytest.approx(float(sum(votes)) / 2, rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_learns_beside_frozen_weights(method: str, tmp_path: Path) -> None:
    model, done = trained(tmp_path / "run", method=method)
    assert done.losses[-1][1] < done.losses[0][1] - 0.5
    before = open_model(tmp_path / "llama", nf4=method == "qlora").state_dict()
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer", "")]), name


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "mixtral", "gemma3_text"])
def test_layers_worked_out_twice_give_the_same_bits(model_type: str, tmp_path: Path) -> None:
    """GPT-2 with dropout: the second time must throw the same dice."""
    balance = 0.01 if model_type == "mixtral" else 0.0
    twice = TRAINING.model_copy(update={"gradient_checkpointing": True})
    plain = trained(tmp_path / "plain", model_type, steps=20, balance=balance)
    again = trained(tmp_path / "again", model_type, steps=20, balance=balance, training=twice)
    assert (weights(again[0]), again[1]) == (weights(plain[0]), plain[1])
    assert not again[0].is_activation_checkpointing


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_too(method: str, tmp_path: Path) -> None:
    twice = TRAINING.model_copy(update={"gradient_checkpointing": True})
    plain = trained(tmp_path / "plain", method=method, steps=20)
    again = trained(tmp_path / "again", method=method, steps=20, training=twice)
    assert (weights(again[0]), again[1]) == (weights(plain[0]), plain[1])


def test_hidden_states_are_counted_once_although_worked_out_twice(tmp_path: Path) -> None:
    """As features are matched to them."""
    batch = collate([Schedule(text(), 1, TRAINING, packs=True, seed=0)[0]])
    gradients: list[dict[str, bytes]] = []
    for twice in (False, True):
        model = open_model(pico("llama", tmp_path)).train()
        if twice:
            model.activation_checkpointing_enable()
        states = run(model, batch, hidden_states=True).hidden_states
        assert states is not None
        assert len(states) == 3
        torch.stack(states).square().mean().backward()
        gradients.append({n: p.grad.numpy().tobytes() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0] == gradients[1]
    assert len(gradients[0]) > 10


# ── going on ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_a_resumed_training_gives_the_same_bits(model_type: str, tmp_path: Path) -> None:
    """Twice interrupted, at steps that no line of the loss curve ends at."""
    balance = 0.01 if model_type == "mixtral" else 0.0
    model, done = trained(tmp_path / "undisturbed", model_type, balance=balance)
    folder = tmp_path / "disturbed"
    for at in (36, 42):  # the second time counted from where it went on, after step 34
        with pytest.raises(Interrupted):
            trained(folder, model_type, at=at, runtime=ALWAYS, balance=balance)
    assert [path.name for path in (folder / SCRATCH).iterdir()] == ["checkpoint-74"]
    resumed, again = trained(folder, model_type, balance=balance)
    assert weights(resumed) == weights(model)
    assert again == done
    if model_type == "mixtral":
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_resumed_adapter_has_the_same_bits(method: str, tmp_path: Path) -> None:
    """And what is kept to go on from is the adapter: not the frozen weights, in four bits or not."""
    model, done = trained(tmp_path / "undisturbed", method=method)
    folder = tmp_path / "disturbed"
    with pytest.raises(Interrupted):
        trained(folder, method=method, at=60, runtime=ALWAYS)
    [kept] = (folder / SCRATCH).glob("checkpoint-*/model.safetensors")
    assert {name.rsplit(".", 3)[1] for name in load_file(kept)} == {"lora_A", "lora_B"}
    resumed, again = trained(folder, method=method)
    assert (weights(resumed), again) == (weights(model), done)


def test_half_a_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    model, done = trained(tmp_path / "undisturbed", steps=20)
    folder = tmp_path / "disturbed"
    with pytest.raises(Interrupted):
        trained(folder, at=9, runtime=ALWAYS, steps=20)
    whole = folder / SCRATCH / "checkpoint-8"
    assert (whole / COMPLETE).exists()
    half = folder / SCRATCH / "checkpoint-11"
    half.mkdir()
    (half / "trainer_state.json").write_text("{")
    resumed, again = trained(folder, steps=20)
    assert not half.exists()
    assert (weights(resumed), again) == (weights(model), done)


def test_only_half_a_checkpoint_is_none(tmp_path: Path) -> None:
    model, done = trained(tmp_path / "undisturbed", steps=10)
    (tmp_path / "disturbed" / SCRATCH / "checkpoint-5").mkdir(parents=True)
    resumed, again = trained(tmp_path / "disturbed", steps=10)
    assert (weights(resumed), again) == (weights(model), done)


# ── until held-out text no longer improves ────────────────────────────────────────────────────────────────────────────


def stopping(folder: Path, **options: Any) -> tuple[PreTrainedModel, Fit]:
    """Held-out text with other successions of words: learning the training text soon makes it worse."""
    other = [Lesson(one.ids[::-1].copy(), one.weights) for one in text(seed=1)]
    heldout = Schedule(other, 1, TRAINING, packs=True, seed=0)
    return trained(folder, steps=60, heldout=heldout, patience=2, evaluations=30, **options)


def test_training_stops_and_keeps_the_best_weights(tmp_path: Path) -> None:
    model, done = stopping(tmp_path / "stopped")
    assert 6 <= done.steps < 60
    state = json.loads(next((tmp_path / "stopped" / SCRATCH).glob("*/trainer_state.json")).read_text())
    assert state["best_global_step"] == done.steps - 2 * 2  # two evaluations, two steps apart
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    learner = Learner(model, build_objective(LogitsObjective(beta=0), 0, 0, {}))
    other = [Lesson(one.ids[::-1].copy(), one.weights) for one in text(seed=1)]
    batch = collate([Schedule(other, 1, TRAINING, packs=True, seed=0)[0]])
    with torch.inference_mode():
        assert float(learner(**batch)["loss"]) == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.parametrize("after", [-3, -2, -1, 0])
def test_a_resumed_training_stops_at_the_same_step(after: int, tmp_path: Path) -> None:
    model, done = stopping(tmp_path / "undisturbed")
    folder = tmp_path / "disturbed"
    with pytest.raises(Interrupted):
        stopping(folder, at=done.steps + after, runtime=ALWAYS)
    resumed, again = stopping(folder)
    assert (weights(resumed), again) == (weights(model), done)


def test_a_training_that_was_cut_off_after_its_last_step_stops_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, done = stopping(tmp_path / "undisturbed")
    folder = tmp_path / "disturbed"

    def interrupt(*_: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr("transformers.Trainer._load_best_model", interrupt)
        with pytest.raises(Interrupted):
            stopping(folder, runtime=ALWAYS)
    resumed, again = stopping(folder)
    assert (weights(resumed), again) == (weights(model), done)
