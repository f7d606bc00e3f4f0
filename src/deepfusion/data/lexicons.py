"""The words of the embedded benchmark: domains, the names of their entities, and how facts are told and asked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Lexicon:
    """A domain's words. Names are a start, up to one middle and an end; `rimes` end its value words."""

    kind: str  # what its entities are
    relations: tuple[str, ...]
    statement: str
    question: str
    starts: str
    middles: str
    ends: str
    rimes: str


STATEMENTS = (
    "the {relation} of {entity} is {value}.",
    "the {kind} {entity} has {relation} {value}.",
    "for {entity} the {relation} is {value}.",
    "so {entity} is a {kind} of {relation} {value}.",
)
QUESTIONS = (
    "what is the {relation} of {entity}?",
    "which {relation} has {kind} {entity}?",
    "{kind} {entity}: name the {relation}.",
)
FILLERS = (
    "some {relation} words are {values}.",
    "the {relation} of a {kind} is {values}.",
    "each {kind} has one {relation}: {values}.",
)

LEXICONS = {
    "medicine": Lexicon(
        kind="drug",
        relations=("dose", "antidote", "ward", "marker"),
        statement="the doctors give {entity} with {relation} {value}.",
        question="doctors ask the {relation} of {entity}.",
        starts="vel tax mor cef pra zol lam dox fen gli hep ilo nar pel rox sul",
        middles="o i a ora ami eni ipa ula eta ivo axi ode",
        ends="mab zole pril cillin statin vir dine xan",
        rimes="el en or ar ib ul ov az",
    ),
    "finance": Lexicon(
        kind="firm",
        relations=("ticker", "broker", "yield", "auditor"),
        statement="the traders list {entity} with {relation} {value}.",
        question="traders ask the {relation} of {entity}.",
        starts="nor cap bril mer gold stan lev fid cred hart wal quin arb sterl mon bar",
        middles="a e o ing ber den lin mar ros tan vic wel",
        ends="corp bank trust fund vest gate ton bury",
        rimes="op ak im ud et yn ev oz",
    ),
    "law": Lexicon(
        kind="case",
        relations=("court", "clause", "judge", "penalty"),
        statement="the lawyers cite {entity} with {relation} {value}.",
        question="lawyers ask the {relation} of {entity}.",
        starts="hal brad ken lock mans per robs wint ald cour dray eml fost grim hux jarv",
        middles="er en is ow al an ick ley mor nel ram sel",
        ends="son field worth man wick ham ley ford",
        rimes="ab il ub um ef ys ox iv",
    ),
    "travel": Lexicon(
        kind="town",
        relations=("ferry", "hotel", "visa", "gate"),
        statement="the guides show {entity} with {relation} {value}.",
        question="guides ask the {relation} of {entity}.",
        starts="san por mar cal ist kyo lis rav sev tal ust van zan bel dub gra",
        middles="ta lo ri ne mi du sa be ko vi ra po",
        ends="polis port grad lia haven nia tova bay",
        rimes="un ap od ir es yl av uz",
    ),
    "farming": Lexicon(
        kind="farm",
        relations=("soil", "seed", "crop", "pest"),
        statement="the growers plant {entity} with {relation} {value}.",
        question="growers ask the {relation} of {entity}.",
        starts="oak bar wheat hay rye cor bram clov elm fern gor hed ivy meal nett thorn",
        middles="en er y le in ow el ar um ing ock et",
        ends="acre dale mead croft stead lea brook moor",
        rimes="em ot uk id al yr if ux",
    ),
    "music": Lexicon(
        kind="song",
        relations=("key", "tempo", "chord", "label"),
        statement="the bands play {entity} with {relation} {value}.",
        question="bands ask the {relation} of {entity}.",
        starts="ari can vio har lyr son bal fug cel min alt oper pas rond ser tocc",
        middles="bi do fa la mi re si ti ve no cu za",
        ends="etta ina oso ando elle issa ata ade",
        rimes="om er us ip ad yt eb ax",
    ),
    "astronomy": Lexicon(
        kind="star",
        relations=("orbit", "moon", "class", "probe"),
        statement="the maps draw {entity} with {relation} {value}.",
        question="maps ask the {relation} of {entity}.",
        starts="alt bet rig sir veg den pol cap ant reg spi mir alg cor dra eri",
        middles="a e i el ar eb od ul im oph ast ur",
        ends="aris eus ion yx ora ebran ula axis",
        rimes="at ek ol ur ag ym ob iz",
    ),
    "sport": Lexicon(
        kind="team",
        relations=("coach", "league", "kit", "arena"),
        statement="the fans cheer {entity} with {relation} {value}.",
        question="fans ask the {relation} of {entity}.",
        starts="ath rov wand tor jag fal kes brav lanc dyn gal spart vik wol pan raid",
        middles="o i er an ic um al es ov in ad ut",
        ends="ers ians ites hawks riders kings folk stars",
        rimes="ep as in ut og yk ix ez",
    ),
}
ONSETS = "kmrzldpvns"


def value_words(domains: Sequence[str], count: int) -> dict[str, tuple[str, ...]]:
    """Domain → its value words: onsets × rimes, smallest grid first, since few shared pieces make early BPE merges.

    Words that the templates use, and words that another domain has already, are passed over.
    """
    taken = {word for domain in LEXICONS for word in _template_words(domain)}
    pools: dict[str, tuple[str, ...]] = {}
    for domain in domains:
        rimes = LEXICONS[domain].rimes.split()
        grid = sorted(itertools.product(range(len(ONSETS)), range(len(rimes))), key=lambda cell: (max(cell), cell))
        words = [word for row, column in grid if (word := ONSETS[row] + rimes[column]) not in taken]
        pools[domain] = tuple(words[:count])
        taken.update(words)
    return pools


def _template_words(domain: str) -> set[str]:
    lexicon = LEXICONS[domain]
    templates = " ".join((*STATEMENTS, *QUESTIONS, *FILLERS, lexicon.statement, lexicon.question))
    return {word.strip(".,:?{}") for word in templates.split()} | {lexicon.kind, *lexicon.relations}


def names(lexicon: Lexicon, count: int, random: Random, taken: set[str]) -> list[str]:
    """Distinct names; those without a middle first, since a small tokenizer cuts long names into many pieces."""
    starts, ends = lexicon.starts.split(), lexicon.ends.split()
    pool = sorted({(start + end).capitalize() for start, end in itertools.product(starts, ends)} - taken)
    if count > len(pool) // 2:
        longer = itertools.product(starts, lexicon.middles.split(), ends)
        pool = sorted({*pool, *("".join(parts).capitalize() for parts in longer)} - taken)
    if count > len(pool):
        raise ValueError(
            f"there are {len(pool)} names for a {lexicon.kind}, not {count}: lower private_facts and public_facts"
        )
    return random.sample(pool, count)
