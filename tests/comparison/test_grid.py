import pytest

from deepfusion.comparison.grid import Variant, seeds, variants
from deepfusion.errors import InputError


def test_a_recipe_without_variation_is_one_variant() -> None:
    assert variants([]) == [Variant("", ())]
    assert variants([])[0].folder == "as-written"


def test_every_combination_is_a_variant() -> None:
    found = variants(["data.partition.devices=[16, 32]", "distill.objective=[{kind: logits}, {kind: vaa, alpha: 2}]"])
    assert [variant.name for variant in found] == [
        "N = 16, objective = kind: logits",
        "N = 16, objective = alpha: 2, kind: vaa",
        "N = 32, objective = kind: logits",
        "N = 32, objective = alpha: 2, kind: vaa",
    ]
    assert found[1].settings == ("data.partition.devices=16", 'distill.objective={"kind": "vaa", "alpha": 2}')
    assert len({variant.folder for variant in found}) == 4
    assert found[0].folder == "N-16-objective-kind-logits"


@pytest.mark.parametrize("setting", ["cluster.k", "cluster.k=4", "cluster.k=[]", "=[1]", "cluster.k=[", ""])
def test_what_is_no_list_of_values_is_refused(setting: str) -> None:
    with pytest.raises(InputError, match=r"--vary takes key=\[value, value\], not"):
        variants([setting])


def test_long_names_are_told_apart_by_what_they_set() -> None:
    keys = ("transfer.sampled_per_cluster=[600]", "transfer.answers_per_question=[1]", "transfer.temperature=[0.7]")
    folders = [variant.folder for variant in variants([*keys, "cluster.k=[2, 4]"])]
    assert len(set(folders)) == 2
    assert all(len(folder) <= 60 and folder.startswith("sampled_per_cluster-600") for folder in folders)
    assert folders == [variant.folder for variant in variants([*keys, "cluster.k=[2, 4]"])]


def test_keys_are_called_by_as_much_as_tells_them_apart() -> None:
    found = variants(["device.training.learning_rate=[1]", "distill.training.learning_rate=[2]", "cluster.k=[4]"])
    assert found[0].name == "device.training.learning_rate = 1, distill.training.learning_rate = 2, k = 4"


@pytest.mark.parametrize(
    ("vary", "named"),
    [
        (["cluster.k=[2]", "cluster.k=[4]"], {}),
        (["distill.objective=[{kind: logits}]", "distill.objective.beta=[1]"], {}),
        (["cluster.k=[2]"], {"few": {"cluster.k": 2}}),
    ],
)
def test_a_key_that_varies_twice_is_refused(vary: list[str], named: dict[str, dict[str, int]]) -> None:
    with pytest.raises(InputError, match="varies twice"):
        variants(vary, named)


def test_variants_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="several variants are called 'k-2'"):
        variants(["cluster.k=[2, 2]"])


@pytest.mark.parametrize(
    ("text", "expected"), [("3", [0, 1, 2]), ("1", [0]), ("3,4,7", [3, 4, 7]), ("3,", [3]), ("0,", [0])]
)
def test_seeds_are_counted_or_named(text: str, expected: list[int]) -> None:
    assert seeds(text) == expected


def test_seeds_count_from_the_recipes() -> None:
    assert seeds("2", first=5) == [5, 6]


@pytest.mark.parametrize("text", ["", "0", "x", "1,1", "-1,2", ",", "1.5"])
def test_other_seeds_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--seeds takes how many, or which"):
        seeds(text)
