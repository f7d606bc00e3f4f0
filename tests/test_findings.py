"""What follows from what a run found out."""

import random
from pathlib import Path

import pytest

from deepfusion.artifacts import Scores
from deepfusion.data.documents import write_jsonl
from deepfusion.findings import Findings, Measured, headline, mean, relative
from found import DEVICES, findings, scored


def test_scores_are_read_from_their_folder(tmp_path: Path) -> None:
    rows = scored(0.5, random.Random(0))
    write_jsonl(tmp_path / "rows.jsonl", rows)
    found = Measured.of(Scores(folder=tmp_path, system="device", item="d1", routing={"experts": 4}))
    assert (found.system, found.item, list(found.rows), found.routing) == ("device", "d1", rows, {"experts": 4})


def test_the_headline(tmp_path: Path) -> None:
    rows = findings(tmp_path, DEVICES).rows()
    values = {name: mean(rows, name, "token_accuracy") for name in ("base", "deepfusion", "centralized")}
    facts = headline(rows)
    assert facts["token_accuracy"] == values["deepfusion"]
    ours, base, ceiling = values["deepfusion"], values["base"], values["centralized"]
    assert ours is not None
    assert base is not None
    assert ceiling is not None
    assert facts["gap_closed"] == pytest.approx((ours - base) / (ceiling - base))
    assert "token_accuracy" not in headline([row for row in rows if row.system == "base"])


def test_a_mean_over_what_is_no_number_is_none() -> None:
    rows = scored(0.5, random.Random(0))
    broken = [row.model_copy(update={"answer_nats": float("inf")}) for row in rows]
    found = Findings("tiny", 0, {}, "", [Measured("device", rows, item="a"), Measured("device", broken, item="b")])
    assert mean(found.rows(), "device", "token_log_perplexity") is None
    assert mean(found.rows(), "device", "token_accuracy") is not None
    assert [warning.split(":")[0] for warning in found.all_warnings()] == [
        "device b has no finite log-perplexity",
        "device b has no finite nats per byte",
    ]


# ── server compute ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stage_has_what_was_spent_until_then() -> None:
    run = [("deepfusion", part, spent) for part, spent in (("write", 1), ("joint", 5), ("branch", 2), ("tune", 2))]
    spent = relative([*run, ("dense_kd", "write", 1.0), ("dense_kd", "train", 9.0), ("centralized", "train", 25.0)])
    assert spent == {
        "joint_student": 0.6,
        "branch": 0.8,
        "branch_ensemble": 0.8,
        "merged": 0.8,
        "deepfusion": 1.0,
        "dense_kd": 1.0,
        "centralized": 2.5,
    }


def test_a_joint_student_that_is_the_base_has_cost_nothing() -> None:
    assert "joint_student" not in relative([("deepfusion", "write", 1.0), ("deepfusion", "branch", 1.0)])


def test_without_a_result_nothing_is_relative_to_it() -> None:
    assert relative([]) == relative([("dense_kd", "train", 1.0)]) == {}
