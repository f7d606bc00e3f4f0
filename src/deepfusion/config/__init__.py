"""The recipe: every choice that changes the answer, one frozen section per phase; and `Runtime`, which changes the
speed.

A recipe is a YAML file. Unknown keys are refused by name; defaults are what measured best (`docs/decisions.md` says
where). `data`, `models`, `device`, `phases`, `baselines`, `judge` and `federation` hold the sections, `recipe` the
whole and its checks, `tree` reads files and `--set`, `faults` words what is wrong with them.
"""

from deepfusion.config.baselines import Baselines, FedAvg, FedJETS, FedMKT
from deepfusion.config.data import Data, FileData, MadeOptions, Partition, SyntheticData, TextSource
from deepfusion.config.device import Codec, DevicePhase, LoRA, OwnWay, Sent
from deepfusion.config.federation import Federation
from deepfusion.config.judge import JudgePhase
from deepfusion.config.models import MadeModel, Models, ModelSource, ModelType, Training
from deepfusion.config.phases import (
    PLAIN,
    Across,
    AssemblePhase,
    ClusterPhase,
    Consultation,
    DistillPhase,
    EvaluatePhase,
    Features,
    LogitsObjective,
    Objective,
    OFAObjective,
    ProxyPhase,
    Reference,
    Shares,
    TransferPhase,
    TunePhase,
    VAAObjective,
)
from deepfusion.config.recipe import Recipe
from deepfusion.config.runtime import Runtime
from deepfusion.config.section import Section

__all__ = [
    "PLAIN",
    "Across",
    "AssemblePhase",
    "Baselines",
    "ClusterPhase",
    "Codec",
    "Consultation",
    "Data",
    "DevicePhase",
    "DistillPhase",
    "EvaluatePhase",
    "Features",
    "FedAvg",
    "FedJETS",
    "FedMKT",
    "Federation",
    "FileData",
    "JudgePhase",
    "LoRA",
    "LogitsObjective",
    "MadeModel",
    "MadeOptions",
    "ModelSource",
    "ModelType",
    "Models",
    "OFAObjective",
    "Objective",
    "OwnWay",
    "Partition",
    "ProxyPhase",
    "Recipe",
    "Reference",
    "Runtime",
    "Section",
    "Sent",
    "Shares",
    "SyntheticData",
    "TextSource",
    "Training",
    "TransferPhase",
    "TunePhase",
    "VAAObjective",
]
