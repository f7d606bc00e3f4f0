import csv
import io
import re

from comparison.made import VERSIONS, study
from deepfusion.comparison.formats import as_csv, as_latex, as_markdown, latex
from deepfusion.comparison.sections import differences, quality, sections, summary
from deepfusion.comparison.study import Failure, Question, Study
from deepfusion.rendering import page

ACCURACY = Question("token_accuracy", "private_only")
VALUES = {
    "base": [0.10, 0.20, 0.30],
    "dense_kd": [0.60, 0.70, 0.80],
    "btx": [0.62, 0.80, 0.79],
    "deepfusion": [0.65, 0.76, 0.85],
    "centralized": [0.90, 0.95, 0.99],
}
MADE = study(**VALUES)


def test_a_table_has_a_row_for_each_system_and_a_column_for_each_variant() -> None:
    table = quality(MADE, ACCURACY)
    assert table.heads == ["token accuracy (higher is better)", "N = 2", "N = 4"]
    assert [row[0] for row in table.rows] == [
        "base model", "distillation (dense)", "Branch-Train-MiX", "DeepFusion MoE", "centralised training",
    ]  # fmt: skip
    assert table.rows[1][1] == "0.7000 ± 0.2484"  # .1 · 4.302653 / √3
    assert (table.best, table.sure) == ({(3, 1), (3, 2)}, frozenset())
    sure = quality(study(**{name: of for name, of in VALUES.items() if name != "btx"}), ACCURACY)
    assert sure.best == sure.sure == {(2, 1), (2, 2)}


def test_differences_carry_their_tests() -> None:
    table = differences(MADE, ACCURACY)
    cells = {row[0]: row[1] for row in table.rows}
    assert "DeepFusion MoE" not in cells
    assert re.fullmatch(r"\+0\.0533 ± 0\.0143 \(p = \.00\d\)", cells["distillation (dense)"])
    assert cells["Branch-Train-MiX"].startswith("+0.0167 ± ")
    places = {row[0]: number for number, row in enumerate(table.rows)}
    assert (places["distillation (dense)"], 1) in table.sure
    assert (places["Branch-Train-MiX"], 1) not in table.sure


def test_the_summary_says_what_is_certain() -> None:
    lead, verdict, other = summary(MADE)
    assert verdict.startswith("By token accuracy on ")
    assert other.startswith("By log-perplexity on ")
    assert lead == "2 variants of the recipe with 3 seeds (0, 1 and 2), 6 runs."
    assert "significantly ahead of distillation (dense) (N = 2) and distillation (dense) (N = 4)" in verdict
    assert "not certainly ahead of or behind Branch-Train-MiX (N = 2)" in verdict
    swapped = VALUES | {"dense_kd": VALUES["deepfusion"], "deepfusion": VALUES["dense_kd"]}
    assert "significantly behind distillation (dense) (N = 2)" in summary(study(**swapped))[1]


def test_one_seed_has_no_tests() -> None:
    one = study(seeds=1, **VALUES)
    assert summary(one)[1].startswith("One seed has no interval")
    assert "±" not in as_markdown("x", summary(one), sections(one)).split("## ", 1)[1].split("|", 1)[1]
    assert not [section for section in sections(one) if section.anchor.startswith("differences")]


def test_all_formats_say_the_same() -> None:
    made = sections(MADE)
    assert [section.anchor for section in made] == ["quality-private_only", "differences-private_only", "gap", "costs"]
    text = as_markdown("made", summary(MADE), made)
    assert "| DeepFusion MoE | **0.7533 ± 0.2488** | **0.8533 ± 0.2488** |" in text
    assert "| DeepFusion MoE | 200 B | 400 B |" in text
    papers = as_latex(made)
    assert r"DeepFusion MoE & \textbf{0.7533 $\pm$ 0.2488} & \textbf{0.8533 $\pm$ 0.2488} \\" in papers
    assert papers.count(r"\begin{tabular}{lrr}") == papers.count(r"\end{tabular}") == sum(len(s.tables) for s in made)
    html = page("made", summary(MADE), made, footer="x", versions=VERSIONS)
    assert html.count("<svg") == 3
    assert '<span class="best" title="best">▲</span>0.7533 ± 0.2488' in html
    assert '<sup title="significantly">†</sup>' in html


def test_what_failed_is_told() -> None:
    lost = Study("x", ["N = 2"], [0, 1], MADE.entries[:1], [Failure("N = 2", 1, "device <b>: no text")])
    assert sections(lost)[-1].items == ["N = 2, seed 1: device <b>: no text"]
    assert "device \\<b\\>: no text" in as_markdown("x", [], sections(lost))


def test_latex_takes_every_character() -> None:
    assert latex("50 % of $x_1$ & {a}\\b") == r"50 \% of \$x\_1\$ \& \{a\}\textbackslash{}b"


def test_rows_of_a_table_file_have_the_same_keys() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(MADE.comparison_rows()))))
    assert len(rows) == len(MADE.comparison_rows())
    assert {row["variant"] for row in rows} == {"N = 2", "N = 4"}
    assert [row["p"] for row in rows if row["system"] == "deepfusion"] == [""] * 4
    assert as_csv([]) == ""
