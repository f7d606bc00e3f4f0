"""How the methods that a run is compared with are run."""

from __future__ import annotations

from pydantic import Field

from deepfusion.config.phases import OFAObjective
from deepfusion.config.section import Section


class FedAvg(Section):
    """Federated averaging of one dense model, the base, that every device trains (arXiv 1602.05629)."""

    rounds: int = Field(default=5, ge=1)
    """How often every device trains the mean of the last round and sends it back; the round that finds held-out text
    likeliest is the result."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over a device's text in each round; none: device.epochs / rounds, so that a device trains as long as for
    its one upload."""


class Baselines(Section):
    """Settings of the baselines among `evaluate.references`; they share all others with the run."""

    ofa_kd: OFAObjective = OFAObjective()
    """The objective in place of the run's own; start, text, teachers, budget, branches and tuning are the run's."""
    fedavg_dense: FedAvg = FedAvg()
    """Rounds of federated averaging."""
