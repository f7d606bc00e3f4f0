import json
import socket
from pathlib import Path

import pytest

from deepfusion.config import JudgePhase
from deepfusion.data.documents import Question
from deepfusion.errors import InputError
from deepfusion.judging import RETRIES, TRIED, Asked, check, request, score_of
from stub_judge import Reply, listening

QUESTION = Question(id="q", domain="law", prompt="Who {is} it? ", answer=" Ann ", private=True)


def config(url: str = "http://127.0.0.1:1/v1", **fields: object) -> JudgePhase:
    return JudgePhase.model_validate({"url": url, "model": "grader", "key": None, **fields})


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("85", 85),
        ("0", 0),
        (" 100.\n", 100),
        ("62.5", 62.5),
        ("Score: 70/100, for it leaves out the year.", 70),
        ("**40**", 40),
        ("<think>Maybe 20? No, 30.</think>\n55", 55),
        ("<think>Maybe 20, and then", None),  # cut off while it was thinking
        ("I cannot tell.", None),
        ("101", None),
        ("-5", None),
        ("", None),
    ],
)
def test_the_score_is_the_first_number_of_a_reply(reply: str, score: float | None) -> None:
    assert score_of(reply) == score


def test_a_request_says_everything_and_nothing_of_the_text_is_taken_for_a_template() -> None:
    asked = request(config(options={"max_tokens": 8}), QUESTION, "{answer} 5")
    assert (asked["model"], asked["max_tokens"]) == ("grader", 8)
    [message] = asked["messages"]
    assert message["role"] == "user"
    assert "Question:\nWho {is} it?\n" in message["content"]
    assert "Reference answer:\nAnn\n" in message["content"]
    assert "Answer to grade:\n{answer} 5\n" in message["content"]


def test_a_reply_is_kept_and_not_asked_for_again(tmp_path: Path) -> None:
    with listening(lambda text, before: "80") as stub:
        asked = Asked(config(stub.url), tmp_path / "judged")
        one, other = (request(config(stub.url), QUESTION, answer) for answer in ("Ann", "Bo"))
        assert asked.graded(one) == asked.graded(one) == ("80", 80)
        assert Asked(config(stub.url), tmp_path / "judged").graded(one) == ("80", 80)
        assert len(stub.asked) == 1
        asked.graded(other)
        assert len(stub.asked) == 2
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "judged").iterdir()]
    assert {(facts["url"], facts["reply"], facts["score"]) for facts in kept} == {(stub.url, "80", 80)}
    assert one in [facts["request"] for facts in kept]


def test_a_reply_without_a_number_is_asked_for_again(tmp_path: Path) -> None:
    with listening(lambda text, before: "hm" if before == 0 else "7") as stub:
        assert Asked(config(stub.url), tmp_path).graded(request(config(), QUESTION, "x")) == ("7", 7)
        assert len(stub.asked) == 2
    with listening(lambda text, before: "hm") as stub:
        assert Asked(config(stub.url), tmp_path).graded(request(config(), QUESTION, "y")) == ("hm", None)
        assert len(stub.asked) == TRIED


def test_a_busy_judge_is_asked_again(tmp_path: Path) -> None:
    with listening(lambda text, before: 503 if before == 0 else "9") as stub:
        assert Asked(config(stub.url), tmp_path).graded(request(config(), QUESTION, "x")) == ("9", 9)
        assert 1 < len(stub.asked) <= 1 + RETRIES


@pytest.mark.parametrize(("says", "told"), [(401, "answered 401 (.*refused: 401.*)"), (None, "no chat completion")])
def test_a_judge_that_refuses_is_named_with_what_to_do(says: Reply, told: str, tmp_path: Path) -> None:
    with (
        listening(lambda text, before: says) as stub,
        pytest.raises(InputError, match=rf"judge: {stub.url} .*{told}.*: see to judge\.url") as raised,
    ):
        Asked(config(stub.url), tmp_path).graded(request(config(), QUESTION, "x"))
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_judge_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepfusion.judging.RETRIES", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(InputError, match=rf"judge: {url} cannot be reached"):
            Asked(config(url), tmp_path).graded(request(config(), QUESTION, "x"))


def test_the_key_comes_from_the_environment_and_is_kept_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(lambda text, before: "1") as stub:
        with_key = config(stub.url, key="GRADER_KEY")
        monkeypatch.delenv("GRADER_KEY", raising=False)
        with pytest.raises(InputError, match=r"judge\.key names the environment variable GRADER_KEY, which is not set"):
            check(with_key)
        monkeypatch.setenv("GRADER_KEY", "open sesame")
        check(with_key)
        Asked(with_key, tmp_path).graded(request(with_key, QUESTION, "x"))
        assert stub.asked[0][1] == "Bearer open sesame"
    assert not any("sesame" in path.read_text(encoding="utf-8") for path in tmp_path.iterdir())


def test_without_its_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepfusion.judging.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'deepfusion-moe\[judge\]'"):
        check(config())


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"url": "judge.example/v1"}, "must begin with http:// or https://"),
        ({"prompt": "{question} {reference}"}, "must have {question}, {reference} and {answer} in it"),
        ({"prompt": "{question} {reference} {answer} {mood}"}, "nothing else in braces"),
        ({"prompt": "{question} {reference} {answer"}, "is no template"),
        ({"questions": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(fields: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        config(**fields)
