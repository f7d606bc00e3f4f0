from collections import Counter
from random import Random

import pytest

from deepfusion.config import SyntheticData
from deepfusion.data.lexicons import LEXICONS, QUESTIONS, STATEMENTS
from deepfusion.data.synthetic import World, fact_documents, world


def make(seed: int = 0, **fields: float) -> World:
    return world(SyntheticData.model_validate({"kind": "synthetic", **fields}), seed)


def words(text: str) -> list[str]:
    return [word.strip(".,:?") for word in text.split()]


def test_same_seed_same_world() -> None:
    assert make(3) == make(3)
    assert make(3) != make(4)


def test_more_domains_leave_earlier_ones_alone() -> None:
    small, large = make(domains=2), make(domains=3)
    assert large.facts[: len(small.facts)] == small.facts


def test_counts_of_the_default_world() -> None:
    made = make()
    assert made.domains == ("medicine", "finance", "law", "travel")
    assert len(made.facts) == 4 * (40 + 16)
    assert len(made.public) == 4 * (16 * 10 + 200)
    assert len(made.questions) == 80
    assert len(made.heldout) == 40
    taught = {document.text for fact in made.facts for document in fact_documents(fact, 30, Random(0))}
    assert not taught & {document.text for document in made.heldout}
    assert Counter(question.private for question in made.test) == {True: 160, False: 64}


def test_no_public_text_states_a_private_fact() -> None:
    made = make(domains=8, question_coverage=1.0)
    values: dict[str, set[str]] = {}
    for fact in made.facts:
        if not fact.public:
            values.setdefault(fact.entity, set()).add(fact.value)
    for document in (*made.public, *made.questions):
        present = set(words(document.text))
        for entity in present & values.keys():
            assert not present & values[entity], document.text
    assert not any(set(words(document.text)) & values.keys() for document in made.public)
    assert all(document.answer == "" for document in made.questions)


def test_entities_and_facts_are_unique_and_wholly_private_or_public() -> None:
    made = make(domains=8, private_facts=41)
    assert len({(fact.entity, fact.relation) for fact in made.facts}) == len(made.facts)
    assert len({fact.entity for fact in made.facts}) == 8 * (21 + 8)
    assert not {f.entity for f in made.facts if f.public} & {f.entity for f in made.facts if not f.public}


def test_the_test_template_is_reserved_per_fact() -> None:
    made = make()
    tests = {question.group: question for question in made.test}
    for fact in made.facts:
        trained = {document.prompt for document in fact_documents(fact, 30, Random(0))}
        assert tests[fact.id].prompt not in trained
        assert len(trained - {""}) == len(QUESTIONS)  # all other question templates are used
    assert {fact.test_template for fact in made.facts} == set(range(len(QUESTIONS) + 1))
    for document in (*made.public, *made.questions, *made.heldout):
        if document.group is not None:
            assert document.prompt != tests[document.group].prompt


def test_half_of_a_facts_documents_are_questions_and_ids_name_texts() -> None:
    fact = make().facts[0]
    documents = fact_documents(fact, 10, Random(1))
    assert [bool(document.prompt) for document in documents] == [True, False] * 5
    assert len({document.id for document in documents}) == 10
    assert len({document.text for document in documents if not document.prompt}) == len(STATEMENTS) + 1
    texts: dict[str, str] = {}
    for document in (*documents, *fact_documents(fact, 10, Random(2))):
        assert texts.setdefault(document.id, document.text) == document.text
        assert document.text.endswith((f" {fact.value}", f" {fact.value}."))
    assert fact_documents(fact, 1, Random(0))[0].prompt.startswith("q: ")
    assert fact_documents(fact, 10, Random(1)) != fact_documents(fact, 10, Random(2))


def test_options_hold_the_answer_and_distractors_of_the_pool() -> None:
    made = make(options=5)
    for question in made.test:
        assert question.options is not None
        assert question.answer_idx is not None
        assert len(set(question.options)) == 5
        assert question.options[question.answer_idx] == question.answer
        assert {option.strip() for option in question.options} <= set(made.values[question.domain])
    assert len({question.answer_idx for question in made.test}) == 5


def test_value_words_are_disjoint_and_frequent() -> None:
    made = make()
    pool = [word for values in made.values.values() for word in values]
    counts = Counter(word for document in made.public for word in words(document.text))
    assert len(set(pool)) == len(pool) == 64
    assert min(counts[word] for word in pool) >= 20


def test_largest_pools_are_disjoint_and_apart_from_templates() -> None:
    made = make(domains=8, values=64, public_facts=0, filler_documents=0)
    pool = [word for values in made.values.values() for word in values]
    assert len(set(pool)) == len(pool) == 8 * 64
    spoken = {word for lexicon in LEXICONS.values() for word in (lexicon.kind, *lexicon.relations)}
    assert not spoken & set(pool)


def test_each_value_is_one_token_of_a_small_byte_level_bpe() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = make()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([document.text for document in made.public], trainer)
    for values in made.values.values():
        assert all(len(tokenizer.encode(f" {word}").ids) == 1 for word in values)
    lengths = [len(tokenizer.encode(d.text).ids) for f in made.facts for d in fact_documents(f, 4, Random(0))]
    assert sum(lengths) / len(lengths) < 16


def test_a_large_world() -> None:
    made = make(private_facts=1280, values=64, filler_documents=0, public_documents_per_fact=0)
    assert sum(not fact.public for fact in made.facts) == 4 * 1280
    assert len({(fact.entity, fact.relation) for fact in made.facts}) == len(made.facts)


def test_impossible_worlds_are_refused() -> None:
    with pytest.raises(ValueError, match="5 options when there are 4 values"):
        make(values=4, options=5)
    with pytest.raises(ValueError, match="names for a drug, not 50008: lower private_facts"):
        make(private_facts=100_000)
