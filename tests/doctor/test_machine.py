from pathlib import Path

import psutil
import pytest
import torch

from deepfusion.config import Runtime
from deepfusion.doctor import machine
from deepfusion.doctor.diagnosis import Machine

SMALL = Machine(cores=2, accelerator="cpu", accelerators=(), memory_bytes=2_000_000_000, disk_bytes=1000)


def test_the_machine_is_looked_at_as_it_is(tmp_path: Path) -> None:
    here = machine.look(tmp_path / "not" / "yet", Runtime())
    assert here.cores >= 1
    assert 0 < here.memory_bytes <= psutil.virtual_memory().total
    assert here.disk_bytes > 0
    assert not (tmp_path / "not").exists()


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert machine.look(tmp_path, Runtime()).memory_bytes == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.look(tmp_path, Runtime()).memory_bytes > 3000


def test_an_accelerators_memory_counts_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda n: f"card {n}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (123, 456))
    here = machine.look(tmp_path, Runtime(accelerator="cuda"))
    assert (here.memory_bytes, here.accelerators) == (123, ("card 0",))
    [told] = machine.checks(here, Runtime(workers=1, accelerator="cuda"))
    assert "card 0" in told.fact


@pytest.mark.parametrize(
    ("workers", "state", "advice"),
    [(2, "ok", ""), (3, "warning", "run with --workers 2"), (0, "ok", "")],
)
def test_steps_side_by_side_must_fit(workers: int, state: str, advice: str) -> None:
    """Three of 0.8 GB, and 0.25 GB for the command."""
    check = machine.memory([(8e8, "device")] * 3 + [(1e8, "tune")], SMALL, Runtime(workers=workers))
    assert (check.state, check.advice) == (state, advice)


def test_one_step_that_does_not_fit_is_a_problem() -> None:
    check = machine.memory([(3e9, "joint")], SMALL, Runtime(workers=2))
    assert check.state == "problem"
    assert "(joint), and 2 GB are free" in check.fact


def test_the_disk_must_hold_what_is_kept_and_what_is_saved_on_the_way() -> None:
    assert machine.disk(600, 300, SMALL).state == "ok"
    check = machine.disk(600, 500, SMALL)
    assert (check.state, check.fact) == (
        "problem",
        "600 B, and up to 500 B more while models are trained, and 1 kB are free",
    )


def test_what_is_done_without_bfloat16_is_said() -> None:
    fact, warning = machine.without_bfloat16(["transfer.dtype", "evaluate.dtype"], ["tune.training.dtype"], Runtime())
    assert (fact.state, warning.state) == ("ok", "warning")
    assert "float32 is used for transfer.dtype and evaluate.dtype" in fact.fact
    assert warning.advice == "set tune.training.dtype=float32"
    assert list(machine.without_bfloat16([], [], Runtime())) == []
