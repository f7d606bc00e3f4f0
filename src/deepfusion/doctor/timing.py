"""How long this machine takes: a few steps of each kind, done with random models of the run's own shapes."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from deepfusion import adapters
from deepfusion.config import LogitsObjective, LoRA, Recipe, Runtime, Training
from deepfusion.data.batches import collate
from deepfusion.data.lessons import Lesson
from deepfusion.doctor.shapes import Shape
from deepfusion.doctor.work import Task
from deepfusion.families import context_length, family
from deepfusion.objectives import build_objective
from deepfusion.training import Learner
from deepfusion.worker import settle
from deepfusion.writing import drawn

SECONDS = 0.25  # that one kind of step is measured for, if it takes no longer by itself
PARAMETERS = 30_000_000  # of a model that is measured whole; of a larger one fewer layers are
FLOPS = 3e10  # about a second's worth for a processor's core: more is not measured at once
FEW, MANY = 16, 96  # tokens of two small batches that tell what a large one would take
STARTED = 0.15  # seconds: a process for a step, its models opened and saved
UNDER_WAY = 0.4  # seconds that a training takes beside its steps
IMPORTING = 5.0  # seconds that a worker takes to import everything, once


@dataclass(frozen=True)
class Rates:
    """Seconds that one unit of a task takes, by the task's shape and settings."""

    of: dict[tuple[object, ...], float]

    def seconds(self, task: Task) -> float:
        """How long one of the task's steps takes."""
        if task.shape is None or not task.tokens:
            return STARTED
        if task.kind == "train":
            assert task.training is not None
            steps = task.tokens / (task.training.rows * task.training.context)
            return STARTED + UNDER_WAY + steps * self.of[_key(task)]
        if task.kind == "write":
            reading = (task.tokens / 2) * self.of[_read_key(task)]
            return STARTED + task.turns * self.of[_key(task)] + reading
        return STARTED + task.tokens * self.of[_read_key(task)]


def _key(task: Task) -> tuple[object, ...]:
    training = task.training
    fields = {"rows", "context", "dtype", "compute", "gradient_checkpointing"}
    how = () if training is None else tuple(training.model_dump(include=fields).values())
    return (task.kind, task.shape, task.batch, task.adapter, *how)


def _read_key(task: Task) -> tuple[object, ...]:
    return ("read", task.shape, task.dtype)


def measure(tasks: Sequence[Task], recipe: Recipe, runtime: Runtime) -> Rates:
    """Do a little of every kind of work that the tasks consist of.

    Raises:
        InputError: there is no such accelerator.
    """
    settle(runtime)
    of: dict[tuple[object, ...], float] = {}
    for task in tasks:
        if task.shape is None or not task.tokens:
            continue
        if task.kind != "train" and _read_key(task) not in of:
            of[_read_key(task)] = _reading(task.shape, task.dtype, runtime)
        if task.kind == "train" and _key(task) not in of:
            assert task.training is not None
            lora = recipe.device.lora if task.adapter else None
            of[_key(task)] = _training(task.shape, task.training, lora, runtime)
        if task.kind == "write" and _key(task) not in of:
            of[_key(task)] = _writing(task.shape, task.batch, task.dtype, runtime)
    return Rates(of)


