from deepfusion.config import Recipe
from deepfusion.outlook import waiting
from deepfusion.steps import STEPS


def counts(*settings: str, recipe: str = "demo", planned: set[str] | None = None) -> dict[str, int]:
    return {step.phase: step.count for step in waiting(Recipe.load(recipe, settings), planned or set())}


def test_every_phase_is_counted_in_order() -> None:
    """Sixteen devices of three ancestors, four clusters, four references."""
    assert counts() == {
        "device": 16, "upload": 1, "cluster": 1, "proxy": 4, "write": 4, "transfer": 1, "joint": 1, "branch": 4,
        "assemble": 1, "tune": 1, "upcycle": 1, "pooled_text": 1, "pooled_text_dense": 1, "dense_kd": 1,
        "centralized": 1, "evaluate": 4 + 16 + 4 + 4 + 4, "report": 1,
    }  # fmt: skip
    order = [phase for phase in STEPS if phase in counts()]
    assert list(counts()) == order


def test_phases_that_a_recipe_leaves_out_are_left_out() -> None:
    found = counts("distill.shares={joint: 1, branch: 0, tune: 0}", "transfer.kinds=[public]", "evaluate.references=[]")
    assert not {"write", "consult", "branch", "tune", "upcycle", "pooled_text", "dense_kd", "centralized"} & set(found)
    assert counts(recipe="paper_mode")["consult"] == 4
    assert counts("distill.objective.kind=vaa")["consult"] == 16
    chosen = counts("distill.teachers=likeliest")
    assert (chosen["likelihoods"], chosen["consult"]) == (17, 16)
    assert counts("distill.mixed=2")["mix"] == 1
    reading = counts("transfer.keep_agreed=0.5")
    assert (reading["read"], reading["agree"]) == (16 + 3, 1)
    assert "read" not in counts("transfer.keep_agreed=0.5", "transfer.kinds=[public, answered]")


def test_a_judge_grades_the_base_the_moe_and_the_references() -> None:
    found = counts("judge={url: 'http://localhost/v1', model: grader}")
    assert found["judge"] == 2 + 4
    assert list(found) == [phase for phase in STEPS if phase in found]
    assert "judge" not in counts()


def test_adapters_are_made_whole() -> None:
    found = counts("device.method=lora", "device.upload=adapter")
    assert (found["upload"], found["materialise"], found["cluster"]) == (1, 16, 1)
    assert list(found) == [phase for phase in STEPS if phase in found]
    assert "materialise" not in counts("device.method=lora")


def test_packed_uploads_are_made_whole() -> None:
    found = counts("device.codec={numbers: nf4, delta: true}", "evaluate.references=[btx]")
    assert (found["materialise"], found["btx_materialise"]) == (16, 16)


def test_devices_with_a_way_of_their_own_are_counted() -> None:
    own = "device.own={device-01: {codec: {numbers: nf4}}, device-02: {method: lora, upload: adapter}}"
    found = counts(own, "evaluate.references=[btx, fedavg_dense]", "baselines.fedavg_dense.rounds=3")
    assert (found["materialise"], found["btx_materialise"], found["fedavg_materialise"]) == (2, 2, 6)
    others = counts("device.codec={numbers: nf4}", "device.own={device-01: {codec: none}}")
    assert others["materialise"] == 15


def test_devices_that_start_from_the_base_have_task_vectors() -> None:
    with_them = counts("distill.task_vectors=0.5", recipe="real_llms")
    without = counts("distill.task_vectors=0", "distill.own_task_vectors=false", recipe="real_llms")
    assert (with_them["task_vectors"], with_them["evaluate"]) == (1, without["evaluate"] + 1)
    own = counts("distill.own_task_vectors=true", recipe="real_llms")
    assert own["own_vector"] == 2
    assert list(own) == [phase for phase in STEPS if phase in own]
    assert "own_vector" not in counts("distill.own_task_vectors=false", recipe="real_llms")
    assert not {"task_vectors", "own_vector"} & set(without)
    assert "task_vectors" not in counts("distill.task_vectors=0.5")  # of made models none is the base


def test_phases_that_are_planned_already_are_not_told_again() -> None:
    assert list(counts(planned=set(STEPS) - {"evaluate", "report"})) == ["evaluate", "report"]


def test_what_only_the_text_tells_is_not_made_up() -> None:
    devices, *others = waiting(Recipe.load("demo", ["data.partition.mode=given"]), set())
    assert (devices.count, devices.reason) == (4, "at least 4 steps, one for each device that the text names")
    assert next(step.reason for step in others if step.phase == "proxy").startswith(
        "at least 4 steps, one for each lineage"
    )
    assert next(step.reason for step in others if step.phase == "branch") == "4 steps, one for each cluster"
