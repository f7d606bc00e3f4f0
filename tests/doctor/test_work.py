"""What phases will have to do, beside what they do."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from deepfusion import doctor
from deepfusion.artifacts import Checkpoint
from deepfusion.config import Recipe, Runtime
from deepfusion.doctor import lengths, models
from deepfusion.doctor import text as texts
from deepfusion.doctor.extent import Extent
from deepfusion.doctor.work import Task, worked_out
from deepfusion.phases.evaluate import evaluate
from deepfusion.pipeline import run
from deepfusion.roles import starting_points
from deepfusion.summary import read_results
from pico import pico
from tiny import HERE, recipe


def extent(into: Path, *overrides: str) -> Extent:
    chosen = recipe("models.base.make.tokens=100", *overrides)
    reading = texts.read(chosen, into)
    words = [document.text for document in (*reading.public, *reading.questions)]
    known: dict[int, lengths.Tokenizer] = {}
    starts = {
        key: models.made(key, source.make, words, known)
        for key, source in models.sources(chosen).items()
        if source.make
    }
    of = {start.tokenizer.fingerprint: lengths.Lengths(start.tokenizer) for start in starts.values()}
    return Extent(chosen, reading, starts, of)


def by_phase(tasks: list[Task]) -> dict[str, list[Task]]:
    return {phase: [task for task in tasks if task.phase == phase] for phase in dict.fromkeys(t.phase for t in tasks)}


def test_a_device_learns_its_own_text_and_a_share_of_what_is_public(tmp_path: Path) -> None:
    load = extent(tmp_path, "device.epochs=7", "device.replay=0.5")
    of = starting_points(list(load.text.private), load.recipe.models, 0)
    for (device, held), task in zip(load.text.private.items(), by_phase(worked_out(load))["device"], strict=True):
        start = load.starts[f"models.ancestors.{of[device]}"]
        own = sum(len(start.tokenizer.encode(document.text)[0]) + 2 for document in held)
        assert task.tokens == pytest.approx(7 * 1.5 * own)
        assert task.flops == pytest.approx(6 * task.tokens * start.shape.active)


def test_a_device_with_little_text_goes_through_it_more_often(tmp_path: Path) -> None:
    """… in a baseline's rounds too, of which each has its share of the steps."""
    plain, more = (
        by_phase(worked_out(extent(tmp_path / name, "device={epochs: 4, training: {rows: 1, context: 64}}",
                                   "baselines.fedavg_dense={rounds: 2}", "baselines.fedjets={rounds: 4}",
                                   "evaluate.references=[fedavg_dense, fedjets, btx]", *settings)))
        for name, settings in (("plain", ()), ("more", ("device.min_steps=1000",)))
    )  # fmt: skip
    assert {task.tokens for task in more["device"]} == {64_000}
    assert all(task.tokens < 64_000 for task in plain["device"])
    tokens = {phase: more[f"{phase}_device"][0].tokens for phase in ("fedavg", "fedjets", "btx")}
    assert tokens == {"fedavg": 32_000, "fedjets": 16_000, "btx": 64_000}


def test_an_adapter_is_all_that_a_device_changes(tmp_path: Path) -> None:
    full = by_phase(worked_out(extent(tmp_path / "a")))
    adapted = by_phase(worked_out(extent(tmp_path / "b", "device.method=lora")))
    whole, part = full["device"][0], adapted["device"][0]
    assert whole.shape == part.shape
    assert part.tokens == whole.tokens
    assert part.forward == part.tokens * (part.shape.active + part.adapter)  # pyright: ignore[reportOptionalMemberAccess]
    assert part.backward == part.tokens * (part.shape.active + 2 * part.adapter)  # pyright: ignore[reportOptionalMemberAccess]
    assert "materialise" not in adapted  # by default devices send whole models


