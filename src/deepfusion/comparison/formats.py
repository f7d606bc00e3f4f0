"""Sections as Markdown, tables as LaTeX, rows as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deepfusion.page.parts import Section, Table
from deepfusion.rendering import markdown

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "†": r"$^\dagger$", "−": "$-$", "–": "--",
    "<": "$<$", ">": "$>$",
}  # fmt: skip


def as_markdown(title: str, summary: Sequence[str], sections: Sequence[Section]) -> str:
    """A whole page; figures are left out."""
    lines = [f"# {markdown(title)}", ""]
    for paragraph in summary:
        lines += [markdown(paragraph), ""]
    for section in sections:
        lines += [f"## {markdown(section.title)}", ""]
        for paragraph in section.text:
            lines += [markdown(paragraph), ""]
        for table in section.tables:
            lines += [*_markdown_table(table), ""]
        lines += [f"- {markdown(item)}" for item in section.items] + [""] * bool(section.items)
    return "\n".join(lines)


def _markdown_table(table: Table) -> Iterator[str]:
    yield "| " + " | ".join(map(markdown, table.heads)) + " |"
    yield "|" + "---|" * table.texts + "---:|" * (len(table.heads) - table.texts)
    for number in range(len(table.rows)):
        yield "| " + " | ".join(_marked(table, number, markdown, "**{}**", "†")) + " |"


def as_latex(sections: Sequence[Section]) -> str:
    """Every table as a `tabular` with booktabs' rules, below a comment that says what it is."""
    parts: list[str] = []
    for section in sections:
        for table in section.tables:
            columns = "l" * table.texts + "r" * (len(table.heads) - table.texts)
            parts += [
                f"% {section.title}",
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                " & ".join(map(latex, table.heads)) + r" \\",
                r"\midrule",
                *(
                    " & ".join(_marked(table, number, latex, r"\textbf{{{}}}", latex("†"))) + r" \\"
                    for number in range(len(table.rows))
                ),
                r"\bottomrule",
                r"\end{tabular}",
                "",
            ]
    return "\n".join(parts)


def latex(text: str) -> str:
    """Text that LaTeX shows as it is."""
    return "".join(_LATEX.get(character, character) for character in text)


def _marked(table: Table, number: int, escaped: Any, bold: str, sure: str) -> Iterator[str]:
    """A row's cells: the best in bold, with a sign where that is significant."""
    for column, cell in enumerate(table.rows[number]):
        text = escaped(cell)
        if (number, column) in table.best:
            text = bold.format(text)
        yield text + (sure if (number, column) in table.sure else "")


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys; nothing stands for none."""
    stream = io.StringIO()
    if rows:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return stream.getvalue()
