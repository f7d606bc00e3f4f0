"""The command line: what it passes on, prints and returns."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from deepfusion import cli, doctor, pipeline
from deepfusion.artifacts import Report
from deepfusion.cli.app import STDERR, STDOUT
from deepfusion.config import Recipe, Runtime
from deepfusion.doctor.diagnosis import Check, Cost, Diagnosis, Machine
from deepfusion.planner import PlannedStep
from ggufs import write_gguf
from pico import pico

RECIPE = """
name: tiny
data: {source: {kind: synthetic}}
models: {base: {make: {type: llama}}, ancestors: {a: {make: {type: gpt2}}}}
"""
RESULTS = {
    "schema": 1,
    "run": "tiny",
    "rows": [
        {"system": name, "domain": domain, "subset": subset, "metric": metric, "value": value, "count": 8, "item": item}
        for name, item, value in (("base", None, 0.125), ("device", "d0", 0.25), ("device", "d1", 0.75))
        for domain in ("all", "law")
        for subset in ("all", "private_only")
        for metric in ("token_accuracy", "token_log_perplexity")
    ],
    "phases": [
        {"name": "device", "item": "d0", "seconds": 60.0, "cpu_seconds": 30.0, "cached": True},
        {"name": "device", "item": "d1", "seconds": 5.0, "cpu_seconds": 4.0, "cached": False},
    ],
    "rejected": [{"device": "d2", "reason": "model/ has no config.json"}],
    "warnings": ["cluster 0 averages strangers [d0, d1]"],
    "bytes": {"up": 3000, "down": 0, "per_device": {n: {"up": 1500, "down": 0} for n in ("d0", "d1")}},
    "compute": [
        {"system": "deepfusion", "part": "joint", "tokens": 9, "token_parameters": 4e6, "critical_path": 4e6},
        {"system": "deepfusion", "part": "branch", "tokens": 9, "token_parameters": 2e6, "critical_path": 1e6},
    ],
    "clusters": {
        "members": [["d0", "d1"], []],
        "proxies": [{"cluster": 0, "model_type": "gpt2", "members": ["d0", "d1"], "distance": 0.125}],
    },
    "transfer": {"per_cluster": [7, 0], "by_writer": {"d0": 3, "d1": 4}},
    "routing": {
        "deepfusion": {"mutual_information": {"mean": 0.25}, "expert_difference": {"mean": 0.5}, "dead": [[0, 1]]}
    },
}

COMMANDS = ["demo", "run", "plan", "doctor", "show", "inspect", "evaluate", "generate", "import-gguf", "fleet"]
Invoke = Callable[..., Result]
Called = tuple[Recipe, Path, Runtime]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Invoke:
    monkeypatch.chdir(tmp_path)
    # Not COLUMNS, which counts from the start where it is set before the import, and else at each print.
    monkeypatch.setattr(STDOUT, "_width", 200)
    monkeypatch.setattr(STDERR, "_width", 200)
    monkeypatch.setenv(cli.DEBUG, "0")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return lambda *arguments: CliRunner().invoke(cli.app, arguments)


def one_line_and_2(result: Result, message: str) -> None:
    """Hold what a command told of a user's mistake against how it must."""
    assert result.exit_code == 2
    assert result.stderr.startswith(f"deepfusion: error: {message}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Called]:
    """A pipeline that only writes down what it was asked."""
    seen: list[Called] = []

    def run(recipe: Recipe, out: Path, runtime: Runtime, watch: Any) -> Report:
        seen.append((recipe, out, runtime))
        out.mkdir(parents=True)
        (out / "results.json").write_text(json.dumps(RESULTS))
        watch.started("device d1", out)
        watch.finished("device d1", 5.0, cached=False)
        return Report(folder=out, name=recipe.name, headline={"gap_closed": 0.5})

    monkeypatch.setattr(pipeline, "run", run)
    return seen


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(*_: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run", run)


def test_run_passes_everything_on(invoke: Invoke, calls: list[Called]) -> None:
    where = ("--out", "there", "--workers", "0", "--threads", "2", "--checkpoint-seconds", "7.5")
    result = invoke("run", "tiny.yaml", "--set", "seed=3", "--set", "cluster.k=2", *where)
    assert result.exit_code == 0, result.output
    [(recipe, out, runtime)] = calls
    assert (recipe.name, recipe.seed, recipe.cluster.k) == ("tiny", 3, 2)
    assert (out, runtime) == (Path("there"), Runtime(workers=0, threads=2, accelerator="cpu", checkpoint_seconds=7.5))


def test_run_goes_to_its_own_folder_and_prints_what_came_out(invoke: Invoke, calls: list[Called]) -> None:
    result = invoke("run", "tiny.yaml")
    assert calls[0][1] == Path("runs/tiny")
    assert calls[0][2] == Runtime()
    assert "runs/tiny/moe" in result.stdout
    assert "runs/tiny/report.html" in result.stdout
    assert "done    device d1  5.0 s" in result.stderr
    assert "device d1" not in result.stdout


def test_json_is_all_there_is_on_stdout(invoke: Invoke, calls: list[Called]) -> None:
    result = invoke("run", "tiny.yaml", "--json")
    assert json.loads(result.stdout)["headline"] == {"gap_closed": 0.5}


def test_quiet_shows_nothing(invoke: Invoke, calls: list[Called]) -> None:
    result = invoke("run", "tiny.yaml", "--quiet")
    assert (result.stdout, result.stderr, len(calls)) == ("", "", 1)


def test_demo_is_the_embedded_recipe(invoke: Invoke, calls: list[Called]) -> None:
    result = invoke("demo", "--seed", "5", "--out", "d")
    assert result.exit_code == 0, result.output
    assert (calls[0][0].name, calls[0][0].seed, calls[0][1]) == ("demo", 5, Path("d"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "recipe 'nope' is neither a file nor an embedded recipe (embedded: "),
        (["nope.yaml"], "recipe nope.yaml does not exist"),
        (["tiny.yaml", "--set", "cluster.kk=2"], "tiny.yaml: unknown key 'cluster.kk'"),
        (["tiny.yaml", "--set", "seed"], "--set takes key=value, not 'seed'"),
    ],
)
def test_the_users_mistakes_are_one_line_and_2(invoke: Invoke, arguments: list[str], message: str) -> None:
    one_line_and_2(invoke("run", *arguments), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "No such command 'rnu'. Did you mean 'run'? (see "),
        (["run"], "Missing argument 'RECIPE'. (see "),
        (["run", "smoke", "--otu", "x"], "No such option '--otu'. (Did you mean "),
        (["run", "smoke", "--workers", "two"], "Invalid value for '--workers': 'two' is not a valid integer"),
        (["run", "smoke", "--checkpoint-seconds", "0"], "Invalid value for '--checkpoint-seconds': 0"),
    ],
)
def test_a_misspelt_command_is_one_line_and_2(invoke: Invoke, arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"deepfusion: error: {message}")
    assert result.stderr.count("\n") == 1
    assert result.stderr.lower().count("did you mean") <= 1
    assert result.stdout == ""


