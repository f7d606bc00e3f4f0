"""Low-rank adapters (LoRA, arXiv 2106.09685): attached to a model, saved, checked, and added to an ancestor's weights.

An adapter's folder holds what peft writes and reads: `adapter_config.json` and `adapter_model.safetensors`. Adding one
to weights on disk is done here, because peft merges whole models in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deepfusion.checkpoints import TRAINABLE, open_config, write_descendant
from deepfusion.config import LoRA
from deepfusion.families import family, skeleton
from deepfusion.files import read_object
from deepfusion.weights import Part, Stored, blocks, stored, stored_in

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # peft's, before the name of a module
_LARGEST = float(torch.finfo(torch.float16).max)  # no sound adapter adds as much to a weight
_LONGEST_CONFIG = 2**20  # bytes
_ENTRY = 2**12  # bytes in a file's header: more than a tensor, or what else it says, needs


@dataclass(frozen=True)
class Site:
    """A matrix that gets an adapter: A [rank, inputs] and B [outputs, rank]."""

    inner: str
    """Name of its module within a layer."""
    inputs: int
    outputs: int
    turned: bool
    """Whether it is stored as [inputs, outputs], as GPT-2's are."""

    def shapes(self, name: str, rank: int) -> dict[str, tuple[int, int]]:
        """Name of each tensor in the adapter's file → its shape."""
        a, b = _names(name)
        return {a: (rank, self.inputs), b: (self.outputs, rank)}


def sites(model: PreTrainedModel, lora: LoRA) -> dict[str, Site]:
    """Module name → what an adapter changes there: every matrix of the layers' targeted parts.

    Args:
        model: with or without weights; an adapter must not be attached yet.
        lora: which parts.

    Raises:
        ValueError: the model has experts, which are no plain matrices.
    """
    kind = family(model.config.model_type)
    if kind.routes:
        raise ValueError(f"an adapter cannot change the experts of a {kind.model_type}: set device.method: full")
    found: dict[str, Site] = {}
    for number, layer in enumerate(kind.layer_list(model)):
        for inner, part in layer.named_modules():
            name = f"{kind.layers}.{number}.{inner}"
            if isinstance(part, nn.Linear | Conv1D) and kind.role(f"{name}.weight") in lora.targets:
                turned = isinstance(part, Conv1D)
                inputs, outputs = (part.nx, part.nf) if turned else (part.in_features, part.out_features)
                found[name] = Site(inner, inputs, outputs, turned)
    return found


def attach(model: PreTrainedModel, lora: LoRA, *, seed: int) -> None:
    """Freeze a model's weights and put an adapter beside them, in place: float32, B zero, A drawn by the seed.

    The model may be quantised. It computes what it did before until the adapter is trained.
    """
    found = sites(model, lora)
    assert found, "every family has matrices in its layers"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_settings(found, lora), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:  # float32 beside bfloat16: small steps of training would be rounded away
            parameter.data = parameter.data.to(torch.float32)


def save(model: PreTrainedModel, ancestor: Path, lora: LoRA, folder: Path) -> None:
    """Write the attached adapter of a model that was opened from `ancestor`; equal adapters give equal bytes."""
    held: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    write({_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in held.items()}, ancestor, lora, folder)


def write(tensors: Mapping[str, Tensor], ancestor: Path, lora: LoRA, folder: Path) -> None:
    """Write an adapter's folder from its tensors, which have the names and shapes of `shapes`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(sorted(tensors.items())), folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(_description(sites(skeleton(open_config(ancestor)), lora), lora), indent=1, sort_keys=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def shapes(ancestor: Path, lora: LoRA) -> dict[str, tuple[int, int]]:
    """Name → shape of the tensors of an adapter of `ancestor`."""
    found = sites(skeleton(open_config(ancestor)), lora)
    return {name: shape for place, site in found.items() for name, shape in site.shapes(place, lora.rank).items()}


def validate(folder: Path, ancestor: Path, lora: LoRA) -> None:
    """Make sure that a folder from elsewhere is an adapter as it was asked for, which can be added to `ancestor`.

    Raises:
        ValueError: names the file, field or tensor at fault: files of another kind, settings other than `lora`'s,
            tensors missing, unknown or of other shapes, or values that are not finite or beyond all measure.
    """
    held = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    if strange := sorted(held - {CONFIG, WEIGHTS}):
        raise ValueError(f"{folder} holds {strange[0]}: an adapter is {CONFIG} and {WEIGHTS}, and nothing else")
    found, file = sites(skeleton(open_config(ancestor)), lora), folder / WEIGHTS
    _check_description(folder / CONFIG, _description(found, lora))
    expected = shapes(ancestor, lora)
    most = sum(4 * math.prod(shape) for shape in expected.values()) + _ENTRY * (1 + len(expected))
    if file.is_file() and (size := file.stat().st_size) > most:
        raise ValueError(f"{file} has {size} bytes, and cannot need more than {most}")
    for name, one in stored_in(file).items():
        if name not in expected:
            raise ValueError(f"{file}: tensor {name} belongs to no matrix that was to be adapted")
        if one.shape != (wanted := expected.pop(name)):
            raise ValueError(f"{file}: tensor {name} has shape {one.shape} instead of {wanted}")
        if one.dtype not in TRAINABLE:
            raise ValueError(f"{file}: tensor {name} is {one.dtype}: save it as float32, float16 or bfloat16")
    if expected:
        raise ValueError(f"{file}: tensor {min(expected)} is missing")
    largest: dict[str, float] = {}
    for name, tensor in load_file(file).items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{file}: tensor {name} holds NaN or infinity")
        largest[name] = float(tensor.abs().max())
    for place in found:
        a, b = _names(place)
        if lora.alpha * largest[a] * largest[b] > _LARGEST:  # rank products, each counted alpha / rank times
            raise ValueError(f"{file}: {b} · {a} may add more than {_LARGEST:g} to a weight: its training diverged")


def change(folder: Path, lora: LoRA) -> float:
    """L2 norm of what a valid adapter adds to its ancestor's weights: that of alpha / rank · B·A, which is not made."""
    held = load_file(folder / WEIGHTS)
    ends = (".lora_A.weight", ".lora_B.weight")
    squares = 0.0
    for place in sorted(name.removesuffix(ends[0]) for name in held if name.endswith(ends[0])):
        a, b = (held[place + end].to(torch.float64) for end in ends)
        squares += float(((b.T @ b) * (a @ a.T)).sum())  # ‖B·A‖² = tr(Bᵀ·B · A·Aᵀ)
    return lora.alpha / lora.rank * math.sqrt(max(squares, 0.0))


