"""What the doctor says of a recipe as a whole, and that it finds everything at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deepfusion import doctor, pipeline
from deepfusion.config import Recipe, Runtime
from deepfusion.doctor import Check, Diagnosis, machine, models
from deepfusion.planner import PlannedStep
from deepfusion.steps import STEPS
from deepfusion.weights import Part, tensors, write
from pico import normalise, pico
from tiny import TREE, recipe

ONE = Runtime(workers=1)
FILLER = "The clerk signs a deed in the hall before noon, and the cook cuts leek for the soup. "
Rows = list[dict[str, Any]]


def rows(*more: dict[str, Any]) -> Rows:
    """Twelve rows of two domains, and what else is wanted."""
    held = [
        {"id": f"{split}-{n}", "domain": "law" if n % 2 else "food", "split": split, "question": f"Who {split} {n}?",
         "answer": f"Ann, of number {n}.", "group": f"{split}-{n}"}
        for split in ("private", "public", "test") for n in range(4)
    ]  # fmt: skip
    filler = [{"domain": "law", "split": "private", "question": f"Say {n}.", "answer": FILLER} for n in range(24)]
    known = {row["id"]: row for row in (*held, *(row for row in more if "id" in row))}
    return [*known.values(), *filler, *(row for row in more if "id" not in row)]


@pytest.fixture
def given(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe with checkpoints and rows of real text."""

    def make(text: Rows | None = None, *overrides: str) -> Recipe:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text or rows()))
        for name, kind in (("base", "llama"), ("own", "gpt2")):
            if not (tmp_path / name).exists():
                pico(kind, tmp_path / name, hidden=16, layers=1, heads=2)
        source = {"kind": "files", "sources": [{"path": "rows.jsonl"}], "heldout_share": 0.0}
        models = {"base": {"path": "base"}, "ancestors": {"own": {"path": "own"}}}
        tree = TREE | {"data": {"source": source, "partition": {"devices": 2}}, "models": models, "name": "given"}
        (tmp_path / "given.yaml").write_text(json.dumps(tree))
        return Recipe.load(tmp_path / "given.yaml", overrides)

    return make


def examine(recipe: Recipe, out: Path | None = None, runtime: Runtime = ONE) -> Diagnosis:
    return doctor.examine(recipe, out or Path("nowhere"), runtime, timed=False)


def told(found: Diagnosis, state: str) -> dict[str, Check]:
    return {check.subject: check for check in found.checks if check.state == state}


def test_nothing_is_wrong_with_a_recipe_that_runs(tmp_path: Path) -> None:
    found = examine(recipe(), tmp_path / "out")
    assert found.state != "problem"
    assert found.seconds is None
    assert not (tmp_path / "out").exists()
    phases = [cost.phase for cost in found.costs]
    assert phases == [phase for phase in STEPS if phase in phases if phase != "take"]
    assert {"device", "write", "joint", "branch", "assemble", "tune", "evaluate", "centralized"} <= set(phases)


def test_given_models_and_text(given: Callable[..., Recipe]) -> None:
    found = examine(given())
    assert told(found, "problem") == {}
    own = next(check for check in found.checks if check.subject == "models.ancestors.own")
    assert own.fact == (
        "gpt2, 10.5 k parameters, float32, one file, head tied to the embedding, context 128, vocabulary 320"
    )
    assert "no test question is about a private group" in told(found, "warning")["private_group"].fact


def test_everything_that_is_missing_or_broken_is_told_at_once(given: Callable[..., Recipe], tmp_path: Path) -> None:
    chosen = given()
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "own" / "model.safetensors").unlink()
    held = {name: tensor.clone() for name, tensor in tensors(tmp_path / "base")}
    held["model.norm.weight"][0] = torch.nan
    write(tmp_path / "base", [Part.of(*item) for item in held.items()])
    problems = told(examine(chosen), "problem")
    assert set(problems) == {"data.source.sources.0.path", "models.base", "models.ancestors.own"}
    assert "rows.jsonl does not exist: set it, as with --set" in problems["data.source.sources.0.path"].fact
    assert "tensor model.norm.weight holds NaN or infinity" in problems["models.base"].fact
    assert "has no model.safetensors" in problems["models.ancestors.own"].fact


def test_a_missing_model_does_not_hide_the_others(given: Callable[..., Recipe], tmp_path: Path) -> None:
    problems = told(examine(given(None, "models.ancestors.gone.path=gone", "device.encoder=none")), "problem")
    assert set(problems) == {"models.ancestors.gone.path", "device.encoder"}