def test_what_is_packed_is_small_until_it_is_made_whole(tmp_path: Path) -> None:
    """In int8, 66 bytes for 64 weights; the server unpacks them to float32."""
    packed = by_phase(worked_out(extent(tmp_path, "device.codec={numbers: int8, delta: true}")))
    parameters = packed["device"][0].shape.parameters  # pyright: ignore[reportOptionalMemberAccess]
    assert packed["device"][0].disk == parameters * 66 / 64
    assert packed["materialise"][0].disk == 4 * parameters


def test_one_device_alone_sends_an_adapter(tmp_path: Path) -> None:
    tasks = by_phase(worked_out(extent(tmp_path, "device.own={device-01: {method: lora, upload: adapter}}")))
    assert [bool(task.adapter) for task in tasks["device"]] == [n == 1 for n in range(len(tasks["device"]))]
    assert tasks["device"][1].disk == 4 * tasks["device"][1].adapter
    [whole] = tasks["materialise"]
    assert whole.shape == tasks["device"][1].shape


def test_the_servers_budget_is_shared_as_the_recipe_says(tmp_path: Path) -> None:
    load = extent(tmp_path, "distill.shares={joint: 0.5, branch: 0.3, tune: 0.2}", "distill.budget_tokens=100_000",
                    "assemble.router=random")  # fmt: skip
    tasks = by_phase(worked_out(load))
    [joint], [branch], [tune] = tasks["joint"], tasks["branch"], tasks["tune"]
    assert (joint.tokens, branch.tokens, branch.steps) == (50_000, 15_000, 2)
    base = load.starts[models.BASE].shape
    assert tune.flops == pytest.approx(6 * 20_000 * base.active)
    assert tune.tokens < 20_000  # for a token passes through two experts
    [pooled] = tasks["pooled_text"]
    assert pooled.flops == pytest.approx(6 * 100_000 * base.active)


def test_what_measuring_the_router_takes_is_taken_from_tuning(tmp_path: Path) -> None:
    plain = by_phase(worked_out(extent(tmp_path / "a", "assemble.router=random", "distill.budget_tokens=900_000")))
    measured = by_phase(worked_out(extent(tmp_path / "b", "distill.budget_tokens=900_000")))
    assert plain["assemble"][0].tokens == 0
    assert measured["assemble"][0].tokens == 2 * 2 * 500
    gone = plain["tune"][0].flops - measured["tune"][0].flops
    assert gone == pytest.approx(measured["assemble"][0].flops)


def test_phases_that_the_recipe_leaves_out_cost_nothing(tmp_path: Path) -> None:
    overrides = ("transfer.kinds=[public]", "distill.shares={joint: 1, branch: 0, tune: 0}", "evaluate.references=[]")
    assert not {"write", "branch", "tune", "upcycle", "pooled_text", "centralized"} & set(
        by_phase(worked_out(extent(tmp_path, *overrides)))
    )


def test_no_training_is_shorter_than_a_batch(tmp_path: Path) -> None:
    [branch] = by_phase(worked_out(extent(tmp_path, "distill.budget_tokens=10")))["branch"]
    assert branch.tokens == 4 * 96


def test_evaluation_reads_what_evaluate_reads(tmp_path: Path) -> None:
    load = extent(tmp_path / "text")
    tasks = by_phase(worked_out(load))["evaluate"]
    tokens = Counter({task.tokens: task.steps for task in tasks})
    folder = pico("llama", tmp_path / "m", hidden=16, layers=1, heads=2)
    base = load.starts[models.BASE].tokenizer.raw
    base.save_pretrained(folder)
    model = Checkpoint(folder=folder, model_type="llama", lineage="", parameters=0, active_parameters=0)
    (tmp_path / "s").mkdir()
    scores = evaluate(
        model, texts.read(load.recipe, tmp_path / "again").corpus, load.recipe.evaluate, system="base", item=None,
        into=tmp_path / "s", runtime=HERE,
    )  # fmt: skip
    assert scores.work.tokens in tokens


