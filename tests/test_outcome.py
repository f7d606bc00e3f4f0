"""`results.json`: what other programs read."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any, Literal, cast

import pytest
from pydantic import BaseModel, ConfigDict

from deepfusion.artifacts import Rejection, Wire
from deepfusion.findings import Measured
from deepfusion.labels import METRICS, SUBSETS, SYSTEMS
from deepfusion.metrics import ResultRow
from deepfusion.phases.report import report
from deepfusion.pipeline import STEPS
from found import DEVICES, findings, scored

DOCUMENT = Path(__file__).parents[1] / "docs" / "results.md"
# Where keys are names out of the run: path → what the document calls them.
NAMED = {
    "versions": "<package>",
    "bytes.per_device": "<device>",
    "bytes.baselines": "<system>",
    "bytes.wire.per_device": "<device>",
    "memory.device_peak_bytes": "<device>",
    "corpus.counts": "<what>",
    "transfer.counts": "<kind>",
    "transfer.by_writer": "<writer>",
    "routing": "<system>",
    "routing.<system>.probabilities": "<domain>",
    "routing.<system>.tokens": "<domain>",
}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Traffic(Strict):
    up: int
    down: int


class Rounds(Traffic):
    rounds: int


class Messages(Traffic):
    per_device: dict[str, Traffic]


class Bytes(Traffic):
    per_device: dict[str, Traffic]
    baselines: dict[str, Rounds]
    wire: Messages | None = None


class Memory(Strict):
    device_peak_bytes: dict[str, int]
    server_peak_bytes: int | None


class Phase(Strict):
    name: str
    item: str | None
    seconds: float
    cpu_seconds: float
    cached: bool
    tokens: int | None
    flops: float | None
    peak_bytes: int | None
    side: Literal["device", "server", "reference"]


class DeviceFacts(Strict):
    device: str
    ancestor: str
    model_type: str
    method: Literal["full", "lora", "qlora"]
    sends: Literal["model", "adapter", "packed"]
    parameters: int
    trained_parameters: int
    tokens: int
    bytes: int
    before_bytes: int | None
    training_peak_bytes: int | None
    codec: str | None
    error: float | None
    lost: float | None


class Results(BaseModel):
    """The part of `results.json` whose shape does not depend on the run."""

    schema_: Literal[1]
    run: str
    recipe_digest: str
    versions: dict[str, str]
    seed: int
    rows: list[ResultRow]
    bytes: Bytes
    memory: Memory
    devices: list[DeviceFacts]
    phases: list[Phase]
    rejected: list[Rejection]


def written(into: Path, **changes: Any) -> dict[str, Any]:
    """The tree that a program reads, by a reader that takes nothing but JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = report(findings(into, DEVICES, **changes), into=into).results.read_text(encoding="utf-8")
    return json.loads(text, parse_constant=refuse)


def fields(tree: Any, path: str = "") -> set[str]:
    """Every field as the document names it: `rows[].value`, `bytes.per_device.<device>.up`."""
    if isinstance(tree, dict) and tree:
        entries = cast("dict[str, Any]", tree).items()
        return set[str]().union(*(fields(v, f"{path}.{NAMED.get(path, k)}".lstrip(".")) for k, v in entries))
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return set[str]().union(*(fields(entry, f"{path}[]") for entry in cast("list[Any]", tree)))
    return {path}


def section(title: str) -> str:
    """One section of the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def first_cells(title: str) -> list[str]:
    """What stands in code in the first column of a section's tables."""
    rows = [line.split(" | ")[0] for line in section(title).splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def test_they_follow_their_schema(tmp_path: Path) -> None:
    tree = written(tmp_path)
    extra = {"compute", "routing", "corpus", "clusters", "transfer", "headline", "warnings"}
    stable = {"schema_" if key == "schema" else key: value for key, value in tree.items() if key not in extra}
    results = Results.model_validate(stable)
    assert set(stable) == set(Results.model_fields)
    assert extra <= set(tree)
    assert results.bytes.up == sum(520_000 + 10_000 * (i % 3) for i in range(16))
    assert results.bytes.per_device["d00"] == Traffic(up=520_000, down=1000)
    assert results.bytes.wire is None
    assert results.memory.server_peak_bytes == 700_000_000, "a reference is not the server's memory"
    assert [one.device for one in results.devices] == DEVICES
    assert results.devices[0].training_peak_bytes is None, "it was not measured"
    one = results.devices[4]
    assert (one.method, one.trained_parameters, one.bytes) == ("lora", 4_000, 530_000)
    assert one.training_peak_bytes == 3 * 2**26 > one.before_bytes == 2**27
    assert {row.item for row in results.rows if row.system == "device"} == set(DEVICES[:5])
    assert tree["compute"][2]["critical_path"] == 3e10
    assert tree["compute"][1]["token_parameters"] == pytest.approx(9.6e11)


def test_what_went_through_a_federations_messages(tmp_path: Path) -> None:
    tree = written(tmp_path, wire={"d00": Wire(up=600_000, down=9000), "lost": Wire(down=4000)})
    assert tree["bytes"]["wire"] == {
        "up": 600_000, "down": 13_000,
        "per_device": {"d00": {"up": 600_000, "down": 9000}, "lost": {"up": 0, "down": 4000}},
    }  # fmt: skip
    assert "585.9 KiB went to the server and 12.7 KiB to devices" in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_no_number_is_null(tmp_path: Path, number: float) -> None:
    rows = [row.model_copy(update={"answer_nats": number}) for row in scored(0.5, random.Random(0))]
    tree = written(tmp_path, measured=[Measured("deepfusion", rows)])
    values = {row["metric"]: row["value"] for row in tree["rows"] if row["domain"] == row["subset"] == "all"}
    assert values["token_log_perplexity"] is None
    assert values["token_accuracy"] > 0
    assert "token_log_perplexity" not in tree["headline"]
    assert [w for w in tree["warnings"] if w.startswith("deepfusion has no finite log-perplexity")]


# ── the document ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_field_is_documented(tmp_path: Path) -> None:
    elsewhere = {"wire": {DEVICES[0]: Wire(up=1, down=2)}}
    assert sorted(first_cells("`results.json`")) == sorted(fields(written(tmp_path, **elsewhere)))


def test_every_name_on_terminal_and_page_is_mapped_to_its_key() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    names = METRICS | {str(subset): label for subset, label in SUBSETS.items()} | SYSTEMS
    assert [key for key, label in names.items() if f"| `{key}` | {label} |" not in text] == []


def test_every_phase_is_documented() -> None:
    assert set(first_cells("Bytes, memory, time")) == set(STEPS)
