import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from deepfusion.config import FileData, TextSource
from deepfusion.data.corpora import Text, private_groups, read_questions, read_text, render_prompt
from deepfusion.errors import InputError


def row(name: str, split: str = "private", **fields: Any) -> dict[str, Any]:
    """A row as question-answering sets ship it."""
    return {
        "id": name,
        "domain": "finance",
        "task": "open",
        "context": None,
        "question": f"what of {name}?",
        "options": None,
        "answer": f"that of {name}",
        "answer_idx": None,
        "source": "FiQA (test)",
        "split": split,
        "group": f"item:{name}",
        "private_group": False,
    } | fields


ROWS = [row("a"), row("b", "public"), row("c", "test")]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def read(rows: list[dict[str, Any]], folder: Path, seed: int = 0, **fields: Any) -> Text:
    path = write(folder / "rows.jsonl", rows)
    source = {key: fields.pop(key) for key in list(fields) if key in TextSource.model_fields}
    data = {"heldout_share": 0.0, **fields}
    return read_text(FileData(kind="files", sources=(TextSource(path=path, **source),), **data), seed)


def test_rows_become_documents_and_questions(tmp_path: Path) -> None:
    choice = row("m", "test", options=["no", "yes"], answer="yes", answer_idx=1, context="the 10-K says")
    text = read([*ROWS, choice], tmp_path)
    assert text.domains == ("finance",)
    (private,) = text.private
    assert private.document.model_dump(exclude_defaults=True) == {
        "id": "a",
        "domain": "finance",
        "prompt": "what of a?\n",
        "answer": "that of a",
        "group": "item:a",
    }
    question = text.test[1].question
    assert question.prompt == "the 10-K says\nwhat of m?\n"
    assert (question.options, question.answer_idx) == (("no", "yes"), 1)
    assert text.counts == {"rows_read": 4, "left_out_test_of_no_device": 0}


def test_prompt_template() -> None:
    assert render_prompt("{context}\n{question}\n", "q", "") == "q\n"
    assert render_prompt("Context: {context}\nQ: {question} A:", "q", None) == "Q: q A:"
    assert render_prompt("{context}\n{question}\n", "{context}?", "{question}!") == "{question}!\n{context}?\n"
    with pytest.raises(ValueError, match="unknown field 'answer'"):
        render_prompt("{question}{answer}", "q", None)
    with pytest.raises(ValueError, match=r"has no \{question\}"):
        render_prompt("{context}", "q", None)


def test_columns_overrides_and_defaults(tmp_path: Path) -> None:
    rows = [{"q": "what?", "a": "this", "topic": "t"} for _ in range(3)]
    files = [write(tmp_path / f"{split}.jsonl", rows) for split in ("private", "public", "test")]
    splits: list[Any] = ["private", "public", "test"]
    sources = tuple(
        TextSource(path=file, columns={"question": "q", "answer": "a", "domain": "topic"}, split=split)
        for file, split in zip(files, splits, strict=True)
    )
    text = read_text(FileData(kind="files", sources=sources, heldout_share=0), 0)
    assert [r.id for r in text.private] == ["private-1", "private-2", "private-3"]
    assert [r.group for r in text.private] == ["private-1", "private-2", "private-3"]
    assert text.domains == ("t",)


def test_the_answer_may_be_given_by_its_index_alone(tmp_path: Path) -> None:
    text = read([*ROWS, row("m", "test", options=["no", "yes"], answer=None, answer_idx=0)], tmp_path)
    assert text.test[1].answer == "no"


def test_filters_are_counted(tmp_path: Path) -> None:
    rows = [*ROWS, row("d", source="Other"), row("e", answer="é" * 10)]
    text = read(rows, tmp_path, where={"source": "FiQA"}, max_answer_bytes=19)
    assert [r.id for r in text.private] == ["a"]
    assert text.counts["left_out_by_where"] == text.counts["left_out_long_answers"] == 1


def test_a_filter_may_name_several_values(tmp_path: Path) -> None:
    rows = [*ROWS, row("d", source="Other"), row("e", source="Third")]
    text = read(rows, tmp_path, where={"source": ("FiQA", "Oth"), "split": ["private", "public", "test"]})
    assert [r.id for r in text.private] == ["a", "d"]
    assert text.counts["left_out_by_where"] == 1


def test_max_rows_takes_whole_groups_the_same_in_each_split(tmp_path: Path) -> None:
    rows = [row("p", "public"), row("q", "public")]
    for company in "uvwxyz":
        fields = {"group": company, "private_group": True}
        rows += [row(f"{company}{n}", "private", **fields) for n in range(4)]
        rows += [row(f"{company}t{n}", "test", **fields) for n in range(4)]
    text = read(rows, tmp_path, max_rows=8)
    companies = {r.group for r in text.private}
    assert len(text.private) == len(text.test) == 8
    assert len(companies) == 2
    assert {r.group for r in text.test} == companies
    assert len(text.public) == 2
    assert text.counts["left_out_over_max_rows"] == 32
    assert {r.group for r in read(rows, tmp_path, seed=1, max_rows=8).private} != companies


