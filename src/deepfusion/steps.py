"""The table of steps: which function runs a phase, and what it gives."""

from __future__ import annotations

from typing import Any

from deepfusion.artifacts import (
    Artifact,
    Checkpoint,
    Client,
    Clusters,
    Corpus,
    Intake,
    Judgements,
    Likelihoods,
    Proxy,
    Report,
    Round,
    Scores,
    Teaching,
    TransferSet,
    Upload,
    Writing,
)
from deepfusion.config import DevicePhase

# Phase → what runs it, what it gives, and a number to raise when the same inputs would give something else.
STEPS: dict[str, tuple[str, type[Artifact], int]] = {
    "data": ("deepfusion.phases.data:build_corpus", Corpus, 2),
    "public": ("deepfusion.phases.data:build_public", Corpus, 1),
    "make": ("deepfusion.ancestors:make", Checkpoint, 1),
    "take": ("deepfusion.ancestors:take", Checkpoint, 2),
    "device": ("deepfusion.phases.device:train_device", Upload, 1),
    "upload": ("deepfusion.phases.upload:receive", Intake, 2),
    "materialise": ("deepfusion.phases.upload:materialise", Upload, 1),
    "cluster": ("deepfusion.phases.cluster:cluster", Clusters, 1),
    "proxy": ("deepfusion.phases.proxy:average", Proxy, 2),
    "write": ("deepfusion.phases.transfer:write_cluster", Writing, 6),
    "transfer": ("deepfusion.phases.transfer:gather", TransferSet, 3),
    "read": ("deepfusion.phases.consult:likelihoods", Likelihoods, 1),
    "agree": ("deepfusion.phases.agree:agree", TransferSet, 1),
    "shift": ("deepfusion.phases.shift:shift", TransferSet, 2),
    "mix": ("deepfusion.phases.mix:mix", TransferSet, 1),
    "task_vectors": ("deepfusion.phases.task_vectors:add_task_vectors", Checkpoint, 1),
    "likelihoods": ("deepfusion.phases.consult:likelihoods", Likelihoods, 1),
    "consult": ("deepfusion.phases.consult:consult", Teaching, 3),
    "joint": ("deepfusion.phases.distill:distill", Checkpoint, 3),
    "own_vector": ("deepfusion.phases.task_vectors:own_task_vector", Checkpoint, 1),
    "branch": ("deepfusion.phases.distill:distill", Checkpoint, 3),
    "assemble": ("deepfusion.phases.assemble:merge", Checkpoint, 1),
    "tune": ("deepfusion.phases.tune:tune", Checkpoint, 4),
    "upcycle": ("deepfusion.phases.assemble:merge", Checkpoint, 1),
    "pooled_text": ("deepfusion.baselines.controls:pooled_text", Checkpoint, 3),
    "pooled_text_dense": ("deepfusion.baselines.controls:pooled_text", Checkpoint, 1),
    "dense_kd": ("deepfusion.baselines.controls:dense_kd", Checkpoint, 3),
    "ofa_joint": ("deepfusion.phases.distill:distill", Checkpoint, 1),
    "ofa_own_vector": ("deepfusion.phases.task_vectors:own_task_vector", Checkpoint, 1),
    "ofa_branch": ("deepfusion.phases.distill:distill", Checkpoint, 1),
    "ofa_assemble": ("deepfusion.phases.assemble:merge", Checkpoint, 1),
    "ofa_tune": ("deepfusion.phases.tune:tune", Checkpoint, 1),
    "fedmkt_likelihoods": ("deepfusion.phases.consult:likelihoods", Likelihoods, 1),
    "fedmkt_consult": ("deepfusion.phases.consult:consult", Teaching, 1),
    "fedmkt_joint": ("deepfusion.phases.distill:distill", Checkpoint, 1),
    "fedmkt_own_vector": ("deepfusion.phases.task_vectors:own_task_vector", Checkpoint, 1),
    "fedmkt_branch": ("deepfusion.phases.distill:distill", Checkpoint, 1),
    "fedmkt_assemble": ("deepfusion.phases.assemble:merge", Checkpoint, 1),
    "fedmkt_tune": ("deepfusion.phases.tune:tune", Checkpoint, 1),
    "fedjets_start": ("deepfusion.phases.assemble:upcycle", Checkpoint, 1),
    "fedjets_device": ("deepfusion.baselines.fedjets:train_client", Client, 1),
    "fedjets_round": ("deepfusion.baselines.fedjets:average_experts", Round, 1),
    "fedjets_best": ("deepfusion.baselines.homogeneous:best_round", Round, 1),
    "fedjets_tune": ("deepfusion.baselines.fedjets:tune_round", Round, 1),
    "fedjets": ("deepfusion.baselines.homogeneous:best_round", Round, 1),
    "fedavg_device": ("deepfusion.phases.device:train_device", Upload, 1),
    "fedavg_materialise": ("deepfusion.phases.upload:materialise", Upload, 1),
    "fedavg_round": ("deepfusion.baselines.homogeneous:average_round", Round, 1),
    "fedavg_dense": ("deepfusion.baselines.homogeneous:best_round", Round, 1),
    "btx_device": ("deepfusion.phases.device:train_device", Upload, 1),
    "btx_materialise": ("deepfusion.phases.upload:materialise", Upload, 1),
    "btx_branch": ("deepfusion.baselines.homogeneous:average_round", Round, 1),
    "btx_merge": ("deepfusion.phases.assemble:merge", Checkpoint, 1),
    "btx": ("deepfusion.phases.tune:tune", Checkpoint, 1),
    "centralized": ("deepfusion.baselines.controls:centralized", Checkpoint, 2),
    "evaluate": ("deepfusion.phases.evaluate:evaluate", Scores, 2),
    "judge": ("deepfusion.phases.judge:judge", Judgements, 1),
    "report": ("deepfusion.conclusion:conclude", Report, 2),
}
FIRST, LAST = -10, 10  # priorities: the run's own critical path, and what only stands beside it


def sent_by(device: DevicePhase) -> dict[str, Any]:
    """Arguments that tell a step what devices send; what only some recipes have is in a step's key only there."""
    own = {name: device.of(name).sent for name in device.own}
    codec = {} if device.codec is None else {"codec": device.codec}
    return {"lora": device.sent.lora, **codec, **({"own": own} if own else {})}


def placed(**arguments: tuple[Any, Any]) -> dict[str, Any]:
    """Arguments of a step, each with what it is keyed by: the two differ where there are paths in it."""
    paths = {name: pair for name, pair in arguments.items() if pair[0] != pair[1]}
    plain = {name: value for name, (value, _) in arguments.items() if name not in paths}
    if not paths:
        return plain
    passed, keyed = ({name: pair[n] for name, pair in paths.items()} for n in (0, 1))
    return plain | {"unkeyed": passed, "also_keyed_by": keyed}
