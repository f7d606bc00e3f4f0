import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict

from deepfusion import figures
from deepfusion.artifacts import (
    Checkpoint,
    Clusters,
    Corpus,
    DeviceInfo,
    Intake,
    Proxy,
    Rejection,
    Scores,
    TransferSet,
    Upload,
    Work,
)
from deepfusion.data.documents import ScoredQuestion, write_jsonl
from deepfusion.metrics import ResultRow
from deepfusion.phases.report import Compute, Findings, Measured, Step, model_card, report

DOMAINS = ("finance", "law", "medicine", "travel")
SYSTEMS = {
    "base": 0.09,
    "device": 0.30,
    "proxy_ensemble": 0.51,
    "joint_student": 0.76,
    "branch_ensemble": 0.71,
    "merged": 0.45,
    "deepfusion": 0.81,
    "pooled_text": 0.61,
    "pooled_text_dense": 0.69,
    "dense_kd": 0.78,
    "centralized": 0.90,
}
EVIL = "<script>alert('$x$')</script> --> & \"q\""


class Traffic(BaseModel):
    model_config = ConfigDict(extra="forbid")
    up: int
    down: int


class Bytes(Traffic):
    per_device: dict[str, Traffic]


class Memory(BaseModel):
    model_config = ConfigDict(extra="forbid")
    device_peak_bytes: dict[str, int]
    server_peak_bytes: int | None


class Phase(BaseModel):
    name: str
    item: str | None
    seconds: float
    cpu_seconds: float
    cached: bool
    tokens: int | None
    flops: float | None


class Results(BaseModel):
    """The stable part of `results.json`."""

    schema_: Literal[1]
    run: str
    recipe_digest: str
    versions: dict[str, str]
    seed: int
    rows: list[ResultRow]
    bytes: Bytes
    memory: Memory
    phases: list[Phase]
    rejected: list[Rejection]


def scored(rate: float, generator: random.Random) -> list[ScoredQuestion]:
    return [
        ScoredQuestion(
            id=f"q{i}",
            domain=DOMAINS[i % 4],
            private=i % 5 != 0,
            prompt_nats=20.0,
            prompt_bytes=20,
            answer_nats=4 * (1.2 - rate) * generator.uniform(0.8, 1.2),
            answer_tokens=4,
            answer_bytes=9,
            correct_tokens=sum(generator.random() < rate for _ in range(4)),
            choice=0 if generator.random() < rate else 1,
            answer_idx=0,
        )
        for i in range(160)
    ]


def routing() -> dict[str, Any]:
    share = [[0.55, 0.15, 0.15, 0.15], [0.1, 0.6, 0.2, 0.1], [0.15, 0.15, 0.6, 0.1], [0.05, 0.1, 0.1, 0.75]]
    return {
        "domains": list(DOMAINS),
        "tokens": dict.fromkeys(DOMAINS, 100),
        "layers": 3,
        "experts": 4,
        "probabilities": {domain: [share[i], [0.25] * 4, share[i]] for i, domain in enumerate(DOMAINS)},
        "mutual_information": {"mean": 0.2, "layers": [0.3, 0.0, 0.3]},
        "load": [[0.25] * 4] * 3,
        "used": [[0.5, 0.5, 0.995, 0.005]] * 3,
        "dead": [[0, 3]],
        "removal": [
            {"expert": e, "domain": d, "nats_per_token": 0.4 * (e == i), "token_accuracy": -0.3 * (e == i), "count": 9}
            for e in range(4)
            for i, d in enumerate(("all", *DOMAINS))
        ],
        "expert_difference": {"mean": 0.41, "layers": [0.4, 0.41, 0.42]},
    }


