"""Names for people, one for each thing: the terminal, the page and the model card say the same."""

from __future__ import annotations

from deepfusion.metrics import Subset

LISTED = 12
"""Dead experts that are named, before they are only counted."""
METRICS = {
    "token_accuracy": "token accuracy",
    "token_log_perplexity": "log-perplexity",
    "choice_accuracy": "choice accuracy",
    "answer_nats_per_byte": "nats per byte",
    "judge_score": "judge's score",
}
SUBSETS: dict[Subset, str] = {
    "private_only": "what only devices know",
    "public": "what is public",
    "all": "all questions",
}
QUESTIONS: dict[Subset, str] = {"private_only": "questions that only devices can answer", "all": "all test questions"}
STAGES = {
    "base": "base model",
    "device": "devices",
    "device_ensemble": "devices (ensemble)",
    "proxy": "proxies",
    "proxy_ensemble": "proxies (ensemble)",
    "task_vectors": "base + task vectors",
    "joint_student": "joint student",
    "branch": "branches",
    "branch_ensemble": "branches (ensemble)",
    "merged": "merged MoE (untuned)",
    "deepfusion": "DeepFusion MoE",
}
CONTROLS = {
    "pooled_text": "pooled text (MoE)",
    "pooled_text_dense": "pooled text (dense)",
    "dense_kd": "distillation (dense)",
}
BASELINES = {
    "ofa_kd": "OFA-KD",
    "fedmkt": "FedMKT (server side)",
    "fedjets": "FedJETS",
    "fedavg_dense": "FedAvg (dense)",
    "btx": "Branch-Train-MiX",
}
BOUNDS = {"centralized": "centralised training"}
BESIDE = {
    "upcycle", "ofa_joint", "ofa_own_vector", "ofa_branch", "ofa_assemble", "ofa_tune", "fedmkt_likelihoods",
    "fedmkt_consult", "fedmkt_joint", "fedmkt_own_vector", "fedmkt_branch", "fedmkt_assemble", "fedmkt_tune",
    "fedjets_start", "fedjets_device", "fedjets_round", "fedjets_best", "fedjets_tune", "fedavg_device",
    "fedavg_materialise", "fedavg_round", "btx_device", "btx_materialise", "btx_branch", "btx_merge",
}  # fmt: skip
"""Phases of which references are made, beside those that have a reference's name."""
SYSTEMS = STAGES | CONTROLS | BASELINES | BOUNDS
KINDS = {
    "stage": "this run, stage by stage: text stays on devices",
    "control": "controls: the same text, the same server compute",
    "baseline": "baselines: what others do with the same devices",
    "bound": "upper bound: all private text in one place, compute of its own",
    "other": "others",
}


def kind(system: str) -> str:
    """What a system is beside the run: a key of `KINDS`."""
    of = {"stage": STAGES, "control": CONTROLS, "baseline": BASELINES, "bound": BOUNDS}
    return next((name for name, systems in of.items() if system in systems), "other")


def in_order(systems: set[str]) -> list[str]:
    """Stages in the method's order, then controls, baselines, bounds, and what we do not know by name."""
    return [name for name in SYSTEMS if name in systems] + sorted(systems - SYSTEMS.keys())


def label(system: str) -> str:
    """A system's name on the page."""
    return SYSTEMS.get(system, system)


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number and its noun: `1 device`, `1,200 devices`, `2 proxies`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def joined(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def left_out(device: str, reason: str) -> str:
    """A rejected device and why; most reasons name it already."""
    return reason if reason.startswith(f"device {device}") else f"{device}: {reason}"
