"""What a run may find out, made up: every section of a report has something to tell."""

from __future__ import annotations

import random
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from deepfusion.artifacts import (
    Clusters,
    Corpus,
    DeviceInfo,
    Intake,
    Proxy,
    Rejection,
    TransferSet,
    Upload,
    Work,
)
from deepfusion.data.documents import ScoredQuestion
from deepfusion.findings import Compute, Findings, Measured, Step, Traffic

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
    "fedavg_dense": 0.58,
    "btx": 0.63,
    "centralized": 0.90,
}
DEVICES = [f"d{i:02d}" for i in range(16)]
EVIL = "<script>alert('$x$')</script> --> & \"q\""


def scored(rate: float, generator: random.Random) -> list[ScoredQuestion]:
    """Answers to 160 questions of four domains, every fifth of them public, most of whose tokens are right."""
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
    """Four experts in three layers, of which the last expert of the first layer is dead."""
    share = [[0.55, 0.15, 0.15, 0.15], [0.1, 0.6, 0.2, 0.1], [0.15, 0.15, 0.6, 0.1], [0.05, 0.1, 0.1, 0.75]]
    return {
        "domains": list(DOMAINS),
        "tokens": dict.fromkeys(DOMAINS, 100),
        "layers": 3,
        "experts": 4,
        "clusters": 4,
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


def findings(folder: Path, devices: list[str], **changes: Any) -> Findings:
    """A run of everything, with some of its facts replaced."""
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
            method=("full", "lora", "qlora")[i % 3],
            trained_parameters=(130_000, 4_000, 4_000)[i % 3],
            sends="model",
        )
        for i, device in enumerate(devices)
    ]
    measured = [
        Measured(name, scored(rate, generator), routing=routing() if name == "deepfusion" else None)
        for name, rate in SYSTEMS.items()
        if name != "device"
    ]
    measured += [Measured("device", scored(0.2 + 0.02 * i, generator), item=d) for i, d in enumerate(devices[:5])]
    found = Findings(
        run="demo",
        seed=3,
        recipe={"name": "demo", "data": {"source": {"kind": "synthetic"}}, "models": {"base": {"path": "größe"}}},
        recipe_digest="ab" * 32,
        measured=measured,
        corpus=Corpus(
            folder=folder,
            domains=DOMAINS,
            counts={"rows_read": 700, "left_out_long_answers": 12, "left_out_by_where": 0, "test": 160},
            devices=tuple(
                DeviceInfo(id=d, domains={DOMAINS[of[d]]: 30, DOMAINS[(of[d] + 1) % 4]: 3}, documents=33, bytes=4000)
                for d in devices
            ),
        ),
        uploads=uploads,
        baselines={"fedavg_dense": Traffic(5, 90_000_000, 80_000_000), "btx": Traffic(1, 18_000_000, 16_000_000)},
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
            Compute("deepfusion", "write", Work(tokens=50_000, forward=5e9)),
            Compute("deepfusion", "joint", Work(tokens=800_000, forward=3.2e11, backward=6.4e11)),
            Compute("deepfusion", "branch", Work(tokens=100_000, forward=4e10, backward=8e10), critical=3e10),
            Compute("deepfusion", "tune", Work(tokens=65_000, forward=4e10, backward=8e10)),
            Compute("pooled_text", "train", Work(tokens=660_000, forward=4e11, backward=8e11)),
            Compute("centralized", "train", Work(tokens=660_000, forward=8e11, backward=16e11)),
        ],
        steps=[
            Step(
                "device",
                d,
                12.0,
                11.5,
                i == 0,
                5_000,
                1e9,
                200_000_000,
                "device",
                {"before_bytes": 2**27, "peak_bytes": 3 * 2**26} if i else None,
            )
            for i, d in enumerate(devices)
        ]
        + [
            Step("cluster", None, 0.5, 0.5, False),
            Step("joint", None, 90.0, 88.0, False, 900_000, 1e12, 700_000_000),
            Step("centralized", None, 90.0, 88.0, False, 900_000, 1e12, 900_000_000, "reference"),
        ],
        bytes_down=dict.fromkeys(devices, 1000),
        losses={"deepfusion": losses, "joint_student": losses[:200], "branch 0": losses[:9], "centralized": losses[50:]}
        | {f"device {d}": losses[:100] for d in devices[:4]},
        warnings=("the test set has few questions",),
    )
    return replace(found, **changes)


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
