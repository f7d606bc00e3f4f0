"""Templates: sections to one HTML page that needs nothing else, findings to a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined

from deepfusion.labels import counted

if TYPE_CHECKING:
    from deepfusion.page.parts import Section


def page(
    title: str,
    summary: Sequence[str],
    sections: Sequence[Section],
    *,
    tiles: Sequence[tuple[str, str]] = (),
    footer: str,
    versions: Mapping[str, str],
) -> str:
    """One page.

    Args:
        title: what it is about.
        summary: paragraphs, of which the first leads.
        sections: in order.
        tiles: (value, label) of a few large numbers.
        footer: a sentence.
        versions: of what made it.
    """
    return template("report.html.j2").render(
        run=title, summary=summary, tiles=tiles, sections=sections, footer=footer, versions=versions
    )


def template(name: str) -> Any:
    """One of the package's templates; what it names must be given to it."""

    def escaped(template: str | None) -> bool:
        return template is not None and template.endswith(".html.j2")

    environment = Environment(
        loader=PackageLoader("deepfusion"),
        autoescape=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cast("dict[str, Any]", environment.filters).update(md=markdown, counted=counted)
    return environment.get_template(name)


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, also inside a table."""
    return "".join("\\" + c if c in "\\`*_[]<>|#" else c for c in " ".join(text.split()))
