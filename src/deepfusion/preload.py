"""What a worker imports before it forks: the phases, and through them torch and transformers."""

from deepfusion.baselines import controls
from deepfusion.phases import (
    agree,
    assemble,
    cluster,
    consult,
    data,
    device,
    distill,
    evaluate,
    mix,
    proxy,
    report,
    shift,
    task_vectors,
    transfer,
    tune,
    upload,
)

__all__ = [
    "agree",
    "assemble",
    "cluster",
    "consult",
    "controls",
    "data",
    "device",
    "distill",
    "evaluate",
    "mix",
    "proxy",
    "report",
    "shift",
    "task_vectors",
    "transfer",
    "tune",
    "upload",
]
