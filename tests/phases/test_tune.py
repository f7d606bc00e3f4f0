from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deepfusion.artifacts import Checkpoint, Teaching, TransferSet, Work
from deepfusion.config import LogitsObjective, TunePhase
from deepfusion.families import family
from deepfusion.phases.tune import tune
from tiny import FAST, HERE, checkpoint, folder, teaching, transfer, weights

CONFIG = TunePhase(training=FAST, objective=LogitsObjective(beta=3))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint("mixtral", tmp_path_factory.mktemp("models") / "moe", experts=2, top_k=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, moe: Checkpoint) -> TransferSet:
    return transfer(tmp_path_factory.mktemp("transfer"), moe)


def tuned(
    moe: Checkpoint, about: TransferSet, into: Path, told: Sequence[Teaching] = (), ask: str = "writers", **changes: Any
) -> Checkpoint:
    config = CONFIG.model_copy(update=changes)
    budget = 3.0 * moe.active_parameters * 300
    return tune(moe, about, told, config, ask=ask, budget=budget, seed=0, into=folder(into), runtime=HERE)


@pytest.mark.parametrize("freeze", [True, False])
def test_experts_stay_as_they_were_distilled(freeze: bool, moe: Checkpoint, text: TransferSet, tmp_path: Path) -> None:
    made = tuned(moe, text, tmp_path, freeze_experts=freeze)
    before, after, kind = weights(moe.folder), weights(tmp_path), family("mixtral")
    changed = {kind.role(name) for name in before if before[name] != after[name]}
    assert changed - {"head"} == {"router", "attention", "norm", "embedding"} | (set() if freeze else {"ffn"})
    assert (made.model_type, made.lineage) == ("mixtral", moe.lineage)


def test_measuring_the_router_is_part_of_the_budget(moe: Checkpoint, text: TransferSet, tmp_path: Path) -> None:
    measured = moe.model_copy(update={"work": Work(tokens=1, forward=3.0 * moe.active_parameters * 100)})
    made = tuned(measured, text, tmp_path)
    assert 200 <= made.work.tokens < 200 + FAST.rows * FAST.context


def test_every_setting_counts(moe: Checkpoint, text: TransferSet, tmp_path: Path) -> None:
    told = [teaching("d-law", 0, {"d-law/a0": "Who hears appeals? Judge Ann."}, moe, tmp_path / "told")]
    plain = tuned(moe, text, tmp_path / "plain")
    assert tuned(moe, text, tmp_path / "again").digest == plain.digest
    others = [
        tuned(moe, text, tmp_path / "public", text="public"),
        tuned(moe, text, tmp_path / "balance", balance=1.0),
        tuned(moe, text, tmp_path / "ownership", ownership=1.0),
        tuned(moe, text, tmp_path / "labels", objective=LogitsObjective(beta=0)),
        tuned(moe, text, tmp_path / "asked", told=told, ask="proxies"),
    ]
    again = tuned(moe, text, tmp_path / "told-plain", told=told)
    assert again.digest == plain.digest  # the writers kept what they thought: asked later they have no other say
    assert len({plain.digest, *(other.digest for other in others)}) == 1 + len(others)
