from pathlib import Path

import pytest

from deepfusion.doctor import models
from deepfusion.doctor.models import Start
from deepfusion.doctor.shapes import Shape
from deepfusion.roles import NO_KIN
from pico import pad_vocabulary, pico
from tiny import recipe

SMALL = {"hidden": 16, "layers": 1, "heads": 2}


def given(kind: str, folder: Path, key: str = "models.ancestors.a") -> Start:
    return models.given(key, pico(kind, folder, **SMALL))


def test_a_given_model_is_described_by_what_its_folder_holds(tmp_path: Path) -> None:
    folder = pad_vocabulary(pico("opt", tmp_path / "m", **SMALL))
    start = models.given("models.ancestors.a", folder)
    assert (start.name, start.context) == ("a", 128)
    assert models.described(start).endswith("context 128, vocabulary 320 padded to 328")


def test_a_tokenizer_with_more_tokens_than_the_model_is_told(tmp_path: Path) -> None:
    start = given("llama", tmp_path / "m")
    start.config.vocab_size = 310
    [_, warning] = models.about(start)
    assert (warning.state, warning.fact) == (
        "warning", "its tokenizer has 10 tokens more than the model's vocabulary of 310",
    )  # fmt: skip


def test_made_models_of_one_vocabulary_share_a_tokenizer() -> None:
    sources, known = models.sources(recipe()), {}
    texts = ["Who signs the deed? The clerk does, and the cook looks on."] * 9
    starts = {key: models.made(key, source.make, texts, known) for key, source in sources.items() if source.make}
    base, gpt2, neox = (starts[f"models.{name}"] for name in ("base", "ancestors.gpt2", "ancestors.neox"))
    assert base.tokenizer is gpt2.tokenizer
    assert base.tokenizer is not neox.tokenizer
    assert "to be made" in models.described(base)
    assert len({start.lineage for start in starts.values()}) == 3


def test_equal_checkpoints_are_one_lineage(tmp_path: Path) -> None:
    chosen = recipe("models.ancestors={a: {make: {type: gpt2}}, b: {make: {type: gpt2}}}")
    starts = {name: given("gpt2", tmp_path / name, f"models.ancestors.{name}") for name in ("a", "b")}
    [check] = models.lineages(starts, ["d0", "d1", "d2"], chosen)
    assert (check.subject, check.state) == ("a and b", "ok")
    assert check.fact == (
        "a and b are the same model by content; 3 devices start from it, and can be averaged in a cluster"
    )


def test_models_made_alike_from_other_seeds_are_told() -> None:
    chosen = recipe("models.ancestors={a: {make: {type: gpt2}}, b: {make: {type: gpt2}}}")
    starts = {
        source: models.made(f"models.ancestors.{source}", chosen.models.ancestors[source].make, ["a text"], {})  # pyright: ignore[reportArgumentType]
        for source in ("a", "b")
    }
    *of, warning = models.lineages(starts, ["d0"], chosen)
    assert [check.fact for check in of] == ["one device starts from it", "no device starts from it"]
    assert "each from a seed of its own" in warning.fact


def test_type_pure_clusters_hold_every_lineage(tmp_path: Path) -> None:
    chosen = recipe("cluster={mode: by_type, k: 1}", "assemble.top_k=1")
    starts = {"gpt2": given("gpt2", tmp_path / "a"), "neox": given("gpt_neox", tmp_path / "b")}
    problem = list(models.lineages(starts, ["d0", "d1"], chosen))[-1]
    assert (problem.state, problem.fact) == ("problem", "1 type-pure clusters cannot hold 2 lineages")


def test_what_devices_learn_in_the_bases_own_weights_is_to_be_used(tmp_path: Path) -> None:
    base, *starts = (given("llama", tmp_path / name, f"models.{name}") for name in ("base", "a", "b"))
    other = given("gpt2", tmp_path / "c", "models.ancestors.b")
    models_set = "models.ancestors={a: {make: {type: gpt2}}, b: {make: {type: gpt2}}}"

    def told(ancestors: dict[str, models.Start], *overrides: str) -> list[str]:
        found = models.of_the_base(base, ancestors, ["d0", "d1"], recipe(models_set, *overrides))
        return [f"{check.state}: {check.fact}" for check in found]

    kin = dict(zip("ab", starts, strict=True))
    because = "from the base itself, and what is learned there in its weights is not used"
    assert told(kin) == [f"warning: 2 devices start {because}"]
    assert told({**kin, "b": other}) == [f"warning: one device starts {because}"]
    used = "from the base itself, and what is learned there in its weights is added to it"
    assert told(kin, "distill.task_vectors=0.5") == [f"ok: 2 devices start {used}"]
    assert told({"a": other, "b": other}) == []
    assert told({"a": other, "b": other}, "distill.task_vectors=0.5") == [f"warning: {NO_KIN}"]


def test_rates_found_for_tiny_models_are_told_for_large_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = {"models.base": given("llama", tmp_path / "a", "models.base")}
    assert list(models.trainings(starts, recipe())) == []
    monkeypatch.setattr(models, "PRETRAINED_PARAMETERS", 1000)
    subjects = [check.subject for check in models.trainings(starts, recipe())]
    assert subjects == ["distill.training", "tune.training"]
    slow = "tune.training={learning_rate: 1e-5}"
    [tuning] = models.trainings(starts, recipe("distill.training={learning_rate: 1e-5}"))
    assert tuning.advice.endswith("tune.training.learning_rate=2e-05")
    fast = "distill.training={learning_rate: 1e-3}"
    assert [check.subject for check in models.trainings(starts, recipe(slow, fast))] == ["distill.training"]
    # A share of it is what the student gets; the whole is for controls, which start from the base.
    assert list(models.trainings(starts, recipe(slow, fast, "distill.joint_rate=0.1"))) == []


def test_rows_longer_than_a_model_takes_are_told(tmp_path: Path) -> None:
    starts = {"models.ancestors.a": given("gpt2", tmp_path / "a")}
    [check] = models.trainings(starts, recipe("device.training.context=200"))
    assert check.fact == "context is 200, and models.ancestors.a takes 128 tokens"


def test_the_shape_of_a_model(tmp_path: Path) -> None:
    """One layer of width 16: q, k, v and o of 16 by 16, three matrices of 16 by 64, and a head of 16 by 320."""
    shape = given("llama", tmp_path / "m").shape
    assert shape.active == 4 * 16 * 16 + 3 * 16 * 64 + 16 * 320
    assert shape.parameters == shape.active + 3 * 16  # norms; the head is the embedding
    assert shape.features == 4 * 16 + 4 * (16 + 16) + 3 * (16 + 64)
    assert (shape.cached, shape.vocabulary) == (2 * 16, 320)
    moe = Shape.of(models.given("models.base", pico("mixtral", tmp_path / "x", experts=4, top_k=2, **SMALL)).config)
    assert moe.features > shape.features
    assert moe.active == 4 * 16 * 16 + 2 * 3 * 16 * 64 + 4 * 16 + 16 * 320
