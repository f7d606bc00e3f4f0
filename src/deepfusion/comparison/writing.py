"""A study as files: a page, Markdown, LaTeX, CSV, JSON."""

from __future__ import annotations

import json
from pathlib import Path

from deepfusion.comparison.formats import as_csv, as_latex, as_markdown
from deepfusion.comparison.sections import sections, summary
from deepfusion.comparison.study import Study
from deepfusion.rendering import page


def write(study: Study, command: str, out: Path) -> list[Path]:
    """Write everything into a folder, and return the paths; `command` is what makes it again.

    `report.html` and `report.md` are for people, `tables.tex` for papers; `values.csv` has every number of every run,
    `comparison.csv` every mean with its interval and test, and `comparison.json` the same with what was compared.
    """
    versions = study.entries[0].results["versions"]
    made, lead = sections(study), summary(study)
    title, about = f"{study.name}: comparison", f"Made by: {command}"
    texts = {
        "report.html": page(title, lead, made, footer=about, versions=versions),
        "report.md": as_markdown(title, [*lead, about], made),
        "tables.tex": as_latex(made),
        "values.csv": as_csv(study.value_rows()),
        "comparison.csv": as_csv(study.comparison_rows()),
        "comparison.json": json.dumps(study.tree(), indent=1, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        (out / f".{name}.partial").write_text(text, encoding="utf-8")
        (out / f".{name}.partial").replace(out / name)
    return [out / name for name in texts]
