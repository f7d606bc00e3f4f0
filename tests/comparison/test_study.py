import pytest

from comparison.made import results, row, study
from deepfusion.comparison.sections import quality
from deepfusion.comparison.statistics import Paired
from deepfusion.comparison.study import Entry, Question, Study

ACCURACY = Question("token_accuracy", "private_only")
NATS = Question("token_log_perplexity", "private_only")
CLEAR = {
    "base": [0.10, 0.20, 0.30],
    "dense_kd": [0.60, 0.70, 0.80],
    "deepfusion": [0.65, 0.76, 0.85],
    "btx": [0.50, 0.75, 0.60],
    "centralized": [0.90, 0.95, 0.99],
}


def test_values_are_means_over_items_by_seed() -> None:
    more = [row("device", 0.2, item="a"), row("device", 0.4, item="b"), row("device", 0.9, item="c", domain="law")]
    made = Study("x", [""], [7], [Entry("", 7, results({"deepfusion": 0.5}, *more))])
    assert made.values("", "device", ACCURACY) == {7: pytest.approx(0.3)}
    assert made.values("", "device", Question("token_accuracy", "private_only", "law")) == {7: 0.9}
    assert made.values("other", "device", ACCURACY) == {}
    assert made.systems() == ["device", "deepfusion"]


def test_what_is_no_number_is_missing() -> None:
    made = Study("x", [""], [0, 1], [Entry("", 0, results({"base": None})), Entry("", 1, results({"base": 0.5}))])
    assert made.values("", "base", ACCURACY) == {1: 0.5}
    assert made.estimate("", "base", ACCURACY) is not None
    assert made.estimate("", "btx", ACCURACY) is None


def test_the_best_is_told_and_whether_that_is_certain() -> None:
    made = study(**CLEAR)
    # btx is ahead on no mean, but so uneven that nothing is certain of it; centralised training is no rival.
    assert made.best("N = 2", ACCURACY) == (["deepfusion"], False)
    even = study(**{name: of for name, of in CLEAR.items() if name != "btx"})
    assert even.best("N = 2", ACCURACY) == (["deepfusion"], True)
    assert even.best("N = 2", NATS) == (["deepfusion"], True)  # where less is better
    assert study(base=[0.1, 0.2, 0.3], deepfusion=[0.1, 0.2, 0.3]).best("N = 2", ACCURACY) is None
    assert study(seeds=1, base=[0.1], deepfusion=[0.3]).best("N = 2", ACCURACY) == (["deepfusion"], False)


def test_of_equals_all_are_best() -> None:
    made = study(base=[0.1, 0.2, 0.3], dense_kd=[0.9, 1.0, 0.8], deepfusion=[0.8, 1.0, 0.9])
    assert made.best("N = 2", ACCURACY) == (["dense_kd", "deepfusion"], False)


def test_who_lacks_a_seed_is_not_the_best() -> None:
    """It lacks the hardest, on which others had to answer too."""
    made = study(base=[0.1, 0.2, 0.1], dense_kd=[0.90, 0.92, float("nan")], deepfusion=[0.95, 0.97, 0.30])
    assert made.best("N = 2", ACCURACY) == (["deepfusion"], False)
    table = quality(made, ACCURACY)
    cells = {row[0]: row[1] for row in table.rows}
    assert cells["distillation (dense)"].endswith("(n = 2)")
    assert "n =" not in cells["DeepFusion MoE"]


def test_who_is_worse_on_the_same_seeds_is_not_significantly_better() -> None:
    assert Study._ahead(Paired(0.05, 0.01, 3, 0.001), ACCURACY)  # pyright: ignore[reportPrivateUsage]
    assert not Study._ahead(Paired(-0.05, 0.01, 3, 0.001), ACCURACY)  # pyright: ignore[reportPrivateUsage]
    assert Study._ahead(Paired(-0.05, 0.01, 3, 0.001), NATS)  # pyright: ignore[reportPrivateUsage]
    assert not Study._ahead(Paired(0.05, None, 3, None), ACCURACY)  # pyright: ignore[reportPrivateUsage]


def test_deepfusion_minus_each_other() -> None:
    found = study(**CLEAR).against("N = 4", "dense_kd", NATS)
    assert found is not None
    assert found.mean == pytest.approx(-(0.05 + 0.06 + 0.05) / 3)
    assert found.count == 3


def test_the_gap_is_closed_seed_by_seed() -> None:
    found = study(**CLEAR).gap_closed("N = 2", ACCURACY)
    assert found is not None
    assert found.mean == pytest.approx((0.55 / 0.8 + 0.56 / 0.75 + 0.55 / 0.69) / 3)
    assert study(deepfusion=[0.1, 0.2, 0.3]).gap_closed("N = 2", ACCURACY) is None


def test_costs_are_of_who_has_devices_train() -> None:
    made = study(**CLEAR)
    assert [made.traffic("N = 4", system) for system in ("base", "dense_kd")] == [None, None]
    sent = {system: made.traffic("N = 4", system) for system in ("deepfusion", "btx")}
    assert {name: one and one.mean for name, one in sent.items()} == {"deepfusion": 400, "btx": 2000}
    peaks = {system: made.memory("N = 4", system) for system in ("deepfusion", "btx", "dense_kd")}
    assert {name: one and one.mean for name, one in peaks.items()} == {"deepfusion": 4, "btx": 20, "dense_kd": None}
    spent = made.compute("N = 2", "dense_kd")
    assert spent is not None
    assert spent.mean == pytest.approx(50 / 40)


def test_rows_for_programs_hold_everything() -> None:
    made = study(**CLEAR)
    assert len(made.value_rows()) == 2 * 3 * 5 * 2  # variants, seeds, systems, metrics
    rows = made.comparison_rows()
    assert len(rows) == 2 * 5 * 2
    ours = [one for one in rows if one["system"] == "deepfusion"]
    assert all(one["p"] is None and one["best"] for one in ours)
    [theirs] = [
        one for one in rows if (one["variant"], one["metric"], one["system"]) == ("N = 2", "token_accuracy", "dense_kd")
    ]
    assert theirs["difference"] == pytest.approx(0.16 / 3)
    assert theirs["p"] < 0.05
    assert not theirs["significantly_best"]
    assert made.tree()["seeds"] == [0, 1, 2]