def findings(folder: Path, devices: list[str]) -> Findings:
    generator = random.Random(0)
    types = ["gpt2", "llama", "opt"]
    groups = [devices[i::4] for i in range(4)]
    of = {device: i for i, group in enumerate(groups) for device in group}

    def alike(a: str, b: str) -> float:
        return 1.0 if a == b else (0.8 if of[a] == of[b] else 0.2) + generator.uniform(-0.1, 0.1)

    losses = tuple((step, 5 * 0.99**step + generator.uniform(0, 0.3)) for step in range(300))
    uploads = [
        Upload(
            folder=folder,
            device=device,
            ancestor=types[i % 3],
            model_type=types[i % 3],
            lineage=types[i % 3],
            parameters=130_000,
            active_parameters=100_000,
            tokens=5_000,
            embedding="00",
            bytes=520_000 + 10_000 * (i % 3),
        )
        for i, device in enumerate(devices)
    ]
    measured = [Measured(name, scored(rate, generator), routing=None) for name, rate in SYSTEMS.items()]
    measured += [Measured("device", scored(0.2 + 0.02 * i, generator), item=d) for i, d in enumerate(devices[:5])]
    measured = [m for m in measured if m.system != "device" or m.item is not None]
    measured.append(Measured("deepfusion", scored(0.8, generator), routing=routing()))
    measured.pop(next(i for i, m in enumerate(measured) if m.system == "deepfusion"))
    return Findings(
        run="demo",
        seed=3,
        recipe={"name": "demo", "data": {"source": {"kind": "synthetic"}}, "models": {"base": {"path": "größe"}}},
        recipe_digest="ab" * 32,
        measured=measured,
        corpus=Corpus(
            folder=folder,
            domains=DOMAINS,
            devices=tuple(
                DeviceInfo(id=d, domains={DOMAINS[of[d]]: 30, DOMAINS[(of[d] + 1) % 4]: 3}, documents=33, bytes=4000)
                for d in devices
            ),
        ),
        uploads=uploads,
        intake=Intake(
            folder=folder,
            accepted=tuple(devices),
            rejected=(Rejection(device="d99", reason="its config.json is not JSON"),),
            bytes={u.device: u.bytes for u in uploads},
        ),
        clusters=Clusters(
            folder=folder,
            k=4,
            members=tuple(map(tuple, groups)),
            similarity=tuple(tuple(alike(a, b) for b in devices) for a in devices),
            devices=tuple(devices),
            centroids=("00",) * 4,
            warnings=("cluster 2 has members that are unlike each other",),
        ),
        proxies=[
            Proxy(
                folder=folder,
                cluster=i,
                lineage="llama",
                model_type="llama",
                members=tuple(group[:2]),
                weights=(0.5, 0.5),
                distance=0.2,
                parameters=1,
                active_parameters=1,
            )
            for i, group in enumerate(groups)
        ],
        transfer=TransferSet(
            folder=folder,
            counts={"public": 1200, "answered": 320, "sampled": 2400, "dropped_unfinished": 12},
            per_cluster=(680, 680, 680, 680),
            by_writer=dict.fromkeys(devices, 170),
            private_text_risk=True,
            notices=("The transfer text was written by devices' models: it can repeat private text word for word.",),
        ),
        compute=[
            Compute("deepfusion", "teachers", Work(tokens=50_000, forward=5e9)),
            Compute("deepfusion", "joint", Work(tokens=800_000, forward=3.2e11, backward=6.4e11)),
            Compute("deepfusion", "branch", Work(tokens=100_000, forward=4e10, backward=8e10), critical=3e10),
            Compute("deepfusion", "tune", Work(tokens=65_000, forward=4e10, backward=8e10)),
            Compute("pooled_text", "train", Work(tokens=660_000, forward=4e11, backward=8e11)),
        ],
        steps=[Step("device", d, 12.0, 11.5, i == 0, 5_000, 1e9, 200_000_000, "device") for i, d in enumerate(devices)]
        + [
            Step("cluster", None, 0.5, 0.5, False),
            Step("distill", None, 90.0, 88.0, False, 900_000, 1e12, 700_000_000),
            Step("centralized", None, 90.0, 88.0, False, 900_000, 1e12, 900_000_000, "reference"),
        ],
        bytes_down=dict.fromkeys(devices, 1000),
        losses={"deepfusion": losses, "joint": losses[:200], "centralized": losses[50:]}
        | {f"device {d}": losses[:100] for d in devices[:4]},
        warnings=("the test set has few questions",),
    )


DEVICES = [f"d{i:02d}" for i in range(16)]


