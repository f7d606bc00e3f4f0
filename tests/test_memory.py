from pathlib import Path

import numpy as np
import pytest

from deepfusion import memory

MIB = 2**20


def test_the_peak_is_the_most_since_it_was_forgotten() -> None:
    memory.forget()
    before = memory.resident()
    held = np.ones(64 * MIB, np.uint8)
    assert 60 * MIB < memory.resident() - before < 100 * MIB
    del held
    assert memory.peak() - before > 60 * MIB
    memory.forget()
    assert memory.peak() - before < 20 * MIB


def test_without_proc_the_most_that_ever_was_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = np.ones(64 * MIB, np.uint8)
    del held
    for name in ("STATUS", "CLEAR"):
        monkeypatch.setattr(memory, name, tmp_path / "absent" / name)
    before = memory.resident()
    memory.forget()
    assert memory.peak() == before > 64 * MIB


def test_a_note_is_found_again(tmp_path: Path) -> None:
    assert memory.noted(tmp_path) is None
    memory.note(tmp_path, 5)
    found = memory.noted(tmp_path)
    assert found is not None
    assert found.before_bytes == 5
    assert found.peak_bytes == memory.peak()
