"""Real text: rows of JSONL files, plain text and `datasets`, sorted into public, private, held-out and test.

A row has `question` and `answer`, and may have `id, domain, context, options, answer_idx, group, private_group, split,
device`. A group is handed to devices whole; one that any row marks `private_group` may stand in no public row.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from random import Random
from typing import Any, Literal

from pydantic import ValidationError

from deepfusion.config import FileData, TextSource
from deepfusion.data.documents import Document, Question
from deepfusion.data.tables import read_table
from deepfusion.errors import InputError

SPLITS = ("private", "public", "test")
PROMPT: str = FileData.model_fields["prompt"].default
ON_A_DEVICE = {"split": "private", "domain": "all"}  # what a row there is that does not say
NOTHING: Mapping[str, str] = {}


@dataclass(frozen=True)
class Row:
    """One checked row; `origin` is its file and line, for messages."""

    origin: str
    id: str
    domain: str
    split: Literal["private", "public", "test"]
    prompt: str
    answer: str
    group: str
    private: bool
    options: tuple[str, ...] | None = None
    answer_idx: int | None = None
    device: str | None = None

    @property
    def document(self) -> Document:
        """The row as text to learn from."""
        return Document(
            id=self.id,
            domain=self.domain,
            prompt=self.prompt,
            answer=self.answer,
            group=self.group,
            private=self.private,
        )

    @property
    def question(self) -> Question:
        """The row as a test question."""
        return Question(**self.document.model_dump(), options=self.options, answer_idx=self.answer_idx)


@dataclass(frozen=True)
class Text:
    """All rows that a run uses, by purpose."""

    domains: tuple[str, ...]
    private: tuple[Row, ...]
    heldout: tuple[Row, ...]
    public: tuple[Row, ...]
    test: tuple[Row, ...]
    counts: dict[str, int]


def read_text(config: FileData, seed: int, *, private_elsewhere: bool = False) -> Text:
    """Read, check, filter and sort the rows of all sources.

    A test row of a private group of which no private row is kept (all left out, or all held out) is left out too: no
    device could know it. With `private_elsewhere` all private rows are on other machines, and test rows stay.

    Raises:
        InputError: names the file and line of the first row that cannot be used, the private group that is public, or
            the purpose for which no row is left.
    """
    counts: Counter[str] = Counter()
    rows = _kept(config, seed, counts)
    heldout = [
        row for row in rows if row.split == "private" and _draw(f"{seed}-heldout-{row.id}") < config.heldout_share
    ]
    aside = {row.id for row in heldout}
    private = [row for row in rows if row.split == "private" and row.id not in aside]
    public = [row for row in rows if row.split == "public"]
    held = {row.group for row in private}
    tests = [row for row in rows if row.split == "test"]
    test = [row for row in tests if private_elsewhere or not row.private or row.group in held]
    if private_elsewhere and (private or heldout):
        raise InputError(
            f"{(private or heldout)[0].origin} is private: in a federation private text is on the devices, so leave "
            "such rows out of the server's files"
        )
    counts["left_out_test_of_no_device"] = len(tests) - len(test)
    for name, kept in (("private", private), ("public", public), ("test", test)):
        if not kept and not (private_elsewhere and name == "private"):
            raise InputError(
                f"no {name} text is left of {len(rows)} rows of {_names(config)}: check `split` and `where`"
            )
    domains = tuple(sorted({row.domain for row in rows}))
    return Text(domains, tuple(private), tuple(heldout), tuple(public), tuple(test), dict(counts))


def private_row(config: FileData, seed: int) -> str | None:
    """File and line of the first row that `read_text` would use as private text, if there is one.

    Raises:
        InputError: names the file and line of the first row that cannot be used.
    """
    return next((row.origin for row in _kept(config, seed, Counter()) if row.split == "private"), None)


def read_private(sources: Sequence[TextSource], prompt: str = PROMPT) -> list[Document]:
    """A device's own text: the private rows of its sources, in order.

    Rows and sources that say nothing of it are private, and of the domain `all`.

    Raises:
        InputError: names the file and line of the first row that cannot be used, or says that no row is private.
    """
    config = FileData(kind="files", sources=tuple(sources), prompt=prompt)
    prompt_parts(prompt)
    counts: Counter[str] = Counter()
    rows = _marked([row for source in sources for row in _rows(source, config, counts, ON_A_DEVICE)])
    found = [row.document for row in rows if row.split == "private"]
    if not found:
        raise InputError(f"no row of {_names(config)} is private: leave `split` out of the rows, or make it private")
    return found


def read_questions(data: Path) -> list[Question]:
    """The test questions of a file: of the format of `Question`, or rows of real data, prompted as a run prompts them.

    Of rows with a split, those of the test count; whether a group is private is decided by all of its rows. A row
    without a domain is of the domain `all`.

    Raises:
        InputError: names the file and line that cannot be used, or the file without test rows.
    """
    source = TextSource(path=str(data))
    questions: list[Question] = []
    marks: list[tuple[str, bool]] = []
    for origin, columns in read_table(source):
        raw = {name: value for name, value in columns.items() if value is not None}
        plain = data.suffix == ".txt"
        if "question" not in raw and not plain:
            question = _question(origin, {name: value for name, value in raw.items() if name != "split"})
        else:
            question = _row(origin, {"domain": "all", "split": "test"} | raw, source, PROMPT).question
        marks.append((question.group or question.id, question.private))
        if raw.get("split", "test") == "test":
            questions.append(question)
    if not questions:
        raise InputError(f"{data} has no row whose split is test: there is nothing to evaluate on")
    private = private_groups(marks)
    return [one.model_copy(update={"private": (one.group or one.id) in private}) for one in questions]


def private_groups(marks: Iterable[tuple[str, bool]]) -> set[str]:
    """Of (group, marked private) pairs, the groups that are private: if any row of a group is, the whole group is."""
    return {group for group, private in marks if private}


def prompt_parts(template: str) -> list[str]:
    """The lines of a prompt template, ends kept.

    Raises:
        InputError: the template has an unknown field, or no question.
    """
    fields = re.findall(r"\{(.*?)\}", template)
    if unknown := [field for field in fields if field not in ("context", "question")]:
        raise InputError(
            f"prompt template {template!r} has unknown field {unknown[0]!r}: use {{context}} and {{question}}"
        )
    if "question" not in fields:
        raise InputError(f"prompt template {template!r} has no {{question}}")
    return template.splitlines(keepends=True)


def render_prompt(template: str, question: str, context: str | None) -> str:
    """Fill a template; without a context the lines that name it go."""
    lines = [line for line in prompt_parts(template) if context or "{context}" not in line]
    texts = {"context": context or "", "question": question}
    return re.sub(r"\{(context|question)\}", lambda match: texts[match[1]], "".join(lines))


# ── rows of tables ────────────────────────────────────────────────────────────────────────────────────────────────────


def _kept(config: FileData, seed: int, counts: Counter[str]) -> list[Row]:
    """The rows of all sources and of the domains that are asked for; `counts` is told of the others."""
    prompt_parts(config.prompt)
    rows: list[Row] = []
    for number, source in enumerate(config.sources):
        rows += _limited(_rows(source, config, counts), source.max_rows, f"{seed}-rows-{number}", counts)
    rows = _marked(rows)
    if config.domains is None:
        return rows
    there = {row.domain for row in rows}
    if unknown := sorted(set(config.domains) - there):
        raise InputError(
            f"data.source.domains names {unknown[0]!r}, but the text of {_names(config)} is about "
            f"{', '.join(sorted(there))}"
        )
    return [row for row in rows if row.domain in config.domains]


def _rows(
    source: TextSource, config: FileData, counts: Counter[str], defaults: Mapping[str, str] = NOTHING
) -> list[Row]:
    """The source's rows that match `where` and are short enough; `defaults` fill what neither it nor they say."""
    rows: list[Row] = []
    read = 0
    for origin, raw in read_table(source):
        read += 1
        if not all(_matches(_get(raw, source, column), value) for column, value in source.where.items()):
            counts["left_out_by_where"] += 1
            continue
        row = _row(origin, raw, source, config.prompt, defaults)
        too_long = config.max_answer_bytes is not None and len(row.answer.encode()) > config.max_answer_bytes
        if row.prompt and too_long:  # plain text has no answer: it is cut into lessons instead
            counts["left_out_long_answers"] += 1
        else:
            rows.append(row)
    counts["rows_read"] += read
    if not rows:
        raise InputError(
            f"{source.path or source.dataset}: none of {read} rows is kept: check `where` and max_answer_bytes"
        )
    return rows


