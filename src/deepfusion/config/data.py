"""The recipe's `data` section: where text comes from, and who holds what."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from deepfusion.config.section import Section


class SyntheticData(Section):
    """The embedded benchmark: invented domains, entities and facts, of which only devices know the private ones."""

    kind: Literal["synthetic"]
    domains: int = Field(default=4, ge=1, le=8)
    """Number of invented domains (medicine, finance, law, travel, …)."""
    private_facts: int = Field(default=40, ge=1)
    """Private facts per domain: no public text states them."""
    public_facts: int = Field(default=16, ge=0)
    """Public facts per domain: stated in the public text."""
    values: int = Field(default=16, ge=2, le=64)
    """Number of possible answers to each kind of question; a fact carries log2(values) bits, chance is 1/values."""
    private_documents_per_fact: int = Field(default=10, ge=1)
    """Documents that a device holds about each fact it knows (different templates)."""
    public_documents_per_fact: int = Field(default=10, ge=0)
    """Public documents about each public fact."""
    filler_documents: int = Field(default=200, ge=0)
    """Public documents per domain that use the domain's words but state no fact."""
    question_coverage: float = Field(default=0.5, ge=0, le=1)
    """Share of the private facts about which the public text holds a question, without its answer."""
    options: int = Field(default=4, ge=2)
    """Length of the option list of a test question (choice accuracy)."""


class TextSource(Section):
    """One file or `datasets` name with real text."""

    path: str | None = None
    """A `.jsonl` or `.txt` file, relative to the recipe's folder (with `--set`: to the current one) unless absolute."""
    dataset: str | None = None
    """Anything `datasets.load_dataset` opens: a hub name or a builder such as `json`, `csv` or `parquet`."""
    arguments: dict[str, Any] = Field(default={})
    """Further arguments of `datasets.load_dataset` (`name`, `split`, `data_files`, …)."""
    columns: dict[str, str] = Field(default={})
    """Our field → the source's column, where they differ (fields: id, domain, context, question, options, answer,
    answer_idx, group, private_group, split, device, source)."""
    where: dict[str, str | tuple[str, ...]] = Field(default={})
    """Keep only rows whose columns have these values, e.g. `{source: FiQA}` (a prefix match), or one of several, e.g.
    `{split: [private, test]}`."""
    domain: str | None = None
    """Domain of every row (overrides the column)."""
    split: Literal["private", "public", "test"] | None = None
    """Split of every row (overrides the column)."""
    private_group: bool | None = None
    """Whether every row's group is private, known to devices alone (overrides the column)."""
    parts: int | None = Field(default=None, ge=2)
    """Cut each group into so many groups, by the rows' ids: for groups too large for one device, such as an exam. A
    private group's parts are all private; a test row asks about the part that it falls into."""
    device: str | None = None
    """The device that holds every private row of this source (only with `partition.mode: given`)."""
    max_rows: int | None = Field(default=None, ge=1)
    """Keep at most this many rows per split, chosen by a seeded shuffle of whole groups."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give exactly one of `path` and `dataset`")
        return self


class MadeOptions(Section):
    """Options for test questions that have none, made of other test questions' answers."""

    count: int = Field(default=4, ge=2)
    """Options of a question."""
    questions: int = Field(default=50, ge=1)
    """Questions of each domain that get options, those of private groups first: each costs `count` answers to score."""


class FileData(Section):
    """Real text from files or datasets."""

    kind: Literal["files"]
    sources: tuple[TextSource, ...] = Field(min_length=1)
    """Where the rows come from."""
    domains: tuple[str, ...] | None = None
    """Keep only rows of these domains; none: all."""
    prompt: str = "{context}\n{question}\n"
    """Template of a prompt; an absent context takes its line with it."""
    max_answer_bytes: int | None = Field(default=None, ge=1)
    """Leave out rows whose answer is longer than this many UTF-8 bytes (counted in the report); none: keep all. Plain
    text (`.txt`) has no answers, and is kept."""
    made_options: MadeOptions | None = None
    """Give test questions without options some (choice accuracy); none: leave them as they are."""
    heldout_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the private rows kept aside to tell when training has converged (never trained on, never reported)."""


class Partition(Section):
    """Who holds what."""

    mode: Literal["by_domain", "uneven", "given"] = "by_domain"
    """by_domain: each device's domain mixture is drawn from a Dirichlet; uneven: random shares of everything, as in the
    paper; given: the rows' own `device` column."""
    devices: int = Field(default=16, ge=1)
    """Number of devices N."""
    alpha: float = Field(default=0.05, gt=0)
    """Dirichlet concentration: small means each device lives in one domain."""
    holders: int = Field(default=2, ge=1)
    """How many devices hold each fact or group (capped by N)."""


class Data(Section):
    """The text: public, private per device, test."""

    source: Annotated[SyntheticData | FileData, Field(discriminator="kind")]
    partition: Partition = Partition()