def test_a_broken_encoder_is_told(given: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    problems = told(examine(given(None, f"device.encoder={tmp_path / 'none'}")), "problem")
    assert "is not a checkpoint folder: it has no config.json" in problems["device.encoder"].fact


def test_a_base_that_cannot_become_experts_is_told(given: Callable[..., Recipe], tmp_path: Path) -> None:
    chosen = given(None, "models.base.path=other")
    pico("opt", tmp_path / "other", hidden=16, layers=1, heads=2)
    moved = chosen.models.base.model_copy(update={"path": str(tmp_path / "other")})
    found = examine(chosen.model_copy(update={"models": chosen.models.model_copy(update={"base": moved})}))
    assert found.costs == ()
    problem = told(found, "problem")["models.base"]
    assert problem.fact.startswith("no MoE is assembled from opt models: choose a base of type llama, ")
    assert problem.advice == "choose another model as models.base"
    assert any(check.part == "lineages" for check in found.checks)  # what does not depend on it is looked at


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"split": "public", "question": "?", "answer": "Ann.", "group": "private-1"}, "yet this row is public"),
        ({"split": "private", "question": "?"}, "has no 'answer'"),
        ({"split": "other", "question": "?", "answer": "Ann."}, "has split 'other'"),
    ],
)
def test_a_row_that_stops_a_run_is_told_with_its_line(
    row: dict[str, Any], message: str, given: Callable[..., Recipe]
) -> None:
    marked = {"id": "private-1", "domain": "law", "split": "private", "question": "Who?", "answer": "Bo.",
              "group": "private-1", "private_group": True}  # fmt: skip
    problem = told(examine(given(rows(marked, {"domain": "law"} | row))), "problem")["data"]
    assert message in problem.fact
    assert "rows.jsonl, line 37" in problem.fact


def test_an_answer_that_is_too_long_is_told_with_its_line(given: Callable[..., Recipe]) -> None:
    long = {"domain": "law", "split": "private", "question": "Who?", "answer": "Ann! " * 80}
    problems = told(examine(given(rows(long))), "problem")
    assert set(problems) == {"device.training.context", "distill.training.context"}  # the latter: centralized
    fact = problems["device.training.context"].fact
    assert fact.startswith("holds 94 tokens of an answer; too long for it: one document, the longest ")
    assert "rows.jsonl, line 37 with " in fact
    assert "tokens of models.ancestors.own" in fact
    assert problems["device.training.context"].advice.startswith("leave such rows out by data.source.max_answer_bytes")


def test_what_fits_a_larger_context_says_which(given: Callable[..., Recipe]) -> None:
    long = {"domain": "law", "split": "public", "question": "Who?", "answer": "x" * 100}
    problems = told(examine(given(rows(long))), "problem")
    assert set(problems) == {"device.training.context", "distill.training.context", "tune.training.context"}
    assert problems["tune.training.context"].advice.startswith("raise it to 10")


def test_a_test_answer_longer_than_a_models_context_is_told(given: Callable[..., Recipe]) -> None:
    long = {"domain": "law", "split": "test", "question": "Who?", "answer": "x" * 200}
    assert set(told(examine(given(rows(long))), "problem")) == {"context of the models"}


def test_text_that_a_tokenizer_cannot_spell_is_told(given: Callable[..., Recipe], tmp_path: Path) -> None:
    odd = {"domain": "law", "split": "private", "question": "Who?", "answer": "Re\u0301ne\u0301."}
    chosen = given(rows(odd))
    normalise(tmp_path / "own")
    problem = told(examine(chosen), "problem")["models.ancestors.own"]
    assert problem.fact.startswith("its tokenizer cannot spell one document, the first ")
    assert "rows.jsonl, line 37: " in problem.fact


def test_private_questions_that_the_public_text_asks_are_told(given: Callable[..., Recipe]) -> None:
    private = {"split": "private", "domain": "law", "group": "deed", "private_group": True}
    asked = {"question": "Who  signs the deed?", "answer": "Bo."}
    text = rows(private | asked, {"split": "test", "domain": "law", "group": "deed"} | asked,
                {"split": "public", "domain": "law", "question": "Who signs the Deed?", "answer": "Bo."})  # fmt: skip
    warning = told(examine(given(text)), "warning")["private_group"]
    assert warning.fact.startswith("1 private test questions stand in the public text too, the first as ")
    assert "line 39" in warning.fact


def test_devices_with_hardly_any_text_are_told(given: Callable[..., Recipe]) -> None:
    little = [row for row in rows() if row.get("answer") != FILLER]
    warnings = told(examine(given(little)), "warning")
    assert {"device-00", "device-01"} <= set(warnings)
    assert "too little to learn from" in warnings["device-00"].fact


