"""How much memory the process of a step will take at its peak, from what it does and with what."""

from __future__ import annotations

from deepfusion.config import Recipe
from deepfusion.doctor.work import Task, size_of
from deepfusion.objectives.logits import BLOCK
from deepfusion.scoring import LOGITS_AT_ONCE
from deepfusion.weights import BLOCK as WEIGHTS_AT_ONCE

# Of a process that has imported all that a step needs, and what the first pass of a model brings along, or the first
# training step; measured.
IMPORTED, PASSING, TRAINER = 455e6, 35e6, 70e6
LESSON, TAUGHT = 12, 18  # bytes of a token in a lesson; and of each alternative of its teacher's, raw and in the lesson
LOSSES = 5  # logits, in float32, in log-probabilities, without what is kept, and their gradients
SCORES = 3
FOUR_BITS = 0.5625  # bytes of a weight with its share of the scale of its block


def peak(task: Task, recipe: Recipe) -> float:
    """Bytes of one step's process at its peak, as the system counts them."""
    shape = task.shape
    text = task.lessons * LESSON + task.taught * task.kept * TAUGHT
    if shape is None:
        return IMPORTED + text
    blocks = 4 * 4 * min(WEIGHTS_AT_ONCE, shape.parameters)
    if task.kind == "train":
        assert task.training is not None
        number = size_of(task.training.dtype)
        # Weights, their gradients, and two averages of these; autocast keeps a copy of the weights in its own type.
        cast = 2 if task.training.compute == "bfloat16" else 0
        states = shape.parameters * (4 * number + cast)
        if task.adapter:  # in float32, beside weights that stay as they are
            four = task.phase.endswith("device") and all(way.method == "qlora" for way in recipe.device.ways)
            held = shape.parameters * number - (shape.inner * (number - FOUR_BITS) if four else 0)
            states = held + task.adapter * (4 * 4 + cast)
        tokens = task.training.rows * task.training.context
        features = shape.features
        if task.training.gradient_checkpointing:  # what enters each layer, and all of one
            layers = shape.config.num_hidden_layers
            features = features / layers + layers * shape.config.hidden_size
        kept = tokens * features * min(number, size_of(task.training.compute))
        mask = task.training.rows * task.training.context**2 * (1 + number)
        logits = LOSSES * 4 * min(tokens * shape.vocabulary, BLOCK)
        return IMPORTED + TRAINER + states + kept + mask + logits + text
    if task.kind == "write":
        number = size_of(task.dtype)
        longest = min(recipe.transfer.max_new_tokens, 10**6)
        cache = task.batch * longest * shape.cached * number
        logits = SCORES * 4 * max(task.batch * shape.vocabulary, min(64 * longest * shape.vocabulary, LOGITS_AT_ONCE))
        held = 2 * shape.parameters * number  # beside the writer its ancestor
        return IMPORTED + PASSING + held + 2 * cache + logits + text
    if task.phase in ("assemble", "upcycle"):  # what enters each layer is kept, and no head is asked
        states = 2 * 4 * task.batch * shape.config.hidden_size * shape.config.num_hidden_layers
        return IMPORTED + PASSING + 4 * shape.parameters + states + blocks
    if task.kind == "read":
        number = size_of(task.dtype)
        logits = SCORES * 4 * min(task.batch * shape.vocabulary, LOGITS_AT_ONCE)
        working = task.batch * shape.features / max(1, shape.config.num_hidden_layers) * number
        return IMPORTED + PASSING + shape.parameters * number + logits + working + text
    return IMPORTED + blocks + text  # weights are gone through block by block
