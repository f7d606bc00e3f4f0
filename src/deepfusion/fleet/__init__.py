"""What a fleet of devices would send and need, worked out from the shapes of its models: no weights, no text.

`published` has the shapes of models that are known by name, `assumptions` how devices train and what they send, `costs`
what that takes of one model, `planning` what it comes to, and `paper` holds it beside two figures of arXiv 2602.14301.
"""

from deepfusion.fleet.assumptions import Assumptions
from deepfusion.fleet.costs import Model
from deepfusion.fleet.planning import Client, Member, Plan, Total, planned
from deepfusion.fleet.published import PUBLISHED, known

__all__ = ["PUBLISHED", "Assumptions", "Client", "Member", "Model", "Plan", "Total", "known", "planned"]
