from typing import get_args

from deepfusion.config.phases import Reference
from deepfusion.labels import BASELINES, BOUNDS, CONTROLS, SUBSETS, counted, in_order, joined, kind, label, left_out
from deepfusion.metrics import SUBSETS as MEASURED


def test_numbers_and_their_nouns() -> None:
    assert [counted(n, "document") for n in (0, 1, 2, 1200)] == [
        "0 documents",
        "1 document",
        "2 documents",
        "1,200 documents",
    ]
    assert [counted(n, "proxy", "proxies") for n in (1, 2)] == ["1 proxy", "2 proxies"]


def test_names_in_a_row() -> None:
    assert [joined(list(names)) for names in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]


def test_systems_in_the_order_of_the_method() -> None:
    given = {"centralized", "mine", "btx", "dense_kd", "deepfusion", "device_ensemble", "device", "base"}
    order = ["base", "device", "device_ensemble", "deepfusion", "dense_kd", "btx", "centralized", "mine"]
    assert in_order(given) == order
    assert [kind(name) for name in order] == ["stage"] * 4 + ["control", "baseline", "bound", "other"]
    assert (label("device"), label("mine")) == ("devices", "mine")


def test_everything_measured_has_a_name() -> None:
    assert set(SUBSETS) == set(MEASURED)
    assert set(CONTROLS | BASELINES | BOUNDS) == set(get_args(Reference))


def test_a_rejection_names_its_device_once() -> None:
    assert left_out("d1", "device d1: model/ is missing") == "device d1: model/ is missing"
    assert left_out("d1", "model/ is missing") == "d1: model/ is missing"