def _training(shape: Shape, training: Training, lora: LoRA | None, runtime: Runtime) -> float:
    """Seconds that an optimiser step on a full batch takes, with a teacher's probabilities.

    Of a model too large for that, a part of each step is taken to go by tokens and a part by weights; two batches of
    different sizes tell them apart.
    """
    model, share = _model(shape, training.dtype, runtime)
    if lora is not None:  # four bits are not tried: their unpacking comes on top
        adapters.attach(model, lora, seed=0)
    if training.gradient_checkpointing:
        model.activation_checkpointing_enable()
        model.disable_input_require_grads()
    learner = Learner(model.train(), build_objective(LogitsObjective(), 0, 0, {}))
    changed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(changed, fused=True)

    def step(batch: dict[str, torch.Tensor]) -> None:
        with torch.autocast(runtime.accelerator, torch.bfloat16, enabled=training.compute == "bfloat16"):
            loss = learner(**batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(changed, training.clip)
        optimiser.step()
        optimiser.zero_grad()
        loss.item()  # waits for an accelerator

    def seconds(rows: int, context: int) -> float:
        batch = _batch(rows, context, shape.vocabulary, runtime)
        return _timed(lambda: step(batch))

    longest = _longest(shape, training.context)
    full = training.rows * training.context
    if share == 1 and 6 * shape.active * full <= FLOPS:
        return seconds(training.rows * training.context // longest, longest)
    most = min(MANY, longest)
    few, many = seconds(1, FEW), seconds(1, most)
    a_token = max(0.0, many - few) / max(1, most - FEW)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return max(0.0, few - FEW * a_token) * shape.parameters / weights + full * a_token / share


def _batch(rows: int, context: int, vocabulary: int, runtime: Runtime) -> dict[str, torch.Tensor]:
    ids = np.arange(context, dtype=np.int64) % min(vocabulary, 64)
    lesson = Lesson(
        ids, np.ones(context, np.float32), topk_ids=np.zeros((context, 8), np.int64) + np.arange(8),
        topk_logprobs=np.full((context, 8), -3.0, np.float32),
    )  # fmt: skip
    return {name: tensor.to(runtime.accelerator) for name, tensor in collate([[[lesson]] * rows]).items()}


@torch.inference_mode()
def _reading(shape: Shape, dtype: str, runtime: Runtime) -> float:
    """Seconds a token takes forward."""
    model, share = _model(shape, dtype, runtime)
    length = _longest(shape, 128)
    rows = int(min(32, max(1, FLOPS / (2 * shape.active * share * length))))
    ids = torch.ones(rows, length, dtype=torch.int64, device=runtime.accelerator)
    return _timed(lambda: model(input_ids=ids, use_cache=False).logits.sum().item()) / ids.numel() / share


@torch.inference_mode()
def _writing(shape: Shape, batch: int, dtype: str, runtime: Runtime) -> float:
    """Seconds that a batch takes for one token each, with what came before kept."""
    model, share = _model(shape, dtype, runtime)
    ids = torch.ones(batch, 8, dtype=torch.int64, device=runtime.accelerator)
    before = model(input_ids=ids, use_cache=True)
    step = ids[:, :1]

    def turn() -> None:
        mask = torch.ones(batch, 9, dtype=torch.int64, device=runtime.accelerator)
        cache = copy.deepcopy(before.past_key_values)
        logits = model(input_ids=step, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        log_p = torch.log_softmax(logits[:, -1].float(), -1)
        drawn(log_p.softmax(-1), torch.Generator(log_p.device))
        log_p.topk(min(32, log_p.shape[-1]), -1).values.sum().item()

    return _timed(turn) / share


def _longest(shape: Shape, tokens: int) -> int:
    return int(min(tokens, context_length(shape.config) or tokens))


def _timed(work: Callable[[], object]) -> float:
    """Seconds that it takes once, after a first time."""
    started = time.perf_counter()
    work()
    first = time.perf_counter() - started
    if first > 4 * SECONDS:  # what happens at the first time alone no longer counts
        return first
    times = max(1, math.ceil(SECONDS / max(first, 1e-3)))
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


def _model(shape: Shape, dtype: str, runtime: Runtime) -> tuple[PreTrainedModel, float]:
    """A model of the shape, or of as many of its layers as are quick to make; and which share of its work they do."""
    config, share = shape.config, 1.0
    if shape.parameters > PARAMETERS and config.num_hidden_layers > 2:
        config = _shorter(config, 2)
        share = family(config.model_type).matrix_parameters(config) / shape.active
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.to(runtime.accelerator).eval(), share


def _shorter(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same with its first layers alone."""
    short = copy.deepcopy(config)
    if getattr(short, "layer_types", None):
        short.layer_types = short.layer_types[:layers]
    short.num_hidden_layers = layers
    return short
