"""What the terminal shows of a run."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from deepfusion.artifacts import MANIFEST
from deepfusion.phases.report import report
from deepfusion.pipeline import STEPS
from deepfusion.summary import ALWAYS, metrics, overview, plan, read_results
from found import DEVICES, findings


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    return read_results(report(findings(tmp_path, DEVICES), into=tmp_path).results)


def printed(parts: Sequence[RenderableType], width: int = 80) -> list[str]:
    """The lines on a terminal of this width, with single spaces."""
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(*parts, sep="\n")
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return [" ".join(line.split()) for line in lines]


def steps(run: Path, *names: str) -> None:
    """Finished steps, and those under way where the name says so."""
    for name in names:
        (run / "steps" / name).mkdir(parents=True)
        if not name.endswith(".partial"):
            (run / "steps" / name / MANIFEST).touch()


# ── systems ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_controls_of_equal_compute_are_told_from_what_is_not(results: dict[str, Any]) -> None:
    lines = printed(overview(results))
    assert lines[0].split() == ["token", "choice", "nats", "per", "server"]
    assert lines[1].startswith("what only devices know accuracy log-perplexity accuracy byte compute")
    first = lines[: lines.index("")]
    names = [line.split()[0] for line in first[2:]]
    assert names.index("deepfusion") < names.index("same") < names.index("pooled_text") < names.index("dense_kd")
    assert names.index("dense_kd") < names.index("all") < names.index("centralized")
    assert "all text in one place:" in first
    ends = {line.split()[0]: line.split()[-1] for line in first[2:]}
    assert (ends["deepfusion"], ends["pooled_text"], ends["centralized"]) == ("1.00", "1.00", "1.99")


def test_every_subset_is_shown(results: dict[str, Any]) -> None:
    lines = printed(overview(results))
    start = lines.index("token accuracy what only devices know public questions")
    assert lines[start - 1] == "what is all"
    values = {
        row["subset"]: f"{row['value']:.3f}"
        for row in results["rows"]
        if (row["system"], row["domain"], row["metric"]) == ("deepfusion", "all", "token_accuracy")
    }
    assert f"deepfusion {values['private_only']} {values['public']} {values['all']}" in lines


def test_questions_of_one_kind_need_one_table(results: dict[str, Any]) -> None:
    results["rows"] = [row for row in results["rows"] if row["subset"] == "all"]
    lines = printed(overview(results))
    assert lines[1].startswith("all questions accuracy")
    assert not [line for line in lines if line.startswith("token accuracy")]


def test_what_is_null_is_left_empty(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        if (row["system"], row["metric"]) == ("base", "token_log_perplexity"):
            row["value"] = None
    lines = [line.split() for line in printed(overview(results)) if line.startswith("base")]
    assert len(lines[0]) == 1 + 3  # two accuracies and nats per byte; the base cost the server nothing


# ── time ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_times_are_of_the_run_that_did_the_work(results: dict[str, Any]) -> None:
    """Sixteen devices of 12 seconds each; also when a later run finds them all done."""
    for cached in (False, True):
        for phase in results["phases"]:
            phase["cached"] = cached
        lines = printed(overview(results))
        assert "device 16 3 min 12 s 3 min 04 s" in lines
        assert lines[-2] == "Times are those of the runs that did the work, summed over steps."
        assert lines[-1] == "left out: d99: its config.json is not JSON"


# ── runs that are not finished ────────────────────────────────────────────────────────────────────────────────────────


def test_a_stopped_run_tells_what_is_done_what_is_missing_and_how_to_go_on(tmp_path: Path) -> None:
    steps(tmp_path, "data/data-1", "device/d0-1", "device/d1-1", "device/d2-1.partial")
    with pytest.raises(ValueError, match="is not a finished run") as told:
        read_results(tmp_path)
    text = str(told.value)
    assert "Done: data and device (2); begun: device; missing: upload, cluster, " in text
    assert "Go on with the command that began it" in text
    assert f"`deepfusion plan RECIPE --out {tmp_path}`" in text


def test_a_run_stopped_at_once(tmp_path: Path) -> None:
    steps(tmp_path, "data/data-1.partial")
    with pytest.raises(ValueError, match="Done: nothing; begun: data; missing: data, device, "):
        read_results(tmp_path)


def test_a_folder_without_steps_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a finished run: it has no results\.json$"):
        read_results(tmp_path)


def test_what_every_run_has_are_phases() -> None:
    assert set(ALWAYS) <= set(STEPS)


def test_broken_results(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"schema": 7}))
    with pytest.raises(ValueError, match="has schema 7; this version reads 1"):
        read_results(tmp_path)


# ── other tables ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_checkpoints_own_metrics_have_the_same_names(tmp_path: Path) -> None:
    rows = [row for row in findings(tmp_path, DEVICES).rows() if row.system == "base"]
    lines = printed([metrics(rows)], width=120)
    assert lines[0] == "domain questions token accuracy log-perplexity choice accuracy nats per byte"
    assert any(line.startswith("law, what only devices know 32 ") for line in lines)


@pytest.mark.parametrize(("waiting", "end"), [(1, "1 waits for those"), (2, "2 wait for those")])
def test_a_plan_counts(waiting: int, end: str) -> None:
    planned = [SimpleNamespace(phase="joint", item=None, state="wait", reason="…", count=waiting)]
    assert printed(plan(planned))[-1] == f"0 done, 0 would run, {end}"  # pyright: ignore[reportArgumentType]
