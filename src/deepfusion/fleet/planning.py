"""What a fleet comes to: its models one by one, a device of FedJETS, and both methods' traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from deepfusion.baselines.fedjets import pruned
from deepfusion.fleet.assumptions import BYTES, Assumptions
from deepfusion.fleet.costs import Model, memory, trained, upload


@dataclass(frozen=True)
class Member:
    """A model that devices train."""

    name: str
    parameters: int
    trained: int
    up_bytes: int  # once
    memory_bytes: int


@dataclass(frozen=True)
class Client:
    """The part of an MoE that a device of FedJETS trains, all of it."""

    name: str
    experts: int
    of_experts: int
    parameters: int
    down_bytes: int  # a round: its part, and the router's rows of all other experts
    up_bytes: int  # a round
    memory_bytes: int


@dataclass(frozen=True)
class Total:
    """Traffic of so many devices."""

    devices: int
    up_bytes: int
    fedjets_up_bytes: int | None
    fedjets_down_bytes: int | None

    @property
    def ratio(self) -> float | None:
        """What FedJETS sends, both ways, for each byte of DeepFusion's; none: there is no FedJETS."""
        if self.fedjets_up_bytes is None or self.fedjets_down_bytes is None:
            return None
        return (self.fedjets_up_bytes + self.fedjets_down_bytes) / self.up_bytes


@dataclass(frozen=True)
class Plan:
    """A fleet, and FedJETS on the same devices."""

    name: str
    members: tuple[Member, ...]
    client: Client | None
    totals: tuple[Total, ...]

    def tree(self) -> dict[str, Any]:
        """As JSON holds it."""
        totals = [{**asdict(total), "ratio": total.ratio} for total in self.totals]
        return {**asdict(self), "totals": totals}


def planned(name: str, models: Sequence[Model], moe: Model | None, devices: Sequence[int], of: Assumptions) -> Plan:
    """The plan of a fleet in which each of the models is as frequent as any other.

    Args:
        name: the plan's.
        models: that devices train; dense ones.
        moe: that FedJETS would train, if that is asked for.
        devices: numbers of devices.
        of: how they train, and what they send.

    Raises:
        ValueError: an MoE among the models, a dense one in place of the MoE, or one with too few experts.
    """
    for model in models:
        if model.experts > 1:
            raise ValueError(f"{model.name} is an MoE, and devices train dense models: give it as --moe")
    members = tuple(
        Member(
            model.name, model.shape.parameters, trained(model, of), round(upload(model, of)), round(memory(model, of))
        )
        for model in models
    )
    client = _client(moe, of) if moe else None
    mean = sum(member.up_bytes for member in members) / len(members)
    totals = tuple(
        Total(
            count,
            round(count * mean),
            count * of.rounds * client.up_bytes if client else None,
            count * of.rounds * client.down_bytes if client else None,
        )
        for count in devices
    )
    return Plan(name, members, client, totals)


def _client(moe: Model, of: Assumptions) -> Client:
    if moe.experts == 1:
        raise ValueError(f"{moe.name} has no experts: give an MoE as --moe, such as qwen1.5-moe-a2.7b")
    if of.experts > moe.experts:
        raise ValueError(f"{moe.name} has {moe.experts} experts: set --experts to that or less, not {of.experts}")
    part = Model.of(moe.name, pruned(moe.shape.config, of.experts))
    everything = replace(of, method="full", adapter="merged")
    up, memory_bytes = round(upload(part, everything)), round(memory(part, everything))
    rows = (moe.routers - part.routers) * round(BYTES["float32" if of.upload == "float32" else "bfloat16"])
    return Client(moe.name, of.experts, moe.experts, part.shape.parameters, up + rows, up, memory_bytes)