def test_private_groups_are_marked_and_tested_only_when_held(tmp_path: Path) -> None:
    marked = {"group": "g", "private_group": True}
    rows = [*ROWS, row("x", **marked), row("y", "test", group="g"), row("z", "test", group="h", private_group=True)]
    text = read(rows, tmp_path)
    assert [(r.id, r.private) for r in text.private] == [("a", False), ("x", True)]
    assert [(r.id, r.private) for r in text.test] == [("c", False), ("y", True)]
    assert text.counts["left_out_test_of_no_device"] == 1


def test_a_source_may_say_that_its_groups_are_private(tmp_path: Path) -> None:
    rows = [row(name, split, group=name) for name, split in (("a", "private"), ("b", "public"))]
    exam = [row(f"e{n}", split, group="exam") for n, split in enumerate(("private", "private", "test"))]
    sources = (
        TextSource(path=write(tmp_path / "rows.jsonl", rows)),
        TextSource(path=write(tmp_path / "exam.jsonl", exam), private_group=True),
    )
    text = read_text(FileData(kind="files", sources=sources, heldout_share=0), 0)
    assert [(r.group, r.private) for r in text.private] == [("a", False), ("exam", True), ("exam", True)]
    assert [(r.group, r.private) for r in text.test] == [("exam", True)]
    open_again = sources[1].model_copy(update={"private_group": False})
    text = read_text(FileData(kind="files", sources=(sources[0], open_again), heldout_share=0), 0)
    assert not any(r.private for r in (*text.private, *text.test))


def test_a_group_can_be_cut_into_parts(tmp_path: Path) -> None:
    exam = [row(f"e{n}", "test" if n % 3 else "private", group="exam", private_group=True) for n in range(300)]
    text = read([*ROWS, *exam], tmp_path, parts=4)
    held = Counter(r.group for r in text.private if r.private)
    assert sorted(held) == [f"exam ({n} of 4)" for n in range(1, 5)]
    assert min(held.values()) > 10  # of 100
    asked = [r for r in text.test if r.private]
    assert len(asked) == 200
    assert {r.group for r in asked} == set(held)
    again = read([*ROWS, *reversed(exam)], tmp_path, parts=4)
    assert {r.id: r.group for r in again.test} == {r.id: r.group for r in text.test}


def test_heldout_is_a_seeded_share_of_private_rows(tmp_path: Path) -> None:
    rows = [*ROWS, *(row(f"p{n}") for n in range(400))]
    text = read(rows, tmp_path, heldout_share=0.25)
    assert 70 <= len(text.heldout) <= 130
    assert {r.id for r in text.heldout}.isdisjoint(r.id for r in text.private)
    assert len(text.heldout) + len(text.private) == 401
    assert text == read(rows, tmp_path, heldout_share=0.25)
    assert text != read(rows, tmp_path, heldout_share=0.25, seed=1)


