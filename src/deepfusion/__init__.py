"""Train one Mixture-of-Experts language model out of many small, different ones that never share their data.

    from deepfusion import Recipe, run

    report = run(Recipe.load("recipes/demo.yaml"))
    print(report.headline, report.page)

Every phase is also a plain function on artifacts, from `build_corpus` to `evaluate`; the documentation's API page
writes the whole method out with them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deepfusion.artifacts import Report
from deepfusion.config import Recipe, Runtime
from deepfusion.pipeline import plan, run

if TYPE_CHECKING:
    from deepfusion.ancestors import make, take
    from deepfusion.phases.agree import agree
    from deepfusion.phases.assemble import merge
    from deepfusion.phases.cluster import cluster
    from deepfusion.phases.consult import consult, likelihoods
    from deepfusion.phases.data import build_corpus
    from deepfusion.phases.device import train_device
    from deepfusion.phases.distill import distill
    from deepfusion.phases.evaluate import evaluate
    from deepfusion.phases.mix import mix
    from deepfusion.phases.proxy import average
    from deepfusion.phases.shift import shift
    from deepfusion.phases.task_vectors import add_task_vectors, own_task_vector
    from deepfusion.phases.transfer import gather, write_cluster
    from deepfusion.phases.tune import tune
    from deepfusion.phases.upload import materialise, receive

__all__ = [
    "Recipe",
    "Report",
    "Runtime",
    "add_task_vectors",
    "agree",
    "average",
    "build_corpus",
    "cluster",
    "consult",
    "distill",
    "evaluate",
    "gather",
    "likelihoods",
    "make",
    "materialise",
    "merge",
    "mix",
    "own_task_vector",
    "plan",
    "receive",
    "run",
    "shift",
    "take",
    "train_device",
    "tune",
    "write_cluster",
]
__version__ = "0.1.0"

# Loaded when asked for: they need torch, and a run whose steps are all done needs none.
_PHASES = {
    "add_task_vectors": "phases.task_vectors",
    "agree": "phases.agree",
    "own_task_vector": "phases.task_vectors",
    "average": "phases.proxy",
    "build_corpus": "phases.data",
    "cluster": "phases.cluster",
    "consult": "phases.consult",
    "distill": "phases.distill",
    "evaluate": "phases.evaluate",
    "gather": "phases.transfer",
    "likelihoods": "phases.consult",
    "make": "ancestors",
    "materialise": "phases.upload",
    "merge": "phases.assemble",
    "mix": "phases.mix",
    "receive": "phases.upload",
    "shift": "phases.shift",
    "take": "ancestors",
    "train_device": "phases.device",
    "tune": "phases.tune",
    "write_cluster": "phases.transfer",
}


def __getattr__(name: str) -> Any:
    """A phase's function, from its module."""
    if name in _PHASES:
        return getattr(import_module(f"deepfusion.{_PHASES[name]}"), name)
    raise AttributeError(f"module 'deepfusion' has no attribute {name!r}")
