"""How the methods that a run is compared with are run."""

from __future__ import annotations

from pydantic import Field

from deepfusion.config.phases import LogitsObjective, OFAObjective
from deepfusion.config.section import Section


class FedAvg(Section):
    """Federated averaging of one dense model, the base, that every device trains (arXiv 1602.05629)."""

    rounds: int = Field(default=5, ge=1)
    """How often every device trains the mean of the last round and sends it back; the round that finds held-out text
    likeliest is the result."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over a device's text in each round; none: device.epochs / rounds, so that a device trains as long as for
    its one upload."""


class FedJETS(Section):
    """Rounds in which devices train parts of an MoE (arXiv 2306.08586)."""

    rounds: int = Field(default=5, ge=1)
    """How often every device trains its part and sends it back; of them and of what tuning on public text makes of the
    best, the one that finds held-out text likeliest is the result."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over a device's text in each round; none: device.epochs / rounds."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of devices, which train all weights; none: that of device.training, or where the recipe's own
    devices train adapters, which want higher ones, that of distill.training."""
    experts: int = Field(default=2, ge=1)
    """Clusters whose experts a device is sent."""
    anchors: float = Field(default=0.3, gt=0, le=1)
    """Least share of each cluster's devices that know which experts are theirs."""
    gate_weight: float = Field(default=1.0, gt=0)
    """What an anchor's loss of sending its text to another expert weighs beside its cross-entropy."""


class FedMKT(Section):
    """The server's side of FedMKT (arXiv 2406.02224)."""

    ce_weight: float = Field(default=0.9, gt=0, le=1)
    """λ: the loss is λ times the cross-entropy, plus 1 − λ times that to the teacher's distribution."""
    top_k: int = Field(default=128, ge=1)
    """Probabilities kept of the teacher of a document."""

    @property
    def objective(self) -> LogitsObjective:
        """The loss, up to a factor and to what does not depend on the student."""
        beta = (1 - self.ce_weight) / self.ce_weight
        return LogitsObjective(beta=beta, focus=0, label_teaches=False, across="mined")


class Baselines(Section):
    """Settings of the baselines among `evaluate.references`; they share all others with the run."""

    ofa_kd: OFAObjective = OFAObjective()
    """The objective in place of the run's own; start, text, teachers, budget, branches and tuning are the run's."""
    fedmkt: FedMKT = FedMKT()
    """Who teaches what, and with what weight; start, text, budget, branches and tuning are the run's."""
    fedjets: FedJETS = FedJETS()
    """Rounds of training parts of an MoE."""
    fedavg_dense: FedAvg = FedAvg()
    """Rounds of federated averaging."""
