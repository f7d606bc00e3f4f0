"""Memory, time and what they come to, from tasks whose numbers are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deepfusion.config import MadeModel, Runtime, Training
from deepfusion.doctor import costs, timing
from deepfusion.doctor.memory import IMPORTED, LOSSES, PASSING, TRAINER, peak
from deepfusion.doctor.shapes import Shape
from deepfusion.doctor.timing import IMPORTING, STARTED, UNDER_WAY, Rates
from deepfusion.doctor.work import Task
from deepfusion.families import family
from deepfusion.objectives.logits import BLOCK
from tiny import recipe

MADE = MadeModel(type="llama", hidden=16, ffn=32, layers=3, heads=2, context=64)
SHAPE = Shape.of(family("llama").config(MADE, 320, end=0))
TRAINING = Training(rows=2, context=32)
TASK = Task("joint", 1, "train", SHAPE, 640, training=TRAINING)
HERE = Runtime(workers=0)


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_training_keeps_weights_gradients_and_their_averages() -> None:
    kept = 64 * SHAPE.features * 4 + 2 * 32 * 32 * 5 + LOSSES * 4 * 64 * 320
    assert peak(TASK, recipe()) == pytest.approx(IMPORTED + TRAINER + 16 * SHAPE.parameters + kept)


def test_half_the_precision_is_half_the_states() -> None:
    half = replace(TASK, training=TRAINING.model_copy(update={"dtype": "bfloat16"}))
    large = replace(SHAPE, parameters=10**9)
    gone = peak(replace(TASK, shape=large), recipe()) - peak(replace(half, shape=large), recipe())
    assert gone == pytest.approx(8e9, rel=1e-3)


def test_frozen_weights_have_no_gradients() -> None:
    """A billion weights, of which 0.9 in layers, and an adapter of a million."""
    large = replace(SHAPE, parameters=10**9, inner=9 * 10**8)
    adapted = replace(TASK, phase="device", shape=large, adapter=10**6)
    assert peak(adapted, recipe("device.method=lora")) == pytest.approx(IMPORTED + TRAINER + 4e9 + 16e6, rel=1e-3)
    four = peak(adapted, recipe("device.method=qlora"))
    assert four == pytest.approx(IMPORTED + TRAINER + 4e8 + 0.5625 * 9e8 + 16e6, rel=1e-3)


def test_checkpointed_layers_keep_what_enters_them() -> None:
    deep = replace(SHAPE, features=3e6)
    again = replace(TASK, training=TRAINING.model_copy(update={"gradient_checkpointing": True}))
    saved = peak(replace(TASK, shape=deep), recipe()) - peak(replace(again, shape=deep), recipe())
    assert saved == pytest.approx(64 * 4 * (3e6 - 1e6 - 3 * 16))


def test_logits_of_a_large_vocabulary_are_made_in_blocks() -> None:
    large = replace(SHAPE, vocabulary=10**7)
    more = peak(replace(TASK, shape=large), recipe()) - peak(TASK, recipe())
    assert more == pytest.approx(LOSSES * 4 * (BLOCK - 64 * 320))


def test_teachers_probabilities_are_held_in_memory() -> None:
    taught = replace(TASK, lessons=1e6, taught=1e6, kept=32)
    assert peak(taught, recipe()) - peak(TASK, recipe()) == pytest.approx(1e6 * (12 + 32 * 18))


def test_a_step_without_a_model_takes_what_imports_take() -> None:
    assert peak(Task("cluster", 1), recipe()) == IMPORTED


def test_a_writer_stands_beside_its_ancestor() -> None:
    large = replace(SHAPE, parameters=10**9)
    write = Task("write", 1, "write", large, 10, batch=4, turns=3)
    assert peak(write, recipe()) == pytest.approx(IMPORTED + PASSING + 8e9, rel=1e-2)
    assert peak(replace(write, dtype="bfloat16"), recipe()) == pytest.approx(IMPORTED + PASSING + 4e9, rel=1e-2)


# ── time ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_kind_of_work_is_measured_once() -> None:
    write = Task("write", 1, "write", SHAPE, 10, batch=4, turns=3)
    read = Task("evaluate", 1, "read", SHAPE, 100, batch=64)
    tasks = [TASK, replace(TASK, phase="dense_kd", tokens=1280), write, read, Task("data", 1)]
    rates = timing.measure(tasks, recipe(), HERE)
    assert len(rates.of) == 3
    assert all(seconds > 0 for seconds in rates.of.values())
    once, twice, writing, reading, nothing = (rates.seconds(task) for task in tasks)
    assert twice - STARTED - UNDER_WAY == pytest.approx(2 * (once - STARTED - UNDER_WAY))
    assert min(writing, reading) > nothing == STARTED


def test_adapters_and_checkpointed_layers_are_measured_as_such() -> None:
    adapted = replace(TASK, adapter=100)
    again = replace(TASK, training=TRAINING.model_copy(update={"gradient_checkpointing": True}))
    assert len(timing.measure([TASK, adapted, again], recipe(), HERE).of) == 3


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen2", "gpt2"])
def test_a_large_model_is_measured_by_two_of_its_layers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape.of(family(kind).config(MADE.model_copy(update={"type": kind}), 320, end=0))
    monkeypatch.setattr(timing, "PARAMETERS", 1000)
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    model, share = timing._model(shape, "bfloat16", HERE)
    assert model.config.num_hidden_layers == 2
    assert shape.config.num_hidden_layers == 3
    assert 0.3 < share < 1
    task = replace(TASK, shape=shape, training=TRAINING.model_copy(update={"compute": "bfloat16"}))
    assert timing.measure([task], recipe(), HERE).seconds(task) > STARTED + UNDER_WAY


def test_a_run_takes_its_longest_chain_or_its_share_of_all_work() -> None:
    """Four steps of 10 s and then one of 20 s; beside them stands one of 30 s."""
    first = Task("device", 4, "read", SHAPE, 10)
    second = Task("joint", 1, "read", SHAPE, 20)
    aside = Task("dense_kd", 1, "read", SHAPE, 30, own=False)
    rates = Rates({("read", SHAPE, "float32"): 1.0})
    tasks = [first, second, aside]

    def seconds(workers: int) -> float:
        begun = sum(task.steps for task in tasks if task.own or workers < 2) * STARTED
        return costs.duration(tasks, rates, Runtime(workers=workers)) - (IMPORTING if workers else 0) - begun

    assert seconds(0) == pytest.approx(90)
    assert seconds(1) == pytest.approx(90)
    assert seconds(2) == pytest.approx(45, abs=1)
    assert seconds(8) == pytest.approx(30, abs=1)  # one device, then the student


def test_phases_are_told_as_wholes() -> None:
    tasks = [
        Task("make", 1, "train", SHAPE, 640, forward=1, backward=2, training=TRAINING, disk=5),
        Task("take", 1, shape=SHAPE),
        Task("make", 2, "train", SHAPE, 1280, forward=3, backward=4, training=TRAINING, disk=7),
    ]
    make, take = costs.phases(recipe(), tasks, None)
    assert (make.phase, make.steps, make.tokens, make.flops, make.disk_bytes) == ("make", 3, 3200, 34, 19)
    assert (take.phase, take.seconds) == ("take", None)
