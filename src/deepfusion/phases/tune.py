"""Phase III, tuning: the assembled MoE learns to work as one; its experts usually stay as they were distilled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepfusion.artifacts import Checkpoint, Teaching, TransferSet
from deepfusion.config import Runtime, TunePhase
from deepfusion.families import Role
from deepfusion.students import learn, tokens_within, transfer_lessons

NOT_EXPERTS: frozenset[Role] = frozenset({"embedding", "attention", "shared", "norm", "head", "router"})


def tune(
    moe: Checkpoint,
    transfer: TransferSet,
    teachings: Sequence[Teaching],
    config: TunePhase,
    *,
    ask: str = "writers",
    budget: float,
    seed: int,
    into: Path,
    runtime: Runtime,
) -> Checkpoint:
    """Train all but the routed experts, and them too unless they are frozen: CE, and KL to the writers.

    Args:
        ask: whose signals the teachings hold, as in `DistillPhase.teachers`.
        budget: token-parameters, forward and backward; what measuring the router took is part of it.
    """
    text = transfer_lessons(
        moe,
        transfer,
        teachings,
        config.training,
        ask=ask,
        only_public=config.text == "public",
        objective=config.objective,
    )
    return learn(
        moe,
        text,
        config.objective,
        config.training,
        tokens=tokens_within(budget - moe.work.token_parameters, moe),
        trains=NOT_EXPERTS if config.freeze_experts else None,
        balance=config.balance,
        ownership=config.ownership,
        seed=seed,
        into=into,
        runtime=runtime,
    )
