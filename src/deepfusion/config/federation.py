"""How uploads are collected from devices that are elsewhere."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, model_validator

from deepfusion.config.section import Section


class Federation(Section):
    """Devices on machines of their own, whose uploads a server collects (`docs/federation.md`)."""

    devices: tuple[str, ...] = Field(min_length=1)
    """Names of all devices that may send. A device's place in this list decides its seed and the ancestor that it
    starts from, just as among the devices of a run on one machine."""
    quorum: int = Field(ge=1)
    """Accepted uploads with which the server can go on."""
    deadline_s: float = Field(default=7 * 24 * 3600.0, gt=0)
    """Seconds from the first start of collecting after which the server goes on with what it has, or if that is less
    than the quorum, stops. A server that was killed and started again does not begin to count anew."""
    grace_s: float = Field(default=600.0, ge=0)
    """Once there is a quorum, seconds that the server still waits for the others."""
    piece_bytes: int = Field(default=32 * 2**20, ge=2**12, le=2**30)
    """Most bytes of an upload in one message. What is larger is asked for piece by piece, so that memory holds a few
    pieces and a broken transfer loses one."""
    patience_s: float = Field(default=300.0, gt=0)
    """Seconds without an answer after which a piece is asked for again."""
    attempts: int = Field(default=5, ge=1)
    """How often one device may fail to train or send bytes that are not those it announced, or break off without
    anything having come in between, until it is given up; when uploads are collected again, it has as many attempts
    again."""

    @model_validator(mode="after")
    def _enough_devices_with_names(self) -> Self:
        for name in self.devices:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(f"device {name!r} cannot name a file: use letters, digits, '-', '_', '.'")
        if len(set(self.devices)) < len(self.devices):
            raise ValueError("devices has a name twice: each device needs its own")
        if self.quorum > len(self.devices):
            raise ValueError(f"quorum is {self.quorum}, but there are only {len(self.devices)} devices: lower it")
        return self
