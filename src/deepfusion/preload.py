"""What a worker imports before it forks: the phases, and through them torch and transformers."""

from deepfusion.baselines import controls
from deepfusion.phases import (
    assemble,
    cluster,
    data,
    device,
    distill,
    evaluate,
    proxy,
    report,
    shift,
    task_vectors,
    transfer,
    tune,
    upload,
)

__all__ = [
    "assemble",
    "cluster",
    "controls",
    "data",
    "device",
    "distill",
    "evaluate",
    "proxy",
    "report",
    "shift",
    "task_vectors",
    "transfer",
    "tune",
    "upload",
]
