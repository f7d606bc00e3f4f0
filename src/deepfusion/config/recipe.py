"""The whole recipe, and the checks that take more than one section."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from deepfusion.config import tree as trees
from deepfusion.config.baselines import Baselines
from deepfusion.config.data import Data
from deepfusion.config.device import DevicePhase
from deepfusion.config.faults import explain
from deepfusion.config.federation import Federation
from deepfusion.config.judge import JudgePhase
from deepfusion.config.models import Models, ModelSource
from deepfusion.config.phases import (
    AssemblePhase,
    ClusterPhase,
    DistillPhase,
    EvaluatePhase,
    OFAObjective,
    ProxyPhase,
    TransferPhase,
    TunePhase,
    VAAObjective,
)
from deepfusion.config.section import Section
from deepfusion.config.targets import PRESETS, expert_width, shared_width, target_of
from deepfusion.errors import InputError


class Recipe(Section):
    """Everything that decides a run's result."""

    name: str
    """Name of the run; its folder unless `--out` says otherwise."""
    seed: int = Field(default=0, ge=0)
    """Seed of data, initialisation, order and sampling."""
    data: Data
    models: Models
    device: DevicePhase = DevicePhase()
    cluster: ClusterPhase = ClusterPhase()
    proxy: ProxyPhase = ProxyPhase()
    transfer: TransferPhase = TransferPhase()
    distill: DistillPhase = DistillPhase()
    assemble: AssemblePhase = AssemblePhase()
    tune: TunePhase = TunePhase()
    evaluate: EvaluatePhase = EvaluatePhase()
    baselines: Baselines = Baselines()
    judge: JudgePhase | None = None
    """An LLM that grades answers; none: nobody is asked, and no text leaves the machine."""
    # Left out of records where there is none, so that runs without are those that they were before it existed.
    federation: Federation | None = Field(default=None, exclude_if=lambda federation: federation is None)
    """How uploads are collected from devices elsewhere; none: all devices are simulated on this machine."""

    @field_validator("name")
    @classmethod
    def _a_name_for_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ValueError(
                f"must be letters, digits, '_', '.' and '-', and begin with a letter or digit, not {name!r}"
            )
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.federation is not None and self.cluster.k > self.federation.quorum:
            raise ValueError(
                f"cluster.k is {self.cluster.k} but federation.quorum is {self.federation.quorum}, and fewer devices "
                "than that cannot fill the clusters: lower k or raise quorum"
            )
        if self.data.partition.mode != "given" and self.cluster.k > self.data.partition.devices:
            raise ValueError(
                f"cluster.k is {self.cluster.k} but there are only {self.data.partition.devices} devices "
                "(data.partition.devices): lower k or add devices"
            )
        if self.models.base.make is not None:
            asked = self.assemble
            try:
                target_of(self.models.base.make.type, asked.target)
                expert_width(self.models.base.make.ffn, asked.granularity or 1, asked.expert_width)
                shared_width(self.models.base.make.ffn, asked.shared_width)
            except ValueError as error:
                raise ValueError(f"models.base and assemble do not fit: {error}") from None
        if self.assemble.preset != "none" and self.cluster.k != (k := PRESETS[self.assemble.preset][0]):
            raise ValueError(f"assemble.preset {self.assemble.preset} needs cluster.k: {k}, not {self.cluster.k}")
        if self.distill.shifted and self.tune.objective.across not in ("auto", "span_likelihood"):
            raise ValueError(
                "distill.shifted needs tune.objective.across: auto or span_likelihood, the only one whose base can be "
                f"shifted, not {self.tune.objective.across}"
            )
        if "fedjets" in self.evaluate.references and self.baselines.fedjets.experts > self.cluster.k:
            raise ValueError(
                f"baselines.fedjets.experts is {self.baselines.fedjets.experts}, but cluster.k is {self.cluster.k}: a "
                "device cannot be sent the experts of more clusters than there are: lower it or raise k"
            )
        if self.assemble.top_k > self.cluster.k:
            raise ValueError(
                f"assemble.top_k is {self.assemble.top_k}, but cluster.k is {self.cluster.k}, and no token can use "
                "more experts than there are: lower top_k or raise k"
            )
        return self

    @model_validator(mode="after")
    def _as_many_stages_as_layers(self) -> Self:
        objective, base = self.distill.objective, {"models.base": self.models.base}
        if isinstance(objective, VAAObjective):  # which cuts teachers too
            ancestors = {f"models.ancestors.{name}": source for name, source in self.models.ancestors.items()}
            _enough_layers("distill.objective", objective.stages, base | ancestors)
        elif isinstance(objective, OFAObjective):
            _enough_layers("distill.objective", objective.stages, base)
        if "ofa_kd" in self.evaluate.references:
            _enough_layers("baselines.ofa_kd", self.baselines.ofa_kd.stages, base)
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file, or an embedded recipe by its name, and apply `key.subkey=value` overrides.

        Values of overrides are YAML; a number in a key is a place in a list. Relative paths in the file count from the
        file's folder, those in overrides from the current directory. An embedded recipe that is called by its name
        counts as `recipes/<name>.yaml`.

        Raises:
            InputError: one line that names the file and the field at fault.
        """
        return cls.parse(trees.chosen(path, overrides), origin=str(path))

    @classmethod
    def parse(cls, tree: dict[str, Any], origin: str = "recipe") -> Recipe:
        """Validate an already loaded tree; the error is one line and names `origin`."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise InputError(f"{origin}: {explain(error, cls)}") from None


def _enough_layers(section: str, stages: int, models: Mapping[str, ModelSource]) -> None:
    """Refuse to cut a made model into more stages than it has layers."""
    for name, source in models.items():
        if source.make is not None and source.make.layers < stages:
            raise ValueError(f"{section}.stages is {stages} but {name} has only {source.make.layers} layers")
