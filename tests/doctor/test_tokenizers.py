from dataclasses import replace
from pathlib import Path

from deepfusion.config import Recipe
from deepfusion.data.documents import Document
from deepfusion.data.tokens import Tokenizer
from deepfusion.doctor import models
from deepfusion.doctor.models import BASE, Start
from deepfusion.doctor.tokenizers import checks
from kinds import byte_level
from pico import pico

DOCUMENTS = [Document(id=str(n), domain="x", answer=f"the {n} dogs say: ½ of it") for n in range(5)]


def starts(tmp_path: Path, vocab: int) -> dict[str, Start]:
    folders = {BASE: pico("llama", tmp_path / "base"), "models.ancestors.a": pico("gpt2", tmp_path / "a", vocab=vocab)}
    return {key: models.given(key, folder) for key, folder in folders.items()}


def test_teachers_are_told_how_they_are_heard(tmp_path: Path) -> None:
    recipe = Recipe.load("smoke")
    [same] = checks(starts(tmp_path / "1", 320), DOCUMENTS, recipe)
    assert (same.state, same.fact) == ("ok", "one tokenizer: probabilities are taught token by token")
    for across in ("span_likelihood", "projected_kl"):
        asked = Recipe.load("smoke", [f"distill.objective.across={across}"])
        [other] = checks(starts(tmp_path / across, 300), DOCUMENTS, asked)
        assert other.state == "ok"
        assert other.fact.startswith(f"different tokenizers, taught by {across}: ")


def test_a_teacher_with_hardly_a_token_in_common_is_a_warning(tmp_path: Path) -> None:
    found = starts(tmp_path, 300)
    key = "models.ancestors.a"
    found[key] = replace(found[key], tokenizer=Tokenizer(byte_level()))  # with words of Russian, which the base spells
    texts = [Document(id="a", domain="x", answer="два слова и ещё два слова " * 3)]
    for across, words in (("projected_kl", "19% of the teacher's"), ("span_likelihood", ": 0.26 shared")):
        [spoken] = checks(found, texts, Recipe.load("smoke", [f"distill.objective.across={across}"]))
        assert spoken.state == "warning"
        assert words in spoken.fact


def test_what_auto_chooses_is_told(tmp_path: Path) -> None:
    found = starts(tmp_path, 300)
    [other] = checks(found, DOCUMENTS, Recipe.load("smoke", ["distill.objective.across=auto"]))
    assert other.fact.startswith("different tokenizers, taught by span_likelihood: ")
    key = "models.ancestors.a"
    found[key] = replace(found[key], tokenizer=Tokenizer(byte_level()))
    texts = [Document(id="a", domain="x", answer="два слова и ещё два слова " * 3)]
    for shifted in (True, False):  # little either way
        asked = Recipe.load("smoke", ["distill.objective.across=auto", f"distill.shifted={str(shifted).lower()}"])
        [spoken] = checks(found, texts, asked)
        assert spoken.state == "warning"
        assert "taught by span_likelihood" in spoken.fact