def test_no_command_at_all_is_helped(invoke: Invoke) -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "medical" not in result.output
    assert "Usage: " in result.output


def test_our_mistakes_are_1_and_say_where_to_look(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, RuntimeError("device d0: KeyError: 'x'; see runs/tiny/logs/device-d0.log"))
    result = invoke("run", "tiny.yaml")
    assert result.exit_code == 1
    assert result.stderr == (
        "deepfusion: internal error: RuntimeError: device d0: KeyError: 'x'; see runs/tiny/logs/device-d0.log "
        "(traceback: deepfusion --debug …)\n"
    )


def test_debug_shows_the_traceback(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, RuntimeError("broken"))
    assert "Traceback (most recent call last)" in invoke("--debug", "run", "tiny.yaml").stderr
    monkeypatch.setenv(cli.DEBUG, "1")
    assert "Traceback (most recent call last)" in invoke("run", "tiny.yaml").stderr


def test_a_full_disk(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/tiny/model.safetensors"))
    result = invoke("run", "tiny.yaml")
    assert result.exit_code == 2
    assert result.stderr == (
        "deepfusion: error: disk full while writing runs/tiny/model.safetensors "
        "(deepfusion doctor says what a run needs)\n"
    )


def test_another_error_of_the_system_is_told_as_it_is(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs"))
    result = invoke("run", "tiny.yaml")
    assert (result.exit_code, result.stderr) == (1, "deepfusion: error: [Errno 13] Permission denied: 'runs'\n")


def test_stopping(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    result = invoke("run", "tiny.yaml")
    assert (result.exit_code, result.stderr) == (130, "deepfusion: stopped; the same command goes on from here\n")


def test_plan(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [
        PlannedStep("data", None, "done", "found"),
        PlannedStep("device", "d0", "run", "[new] settings"),
    ]
    asked: list[Path] = []
    monkeypatch.setattr(pipeline, "plan", lambda recipe, out: asked.append(out) or steps)
    result = invoke("plan", "tiny.yaml")
    assert result.exit_code == 0, result.output
    assert "[new] settings" in result.stdout
    assert "1 done, 1 would run, 0 wait" in result.stdout
    assert json.loads(invoke("plan", "tiny.yaml", "--json", "--out", "x").stdout)[1] == {
        "phase": "device",
        "item": "d0",
        "state": "run",
        "reason": "[new] settings",
        "count": 1,
    }
    assert asked == [Path("runs/tiny"), Path("x")]
    monkeypatch.delenv("GRADER_KEY", raising=False)
    refused = invoke("plan", "tiny.yaml", "--set", "judge={url: 'http://localhost:1', model: m, key: GRADER_KEY}")
    assert (refused.exit_code, "GRADER_KEY" in refused.stderr) == (2, True)


@pytest.mark.parametrize(("state", "status"), [("ok", 0), ("warning", 0), ("problem", 2)])
def test_doctor(state: Any, status: int, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = (
        Check("text", "data", "ok", "3 documents"),
        Check("models", "models.base", state, "too [large]", "mend it"),
    )
    costs = (Cost("joint", 1, 10, 60, None, None, 5e8, 1e6),)
    found = Diagnosis("tiny", checks, costs, Machine(2, "cpu", (), 10, 10), None)
    asked: list[Any] = []
    monkeypatch.setattr(doctor, "examine", lambda *of, **how: asked.append((of, how)) or found)
    result = invoke("doctor", "tiny.yaml", "--set", "seed=3", "--workers", "0", "--threads", "2", "--no-timing")
    assert result.exit_code == status, result.output
    assert "too [large]" in result.stdout
    assert "joint" in result.stdout
    [((recipe, out, runtime), how)] = asked
    assert (recipe.seed, out, runtime, how) == (3, Path("runs/tiny"), Runtime(workers=0, threads=2), {"timed": False})
    result = invoke("doctor", "tiny.yaml", "--json", "--out", "x")
    document = json.loads(result.stdout)
    assert (document["state"], document["checks"][1]["advice"], result.exit_code) == (state, "mend it", status)
    assert (asked[1][0][1], asked[1][1]) == (Path("x"), {"timed": True})


def test_doctor_tells_a_wrong_recipe_as_run_does(invoke: Invoke) -> None:
    result = invoke("doctor", "tiny.yaml", "--set", "cluster.kk=2")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "unknown key 'cluster.kk'" in result.stderr


def test_import_gguf(invoke: Invoke, tmp_path: Path) -> None:
    write_gguf(pico("llama", tmp_path / "m"), tmp_path / "m.gguf", pre="odd")
    result = invoke("import-gguf", "m.gguf", "out")
    assert result.exit_code == 0, result.output
    assert result.stdout == "out  llama, 30,880 parameters\n"
    assert result.stderr.startswith("note: the file's tokenizer cuts words by the pattern 'odd'")
    again = invoke("import-gguf", "m.gguf", "out")
    assert (again.exit_code, again.stdout) == (2, "")
    assert again.stderr == "deepfusion: error: out is there already: give another folder, or --force to replace it\n"
    told = json.loads(invoke("import-gguf", "m.gguf", "out", "--force", "--dtype", "float32", "--json").stdout)
    assert (told["folder"], told["model_type"], told["quantised"]) == ("out", "llama", ["F32"])


def test_show(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    lines = [line.split() for line in invoke("show", ".").stdout.splitlines()]
    assert ["base", "0.125", "0.125"] in lines
    assert ["device,", "mean", "of", "2", "0.500", "0.500"] in lines
    assert ["device,", "best", "of", "2", "0.750", "0.250"] in lines  # the most accurate, the least perplexed
    assert ["device", "2", "1", "min", "05", "s", "34", "s"] in lines
    assert json.loads(invoke("show", ".", "--json").stdout) == RESULTS


def test_inspect(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    lines = [" ".join(line.split()) for line in invoke("inspect", ".").stdout.splitlines()]
    assert "0 d0, d1 gpt2 of 2 (0.12) 7" in lines
    assert "d1 0 4 1.5 k 0" in lines
    assert "all 7 3 k 0" in lines
    assert "deepfusion 0.250 0.500 [0, 1]" in lines
    assert lines[-2:] == [
        "left out: d2: model/ has no config.json",
        "warning: cluster 0 averages strangers [d0, d1]",
    ]
    told = json.loads(invoke("inspect", ".", "--json").stdout)
    assert told["transfer"] == RESULTS["transfer"]
    assert "rows" not in told


@pytest.mark.parametrize("command", ["show", "inspect"])
def test_a_folder_that_is_no_finished_run(invoke: Invoke, command: str) -> None:
    result = invoke(command, "nowhere")
    assert (result.exit_code, result.stderr) == (
        2,
        "deepfusion: error: nowhere is not a finished run: it has no results.json\n",
    )


def test_results_of_another_version(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"schema": 7}')
    assert "has schema 7; this version reads 1" in invoke("show", ".").stderr


def test_generate_and_evaluate_open_a_checkpoint(invoke: Invoke, tmp_path: Path) -> None:
    pico("llama", tmp_path / "model")
    told = json.loads(invoke("generate", "model", "The quick", "--max-new-tokens", "3", "--json").stdout)
    assert told["text"].startswith("The quick")
    question = {"id": "q", "domain": "law", "prompt": "Who?", "answer": " Ada"}
    (tmp_path / "q.jsonl").write_text(json.dumps(question) + "\n")
    result = invoke("evaluate", "model", "--data", "q.jsonl", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert {(row["domain"], row["count"]) for row in rows} == {("all", 1), ("law", 1)}
    assert "log-perplexity" in invoke("evaluate", "model", "--data", "q.jsonl").stdout


@pytest.mark.parametrize("command", [["generate", "model", "x"], ["evaluate", "model", "--data", "q.jsonl"]])
def test_a_folder_that_is_no_checkpoint(invoke: Invoke, command: list[str]) -> None:
    result = invoke(*command)
    assert (result.exit_code, result.stderr) == (
        2,
        "deepfusion: error: model is not a checkpoint: it has no config.json\n",
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(invoke: Invoke, command: str) -> None:
    assert f"Example: deepfusion {command}" in invoke(command, "--help").stdout


def test_the_command_starts_fast_enough_to_import_nothing_heavy() -> None:
    result = subprocess.run([sys.executable, "-m", "deepfusion.cli", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout.count(".")) == (0, 2), result.stderr


def test_fleet(invoke: Invoke, tmp_path: Path) -> None:
    pico("llama", tmp_path / "mine")
    asked = ("fleet", "--models", "gpt2,mine", "--moe", "qwen1.5-moe-a2.7b", "--devices", "16", "--rounds", "2")
    result = invoke(*asked)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())  # whatever the width, by which a long name is folded
    assert "gpt2 124 M 9.44 M 287 MB 2.54 GB" in text
    assert "FedJETS: qwen1.5-moe-a2.7b, 4 of 60 " in text
    assert " 2.69 G 2.69 G 2.41 GB 2.41 GB 23.7 GB" in text
    assert "assumed: method qlora, rank 64, " in text
    told = json.loads(invoke(*asked, "--json").stdout)
    [plan] = told["plans"]
    assert [member["name"] for member in plan["members"]] == ["gpt2", "mine"]
    assert (told["assumptions"]["rounds"], told["figures"], plan["client"]["of_experts"]) == (2, [], 60)
    [total] = plan["totals"]
    assert total["fedjets_up_bytes"] == 16 * 2 * plan["client"]["up_bytes"]


def test_fleet_beside_the_paper(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STDOUT, "_width", 80)
    result = invoke("fleet", "--paper", "--rank", "8")
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "…" not in result.stdout
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert {"medical", "finance", "rank 8 given", "Fig. 8 finance FedJETS 245 GB 247 GB +0.8 %"} < set(lines)
    assert "does not confirm them" in result.stdout
    told = json.loads(invoke("fleet", "--paper", "--json").stdout)
    assert len(told["figures"]) == 11
    assert told["sources"]["batch_tokens"] == "fitted to Fig. 7"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what devices train, as in --models gpt2,tinyllama-1.1b; or --paper, alone"),
        (["--paper", "--models", "gpt2"], "say what devices train, as in --models gpt2,tinyllama-1.1b; or --paper"),
        (["--paper", "--moe", "deepseek-moe-16b"], "--paper has MoEs of its own: leave --moe out"),
        (["--models", "gtp2"], "model 'gtp2' is neither known by name (gpt2, gpt2-medium, "),
        (["--models", "."], ". is not a checkpoint: it has no config.json"),
        (["--models", "gpt2", "--moe", "olmo-1.2b"], "olmo-1.2b has no experts: give an MoE as --moe"),
        (["--models", ","], "',' names nothing"),
        (["--models", "gpt2", "--devices", "16,many"], "--devices takes numbers of devices, as in 16,32, not"),
        (["--models", "gpt2", "--unquantised", "gtp2"], "model type 'gtp2' is not supported: choose from gpt2, "),
    ],
)
def test_mistakes_about_a_fleet_are_one_line_and_2(invoke: Invoke, arguments: list[str], message: str) -> None:
    one_line_and_2(invoke("fleet", *arguments), message)
