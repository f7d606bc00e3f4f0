"""What a dense base can become: the MoE of its kin; and the published shapes that recipes can ask for by name."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

Target = Literal["mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo", "deepseek"]
Preset = Literal["qwen1.5-moe-a2.7b", "deepseek-moe-16b"]

# MoE → the dense model types whose attention, norms and FFN are its own.
KIN: dict[Target, tuple[str, ...]] = {
    "mixtral": ("llama", "mistral"),
    "qwen2_moe": ("qwen2",),
    "qwen3_moe": ("qwen3",),
    "flex_olmo": ("olmo2",),
    "deepseek": ("llama",),
}
BASES = tuple(dict.fromkeys(base for bases in KIN.values() for base in bases))

# MoE → shards of an FFN that its shared experts take over, if it is cut.
COMMON_SHARDS: dict[Target, int] = {"deepseek": 2}

# Preset → number of clusters, and fields of `assemble`; config.json then says what the published checkpoint's does.
PRESETS: dict[Preset, tuple[int, dict[str, Any]]] = {
    # Qwen1.5-1.8B's FFN of 5504 is cut into 4 × 1376, each padded to 1408; 15 × 4 = 60 experts.
    "qwen1.5-moe-a2.7b": (
        15,
        {
            "target": "qwen2_moe",
            "layout": "fine_grained",
            "granularity": 4,
            "top_k": 1,
            "expert_width": 1408,
            "shared_width": 5632,
            "renormalise": False,
        },
    ),
    # An FFN of 10944 is cut into 8 × 1368, each padded to 1408; 8 × 8 = 64 experts, of which 8 − 2 are used.
    "deepseek-moe-16b": (
        8,
        {
            "target": "deepseek",
            "layout": "fine_grained",
            "granularity": 8,
            "top_k": 1,
            "expert_width": 1408,
            "renormalise": False,
        },
    ),
}


def target_of(base: str, asked: str = "auto") -> Target:
    """The MoE that a base of this model type becomes; with `auto` the first of its kin.

    Raises:
        ValueError: names what the base, or the target, would have to be.
    """
    if asked == "auto":
        for target, bases in KIN.items():
            if base in bases:
                return target
        raise ValueError(f"no MoE is assembled from {base} models: choose a base of type {', '.join(BASES)}")
    target = cast("Target", asked)
    if base not in KIN[target]:
        raise ValueError(
            f"a {target} is assembled from {' or '.join(KIN[target])} models, not {base}: "
            "choose another base model, or assemble.target: auto"
        )
    return target


def expert_width(channels: int, granularity: int, asked: int | None) -> int:
    """Channels of an expert, of the FFN's `channels` cut into `granularity`.

    Raises:
        ValueError: there are fewer channels than shards, or `asked` holds no shard.
    """
    if granularity > channels:
        raise ValueError(f"granularity is {granularity} but the FFN has only {channels} channels: set it lower")
    needed = math.ceil(channels / granularity)
    if asked is not None and asked < needed:
        raise ValueError(f"expert_width is {asked}, but an FFN of {channels} cut into {granularity} needs {needed}")
    return asked or needed


def shared_width(channels: int, asked: int | None) -> int:
    """Channels of a shared expert beside experts that have whole FFNs of `channels`.

    Raises:
        ValueError: `asked` holds no FFN.
    """
    if asked is not None and asked < channels:
        raise ValueError(f"shared_width is {asked}, but the base's FFN has {channels} channels: set it higher")
    return asked or channels