class Page(HTMLParser):
    """Collects what a browser would see: ids, tags, attributes that load things; and checks that tags close."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.stack.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"src", "href", "xlink:href", "action", "data"}:
                self.loads.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_stands_alone_and_has_every_section(tmp_path: Path) -> None:
    done = report(findings(tmp_path, DEVICES), into=tmp_path)
    text = done.page.read_text(encoding="utf-8")
    page = Page(text)
    assert page.stack == []
    assert len(page.ids) == len(set(page.ids))
    assert {
        *("results", "stages", "domains", "clusters", "transfer", "routing", "training", "compute", "traffic", "time"),
        *("remarks", "recipe"),
    } <= set(page.ids)
    assert page.tags.count("svg") == 5
    assert all(load.startswith(("#", "data:")) for load in page.loads)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert not re.search(r"#01020[3-7]", text), "a colour's stand-in was left in a figure"
    words = " ".join(page.text)
    assert "word for word" in words
    assert "Left out: d99: its config.json is not JSON" in words
    assert "cluster 2 has members that are unlike each other" in words
    assert "path: größe" in words


def test_results_follow_their_schema(tmp_path: Path) -> None:
    done = report(findings(tmp_path, DEVICES), into=tmp_path)
    tree = json.loads(done.results.read_text(encoding="utf-8"))
    extra = {"compute", "routing", "clusters", "transfer", "headline", "warnings"}
    stable = {"schema_" if key == "schema" else key: value for key, value in tree.items() if key not in extra}
    results = Results.model_validate(stable)
    assert set(stable) == set(Results.model_fields)
    assert extra <= set(tree)
    assert results.bytes.up == sum(520_000 + 10_000 * (i % 3) for i in range(16))
    assert results.bytes.per_device["d00"] == Traffic(up=520_000, down=1000)
    assert results.memory.server_peak_bytes == 700_000_000, "a reference is not the server's memory"
    assert {row.item for row in results.rows if row.system == "device"} == set(DEVICES[:5])
    assert tree["compute"][2]["critical_path"] == 3e10
    assert tree["compute"][1]["token_parameters"] == pytest.approx(9.6e11)
    assert done.headline == tree["headline"]
    values = {
        row.system: row.value
        for row in results.rows
        if (row.domain, row.subset, row.metric, row.item) == ("all", "private_only", "token_accuracy", None)
    }
    closed = (values["deepfusion"] - values["base"]) / (values["centralized"] - values["base"])
    assert done.headline["gap_closed"] == pytest.approx(closed)


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    done = report(findings(tmp_path, [EVIL, *DEVICES[1:]]), into=tmp_path)
    text = done.page.read_text(encoding="utf-8")
    page = Page(text)
    assert page.stack == []
    assert "script" not in page.tags
    assert EVIL in "".join(page.text)


def test_a_run_with_little_to_tell(tmp_path: Path) -> None:
    rows = [row.model_copy(update={"private": False}) for row in scored(0.5, random.Random(0))]
    little = Findings(
        run="tiny", seed=0, recipe={"name": "tiny"}, recipe_digest="", measured=[Measured("base", rows)], versions={}
    )
    done = report(little, into=tmp_path)
    page = Page(done.page.read_text(encoding="utf-8"))
    assert {"results", "remarks", "recipe"} <= set(page.ids)
    assert not {"clusters", "routing", "training", "compute", "traffic", "time"} & set(page.ids)
    assert "token_accuracy" not in done.headline
    with pytest.raises(ValueError, match="no scored question"):
        report(Findings("empty", 0, {}, "", [Measured("base", [])]), into=tmp_path)


def test_scores_are_read_from_their_folder(tmp_path: Path) -> None:
    rows = scored(0.5, random.Random(0))
    write_jsonl(tmp_path / "rows.jsonl", rows)
    found = Measured.of(Scores(folder=tmp_path, system="device", item="d1", routing={"experts": 4}))
    assert (found.system, found.item, list(found.rows), found.routing) == ("device", "d1", rows, {"experts": 4})


def test_figures_are_the_same_twice_and_take_many_devices() -> None:
    names = [f"device-with-a-long-name-{i}-世界" for i in range(60)]
    matrix = [[float(i == j) for j in range(60)] for i in range(60)]
    large = figures.similarity(matrix, names, [i % 5 for i in range(60)])
    assert large == figures.similarity(matrix, names, [i % 5 for i in range(60)])
    assert "data:image/png" in large
    assert "20 smaller ones not drawn" in figures.costs({n: i for i, n in enumerate(names)}, {}, None)
    assert figures.routing({"law": [[1 / 60] * 60] * 12}).count("layer ") >= 4
    assert "世" in figures.similarity([[1.0]], ["世界"], [0])


def test_sizes_for_people() -> None:
    assert [figures.size(n) for n in (12, 1536, 3 * 2**20, 5 * 2**40)] == ["12 B", "1.5 KiB", "3.0 MiB", "5.0 TiB"]


def test_the_model_card(tmp_path: Path) -> None:
    model = Checkpoint(
        folder=tmp_path, model_type="mixtral", lineage="x", parameters=1_234_567, active_parameters=600_000
    )
    path = model_card(findings(tmp_path, [EVIL, *DEVICES[1:]]), model, into=tmp_path)
    assert path == tmp_path / "README.md"
    _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert {"moe", "deepfusion"} <= set(yaml.safe_load(front)["tags"])
    assert "1,234,567 parameters" in body
    assert "word for word" in body
    assert 'AutoModelForCausalLM.from_pretrained("path/to/this/folder")' in body
    table = [line for line in body.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(SYSTEMS)
    assert all(line.count("|") == 5 for line in table)
