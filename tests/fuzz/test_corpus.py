"""What the fuzzers have found worth keeping is taken or refused as documented, today too; and the fuzzers can fail."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import pytest

import intake
from deepfusion.federation import inbox
from deepfusion.federation.manifest import Manifest

CORPUS = Path(__file__).parent / "corpus"
INPUTS = sorted(path.relative_to(CORPUS).as_posix() for path in CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_is_taken_or_refused(name: str) -> None:
    target = name.partition("/")[0]
    intake.TARGETS[target]((CORPUS / name).read_bytes())


@pytest.mark.parametrize("number", range(len(intake.KINDS)), ids=list(intake.KINDS))
def test_a_faultless_upload_of_each_kind_is_accepted(number: int) -> None:
    intake.upload(bytes([number]))


@pytest.mark.parametrize("target", intake.TARGETS)
def test_every_target_has_a_corpus(target: str) -> None:
    assert any(name.startswith(f"{target}/") for name in INPUTS)


def busily(seconds: float) -> None:
    with intake.within_bounds():
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass


def at_large(size: int) -> None:
    with intake.within_bounds():
        bytearray(b"x") * size


def test_what_takes_long_or_much_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "SECONDS", 0.01)
    with pytest.raises(AssertionError, match="of processor time"):
        busily(0.02)
    monkeypatch.setattr(intake, "SECONDS", 10.0)
    monkeypatch.setattr(intake, "MEMORY", 2**20)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with pytest.raises(AssertionError, match="MiB of memory"):
        at_large(most + 2**24)


def test_an_error_of_another_kind_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(content: bytes) -> Manifest:
        raise KeyError(content)

    monkeypatch.setattr(inbox.Manifest, "read", broken)
    with pytest.raises(KeyError):
        intake.manifest(b"")


def test_what_is_left_behind_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox.Inbox, "_forget", lambda *_: None)
    with pytest.raises(AssertionError, match="left"):
        intake.pieces(bytes([1]))  # refused
