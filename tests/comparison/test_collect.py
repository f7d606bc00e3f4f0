"""Whole comparisons, of runs that take seconds."""

import json
import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from deepfusion import cli, pipeline
from deepfusion.comparison import collect as module
from deepfusion.comparison.collect import Plan, collect
from deepfusion.comparison.grid import Variant, variants
from deepfusion.config import Recipe
from deepfusion.errors import InputError
from seen import Seen
from tiny import HERE, TREE

SMALL: dict[str, Any] = {
    "distill": {"budget_tokens": 2000, "shares": {"joint": 1, "branch": 0, "tune": 0}},
    "transfer": {"sampled_per_cluster": 4},
    "evaluate": {"references": ["dense_kd"], "removal": False},
}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    tree = deepcopy(TREE)
    for section, fields in SMALL.items():
        tree[section] |= fields
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


def test_variants_share_what_they_have_in_common(recipe: str, tmp_path: Path) -> None:
    plan = Plan(recipe, [], variants(["distill.objective.beta=[1, 3]"]), [0])
    out, seen = tmp_path / "out", Seen()
    study = collect(plan, out, HERE, seen)
    assert [(entry.variant, entry.seed) for entry in study.entries] == [("beta = 1", 0), ("beta = 3", 0)]
    ran = [name.split()[0] for name in seen.ran]
    assert (ran.count("device"), ran.count("write"), ran.count("joint")) == (4, 2, 2)
    assert {path.name for path in (out / "seed-0").iterdir()} >= {"steps", "beta-1", "beta-3"}
    assert (out / "seed-0" / "beta-3" / "moe" / "README.md").is_file()
    values = [entry.results["rows"] for entry in study.entries]
    assert values[0] != values[1]
    again = Seen()
    assert collect(plan, out, HERE, again).entries == study.entries
    assert not [name for name in again.ran if name.split()[0] != "report"]


def test_a_run_that_fails_is_left_out_and_told(recipe: str, tmp_path: Path) -> None:
    found = [Variant("good"), Variant("bad", ("device.encoder=no/such/encoder",))]
    seen = Seen()
    study = collect(Plan(recipe, [], found, [0]), tmp_path / "out", HERE, seen)
    assert [entry.variant for entry in study.entries] == ["good"]
    [failure] = study.failed
    assert (failure.variant, failure.seed) == ("bad", 0)
    assert "no/such/encoder" in failure.reason
    assert any("no/such/encoder" in told for told in seen.said)
    with pytest.raises(InputError, match="no run came to an end; the first: "):
        collect(Plan(recipe, [], found[1:], [0]), tmp_path / "other", HERE, Seen())


