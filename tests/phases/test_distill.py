from pathlib import Path

import pytest

from deepfusion.artifacts import Checkpoint, Teaching, TransferSet, Work
from deepfusion.config import DistillPhase, LogitsObjective, VAAObjective
from deepfusion.families import family
from deepfusion.phases.consult import consult
from deepfusion.phases.distill import distill
from tiny import FAST, HERE, PRIVATE, World, folder, transfer, weights

PLAIN = DistillPhase(objective=LogitsObjective(beta=3), training=FAST, teacher_top_k=5)
VAA = PLAIN.model_copy(update={"objective": VAAObjective(stages=1, patches=2, width=8, heads=2)})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def asked(world: World, into: Path, config: DistillPhase = PLAIN) -> Teaching:
    return consult(world.proxy, 0, world.transfer, config.consultation, into=folder(into), runtime=HERE)


def learnt(
    world: World, into: Path, config: DistillPhase = PLAIN, cluster: int | None = None, told: tuple[Teaching, ...] = (),
    text: TransferSet | None = None, paid: tuple[TransferSet, ...] = (),
) -> Checkpoint:  # fmt: skip
    budget = 3.0 * world.base.active_parameters * 400
    return distill(
        world.base, text or world.transfer, told, config, budget=budget, cluster=cluster, paid=paid, seed=0,
        into=folder(into), runtime=HERE,
    )  # fmt: skip


def test_joint_and_branch_spend_their_budget(world: World, tmp_path: Path) -> None:
    for cluster in (None, 0):
        student = learnt(world, tmp_path / str(cluster), cluster=cluster)
        assert 400 <= student.work.tokens < 400 + FAST.rows * FAST.context
        assert student.lineage == world.base.lineage
        assert student.losses[-1][1] < student.losses[0][1]
    assert learnt(world, tmp_path / "again").digest == Checkpoint.load(tmp_path / "None").digest


def test_what_was_made_for_a_training_is_part_of_its_budget(world: World, tmp_path: Path) -> None:
    made = world.transfer.model_copy(update={"work": Work(tokens=1, forward=3.0 * world.base.active_parameters * 200)})
    student = learnt(world, tmp_path / "student", paid=(made,))
    assert 200 <= student.work.tokens < 200 + FAST.rows * FAST.context
    assert learnt(world, tmp_path / "free", paid=()).digest == learnt(world, tmp_path / "plain").digest


def test_a_branch_may_change_its_ffns_alone(world: World, tmp_path: Path) -> None:
    config = PLAIN.model_copy(update={"branch_trains": "ffn"})
    before, kind = weights(world.base.folder), family("llama")
    for cluster, expected in ((0, {"ffn"}), (None, {"ffn", "attention", "embedding", "norm"})):
        after = weights(learnt(world, tmp_path / str(cluster), config, cluster).folder)
        assert {kind.role(name) for name in before if before[name] != after[name]} - {"head"} == expected


@pytest.mark.parametrize(("of", "other"), [(None, 0), (0, None)])
def test_joint_student_and_branches_have_rates_of_their_own(
    world: World, tmp_path: Path, of: int | None, other: int | None
) -> None:
    rate = "joint_rate" if of is None else "branch_rate"
    plain, gentle = (PLAIN.model_copy(update={rate: share}) for share in (1.0, 0.25))
    slower = PLAIN.training.model_copy(update={"learning_rate": 0.25 * PLAIN.training.learning_rate})
    made = [
        learnt(world, tmp_path / name, config, cluster).digest
        for name, config, cluster in (
            ("plain", plain, of),
            ("gentle", gentle, of),
            ("slower", plain.model_copy(update={"training": slower}), of),
            ("other", plain, other),
            ("as other", gentle, other),
        )
    ]
    assert made[0] != made[1] == made[2]
    assert made[3] == made[4]


def test_a_branch_that_nobody_wrote_for_stays_as_it_is(world: World, tmp_path: Path) -> None:
    text = transfer(folder(tmp_path / "transfer"), public=False)
    student = learnt(world, tmp_path / "branch", cluster=0, text=text)
    assert weights(student.folder) == weights(world.base.folder)
    assert (student.lineage, student.work.tokens) == (world.base.lineage, 0)
    with pytest.raises(ValueError, match="there is no text to train on"):
        learnt(world, tmp_path / "joint", text=text)


def test_view_aligned_attention_leaves_an_ordinary_checkpoint(world: World, tmp_path: Path) -> None:
    config = VAA.model_copy(update={"teachers": "proxies"})
    told = asked(world, tmp_path / "told", config)
    student = learnt(world, tmp_path / "student", config, told=(told,))
    assert set(weights(student.folder)) == set(weights(world.base.folder))
    assert student.parameters == world.base.parameters
    other = learnt(world, tmp_path / "other", PLAIN.model_copy(update={"teachers": "proxies"}), told=(told,))
    assert other.digest != student.digest


def test_who_is_asked_decides_what_is_learnt(world: World, tmp_path: Path) -> None:
    told = asked(world, tmp_path / "told")
    proxies = PLAIN.model_copy(update={"teachers": "proxies"})
    digests = {
        learnt(world, tmp_path / "writers").digest,
        learnt(world, tmp_path / "proxies", proxies, told=(told,)).digest,
        learnt(world, tmp_path / "labels", PLAIN.model_copy(update={"objective": LogitsObjective(beta=0)})).digest,
    }
    assert len(digests) == 3
    assert len(PRIVATE) == 2