def test_written_text_is_no_longer_than_models_may_write(tmp_path: Path) -> None:
    short = by_phase(worked_out(extent(tmp_path / "a", "transfer.max_new_tokens=5", "transfer.kinds=[sampled]")))
    long = by_phase(worked_out(extent(tmp_path / "b", "transfer.max_new_tokens=50", "transfer.kinds=[sampled]")))
    [few], [many] = short["write"], long["write"]
    assert few.tokens == 2 * 10 * 5  # ten texts a cluster, written once and read by the ancestor once
    assert many.tokens > few.tokens
    assert few.turns == 2 * 5  # two writers a cluster, each a batch


def test_more_is_written_and_read_than_is_kept(tmp_path: Path) -> None:
    """Half is kept, so twice as much is written, and read by four devices and both of their ancestors."""
    texts = "transfer.kinds=[sampled]"
    all_kept = by_phase(worked_out(extent(tmp_path / "a", texts)))
    half_kept = by_phase(worked_out(extent(tmp_path / "b", texts, "transfer.keep_agreed=0.5")))
    [write], [more], [read] = all_kept["write"], half_kept["write"], half_kept["read"]
    assert "read" not in all_kept
    assert more.tokens == pytest.approx(2 * write.tokens)
    assert read.steps == 4 + 2
    assert read.tokens == pytest.approx(more.tokens)  # a cluster's, passed twice while it is written
    assert half_kept["joint"][0].flops == pytest.approx(all_kept["joint"][0].flops)


def test_proxies_write_where_the_recipe_says_so(tmp_path: Path) -> None:
    assert "consult" not in by_phase(worked_out(extent(tmp_path / "a")))
    tasks = by_phase(worked_out(extent(tmp_path / "b", "distill.teachers=proxies", "transfer.writers=proxies")))
    [consult] = tasks["consult"]
    assert consult.steps == 4  # two lineages in each of two clusters
    every = by_phase(worked_out(extent(tmp_path / "c", "distill.objective={kind: vaa, stages: 1}")))
    assert every["consult"][0].steps == 4


def test_all_that_write_are_asked_where_the_likeliest_teach(tmp_path: Path) -> None:
    """Each about everything, and then about its share."""
    load = extent(tmp_path / "a", "distill.teachers=likeliest")
    tasks = by_phase(worked_out(load))
    (writers, student), [consult] = tasks["likelihoods"], tasks["consult"]
    assert (writers.steps, student.steps, consult.steps) == (4, 1, 4)
    assert writers.tokens == student.tokens == pytest.approx(4 * consult.tokens)
    assert student.shape == load.base.shape
    beside = by_phase(worked_out(extent(tmp_path / "b", "evaluate.references=[fedmkt]")))
    assert beside["fedmkt_likelihoods"][0].tokens == writers.tokens
    assert {task.kept for task in beside["fedmkt_consult"]} == {128}
    own = by_phase(worked_out(extent(tmp_path / "c", "evaluate.references=[]")))
    for phase in ("joint", "branch", "assemble", "tune"):
        assert [task.flops for task in beside[f"fedmkt_{phase}"]] == [task.flops for task in own[phase]]
    assert not any(task.own for name, found in beside.items() if name.startswith("fedmkt") for task in found)
    few = by_phase(worked_out(extent(tmp_path / "d", "distill.teachers=likeliest", "transfer.max_writers=1")))
    assert few["consult"][0].steps == 4  # two lineages in each of two clusters


