"""The models that a run is compared with: on the same text at equal server compute, and one that sees everything."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from deepfusion.artifacts import Checkpoint, Corpus, Teaching, TransferSet
from deepfusion.config import Recipe
from deepfusion.steps import LAST


def references(
    go: Callable[..., Future[Checkpoint]],
    recipe: Recipe,
    base: Future[Checkpoint],
    start: Future[Checkpoint],
    corpus: Future[Corpus],
    transfer: Future[TransferSet],
    lessons: Future[TransferSet],
    teachings: list[Future[Teaching]],
    budget: float,
) -> tuple[dict[str, Future[Checkpoint]], Future[Checkpoint] | None]:
    """Name → model of every reference that the recipe wants, and the MoE of copies that some start from (or none).

    `go` submits a step; `start` is what the run's own dense student starts from; `lessons` is the transfer set as
    students are taught it, shifted or not; `budget` is in token-parameters.
    """
    seed, wanted = recipe.seed, dict.fromkeys(recipe.evaluate.references)
    common = {"transfer": transfer, "teachings": teachings, "seed": seed}
    training = recipe.distill.training  # no more of it: another objective leaves plain training as it was
    copies: Future[Checkpoint] | None = None
    if {"pooled_text", "centralized"} & wanted.keys():
        copies = go(
            Checkpoint, "upcycle", students=[base] * recipe.cluster.k, transfer=transfer, config=recipe.assemble,
            seed=seed, priority=LAST,
        )  # fmt: skip
    result: dict[str, Future[Checkpoint]] = {}
    for name in wanted:
        if name == "centralized":
            result[name] = go(
                Checkpoint, name, moe=copies, corpus=corpus, training=training, config=recipe.evaluate,
                balance=recipe.tune.balance, seed=seed, priority=LAST - 1,
            )  # fmt: skip
        elif name == "dense_kd":
            paid = {} if lessons is transfer else {"paid": [lessons]}
            result[name] = go(
                Checkpoint, name, base=start, config=recipe.distill, budget=budget, priority=LAST,
                **(common | {"transfer": lessons}), **paid,
            )  # fmt: skip
        else:
            result[name] = go(
                Checkpoint, name, model=copies if name == "pooled_text" else base, training=training,
                budget=budget, balance=recipe.tune.balance if name == "pooled_text" else 0.0, priority=LAST,
                **common,
            )  # fmt: skip
    return result, copies
