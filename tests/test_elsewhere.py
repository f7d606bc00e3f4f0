"""Recipes whose devices are elsewhere: how they are known, planned, looked at, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepfusion import doctor, pipeline
from deepfusion.config import Recipe, Runtime
from deepfusion.elsewhere import devices_elsewhere, refuse
from deepfusion.errors import InputError
from tiny import TREE

Given = Callable[..., Recipe]


def row(split: str, number: int) -> dict[str, Any]:
    return {
        "split": split, "domain": "law", "group": f"{split == 'public'}-{number}", "private_group": split != "public",
        "question": f"Who {split} {number}?", "answer": f"Ann, of number {number}, in the hall.",
    }  # fmt: skip


@pytest.fixture
def given(tmp_path: Path) -> Given:
    """A federation's recipe, whose files have rows of some splits."""

    def make(*splits: str, **changed: Any) -> Recipe:
        rows = [row(split, number) for split in splits for number in range(6)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        source = {"kind": "files", "sources": [{"path": str(tmp_path / "rows.jsonl")}]}
        tree = TREE | {
            "data": {"source": source, "partition": {"devices": 4}},
            "evaluate": {"references": ["dense_kd"]},
        }
        return Recipe.parse(tree | {"federation": {"devices": ["north", "south", "west"], "quorum": 2}} | changed)

    return make


def test_devices_are_elsewhere_where_the_recipe_has_no_private_text(given: Given) -> None:
    assert devices_elsewhere(given("public", "test")) == ("north", "south", "west")
    assert devices_elsewhere(given("public", "test", "private")) == ()
    assert devices_elsewhere(given("public", "test", federation=None)) == ()
    assert devices_elsewhere(Recipe.load("federation")) == ()  # invents its private text


def test_a_run_says_what_to_do_instead(given: Given, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\(north, south, west\) have it.* deepfusion federation init DIR"):
        pipeline.run(given("public", "test"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_counts_the_federations_devices_and_asks_for_no_private_text(given: Given, tmp_path: Path) -> None:
    steps = {step.phase: step for step in pipeline.plan(given("public", "test"), tmp_path / "out")}
    assert "data" not in steps
    assert steps["public"].state == "run"
    assert (steps["device"].state, steps["device"].count) == ("wait", 3)
    assert "they train where they are" in steps["device"].reason
    here = {step.phase: step for step in pipeline.plan(given("public", "test", "private"), tmp_path / "out")}
    assert here["device"].count == 4
    assert "public" not in here


def test_a_plan_after_the_servers_first_steps(given: Given, tmp_path: Path) -> None:
    chosen = given("public", "test")
    pipeline.prepare(chosen, tmp_path / "out", Runtime(workers=0))
    steps = pipeline.plan(chosen, tmp_path / "out")
    assert [step.phase for step in steps if step.state == "done"] == ["public", "make", "make", "make"]
    assert not any(step.state == "run" for step in steps)
    assert next(step for step in steps if step.phase == "device").count == 3


def test_the_doctor_looks_at_the_servers_part_and_says_what_it_cannot_know(given: Given, tmp_path: Path) -> None:
    found = doctor.examine(given("public", "test"), tmp_path / "out", Runtime(workers=1), timed=False)
    assert [check.fact for check in found.checks if check.state == "problem"] == []
    facts = {check.subject: check.fact for check in found.checks if check.part == "text"}
    assert facts["data"] == "private text on 3 devices elsewhere, 6 public, 0 held out, 6 test questions; law: 6 test"
    assert facts["federation"].startswith("north, south and west have text of their own: how much, ")
    phases = {cost.phase: cost for cost in found.costs}
    assert "device" not in phases
    assert "data" not in phases
    assert phases["public"].steps == 1
    assert phases["write"].tokens > 0  # written text is as long as public text, and not of no length
    assert {check.subject for check in found.checks if check.state == "warning"} <= {"joint", "device.training"}


def test_the_doctor_says_that_a_recipe_with_private_text_is_run_here(given: Given) -> None:
    found = doctor.examine(given("public", "test", "private"), Path("nowhere"), Runtime(workers=1), timed=False)
    [fact] = [check.fact for check in found.checks if check.subject == "federation"]
    assert "looked at as a run on this machine" in fact


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"evaluate": {"references": ["btx"]}}, "evaluate.references names btx, which trains on devices' private text"),
        ({"device": {"encoder": "."}}, "a model that devices elsewhere do not have: set it to hashing"),
        ({"device": {"own": {"tablet": {}}}}, "device.own names tablet, and the devices are north, south, west"),
    ],
)
def test_what_a_federation_refuses(given: Given, changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    chosen = given("public", "test", **changed)
    for refusing in (refuse, lambda r: pipeline.prepare(r, tmp_path), lambda r: pipeline.plan(r, tmp_path)):
        with pytest.raises(InputError) as told:
            refusing(chosen)
        assert words in str(told.value)
    found = doctor.examine(chosen, Path("nowhere"), Runtime(workers=1), timed=False)
    assert any(check.state == "problem" and words in check.fact for check in found.checks)
    assert found.costs == ()


def test_private_rows_and_missing_files_are_refused(given: Given, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows.jsonl.* is private: in a federation private text is on the devices"):
        refuse(given("public", "test", "private"))
    chosen = given("public", "test")
    refuse(chosen)
    (tmp_path / "rows.jsonl").unlink()
    for refusing in (refuse, devices_elsewhere):
        with pytest.raises(InputError, match=r"data\.source\.sources\.0\.path: .*rows\.jsonl does not exist"):
            refusing(chosen)