def test_more_clusters_than_the_text_names_devices_are_told(given: Callable[..., Recipe]) -> None:
    """Which the recipe alone cannot tell."""
    named = [row | {"device": "a"} for row in rows()]
    problem = told(examine(given(named, "data.partition={mode: given}")), "problem")["cluster.k"]
    assert problem.fact == "2 clusters cannot be made of 1 devices"


def test_text_longer_than_models_may_write_is_told(given: Callable[..., Recipe]) -> None:
    warning = told(examine(given(None, "transfer.max_new_tokens=8")), "warning")["transfer.max_new_tokens"]
    assert warning.fact.startswith("28 of 28 private texts are longer than 8 tokens")
    assert "transfer.max_new_tokens" not in told(examine(given(None, "transfer.max_new_tokens=200")), "warning")
    only = examine(given(None, "transfer={max_new_tokens: 8, kinds: [public, answered]}"))
    assert "transfer.max_new_tokens" not in told(only, "warning")


def test_trainings_of_a_few_steps_are_told() -> None:
    found = told(examine(recipe("distill.budget_tokens=500")), "warning")
    assert "joint" in found
    assert found["joint"].advice == "raise distill.budget_tokens, or lower distill.training.rows"


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_are_told_by_their_size(method: str, given: Callable[..., Recipe]) -> None:
    """Rank 2 on four matrices of a GPT-2 of width 16 (three in one, one, and two of 16 by 64)."""
    found = examine(given(None, f"device={{method: {method}, upload: adapter, lora: {{rank: 2}}}}"))
    if method == "qlora":
        problem = told(found, "problem")["models.ancestors.own"]
        assert problem.fact.startswith("weights in four bits come in blocks of 64, and ")
        assert problem.advice == "set device.method: lora"
        return
    own = [check for check in found.checks if check.subject == "models.ancestors.own"]
    assert own[1].fact == "512 of 10.5 k weights are trained, in adapters of rank 2"
    costs = {cost.phase: cost for cost in found.costs}
    assert costs["device"].disk_bytes == 2 * 4 * 512
    assert costs["materialise"].steps == 2


def test_a_device_that_is_none_of_the_fleets_is_told() -> None:
    problems = told(examine(recipe("device.own={tablet: {method: lora}}")), "problem")
    assert set(problems) == {"device.own"}
    assert problems["device.own"].fact.startswith("device.own names tablet, and the devices are device-00, ")


def test_four_bits_need_their_package(given: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "is_bitsandbytes_available", lambda: False)
    problem = told(examine(given(None, "device.method=qlora")), "problem")["models.ancestors.own"]
    assert problem.fact == "weights in four bits need bitsandbytes"


def test_a_judge_and_what_is_sent_to_it_are_told(given: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADER_KEY", raising=False)
    judge = "judge={url: 'http://localhost:1/v1', model: grader, key: GRADER_KEY}"
    [check] = [check for check in examine(given(None, judge)).checks if check.subject == "judge"]
    assert check.state == "problem"
    assert "GRADER_KEY, which is not set" in check.fact
    monkeypatch.setenv("GRADER_KEY", "secret")
    found = examine(given(None, judge))
    [check] = [check for check in found.checks if check.subject == "judge"]
    assert (check.state, "sent to http://localhost:1/v1" in check.fact) == ("ok", True)
    [cost] = [cost for cost in found.costs if cost.phase == "judge"]
    assert cost.steps == 2 + len(Recipe.load("demo").evaluate.references)
    assert not [check for check in examine(given()).checks if check.subject == "judge"]


def test_what_is_done_already_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = [PlannedStep("data", None, "done", ""), PlannedStep("device", "d", "run", "")]
    monkeypatch.setattr(pipeline, "plan", lambda *_: done)
    fact = told(examine(recipe(), tmp_path), "ok")["--out"].fact
    assert fact == f"{tmp_path} has 1 steps of this run already: they cost nothing again"


def test_a_machine_that_is_too_small_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    look = machine.look
    monkeypatch.setattr(
        machine, "look", lambda *of: replace(look(*of), memory_bytes=100_000_000, disk_bytes=1000, cores=2)
    )
    found = examine(recipe(), runtime=Runtime(workers=2, threads=4))
    assert {"memory", "disk"} == set(told(found, "problem"))
    assert told(found, "warning")["--workers"].fact == "2 workers of 4 threads share 2 cores"


def test_an_accelerator_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = doctor.examine(recipe(), Path("nowhere"), Runtime(workers=1, accelerator="cuda"))
    assert told(found, "problem")["--accelerator"].fact == "there is no cuda accelerator on this machine"
    assert found.seconds is None
