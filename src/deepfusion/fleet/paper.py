"""Figs. 7 and 8 of arXiv 2602.14301 beside what a plan says of the same models.

The paper gives neither the formula behind its bars nor most of what it depends on. `SOURCES` tells what it says from
what was inferred from the bars themselves; that they come out so does not confirm any of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from deepfusion.fleet.assumptions import Assumptions
from deepfusion.fleet.costs import Model
from deepfusion.fleet.planning import Plan, planned
from deepfusion.fleet.published import known

Study = Literal["medical", "finance"]
STUDIES: dict[Study, tuple[tuple[str, ...], str]] = {
    "medical": (("gpt2", "gpt2-medium", "tinyllama-1.1b"), "qwen1.5-moe-a2.7b"),
    "finance": (("tinyllama-1.1b", "olmo-1.2b", "bloom-1.1b"), "deepseek-moe-16b"),
}
DEVICES = 128
FEDJETS = "FedJETS"

# Read off the bars, in GB. FedJETS's bar of Fig. 7 stands for both MoEs.
MEMORY: tuple[tuple[Study, str, float], ...] = (
    ("medical", "gpt2", 2.6),
    ("medical", "gpt2-medium", 3.8),
    ("medical", "tinyllama-1.1b", 7.2),
    ("medical", FEDJETS, 24.0),
    ("finance", "olmo-1.2b", 5.7),
    ("finance", "bloom-1.1b", 4.9),
    ("finance", FEDJETS, 24.0),
)
TRAFFIC: tuple[tuple[Study, str, float], ...] = (
    ("medical", "DeepFusion", 92.0),
    ("medical", FEDJETS, 295.0),
    ("finance", "DeepFusion", 130.0),
    ("finance", FEDJETS, 245.0),
)

# Field of `Assumptions` → where its default comes from.
SOURCES = {
    "method": "inferred: the paper says bfloat16 with NF4, not how such weights are trained",
    "rank": "inferred: QLoRA's own (arXiv 2305.14314), on every matrix",
    "dtype": "the paper",
    "states": "inferred from Fig. 7: in bfloat16 FedJETS would need 21 % too much, without states 24 % too little",
    "upload": "the paper, of training; that it is sent so is inferred from Fig. 8",
    "adapter": "inferred: what NF4 training leaves; without it, medical is too low in Fig. 8",
    "unquantised": "inferred from Fig. 8: with GPT-2 in NF4 too, medical is 28 % too low",
    "batch_tokens": "fitted to Fig. 7",
    "fixed_gb": "fitted to Fig. 7",
    "experts": "inferred from Fig. 8; Qwen1.5-MoE uses as many a token, DeepSeek-MoE six",
    "rounds": "inferred: FedJETS's bars of Fig. 8 are one upload, and no download",
}


@dataclass(frozen=True)
class Compared:
    """A bar, and what a plan says."""

    figure: int
    study: Study
    name: str
    paper_bytes: int
    planned_bytes: int

    @property
    def deviation(self) -> float:
        """The plan's, as a share of the paper's."""
        return self.planned_bytes / self.paper_bytes - 1

    def tree(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "deviation": self.deviation}


def sources(of: Assumptions) -> dict[str, str]:
    """Field → where its value comes from; `given` if it is another than the default."""
    usual = asdict(Assumptions())
    return {field: SOURCES[field] if value == usual[field] else "given" for field, value in asdict(of).items()}


def studied(devices: Sequence[int], of: Assumptions) -> dict[Study, Plan]:
    """The plans of both studies."""
    return {
        study: planned(study, [Model.of(name, known(name)) for name in names], Model.of(moe, known(moe)), devices, of)
        for study, (names, moe) in STUDIES.items()
    }


def compared(of: Assumptions) -> list[Compared]:
    """Every bar beside the plan. FedJETS's traffic is its uploads alone, which is what the bars show."""
    plans, rows = studied([DEVICES], of), list[Compared]()
    for study, name, gb in MEMORY:
        found = {member.name: member.memory_bytes for member in plans[study].members}
        if (client := plans[study].client) is not None:
            found[FEDJETS] = client.memory_bytes
        rows.append(Compared(7, study, name, round(1e9 * gb), found[name]))
    for study, name, gb in TRAFFIC:
        [total] = plans[study].totals
        sent = {"DeepFusion": total.up_bytes, FEDJETS: total.fedjets_up_bytes or 0}
        rows.append(Compared(8, study, name, round(1e9 * gb), sent[name]))
    return rows