def merge(ancestor: Path, adapter: Path, lora: LoRA, *, into: Path, resume: bool = False) -> None:
    """Write `ancestor` + `adapter`, with the ancestor's config and tokenizer: W + alpha / rank · B·A, block by block.

    The sum is kept in float32. The ancestor's weights lie on the grid of its dtype, most changes are smaller than the
    grid of bfloat16, and rounding would undo those.

    Args:
        ancestor: the checkpoint folder that the adapter was trained on; its own weights, also where training saw them
            quantised.
        adapter: as `validate` passes it.
        lora: the adapter's settings.
        into: where the checkpoint goes.
        resume: keep what an interrupted call with the same arguments has finished.
    """
    write_descendant(ancestor, merged(ancestor, adapter, lora), into=into, resume=resume)


def merged(ancestor: Path, adapter: Path, lora: LoRA) -> list[Part]:
    """The tensors that `merge` writes, still to be made; the adapter's own are in memory."""
    model = skeleton(open_config(ancestor))
    found, low_rank = sites(model, lora), load_file(adapter / WEIGHTS)
    # Checkpoints of a model without its head leave out the prefix of its names.
    prefix = f"{model.base_model_prefix}."
    places = {f"{name}.weight": place for place in found for name in (place, place.removeprefix(prefix))}
    parts: list[Part] = []
    for name, one in stored(ancestor).items():
        dtype = torch.float32 if one.dtype.is_floating_point else one.dtype
        make = partial(_copied, one, dtype)
        if place := places.get(name):
            a, b = (low_rank[tensor].to(torch.float32) for tensor in _names(place))
            left, right = (a.T, b.T) if found[place].turned else (b, a)
            make = partial(_added, one, left * (lora.alpha / lora.rank), right)
        parts.append(Part(name, dtype, one.shape, make))
    return parts


def _copied(one: Stored, dtype: torch.dtype) -> Iterator[Tensor]:
    for block in one.through():
        yield block.to(dtype)


def _added(one: Stored, left: Tensor, right: Tensor) -> Iterator[Tensor]:
    for rows in blocks(one.shape):
        delta = (left if rows is None else left[rows]) @ right
        yield delta.add_(one.read(rows))


def _names(place: str) -> tuple[str, str]:
    """The names in an adapter's file of A and B of a module."""
    return f"{_PREFIX}{place}.lora_A.weight", f"{_PREFIX}{place}.lora_B.weight"


def _settings(found: dict[str, Site], lora: LoRA) -> LoraConfig:
    """The same in the words of peft, which finds modules by the ends of their names."""
    return LoraConfig(
        r=lora.rank,
        lora_alpha=cast("int", lora.alpha),  # an int only by its annotation
        lora_dropout=lora.dropout,
        target_modules=sorted({site.inner for site in found.values()}),
        fan_in_fan_out=any(site.turned for site in found.values()),
    )


def _description(found: dict[str, Site], lora: LoRA) -> dict[str, Any]:
    """An adapter's config file."""
    fields = _settings(found, lora).to_dict() | {"inference_mode": True}
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
    return json.loads(json.dumps(plain))


def _check_description(path: Path, expected: dict[str, Any]) -> None:
    """What is not said, or said to be nothing, is not there: later versions of peft know more fields.

    Raises:
        ValueError: names the field that differs.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if path.stat().st_size > _LONGEST_CONFIG:
        raise ValueError(f"{path} has more than {_LONGEST_CONFIG} bytes")
    said = read_object(path)
    for field in sorted({*said, *expected} - {"peft_version"}):
        here, there = said.get(field) or None, expected.get(field) or None
        if here != there:
            raise ValueError(f"{path}: {field} is {str(here)[:100]} instead of {str(there)[:100]}")
