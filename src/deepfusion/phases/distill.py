"""Phase II, distillation: what teachers know goes into copies of the base model.

`joint`: one student learns from all documents, each with its own teacher. `branch`: K copies of it go on, each with
its cluster's documents and teachers; branches alone, from public text and averaged proxies, are the published method
(Eq. 11 of arXiv 2602.14301).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepfusion import checkpoints
from deepfusion.artifacts import Artifact, Checkpoint, Teaching, TransferSet
from deepfusion.config import DistillPhase, Runtime
from deepfusion.families import Role
from deepfusion.store import link_tree
from deepfusion.students import learn, tokens_within, transfer_lessons, widths

FFN: frozenset[Role] = frozenset({"ffn"})


def distill(
    student: Checkpoint,
    transfer: TransferSet,
    teachings: Sequence[Teaching],
    config: DistillPhase,
    *,
    budget: float,
    cluster: int | None = None,
    paid: Sequence[Artifact] = (),
    seed: int,
    into: Path,
    runtime: Runtime,
) -> Checkpoint:
    """Train a copy of `student` on the transfer set under the recipe's objective: jointly, or as one cluster's branch.

    Args:
        budget: token-parameters, forward and backward.
        cluster: the branch's cluster; none: joint. A branch about which there is no text stays as it is.
        paid: what was made for this training alone, and took part of its budget.
    """
    budget -= sum(made.work.token_parameters for made in paid)
    share = config.joint_rate if cluster is None else config.branch_rate
    training = config.training.model_copy(update={"learning_rate": config.training.learning_rate * share})
    text = transfer_lessons(
        student,
        transfer,
        teachings,
        training,
        cluster=cluster,
        ask=config.teachers,
        objective=config.objective,
    )
    if not text and cluster is not None:
        link_tree(student.folder, into)
        return checkpoints.as_checkpoint(into, lineage_of=student.lineage)
    return learn(
        student,
        text,
        config.objective,
        training,
        tokens=tokens_within(budget, student),
        trains=FFN if cluster is not None and config.branch_trains == "ffn" else None,
        teacher_widths=widths(teachings),
        seed=seed,
        into=into,
        runtime=runtime,
    )