def _matches(value: Any, prefix: str | tuple[str, ...]) -> bool:
    return value is not None and str(value).startswith(prefix)


def _question(origin: str, fields: Mapping[str, Any]) -> Question:
    try:
        return Question.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        fault = error.errors()[0]
        raise InputError(f"{origin}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


def _get(raw: Mapping[str, Any], source: TextSource, field: str) -> Any:
    return raw.get(source.columns.get(field, field))


def _missed(column: str, raw: Mapping[str, Any]) -> str:
    """A column that is not there, and the one that may have been meant for it."""
    close = get_close_matches(column, [name for name in raw if name != column], 1)
    return f"{column!r}" + (f" (it has {close[0]!r}: is that it?)" if close else "")


def _row(
    origin: str, raw: Mapping[str, Any], source: TextSource, template: str, defaults: Mapping[str, str] = NOTHING
) -> Row:
    def text(field: str, default: str | None = None) -> str:
        value = _get(raw, source, field)
        value = default if value is None else str(value)
        if value is None:
            raise InputError(f"{origin} has no {_missed(source.columns.get(field, field), raw)}")
        if not value.strip():
            raise InputError(f"{origin} has an empty {source.columns.get(field, field)!r}")
        return value

    def known(field: str, override: str | None) -> str:
        if override is not None:
            return override
        if _get(raw, source, field) is None and field not in defaults:
            raise InputError(f"{origin} has no {_missed(field, raw)}: add the column, or set `{field}` of the source")
        return text(field, defaults.get(field))

    split = known("split", source.split)
    if split not in SPLITS:
        raise InputError(f"{origin} has split {split!r}: it must be one of {', '.join(SPLITS)}")
    options, index = _options(origin, raw, source)
    answer = text("answer", options[index] if options and index is not None else None)
    if options and split == "test":
        index = options.index(answer) if index is None and answer in options else index
        if index is None or options[index] != answer:
            raise InputError(f"{origin}: the answer {answer[:40]!r} is not the option that `answer_idx` names")
    whole = source.path is not None and source.path.endswith(".txt")  # plain text has nothing to ask
    context = _get(raw, source, "context")
    name = text("id")
    return Row(
        origin=origin,
        id=name,
        domain=known("domain", source.domain),
        split=split,
        prompt="" if whole else render_prompt(template, text("question"), None if context is None else str(context)),
        answer=answer,
        group=_part(text("group", name), name, source.parts),
        private=_flag(origin, _get(raw, source, "private_group"))
        if source.private_group is None
        else source.private_group,
        options=options,
        answer_idx=index if options else None,
        device=source.device if source.device is not None else _get(raw, source, "device"),
    )


def _part(group: str, name: str, parts: int | None) -> str:
    return group if parts is None else f"{group} ({int(_draw(f'part {name}') * parts) + 1} of {parts})"


def _options(origin: str, raw: Mapping[str, Any], source: TextSource) -> tuple[tuple[str, ...] | None, int | None]:
    options, index = _get(raw, source, "options"), _get(raw, source, "answer_idx")
    if options is None:
        return None, None
    if not isinstance(options, list) or len(options) < 2:
        raise InputError(f"{origin}: options must be a list of two or more")
    if index is not None and not (isinstance(index, int) and 0 <= index < len(options)):
        raise InputError(f"{origin}: answer_idx {index!r} is not an index of {len(options)} options")
    return tuple(str(option) for option in options), index


def _flag(origin: str, value: Any) -> bool:
    flags = {None: False, False: False, True: True, "false": False, "true": True}
    value = value.lower() if isinstance(value, str) else value
    if value not in flags:
        raise InputError(f"{origin}: private_group must be true or false, not {value!r}")
    return flags[value]


def _limited(rows: list[Row], limit: int | None, seed: str, counts: Counter[str]) -> list[Row]:
    """At most `limit` rows of each split, in file order: groups in one shuffled order, the last one cut to fit.

    The order is the same in each split, so that the groups that are tested are those that devices hold.
    """
    if limit is None:
        return rows
    groups = sorted({row.group for row in rows})
    Random(seed).shuffle(groups)
    rank = {group: place for place, group in enumerate(groups)}
    kept: set[int] = set()
    for split in SPLITS:
        places = [place for place, row in enumerate(rows) if row.split == split]
        kept.update(sorted(places, key=lambda place: rank[rows[place].group])[:limit])
    counts["left_out_over_max_rows"] += len(rows) - len(kept)
    return [row for place, row in enumerate(rows) if place in kept]


def _marked(rows: list[Row]) -> list[Row]:
    """Mark every row of a private group; refuse ids that come twice and private groups that are public."""
    private = private_groups((row.group, row.private) for row in rows)
    seen: dict[str, str] = {}
    for row in rows:
        if row.id in seen:
            raise InputError(f"{row.origin}: id {row.id!r} was used before, by {seen[row.id]}")
        seen[row.id] = row.origin
        if row.split == "public" and row.group in private:
            raise InputError(f"{row.origin}: group {row.group!r} is marked private_group, yet this row is public")
    return [replace(row, private=row.group in private) for row in rows]


def _draw(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def _names(config: FileData) -> str:
    return ", ".join(str(source.path or source.dataset) for source in config.sources)
