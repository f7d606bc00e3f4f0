"""Recipe keys as Markdown."""

from deepfusion.reference import render


def row(section: str, key: str) -> str:
    """The table row of a key."""
    part = render().split(f"\n## `{section}` ")[1].split("\n## ")[0]
    return next(line for line in part.splitlines() if line.startswith(f"| `{key}` "))


def test_a_number_has_bounds_and_default() -> None:
    line = row("cluster", "k")
    assert line == "| `k` | integer ≥ 1 | `4` | Number of clusters K, and so of experts. |"


def test_a_choice_lists_its_values() -> None:
    assert row("assemble", "router").startswith("| `router` | `hidden_means`, `random` | `hidden_means` | ")


def test_a_section_says_where_its_default_differs() -> None:
    assert "| section | learning_rate `0.0003` |" in row("tune", "training")


def test_unions_are_told_apart_by_kind() -> None:
    page = render()
    assert "## `data.source (kind: synthetic)` {: #data-source-kind-synthetic }" in page
    assert "## `distill.objective (kind: vaa)` {: #distill-objective-kind-vaa }" in page


def test_a_section_used_twice_is_explained_once() -> None:
    assert render().count("| `weight_decay` |") == 1
