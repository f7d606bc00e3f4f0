"""The embedded benchmark: invented domains whose private facts no public text states.

A fact is (entity, relation) → value, the value drawn uniformly from its domain's pool, so that it carries log2(values)
bits and cannot be guessed. Public text uses every value word, in lists and in public facts, and names private entities
only in questions without answers. A fact's test question uses a template that no text about this fact uses: what
is measured is the fact, not a remembered string.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

from deepfusion.config import SyntheticData
from deepfusion.data.documents import Document, Question
from deepfusion.data.lexicons import FILLERS, LEXICONS, QUESTIONS, STATEMENTS, names, value_words

T = TypeVar("T")

RELATIONS_PER_ENTITY = 2  # fewer than a domain has, so that neither the entity nor the relation alone gives the value
FILLER_VALUES = 5
HELDOUT_SHARE = 0.25


@dataclass(frozen=True)
class Fact:
    """One thing to know.

    `test_template` is the index of the question template kept for its test; `heldout_template`, of some private facts,
    that of the statement template kept for the held-out text. Neither occurs in any other document about the fact.
    """

    id: str
    domain: str
    entity: str
    relation: str
    value: str
    public: bool
    test_template: int
    heldout_template: int | None = None


@dataclass(frozen=True)
class World:
    """The whole benchmark but for devices' text, which depends on who holds what (`fact_documents`)."""

    domains: tuple[str, ...]
    values: dict[str, tuple[str, ...]]  # domain → its possible answers
    facts: tuple[Fact, ...]
    public: tuple[Document, ...]  # public facts and filler
    questions: tuple[Document, ...]  # about private facts, without answer
    heldout: tuple[Document, ...]
    test: tuple[Question, ...]


def world(config: SyntheticData, seed: int) -> World:
    """Draw the benchmark; a domain's part does not depend on how many domains there are after it.

    Raises:
        ValueError: more options than values, or more facts than names.
    """
    if config.options > config.values:
        raise ValueError(f"a test question cannot have {config.options} options when there are {config.values} values")
    domains = tuple(LEXICONS)[: config.domains]
    values = value_words(domains, config.values)
    facts: list[Fact] = []
    for domain in domains:
        own = _facts(domain, values[domain], config, Random(f"{seed}-facts-{domain}"), {f.entity for f in facts})
        facts += _with_heldout(list(own), Random(f"{seed}-heldout-{domain}"))
    private = [fact for fact in facts if not fact.public]
    public = [
        document
        for fact in facts
        if fact.public
        for document in fact_documents(fact, config.public_documents_per_fact, Random(f"{seed}-public-{fact.id}"))
    ]
    for domain in domains:
        public += _fillers(domain, values[domain], config.filler_documents, Random(f"{seed}-filler-{domain}"))
    asked = _share(private, config.question_coverage, Random(f"{seed}-questions"))
    return World(
        domains=domains,
        values=values,
        facts=tuple(facts),
        public=tuple(public),
        questions=tuple(_unanswered(fact, Random(f"{seed}-question-{fact.id}")) for fact in asked),
        heldout=tuple(_heldout(fact) for fact in private if fact.heldout_template is not None),
        test=tuple(_test(f, values[f.domain], config.options, Random(f"{seed}-test-{f.id}")) for f in facts),
    )


def fact_documents(fact: Fact, count: int, random: Random) -> list[Document]:
    """`count` documents about a fact, in turn question and statement, each cycling through its shuffled templates.

    The templates kept for test and held-out text are never used. An id names its text, and a text that comes again gets
    an id of its own.
    """
    questions = iter(_cycle(_allowed(fact), random))
    statements = iter(_cycle([t for t in range(len(STATEMENTS) + 1) if t != fact.heldout_template], random))
    seen: dict[str, int] = {}
    documents: list[Document] = []
    for index in range(count):
        document = _asked(fact, next(questions)) if index % 2 == 0 else _stated(fact, next(statements))
        seen[document.id] = again = seen.get(document.id, 0) + 1
        documents.append(document if again == 1 else document.model_copy(update={"id": f"{document.id}.{again}"}))
    return documents