def test_a_full_disk_stops_one_run_and_not_the_others(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = pipeline.run

    def run(asked: Recipe, into: Path, *arguments: Any, **more: Any) -> Any:
        if asked.assemble.top_k == 1:
            raise OSError("no space left")
        return ran(asked, into, *arguments, **more)

    monkeypatch.setattr(module.pipeline, "run", run)
    study = collect(Plan(recipe, [], variants(["assemble.top_k=[2, 1]"]), [0]), tmp_path / "out", HERE, Seen())
    assert [entry.variant for entry in study.entries] == ["top_k = 2"]
    assert [(failure.variant, failure.reason) for failure in study.failed] == [("top_k = 1", "no space left")]


def test_what_a_killed_child_had_finished_counts(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = (
        "import sys, json; sys.stdin.readline(); print(json.dumps(['good', None]), flush=True);"
        "print(json.dumps(['bad', 'it broke']), flush=True); print('Killed', file=sys.stderr); sys.exit(9)"
    )
    monkeypatch.setattr(module, "CHILD", dying)
    plan = Plan(recipe, [], [Variant("good"), Variant("bad"), Variant("late")], [0, 1])
    for seed in plan.seeds:
        into = module.folder(tmp_path / "out", plan.variants[0], seed)
        into.mkdir(parents=True)
        (into / "results.json").write_text('{"schema": 1, "rows": []}')
    study = collect(plan, tmp_path / "out", HERE, Seen(), jobs=2)
    assert [(entry.variant, entry.seed) for entry in study.entries] == [("good", 0), ("good", 1)]
    assert {(failure.variant, failure.reason) for failure in study.failed} == {("bad", "it broke"), ("late", "Killed")}


def test_a_recipe_that_is_none_is_told_before_anything_runs(recipe: str, tmp_path: Path) -> None:
    plan = Plan(recipe, [], variants(["cluster.k=[2, 99]"]), [0, 1])
    with pytest.raises(InputError, match=r"cluster\.k is 99"):
        collect(plan, tmp_path / "out", HERE, Seen())
    assert not (tmp_path / "out").exists()


def test_seeds_side_by_side_find_what_one_after_the_other_find(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(recipe, [], [Variant("")], [0, 1])
    seen = Seen()
    both = collect(plan, tmp_path / "out", HERE, seen, jobs=2)
    assert any(message.startswith("seed 1 | done    joint") for message in seen.said)
    monkeypatch.setattr(module, "subprocess", None)  # nothing more runs elsewhere
    assert [e.results["rows"] for e in collect(plan, tmp_path / "out", HERE, Seen()).entries] == [
        e.results["rows"] for e in both.entries
    ]


def test_the_command_writes_tables(recipe: str, tmp_path: Path) -> None:
    arguments = [
        "compare",
        recipe,
        "--seeds",
        "2",
        "--systems",
        "dense_kd",
        "--workers",
        "0",
        "--out",
        str(tmp_path / "o"),
    ]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "token accuracy (higher is better)" in result.stdout
    names = {path.name for path in (tmp_path / "o").iterdir()}
    assert names == {
        "seed-0", "seed-1", "report.html", "report.md", "tables.tex", "values.csv", "comparison.csv", "comparison.json",
    }  # fmt: skip
    text = (tmp_path / "o" / "report.md").read_text()
    assert "deepfusion compare" in text
    assert "distillation (dense)" in text
    asked = CliRunner().invoke(cli.app, [*arguments, "--json"])
    tree = json.loads(asked.stdout)
    assert (tree["name"], tree["seeds"], tree["failed"]) == ("tiny", [0, 1], [])
    assert {row["system"] for row in tree["comparison"]} >= {"base", "device", "dense_kd", "deepfusion"}


def test_a_study_says_what_the_options_say(recipe: str, tmp_path: Path) -> None:
    study = tmp_path / "which.yaml"
    study.write_text(f"recipe: {recipe}\nseeds: 1\nsystems: []\nvary: {{assemble.top_k: [1, 2]}}\n")
    out = ["--workers", "0", "--out", str(tmp_path / "o"), "--json"]
    asked = CliRunner().invoke(cli.app, ["compare", str(study), *out])
    assert asked.exit_code == 0, asked.output
    tree = json.loads(asked.stdout)
    assert (tree["variants"], tree["seeds"]) == (["top_k = 1", "top_k = 2"], [0])
    assert {path.name for path in (tmp_path / "o" / "seed-0").iterdir() if path.name.startswith("top")} == {
        "top_k-1", "top_k-2"
    }  # fmt: skip
    assert str(study.name) in (tmp_path / "o" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--seeds", "many"), "--seeds takes how many"),
        (("--vary", "cluster.k"), "--vary takes key=[value, value]"),
        (("--systems", "fedall"), "evaluate.references"),
        (("--devices", "few"), "data.partition.devices"),
        (("--vary", "cluster.k=[1, 2]", "--set", "cluster.k=2"), "--set cluster.k has no say, for cluster.k varies"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: tuple[str, ...], told: str, recipe: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["compare", recipe, "--out", str(tmp_path / "o"), *arguments])
    assert result.exit_code == 2
    assert told in result.stderr
    assert not (tmp_path / "o").exists()


def test_nothing_goes_on_once_it_was_stopped(recipe: str, tmp_path: Path) -> None:
    """Children end with who began them, and the same command goes on."""
    command = [
        sys.executable, "-m", "deepfusion.cli", "compare", recipe, "--seeds", "2", "--jobs", "2", "--workers", "1",
        "--out", str(tmp_path / "o"), "--set", "device.epochs=2000",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if "start   device" in line:
                break
        running.kill()
    limit = time.monotonic() + 60
    while time.monotonic() < limit and _left(running.pid):
        time.sleep(0.2)
    left = _left(running.pid)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def _left(session: int) -> list[int]:
    """Processes of a session that still run."""
    asked = subprocess.run(["ps", "-s", str(session), "-o", "pid=,stat="], capture_output=True, text=True, check=False)
    rows = [line.split() for line in asked.stdout.splitlines()]
    return [int(pid) for pid, state in rows if not state.startswith("Z")]
