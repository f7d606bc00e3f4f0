"""What a comparison runs: every combination of values of the keys that vary, with every seed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, cast

import yaml

from deepfusion.errors import InputError

DEVICES = "data.partition.devices"
LONGEST_NAME = 60


@dataclass(frozen=True)
class Variant:
    """The recipe with some of its keys set."""

    name: str  # for people; empty: the recipe as it is
    settings: tuple[str, ...] = ()  # key=value

    @property
    def folder(self) -> str:
        """The name as that of a folder; a long one is cut, and told from others by what it sets."""
        name = re.sub(r"[^\w.+-]+", "-", self.name).strip("-") or "as-written"
        if len(name) <= LONGEST_NAME:
            return name
        digest = hashlib.sha256("\n".join(self.settings).encode()).hexdigest()[:8]
        return f"{name[: LONGEST_NAME - 9]}-{digest}"


def variants(vary: Sequence[str], named: Mapping[str, Mapping[str, Any]] | None = None) -> list[Variant]:
    """Every combination of the values of `key=[value, …]`, in order; of nothing, the recipe as it is.

    Args:
        vary: keys and their values.
        named: name → keys and their values of a variant that is crossed with these.

    Raises:
        InputError: one of them is no key with a list of values, or two combinations would have one folder.
    """
    axes: list[list[Variant]] = []
    if named:
        axes.append([Variant(name, tuple(setting_of(*one) for one in keys.items())) for name, keys in named.items()])
    told = [_values(setting) for setting in vary]
    _refuse_twice([{key for keys in (named or {}).values() for key in keys}, *({key} for key, _ in told)])
    labels = _labels([key for key, _ in told])
    for key, values in told:
        axes.append([Variant(_named(labels[key], value), (setting_of(key, value),)) for value in values])
    found = [
        Variant(", ".join(one.name for one in combination), tuple(s for one in combination for s in one.settings))
        for combination in product(*axes)
    ]
    folders = [variant.folder for variant in found]
    for variant in found:
        if folders.count(variant.folder) > 1:
            raise InputError(f"--vary: several variants are called {variant.folder!r}: leave all but one out")
    return found


def setting_of(key: str, value: Any) -> str:
    """`key=value`, the value as YAML reads it back."""
    return f"{key}={json.dumps(value)}"


def overlap(one: str, other: str) -> bool:
    """Whether two keys are one, or one is a section that the other is in."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def key_of(setting: str) -> str:
    """The key of `key=value`."""
    return setting.partition("=")[0].strip()


def _refuse_twice(axes: Sequence[set[str]]) -> None:
    for keys, others in combinations(axes, 2):
        for key, other in product(sorted(keys), sorted(others)):
            if overlap(key, other):
                both = key if key == other else f"{key} and {other}"
                raise InputError(f"{both}: varies twice, of which only one can count: leave one out")


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """As much of each key, from its end, as tells it from the others."""

    def label(key: str) -> str:
        parts = key.split(".")
        ends = (".".join(parts[-length:]) for length in range(1, len(parts)))
        others = [f".{other}" for other in keys if other != key]
        return next((text for text in ends if not any(other.endswith(f".{text}") for other in others)), key)

    return {key: key if key == DEVICES else label(key) for key in keys}


def _values(setting: str) -> tuple[str, list[Any]]:
    key, equals, text = setting.partition("=")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    if not equals or not key.strip() or not isinstance(values, list) or not values:
        raise InputError(f"--vary takes key=[value, value], not {setting!r}")
    return key.strip(), cast("list[Any]", values)


def _named(key: str, value: Any) -> str:
    if key == DEVICES:
        return f"N = {value}"
    written = yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("\n...")
    return f"{key} = {written.strip('{}')}"


def seeds(text: str, first: int = 0) -> list[int]:
    """`5`: five seeds from `first` on; `3,4,7`: these; `3,`: this one.

    Raises:
        InputError: it is neither, or names a seed twice.
    """
    parts = [part for part in text.split(",") if part.strip()]
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if "," not in text and numbers:
        numbers = list(range(first, first + numbers[0]))
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise InputError(f"--seeds takes how many, or which, as in 5 or 3,4,7; not {text!r}")
    return numbers
