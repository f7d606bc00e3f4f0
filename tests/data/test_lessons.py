import pytest

from deepfusion.config import Training
from deepfusion.data.documents import Document
from deepfusion.data.lessons import lessons
from deepfusion.data.tokens import Tokenizer
from pico import TEXTS, pico_tokenizer


def document(prompt: str = "", answer: str = "yes", name: str = "d") -> Document:
    return Document(id=name, domain="law", prompt=prompt, answer=answer)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(pico_tokenizer())


def test_weights_of_a_document_by_hand(tokenizer: Tokenizer) -> None:
    [only] = lessons([document("Who? ", "Ann")], tokenizer, Training(answer_weight=5), cluster=2)
    prompt, answer = len(tokenizer.encode("Who? ")[0]), len(tokenizer.encode("Who? Ann")[0])
    assert only.ids[0] == tokenizer.start
    assert only.ids[-1] == tokenizer.end
    assert only.weights.tolist() == [0] + [1] * prompt + [5] * (answer - prompt) + [5]
    assert only.cluster == 2


def test_an_answer_is_never_cut(tokenizer: Tokenizer) -> None:
    long = document("Who? ", "Ann " * 40, name="law-7")
    with pytest.raises(ValueError, match=r"the answer of document 'law-7' takes \d+ tokens and the context holds 30: "):
        lessons([document(), long], tokenizer, Training(context=32))
    with pytest.raises(ValueError, match="the context holds 14"):
        lessons([long], tokenizer, Training(context=32), context=16)


def test_a_long_prompt_loses_its_beginning(tokenizer: Tokenizer) -> None:
    asked = document("The quick brown fox. " * 20, "An answer.")
    [whole] = lessons([asked], tokenizer, Training(context=4096, answer_weight=2))
    [cut] = lessons([asked], tokenizer, Training(context=32, answer_weight=2))
    assert len(cut) == 32
    assert cut.ids[0] == tokenizer.start
    assert cut.ids[1:].tolist() == whole.ids[-31:].tolist()
    assert cut.weights.tolist() == [0, *whole.weights[-31:].tolist()]
    assert (cut.weights == 2).sum() == (whole.weights == 2).sum()


def test_long_plain_text_becomes_several_lessons(tokenizer: Tokenizer) -> None:
    text = " ".join(TEXTS)
    pieces = lessons([document(answer=text)], tokenizer, Training(context=16))
    assert len(pieces) > 3
    assert all(len(piece) <= 16 for piece in pieces)
    assert {(int(p.ids[0]), int(p.ids[-1])) for p in pieces} == {(tokenizer.start, tokenizer.end)}
    inner = [token for piece in pieces for token in piece.ids[1:-1].tolist()]
    assert inner == tokenizer.encode(text)[0]
    assert b"".join(tokenizer.table[token] for token in inner).decode() == text
