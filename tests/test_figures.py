"""Figures: the same twice, and legible with many of everything."""

from deepfusion import figures
from found import Page


def test_they_are_the_same_twice_and_take_many_devices() -> None:
    names = [f"device-with-a-long-name-{i}-世界" for i in range(60)]
    matrix = [[float(i == j) for j in range(60)] for i in range(60)]
    large = figures.similarity(matrix, names, [i % 5 for i in range(60)])
    assert large == figures.similarity(matrix, names, [i % 5 for i in range(60)])
    assert "data:image/png" in large
    assert "20 smaller ones not drawn" in figures.costs({n: i for i, n in enumerate(names)}, {}, None)
    assert figures.routing({"law": [[1 / 60] * 60] * 12}).count("layer ") >= 4
    assert "世" in figures.similarity([[1.0]], ["世界"], [0])


def test_long_and_short_trainings_have_panels_of_their_own() -> None:
    curve = [(step, 1 / (step + 1)) for step in range(300)]
    page = Page(
        figures.losses({"joint student": curve, "branch 0": curve[:9], "DeepFusion MoE": curve[:5], "device d": curve})
    )
    words = " ".join(page.text)
    assert all(title in words for title in ("joint student, references", "branches, tuning (bold)", "devices"))
    assert "branch 0" not in words  # only long trainings have names
    alone = " ".join(Page(figures.losses({"device d": curve})).text)
    assert "references" not in alone


def test_sizes_for_people() -> None:
    assert [figures.size(n) for n in (12, 1536, 3 * 2**20, 5 * 2**40)] == ["12 B", "1.5 KiB", "3.0 MiB", "5.0 TiB"]