def test_devices_that_train_parts_of_an_moe(tmp_path: Path) -> None:
    rounds = "baselines.fedjets={rounds: 3, experts: 1}"
    load = extent(tmp_path / "a", "evaluate.references=[fedjets]", rounds)
    tasks = by_phase(worked_out(load))
    [device], [tuned] = tasks["fedjets_device"], tasks["fedjets_tune"]
    assert device.steps == 3 * 4
    assert device.shape is not None
    assert load.base.shape.parameters <= device.shape.parameters < load.moe.parameters
    assert tuned.shape == load.moe
    assert not any(task.own for name, found in tasks.items() if name.startswith("fedjets") for task in found)
    whole = by_phase(worked_out(extent(tmp_path / "b", "evaluate.references=[fedjets]")))
    assert whole["fedjets_device"][0].shape == load.moe  # both of two clusters' experts


def test_a_shifted_teacher_is_paid_by_the_joint_student(tmp_path: Path) -> None:
    tasks = by_phase(worked_out(extent(tmp_path, "distill.shifted=true", "distill.budget_tokens=100_000")))
    [shift], [joint] = tasks["shift"], tasks["joint"]
    assert shift.flops + joint.flops == pytest.approx(0.92 * 6 * 100_000 * joint.shape.active)  # pyright: ignore[reportOptionalMemberAccess]


def test_a_mixture_is_paid_by_the_joint_student(tmp_path: Path) -> None:
    """Of four devices three others are asked at most: with writer and ancestor, five passes over what was written."""
    load = extent(tmp_path, "distill.mixed=9", "distill.budget_tokens=100_000", "evaluate.references=[fedmkt]")
    tasks = by_phase(worked_out(load))
    [mix], [joint], [plain] = tasks["mix"], tasks["joint"], tasks["fedmkt_joint"]
    assert mix.tokens == pytest.approx(5 * load.taught())
    assert mix.flops + joint.flops == pytest.approx(plain.flops)


def test_what_devices_learn_in_the_base_is_added_to_it(tmp_path: Path) -> None:
    strangers = extent(tmp_path, "device.method=lora", "distill.task_vectors=0.5")
    kin = replace(strangers.starts["models.ancestors.gpt2"], lineage=strangers.base.lineage)
    load = replace(strangers, starts={**strangers.starts, "models.ancestors.gpt2": kin})
    [task] = by_phase(worked_out(load))["task_vectors"]
    assert (task.steps, task.flops, task.disk) == (1, 0, 4 * load.base.shape.parameters)
    assert not {"task_vectors", "own_vector"} & set(by_phase(worked_out(strangers)))
    distill = load.recipe.distill.model_copy(update={"own_task_vectors": True})
    own = replace(load, recipe=load.recipe.model_copy(update={"distill": distill}))
    [each] = by_phase(worked_out(own))["own_vector"]
    assert (each.steps, each.flops, each.disk) == (2, 0, task.disk)

    def evaluations(load: Extent) -> int:
        return sum(task.steps for task in by_phase(worked_out(load))["evaluate"])

    assert evaluations(load) == evaluations(strangers) + 1


@pytest.mark.slow
def test_the_smoke_recipe_takes_what_the_doctor_says(tmp_path: Path) -> None:
    """Tokens to a sixth, FLOPs too, memory to a fifth; time only roughly, for machines have moods."""
    smoke, one = Recipe.load("smoke"), Runtime(workers=1)
    costs = {cost.phase: cost for cost in doctor.examine(smoke, tmp_path / "run", one).costs}
    run(smoke, tmp_path / "run", one)
    phases = read_results(tmp_path / "run")["phases"]
    seconds = 0.0
    for name in dict.fromkeys(phase["name"] for phase in phases):
        own, cost = [phase for phase in phases if phase["name"] == name], costs[name]
        assert cost.steps == len(own), name
        assert cost.peak_bytes == pytest.approx(max(phase["peak_bytes"] for phase in own), rel=0.2), name
        if name not in ("transfer", "assemble", "upcycle"):
            assert cost.tokens == pytest.approx(sum(phase["tokens"] or 0 for phase in own), rel=1 / 6), name
        seconds += sum(phase["seconds"] for phase in own)
    assert 1 / 4 < seconds / sum(cost.seconds or 0 for cost in costs.values()) < 4
