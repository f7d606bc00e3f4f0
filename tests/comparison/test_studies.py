from pathlib import Path

import pytest

from deepfusion.comparison.collect import Plan
from deepfusion.comparison.grid import Variant, seeds
from deepfusion.comparison.studies import StudyFile, find, names
from deepfusion.config.tree import locate
from deepfusion.errors import InputError


@pytest.mark.parametrize("name", names())
def test_every_embedded_study_can_be_run(name: str) -> None:
    study = find(name)
    assert study is not None
    assert study.about.endswith((".", "?"))
    plan = Plan(study.recipe, study.settings, study.grid([]), seeds(study.seeds))
    assert plan.check()
    assert len(plan.variants) > 1
    with pytest.raises(InputError, match=f"is a study and no recipe: deepfusion compare {name}"):
        locate(name)  # no recipe has its name
    with pytest.raises(InputError, match=rf"\(embedded: .*; studies, for deepfusion compare: .*{name}.*\)$"):
        locate(name + "s")  # and whoever misspells it is told of it


def test_every_embedded_study_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "comparing.md").read_text(encoding="utf-8")
    assert [name for name in names() if f"`{name}`" not in page] == []


def test_a_file_says_what_the_options_say(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        """
        recipe: smoke
        seeds: [3, 5]
        systems: [dense_kd, btx]
        set: {distill.budget_tokens: 9000}
        variants:
          soft: {distill.objective.beta: 3.0, distill.objective.focus: 0.0}
          as it is: {}
        vary:
          cluster.k: [1, 2]
        """
    )
    study = find(str(tmp_path / "mine.yaml"))
    assert study is not None
    assert (study.recipe, study.seeds, seeds(study.seeds)) == ("smoke", "3,5,", [3, 5])
    assert study.settings == ["distill.budget_tokens=9000", 'evaluate.references=["dense_kd", "btx"]']
    grid = study.grid(["data.partition.devices=[4]"])
    assert [variant.name for variant in grid] == [
        "soft, k = 1, N = 4",
        "soft, k = 2, N = 4",
        "as it is, k = 1, N = 4",
        "as it is, k = 2, N = 4",
    ]
    soft = ("distill.objective.beta=3.0", "distill.objective.focus=0.0")
    assert grid[1].settings == (*soft, "cluster.k=2", "data.partition.devices=4")
    assert grid[2] == Variant("as it is, k = 1, N = 4", ("cluster.k=1", "data.partition.devices=4"))


def test_what_the_command_line_varies_stands_in_place_of_the_files() -> None:
    study = StudyFile(recipe="demo", vary={"cluster.k": (2, 4), "data.partition.devices": (8, 16)})
    names = [variant.name for variant in study.grid(["data.partition.devices=[32]"])]
    assert names == ["k = 2, N = 32", "k = 4, N = 32"]


def test_paths_count_from_the_studys_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "recipe: demo\nset: {device.encoder: ../minilm}\n"
        "variants: {8: {models.base: {path: small}}, other: {}}\nvary: {models.ancestors.gpt2.path: [one, /two]}\n"
    )
    study = find(str(tmp_path / "mine.yaml"))
    assert study is not None
    assert study.settings == [f'device.encoder="{tmp_path.parent / "minilm"}"']
    assert study.variants == {"8": {"models.base": {"path": str(tmp_path / "small")}}, "other": {}}
    assert study.vary["models.ancestors.gpt2.path"] == (str(tmp_path / "one"), "/two")


def test_its_recipe_may_lie_beside_it(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("name: own")
    (tmp_path / "mine.yaml").write_text("recipe: own.yaml")
    study = find(str(tmp_path / "mine.yaml"))
    assert study is not None
    assert Path(study.recipe) == tmp_path / "own.yaml"


def test_what_is_no_study_is_left_to_who_reads_recipes(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: some\ndata: {}")
    assert find(str(tmp_path / "recipe.yaml")) is None
    assert find(str(tmp_path / "none.yaml")) is None
    assert find("demo") is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("recipe: demo\nsystem: [dense_kd]", "unknown key 'system'.*systems"),
        ("recipe: demo\nsystems: [magic]", r"systems\.0: must be pooled_text, "),
        ("recipe: demo\nvary: {cluster.k: 4}", r"vary\.cluster\.k: must be"),
        ("recipe: demo\nseeds: some", "seeds: --seeds takes how many"),
    ],
)
def test_a_broken_study_is_named_with_its_field(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"mine\.yaml: .*{told}"):
        find(str(tmp_path / "mine.yaml"))


def test_a_key_without_values_is_refused() -> None:
    with pytest.raises(InputError, match=r"takes key=\[value, value\]"):
        StudyFile(recipe="demo", vary={"cluster.k": ()}).grid([])
