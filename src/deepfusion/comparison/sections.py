"""A study as sections of a page: tables in the shape of the paper's, differences with tests, figures, costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from markupsafe import Markup

from deepfusion import figures
from deepfusion.comparison.statistics import FEWEST, Estimate, Paired
from deepfusion.comparison.study import TRAINED_FOR, Question, Study
from deepfusion.findings import CEILING, RESULT
from deepfusion.labels import KINDS, METRICS, QUESTIONS, SUBSETS, counted, joined, kind, label
from deepfusion.metrics import Subset
from deepfusion.page.parts import Section, Table, signed

INTERVAL = "± is half of the 95 % interval of the mean over seeds (Student's t)."
MARKS = (
    "Best of each column, centralised training aside, among systems that every run has measured; † where it is also "
    "significantly better than every other row (p < .05, paired t-test by seed, uncorrected)."
)
NONE = "–"
TOLD = ("token_accuracy", "token_log_perplexity")  # by which the summary says what is ahead


def summary(study: Study) -> list[str]:
    """What was compared, and what came of it."""
    which = counted(len(study.seeds), "seed")
    of = f"{len(study.variants)} variants of the recipe with " if len(study.variants) > 1 else ""
    lead = f"{of}{which} ({joined([str(seed) for seed in study.seeds])}), {counted(len(study.entries), 'run')}."
    told = [lead[0].upper() + lead[1:]]
    if len(study.seeds) < 2:
        told.append("One seed has no interval, and shows nothing beyond itself.")
    elif len(study.seeds) < FEWEST:
        told.append("Two seeds are too few to call anything significant: intervals are wide, and p says little.")
    if study.entries:
        subset = study.questions()[0].subset
        told += [
            sentence
            for question in study.questions()
            if question.subset == subset and question.metric in TOLD
            for sentence in _verdict(study, question)
        ]
    return told


def _verdict(study: Study, question: Question) -> list[str]:
    """What DeepFusion is ahead of, and behind, by tests."""
    ahead, behind, open_ = list[str](), list[str](), list[str]()
    for variant in study.variants:
        for system in study.systems():
            if system in (RESULT, CEILING, "base", "device"):
                continue
            found = study.against(variant, system, question)
            if found is None or found.p is None:
                continue
            name = label(system) + (f" ({variant})" if len(study.variants) > 1 else "")
            better = (found.mean < 0) == question.lower
            (open_ if not found.significant else ahead if better else behind).append(name)
    what = f"By {METRICS[question.metric]} on {_asked(question)}, DeepFusion is "
    parts = [
        part
        for part, names in (
            (f"significantly ahead of {joined(ahead)}", ahead),
            (f"significantly behind {joined(behind)}", behind),
            (f"not certainly ahead of or behind {joined(open_)}", open_),
        )
        if names
    ]
    return [what + "; ".join(parts) + "."] if parts else []


def sections(study: Study) -> list[Section]:
    """Everything that there is to say, in order."""
    if not study.entries:
        return [_failures(study)] if study.failed else []
    subsets: dict[Subset, None] = dict.fromkeys(question.subset for question in study.questions())
    found = [_quality(study, subset) for subset in subsets]
    found += [_differences(study, subset) for subset in subsets]
    found += [_gap(study), _costs(study)]
    found += [_failures(study)] if study.failed else []
    return [section for section in found if section is not None]


# ── how well ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _quality(study: Study, subset: Subset) -> Section:
    tables = [quality(study, question) for question in study.questions() if question.subset == subset]
    return Section(f"quality-{subset}", _title(subset), [f"{MARKS} {INTERVAL}"], tables=tables)


def quality(study: Study, question: Question) -> Table:
    """Systems against variants: means and intervals, as in Tables I and II of arXiv 2602.14301."""
    systems = [s for s in study.systems() if any(study.values(v, s, question) for v in study.variants)]
    best, sure = set[tuple[int, int]](), set[tuple[int, int]]()
    runs = Counter(entry.variant for entry in study.entries)
    for column, variant in enumerate(study.variants, 1):
        winner = study.best(variant, question)
        if winner is not None:
            places = {(systems.index(system), column) for system in winner[0]}
            best |= places
            sure |= places if winner[1] else set()
    return Table(
        heads=[_metric(question), *_columns(study)],
        rows=[
            [label(s), *(_estimated(study.estimate(v, s, question), runs[v]) for v in study.variants)] for s in systems
        ],
        headings=_headings(systems),
        strong=frozenset(row for row, system in enumerate(systems) if system == RESULT),
        best=frozenset(best),
        sure=frozenset(sure),
    )


def _differences(study: Study, subset: Subset) -> Section | None:
    if len(study.seeds) < 2:
        return None
    tables = [differences(study, question) for question in study.questions() if question.subset == subset]
    text = (
        "DeepFusion minus each system on the same seeds: the mean difference, half of its 95 % interval, and the p of "
        "the paired t-test in brackets (two-sided, uncorrected); none where the difference is the same on every seed. "
        f"† where p < .05 over {FEWEST} seeds or more."
    )
    return Section(f"differences-{subset}", f"Differences: {SUBSETS[subset]}", [text], tables=tables)


def differences(study: Study, question: Question) -> Table:
    """DeepFusion against each other system, paired by seed."""
    systems = [s for s in study.systems() if s != RESULT and any(study.against(v, s, question) for v in study.variants)]
    found = [[study.against(variant, system, question) for variant in study.variants] for system in systems]
    sure = {
        (row, column)
        for row, line in enumerate(found)
        for column, one in enumerate(line, 1)
        if one is not None and one.significant
    }
    return Table(
        heads=[_metric(question), *_columns(study)],
        rows=[[label(system), *map(_differing, line)] for system, line in zip(systems, found, strict=True)],
        headings=_headings(systems),
        sure=frozenset(sure),
    )


def _gap(study: Study) -> Section | None:
    question = next((one for one in study.questions() if one.metric == "token_accuracy"), None)
    if question is None or CEILING not in study.systems():
        return None
    closed = [study.gap_closed(variant, question) for variant in study.variants]
    table = Table(heads=["share of the gap closed", *_columns(study)], rows=[[label(RESULT), *map(_estimated, closed)]])
    lines = {
        label(system): [study.estimate(variant, system, question) for variant in study.variants]
        for system in ("base", RESULT, CEILING)
    }
    figure = figures.trend("gap", lines, list(study.variants), METRICS[question.metric], label(RESULT))
    text = f"How far token accuracy on {_asked(question)} has come from the base (0) to centralised training (1)."
    return Section("gap", "Gap to centralised training", [text], figures=[Markup(figure)], tables=[table])


# ── what it takes ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _costs(study: Study) -> Section | None:
    measures: list[tuple[str, Callable[[str, str], Estimate | None], Callable[[float], str]]] = [
        ("bytes on the wire, all devices", study.traffic, figures.size),
        ("peak memory of a device's training", study.memory, figures.size),
        ("server compute", study.compute, lambda value: f"{value:.2f}"),
    ]
    tables: list[Table] = []
    drawn: list[Markup] = []
    for title, measure, written in measures:
        systems = [s for s in study.systems() if any(measure(variant, s) for variant in study.variants)]
        if not systems:
            continue
        found = {system: [measure(variant, system) for variant in study.variants] for system in systems}
        rows = [[label(s), *(_amount(one, written) for one in line)] for s, line in found.items()]
        strong = frozenset(row for row, system in enumerate(systems) if system == RESULT)
        tables.append(Table(heads=[title, *_columns(study)], rows=rows, strong=strong))
        if title != "server compute":
            lines = {label(system): line for system, line in found.items()}
            name = "bytes" if measure == study.traffic else "memory"
            drawn.append(Markup(figures.trend(name, lines, list(study.variants), title, label(RESULT), figures.size)))
    if not tables:
        return None
    text = (
        f"Bytes and memory are of {joined([label(system) for system in TRAINED_FOR])}, for which devices train: both "
        "ways, all rounds up to the best, and the whole process of the device that needs most, libraries included. "
        "What devices start from is not counted as sent, but for baselines, whose devices are sent a model. Server "
        "compute is in multiples of DeepFusion's; devices' is not counted."
    )
    return Section("costs", "Bytes, memory, compute", [text], figures=drawn, tables=tables)


def _failures(study: Study) -> Section:
    told = [f"{one.variant or 'as written'}, seed {one.seed}: {one.reason}" for one in study.failed]
    return Section("failed", "Runs that failed", ["They are missing above."], items=told)


# ── cells ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _columns(study: Study) -> list[str]:
    return [variant or "as written" for variant in study.variants]


def _metric(question: Question) -> str:
    return f"{METRICS[question.metric]} ({'lower' if question.lower else 'higher'} is better)"


def _asked(question: Question) -> str:
    return QUESTIONS.get(question.subset, SUBSETS[question.subset])


def _title(subset: Subset) -> str:
    return SUBSETS[subset][0].upper() + SUBSETS[subset][1:]


def _headings(systems: Sequence[str]) -> dict[int, str]:
    kinds = [kind(system) for system in systems]
    return {i: KINDS[name] for i, name in enumerate(kinds) if i == 0 or kinds[i - 1] != name}


def _estimated(found: Estimate | None, runs: int = 0) -> str:
    """A mean with its interval; and of how many runs it is, if it lacks some."""
    if found is None:
        return NONE
    few = f" (n = {found.count})" if found.count < runs else ""
    return f"{found.mean:.4f}" + ("" if found.half is None else f" ± {found.half:.4f}") + few


def _amount(found: Estimate | None, written: Callable[[float], str]) -> str:
    return NONE if found is None else written(found.mean)


def _differing(found: Paired | None) -> str:
    if found is None:
        return NONE
    interval = "" if found.half is None else f" ± {found.half:.4f}"
    return signed(found.mean, 4) + interval + ("" if found.p is None else f" ({_chance(found.p)})")


def _chance(p: float) -> str:
    return "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".")
