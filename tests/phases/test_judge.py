import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepfusion import pipeline
from deepfusion.artifacts import Checkpoint, Corpus
from deepfusion.config import JudgePhase, Runtime
from deepfusion.data.documents import Judged, Question, read_jsonl, write_jsonl
from deepfusion.errors import InputError
from deepfusion.phases.judge import ROWS, chosen, judge
from stub_judge import listening
from tiny import checkpoint, folder, recipe

RUNTIME = Runtime(workers=0)
QUESTIONS = [
    Question(id="a", domain="law", prompt="Who? ", answer="Ann", private=True),
    Question(id="b", domain="food", prompt="What is eaten? ", answer="soup"),
    Question(id="c", domain="law", answer="a paragraph, which nobody asked for"),
]


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Corpus]:
    root = tmp_path_factory.mktemp("judge")
    text = folder(root / "corpus")
    write_jsonl(text / "test.jsonl", QUESTIONS)
    corpus = Corpus(folder=text, domains=("law", "food"), devices=()).sealed()
    return checkpoint("llama", root / "model"), corpus


def config(url: str, **fields: Any) -> JudgePhase:
    return JudgePhase.model_validate({"url": url, "model": "grader", "key": None, "max_new_tokens": 4, **fields})


def judged(root: Path, by: tuple[Checkpoint, Corpus], config: JudgePhase) -> Any:
    return judge(
        *by, config, system="base", dtype="float32", cache=root / "judged", into=folder(root / "step"), runtime=RUNTIME
    )


def test_a_model_answers_and_is_graded(answering: tuple[Checkpoint, Corpus], tmp_path: Path) -> None:
    with listening(lambda text, before: "30" if "Who?" in text else "70") as stub:
        made = judged(tmp_path, answering, config(stub.url))
    assert (made.system, made.judge, made.ungraded) == ("base", "grader", 0)
    rows = list(read_jsonl(made.folder / ROWS, Judged))
    assert [(row.id, row.domain, row.private, row.score) for row in rows] == [
        ("a", "law", True, 30),
        ("b", "food", False, 70),
    ]
    for row, text in zip(rows, sorted(stub.texts(), key=lambda text: "eaten" in text), strict=True):
        assert row.prompt.strip() in text
        assert row.reference in text
        assert f"Answer to grade:\n{row.answer}\n" in text
        assert not row.answer.startswith(row.prompt)


def test_an_answer_without_a_grade_counts_and_too_many_are_an_error(
    answering: tuple[Checkpoint, Corpus], tmp_path: Path
) -> None:
    with listening(lambda text, before: "I would rather not" if "Who?" in text else "70") as stub:
        assert judged(tmp_path / "one", answering, config(stub.url)).ungraded == 1
    told = r"grader gave no number from 0 to 100 for 2 of 2 answers, but for instance 'no'"
    with listening(lambda text, before: "no") as stub, pytest.raises(InputError, match=told):
        judged(tmp_path / "both", answering, config(stub.url))
    assert not (tmp_path / "both" / "step" / ROWS).exists()


def test_there_must_be_something_to_ask(answering: tuple[Checkpoint, Corpus], tmp_path: Path) -> None:
    model, corpus = answering
    text = folder(tmp_path / "corpus")
    write_jsonl(text / "test.jsonl", QUESTIONS[2:])
    with pytest.raises(InputError, match="no test question has a prompt"):
        judged(tmp_path, (model, corpus.model_copy(update={"folder": text})), config("http://127.0.0.1:1/v1"))


def test_questions_are_spread_over_each_domain() -> None:
    asked = [Question(id=f"{domain}{n}", domain=domain, prompt="?", answer="x") for n in range(6) for domain in "ab"]
    assert [question.id for question in chosen(asked, 3)] == ["a0", "b0", "a2", "b2", "a4", "b4"]
    assert chosen(asked, 100) == asked


def in_results(out: Path, pick: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    tree = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return [row for row in tree["rows"] if pick(row)]


def test_a_run_has_its_answers_graded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(
        "evaluate.references=[dense_kd]", "evaluate.removal=false", "distill.budget_tokens=1500",
        "judge={url: 'http://127.0.0.1:1/v1', model: grader, key: GRADER_KEY, questions: 2, max_new_tokens: 4}",
    )  # fmt: skip
    monkeypatch.delenv("GRADER_KEY", raising=False)
    with pytest.raises(InputError, match="GRADER_KEY"):  # before anything is trained
        pipeline.run(asked, tmp_path / "run", RUNTIME)
    assert not (tmp_path / "run" / "steps").exists()

    monkeypatch.setenv("GRADER_KEY", "secret")
    with listening(lambda text, before: str(before)) as stub:
        section = asked.judge.model_copy(update={"url": stub.url})  # pyright: ignore[reportOptionalMemberAccess]
        asked = asked.model_copy(update={"judge": section})
        pipeline.run(asked, tmp_path / "run", RUNTIME)
        rows = in_results(tmp_path / "run", lambda row: row["metric"] == "judge_score" and row["domain"] == "all")
        everything = [row for row in rows if row["subset"] == "all"]
        assert [(row["system"], row["count"]) for row in everything] == [
            ("base", 4), ("deepfusion", 4), ("dense_kd", 4)
        ]  # fmt: skip
        assert all(0 <= row["value"] <= 100 for row in rows)
        count = len(stub.asked)
        assert 4 <= count <= 12  # equal answers are graded once

        # Another look at the answers, as after a lost step: what was graded is not asked again.
        for step in (tmp_path / "run" / "steps" / "judge").iterdir():
            for path in step.iterdir():
                path.unlink()
            step.rmdir()
        pipeline.run(asked, tmp_path / "run", RUNTIME)
        assert len(stub.asked) == count
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "what grader thinks of the answers" in page.replace("\n", " ")
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