def _facts(
    domain: str, values: Sequence[str], config: SyntheticData, random: Random, taken: set[str]
) -> Iterator[Fact]:
    lexicon = LEXICONS[domain]
    wanted = [(config.private_facts, False), (config.public_facts, True)]
    entities = iter(names(lexicon, sum(-(-facts // RELATIONS_PER_ENTITY) for facts, _ in wanted), random, taken))
    number = 0
    for facts, public in wanted:  # an entity is wholly private or wholly public
        for first in range(0, facts, RELATIONS_PER_ENTITY):
            entity = next(entities)
            for relation in random.sample(lexicon.relations, min(RELATIONS_PER_ENTITY, facts - first)):
                yield Fact(
                    id=f"{domain}/fact-{number}",
                    domain=domain,
                    entity=entity,
                    relation=relation,
                    value=random.choice(values),
                    public=public,
                    test_template=random.randrange(len(QUESTIONS) + 1),
                )
                number += 1


def _fillers(domain: str, values: Sequence[str], count: int, random: Random) -> Iterator[Document]:
    """Lists of value words, each word as often as any other (within one)."""
    lexicon = LEXICONS[domain]
    words = iter(_cycle(values, random))
    forms = iter(_cycle([(form, relation) for form in FILLERS for relation in lexicon.relations], random))
    for index in range(count):
        form, relation = next(forms)
        *listed, last = itertools.islice(words, FILLER_VALUES)
        text = form.format(relation=relation, kind=lexicon.kind, values=f"{', '.join(listed)} or {last}")
        yield Document(id=f"{domain}/filler-{index}", domain=domain, answer=text)


def _cycle(items: Sequence[T], random: Random) -> Iterator[T]:
    """Endless passes through the items, each newly shuffled."""
    while True:
        yield from random.sample(items, len(items))


def _allowed(fact: Fact) -> list[int]:
    return [index for index in range(len(QUESTIONS) + 1) if index != fact.test_template]


def _with_heldout(facts: Sequence[Fact], random: Random) -> list[Fact]:
    """The facts, some of the private ones with a statement template kept for held-out text."""
    chosen = {fact.id for fact in _share([fact for fact in facts if not fact.public], HELDOUT_SHARE, random)}
    return [
        replace(fact, heldout_template=random.randrange(len(STATEMENTS) + 1)) if fact.id in chosen else fact
        for fact in facts
    ]


def _share(facts: Sequence[Fact], share: float, random: Random) -> list[Fact]:
    chosen = set(random.sample(range(len(facts)), round(share * len(facts))))
    return [fact for index, fact in enumerate(facts) if index in chosen]


def _prompt(fact: Fact, template: int) -> str:
    lexicon = LEXICONS[fact.domain]
    form = (*QUESTIONS, lexicon.question)[template]
    return f"q: {form.format(relation=fact.relation, entity=fact.entity, kind=lexicon.kind)} a:"


def _asked(fact: Fact, template: int) -> Document:
    return Document(
        id=f"{fact.id}/q{template}",
        domain=fact.domain,
        prompt=_prompt(fact, template),
        answer=f" {fact.value}",
        group=fact.id,
        private=not fact.public,
    )


def _stated(fact: Fact, template: int) -> Document:
    lexicon = LEXICONS[fact.domain]
    form = (*STATEMENTS, lexicon.statement)[template]
    text = form.format(relation=fact.relation, entity=fact.entity, kind=lexicon.kind, value=fact.value)
    return Document(
        id=f"{fact.id}/s{template}", domain=fact.domain, answer=text, group=fact.id, private=not fact.public
    )


def _heldout(fact: Fact) -> Document:
    assert fact.heldout_template is not None
    document = _stated(fact, fact.heldout_template)
    return document.model_copy(update={"id": f"{document.id}/heldout"})


def _unanswered(fact: Fact, random: Random) -> Document:
    """A public question: it names a private entity, and says nothing about it."""
    template = random.choice(_allowed(fact))
    return Document(id=f"{fact.id}/asked", domain=fact.domain, prompt=_prompt(fact, template), answer="", group=fact.id)


def _test(fact: Fact, values: Sequence[str], options: int, random: Random) -> Question:
    listed = [fact.value, *random.sample([value for value in values if value != fact.value], options - 1)]
    random.shuffle(listed)
    return Question(
        id=f"{fact.id}/test",
        domain=fact.domain,
        prompt=_prompt(fact, fact.test_template),
        answer=f" {fact.value}",
        group=fact.id,
        private=not fact.public,
        options=tuple(f" {value}" for value in listed),
        answer_idx=listed.index(fact.value),
    )
