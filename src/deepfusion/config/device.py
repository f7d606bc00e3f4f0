"""How a device trains, and what it sends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from deepfusion.config.faults import explain
from deepfusion.config.models import Training
from deepfusion.config.section import Section
from deepfusion.errors import InputError

RUN = 64  # numbers of a row that share a scale, where they are sent as integers


class LoRA(Section):
    """Low-rank adapters (arXiv 2106.09685): W + alpha / rank · B·A, of which B and A alone are trained."""

    rank: int = Field(default=8, ge=1)
    """Rows of A and columns of B."""
    alpha: float = Field(default=16.0, gt=0)
    """The adapter counts alpha / rank times."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of A's inputs that is left out at random in training."""
    targets: tuple[Literal["attention", "ffn"], ...] = Field(default=("attention", "ffn"), min_length=1)
    """The parts of each layer of which every matrix gets an adapter."""


class Codec(Section):
    """How an upload is packed: matrices in fewer bits, the whole compressed with Zstandard."""

    numbers: Literal["float32", "bfloat16", "int8", "nf4"] = "int8"
    """What matrices are sent in. int8, nf4: 64 numbers of a row share a scale in bfloat16; a number is a multiple of
    1/127 of it, or one of the sixteen levels of NF4 (arXiv 2305.14314). Vectors are always float32."""
    delta: bool = False
    """Send what training has changed in the ancestor, which the server has too, instead of the weights themselves."""
    rank: int | None = Field(default=None, ge=1)
    """With `delta`: a matrix's change as the product of two matrices of this rank, the nearest there is, where that is
    smaller."""

    @model_validator(mode="after")
    def _a_change_to_factor(self) -> Self:
        if self.rank is not None and not self.delta:
            raise ValueError("rank is that of a change: set delta: true, or leave rank out")
        return self

    @property
    def label(self) -> str:
        """The codec in a few words, such as `int8 delta rank 8`; different codecs have different labels."""
        return self.numbers + " delta" * self.delta + (f" rank {self.rank}" if self.rank else "")

    @property
    def bytes_per_number(self) -> float:
        """What a number of a matrix takes before compression, and without `rank`."""
        return {"float32": 4, "bfloat16": 2, "int8": 1 + 2 / RUN, "nf4": 1 / 2 + 2 / RUN}[self.numbers]


class Sent(Section):
    """What the server expects a device to send."""

    lora: LoRA | None = None
    """The adapters that it is to send; none: a whole model."""
    codec: Codec | None = None
    """How it is packed; none: not at all."""


class OwnWay(Section):
    """What one device does otherwise than the fleet; what is not named here is as for all."""

    method: Literal["full", "lora", "qlora"] | None = None
    """As `device.method`."""
    lora: LoRA | None = None
    """As `device.lora`."""
    upload: Literal["merged", "adapter"] | None = None
    """As `device.upload`."""
    codec: Codec | Literal["none"] | None = None
    """As `device.codec`; `none`: not packed, where the others' are."""


class DevicePhase(Section):
    """Training on each device, and what it uploads."""

    method: Literal["full", "lora", "qlora"] = "full"
    """full: all weights are trained; lora: low-rank adapters beside frozen weights; qlora: the same beside weights
    kept in four bits (NF4, arXiv 2305.14314), which needs bitsandbytes."""
    lora: LoRA = LoRA()
    upload: Literal["merged", "adapter"] = "merged"
    """merged: the whole trained model; adapter: its adapter alone, which the server adds to the ancestor that it has
    itself (with lora and qlora)."""
    # Left out of keys and records where there is none, so that runs without are those that they were before it existed.
    codec: Codec | None = Field(default=None, exclude_if=lambda codec: codec is None)
    """How that is packed; none: sent as it is, with config and tokenizer."""
    epochs: float = Field(default=30, gt=0)
    """Passes over the device's private text."""
    min_steps: int | None = Field(default=None, ge=1, exclude_if=lambda steps: steps is None)
    """Optimiser steps that a device takes at least: one with little text goes through it more often than `epochs` says.
    none: what it has is passed over `epochs` times, however few steps that makes."""
    replay: float = Field(default=0.25, ge=0)
    """Public tokens mixed in per private token, so that a device does not forget how to write."""
    training: Training = Training()
    encoder: str = "hashing"
    """`hashing` (stateless, scikit-learn), or the folder of a sentence encoder such as MiniLM."""
    embedding_bytes: int = Field(default=64, ge=8, le=64)
    """Size of e_n: a shared seeded projection to this many int8 numbers."""
    own: dict[str, OwnWay] = Field(default={}, exclude_if=lambda own: not own)
    """Device → how it trains and sends otherwise than the others: a tablet adapters, a server whole models."""

    @model_validator(mode="after")
    def _an_adapter_to_send(self) -> Self:
        if self.upload == "adapter" and self.method == "full":
            raise ValueError("upload: adapter needs method: lora or qlora, for full training has no adapter to send")
        if self.upload == "adapter" and self.codec is not None and self.codec.delta:
            raise ValueError("codec.delta is what changed in the ancestor, which an adapter is already: leave it out")
        return self

    @model_validator(mode="after")
    def _everyone_has_a_way(self) -> Self:
        for device in self.own:
            try:
                self.of(device)
            except ValidationError as fault:
                raise ValueError(f"own.{device}: {explain(fault, type(self))}") from None
        return self

    def tokens(self, text: float) -> float:
        """How many tokens a training is long on a text of so many, replay included."""
        return max(self.epochs * text, (self.min_steps or 0) * float(self.training.rows * self.training.context))

    def sitting(self, rounds: int, epochs: float | None = None) -> DevicePhase:
        """One of so many trainings in a row, of `epochs` each; none: of as many in all as this.

        `min_steps` goes with them: half of the epochs, half of the steps.
        """
        epochs = epochs or self.epochs / rounds
        steps = None if self.min_steps is None else math.ceil(self.min_steps * epochs / self.epochs)
        return self.model_copy(update={"epochs": epochs, "min_steps": steps})

    def of(self, device: str) -> DevicePhase:
        """How one device trains and sends: this, with its own way in it."""
        if device not in self.own:
            return self if not self.own else self.model_copy(update={"own": {}})
        given = self.own[device]
        fields = {name: getattr(given, name) for name in type(given).model_fields if getattr(given, name) is not None}
        if given.codec == "none":
            fields["codec"] = None
        held = {name: getattr(self, name) for name in type(self).model_fields if name != "own"}
        return DevicePhase.model_validate(held | fields)

    def only_of(self, devices: Sequence[str]) -> None:
        """See that all who have a way of their own are devices of this fleet.

        Raises:
            InputError: one is not.
        """
        if strange := sorted(set(self.own) - set(devices)):
            raise InputError(f"device.own names {strange[0]}, and the devices are {', '.join(devices)}")

    @property
    def ways(self) -> list[DevicePhase]:
        """The fleet's way, and each that differs from it."""
        return [self.model_copy(update={"own": {}}), *(self.of(device) for device in self.own)]

    @property
    def adapts(self) -> bool:
        """Whether all devices train adapters alone."""
        return all(way.method != "full" for way in self.ways)

    @property
    def sent(self) -> Sent:
        """What the server is to expect of a device that does as all do."""
        return Sent(lora=self.lora if self.upload == "adapter" else None, codec=self.codec)

    @property
    def sends(self) -> Literal["model", "adapter", "packed"]:
        """What leaves a device: the name of the folder that holds it."""
        if self.codec is not None:
            return "packed"
        return "adapter" if self.upload == "adapter" else "model"