def test_plain_text_is_merged_into_documents(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text(f"one\ntwo\n\n{'x' * 800}\n\n\n{'y' * 400}\n\nend\n", encoding="utf-8")
    sources = (
        TextSource(path=str(tmp_path / "wiki.txt"), domain="general", split="public"),
        TextSource(path=write(tmp_path / "rows.jsonl", ROWS)),
    )
    text = read_text(FileData(kind="files", sources=sources, heldout_share=0), 0)
    assert [(r.id, r.prompt, len(r.answer)) for r in text.public] == [
        ("wiki-0", "", 7 + 2 + 800),
        ("wiki-1", "", 400 + 2 + 3),
        ("b", "what of b?\n", 9),
    ]
    assert text.public[0].answer.startswith("one\ntwo\n\nx")


def test_datasets_builders(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.json", [{**r, "options": ["u", "v"], "answer": "u", "answer_idx": 0} for r in ROWS])
    arguments = {"data_files": file, "cache_dir": str(tmp_path / "cache")}
    source = TextSource(dataset="json", arguments=arguments)
    text = read_text(FileData(kind="files", sources=(source,), heldout_share=0), 0)
    assert [r.id for r in text.private] == ["a"]
    assert text.test[0].options == ("u", "v")
    missing = TextSource(dataset="json", arguments={**arguments, "data_files": str(tmp_path / "none.json")})
    with pytest.raises(ValueError, match="dataset json cannot be loaded"):
        read_text(FileData(kind="files", sources=(missing,)), 0)
    parts = TextSource(dataset="json", arguments={**arguments, "data_files": {"train": file, "test": file}})
    with pytest.raises(ValueError, match=r"dataset json has the parts train, test: set `arguments\.split`"):
        read_text(FileData(kind="files", sources=(parts,)), 0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"question": None}, "line 4 has no 'question'"),
        ({"answer": None}, "line 4 has no 'answer'"),
        (
            {"answer": None, "anwser": "x"},
            r"line 4 has no 'answer' \(it has 'anwser': is that it\?\)$",
        ),
        ({"answer": " "}, "line 4 has an empty 'answer'"),
        ({"split": "train"}, "line 4 has split 'train': it must be one of private, public, test"),
        ({"split": None}, "line 4 has no 'split': add the column, or set `split` of the source"),
        ({"domain": None}, "line 4 has no 'domain'"),
        ({"id": "a"}, "line 4: id 'a' was used before, by .*line 1"),
        ({"private_group": "maybe"}, "line 4: private_group must be true or false, not 'maybe'"),
        ({"split": "public", "private_group": True}, "line 4: group 'item:z' is marked private_group"),
        ({"options": "yes"}, "line 4: options must be a list"),
        ({"options": ["u", "v"], "answer_idx": 2}, "line 4: answer_idx 2 is not an index of 2 options"),
        ({"split": "test", "options": ["u", "v"], "answer_idx": 0}, "line 4: the answer 'that of z' is not the option"),
    ],
)
def test_unusable_rows_are_named(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read([*ROWS, row("z") | bad], tmp_path)
    assert "rows.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl does not exist"),
        ("empty.jsonl", b" \n", "empty.jsonl is empty"),
        ("latin.jsonl", b'{}\n{"question": "\xe9"}\n', "latin.jsonl, line 1 has no 'split'"),
        ("latin.txt", b"fine\n\xe9t\xe9\n", r"latin.txt, line 2 is not UTF-8 \(byte 0\)"),
        ("cut.jsonl", b'{"id": \n', "cut.jsonl, line 1 is not JSON: "),
        ("list.jsonl", b"[1]\n", r"list.jsonl, line 1 is not a JSON object: \[1\]"),
        ("table.csv", b"a,b\n", "table.csv: text is read from .jsonl and .txt files only"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(FileData(kind="files", sources=(TextSource(path=str(tmp_path / name)),)), 0)


@pytest.mark.parametrize("missing", ["private", "public", "test"])
def test_each_purpose_needs_text(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ValueError, match=f"no {missing} text is left of 2 rows of .*rows.jsonl"):
        read([r for r in ROWS if r["split"] != missing], tmp_path)


def test_a_filter_that_keeps_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of 3 rows is kept"):
        read(ROWS, tmp_path, where={"source": "Nobody"})


# ── questions for a finished model ────────────────────────────────────────────────────────────────────────────────────


def test_a_group_is_private_if_any_of_its_rows_is() -> None:
    assert private_groups([("a", False), ("b", True), ("a", False), ("b", False)]) == {"b"}


def test_questions_are_as_private_as_in_a_run(tmp_path: Path) -> None:
    """A group is private as a whole, whichever of its rows says so, in a private row or in a test row."""
    rows = [
        row("p1", group="told by a private row", private_group=True),
        row("t1", "test", group="told by a private row"),
        row("p2", group="told by a test row"),
        row("t2", "test", group="told by a test row", private_group="true"),
        row("t3", "test", group="told by a test row"),
        row("p4", group="told by nobody", private_group="false"),
        row("t4", "test", group="told by nobody"),
        row("b", "public"),
    ]
    asked = read_questions(Path(write(tmp_path / "rows.jsonl", rows)))
    assert [(question.id, question.private) for question in asked] == [
        ("t1", True),
        ("t2", True),
        ("t3", True),
        ("t4", False),
    ]
    assert asked == [r.question for r in read(rows, tmp_path).test]


def test_questions_as_runs_write_them_are_private_by_group_too(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "domain": "law", "prompt": "Who?", "answer": " Ada", "group": "g", "private": True},
        {"id": "b", "domain": "law", "prompt": "Who else?", "answer": " Bo", "group": "g", "split": "test"},
        {"id": "c", "domain": "law", "answer": "plain", "private": True},
        {"id": "d", "domain": "law", "answer": "plain"},
    ]
    asked = read_questions(Path(write(tmp_path / "rows.jsonl", rows)))
    assert [(question.id, question.private) for question in asked] == [
        ("a", True),
        ("b", True),
        ("c", True),
        ("d", False),
    ]


def test_questions_need_no_split_and_no_domain(tmp_path: Path) -> None:
    rows = [{"question": "Who?", "context": "A case.", "options": ["Bo", "Ada"], "answer_idx": 1}]
    [question] = read_questions(Path(write(tmp_path / "rows.jsonl", rows)))
    assert (question.domain, question.prompt, question.answer) == ("all", "A case.\nWho?\n", "Ada")
    (tmp_path / "text.txt").write_text("One paragraph.\n\nAnother.\n")
    [question] = read_questions(tmp_path / "text.txt")
    assert (question.prompt, question.answer) == ("", "One paragraph.\n\nAnother.")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "Who?", "answer": "Ada", "split": "public"}], "has no row whose split is test"),
        ([{"question": "Who?"}], r"line 1 has no 'answer'"),
        ([{"id": "a", "prompt": "Who?", "answer": 3, "domain": "law"}], r"line 1: answer: "),
        (
            [{"question": "Who?", "answer": "Ada", "private_group": "maybe"}],
            "line 1: private_group must be true or false",
        ),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"rows\.jsonl,? {message}"):
        read_questions(Path(write(tmp_path / "rows.jsonl", rows)))
