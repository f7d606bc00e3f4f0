"""Trying out checkpoints: questions as `deepfusion evaluate` reads them, and models that cannot be tried."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepfusion.config import Runtime
from deepfusion.data.corpora import read_questions
from deepfusion.inference import complete
from pico import pico


def lines(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_question_as_runs_write_it(tmp_path: Path) -> None:
    row = {"id": "q", "domain": "law", "prompt": "Who?", "answer": " Ada", "options": [" Ada", " Bo"], "answer_idx": 0}
    [question] = read_questions(lines(tmp_path / "q.jsonl", row))
    assert question.model_dump(exclude_defaults=True) == {**row, "options": (" Ada", " Bo")}


def test_a_row_of_real_data_is_prompted_as_in_a_run(tmp_path: Path) -> None:
    row = {"id": "q", "domain": "law", "task": "open", "context": "A case.", "question": "Who?", "answer": "Ada"}
    [question] = read_questions(lines(tmp_path / "q.jsonl", row | {"private_group": True, "group": "case"}))
    assert (question.prompt, question.answer, question.private) == ("A case.\nWho?\n", "Ada", True)


def test_a_group_is_as_private_as_in_a_run(tmp_path: Path) -> None:
    """Told here by a private row of the group, which is not asked itself."""
    row = {"domain": "law", "group": "case", "question": "Who?", "answer": "Ada"}
    held = row | {"id": "a", "split": "private", "private_group": True}
    [question] = read_questions(lines(tmp_path / "q.jsonl", held, row | {"id": "b", "split": "test"}))
    assert (question.id, question.private) == ("b", True)


def test_only_test_rows_of_real_data_count(tmp_path: Path) -> None:
    row = {"domain": "law", "question": "Who?", "answer": "Ada"}
    path = lines(tmp_path / "q.jsonl", row | {"id": "a", "split": "public"}, row | {"id": "b", "split": "test"})
    assert [question.id for question in read_questions(path)] == ["b"]


def test_a_file_without_test_rows_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "q.jsonl", {"id": "a", "question": "Who?", "answer": "Ada", "split": "public"})
    with pytest.raises(ValueError, match=r"q\.jsonl has no row whose split is test"):
        list(read_questions(path))


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    good = {"id": "a", "domain": "law", "question": "Who?", "answer": "Ada"}
    path = lines(tmp_path / "q.jsonl", good, good | {"answer": None})
    with pytest.raises(ValueError, match=r"q\.jsonl, line 2 has no 'answer'"):
        list(read_questions(path))


def test_a_checkpoint_that_is_no_numbers_is_refused(tmp_path: Path) -> None:
    folder = pico("llama", tmp_path / "broken")
    path = folder / "model.safetensors"
    held = load_file(path)
    name = next(iter(held))
    save_file(held | {name: torch.full_like(held[name], float("nan"))}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"tensor {re.escape(name)} holds NaN or infinity"):
        complete(folder, "Once", 4, 0.0, 0, Runtime())
