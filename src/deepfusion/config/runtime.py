"""What is chosen on the command line and not in the recipe."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Runtime(BaseModel):
    """What changes only the speed, never the result; no part of it enters a step's key."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    workers: int = Field(default_factory=lambda: max(1, min(os.cpu_count() or 1, 8)), ge=0)
    """Steps that run at the same time, each in a process of its own; 0 runs everything in this process."""
    threads: int = Field(default=1, ge=1)
    """Torch threads of each process."""
    accelerator: Literal["cpu", "cuda", "mps"] = "cpu"
    """Where tensors live."""
    checkpoint_seconds: float = Field(default=60.0, gt=0)
    """Training saves a resumable checkpoint about this often."""
