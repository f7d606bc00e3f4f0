"""Data → inline SVG.

Colours are CSS variables of the page (`--ink`, `--muted`, `--line`, `--accent`, `--surface`), so one figure serves
light and dark; shapes, hatches and labels carry the meaning, colour only repeats it.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, Protocol

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from deepfusion.labels import METRICS, STAGES

# Stand-ins that matplotlib accepts as colours; `_svg` puts the page's variables in their place.
INK, MUTED, LINE, ACCENT, SURFACE = "#010203", "#010204", "#010205", "#010206", "#010207"
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", ACCENT: "--accent", SURFACE: "--surface"}
RASTER = (0.16, 0.58, 0.56)  # a middle tone that reads on both backgrounds, for matrices too large to draw cell by cell
LARGEST_DRAWN = 40
MARKERS = ("o", "s", "^", "D", "v", "P")
TUNED = STAGES["deepfusion"]
NO_DATE: dict[str, Any] = {"Date": None}
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (9, 3)), (0, (3, 1, 1, 1, 1, 1)))
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "deepfusion",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "hatch.linewidth": 0.7,
}


class Spread(Protocol):
    """A mean, and half of its interval, if it has one."""

    @property
    def mean(self) -> float:
        """The mean."""
        ...

    @property
    def half(self) -> float | None:
        """Half of the interval."""
        ...


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an `<svg>` element that fits its column; `name` keeps ids apart on a page with several."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.05, metadata=NO_DATE)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<defs/>", "", text, flags=re.S)
    left, top, width, height = map(float, text.split('viewBox="', 1)[1].split('"', 1)[0].split())
    box = f"{left:g} {top:g} {width:.2f} {height:.2f}"
    # A point is 4/3 CSS pixels; the page shrinks what is wider than its column.
    head = f'<svg viewBox="{box}" style="width:{width * 4 / 3:.0f}px" role="img" aria-label="{escape(title)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
    text = text.replace("xlink:href", "href").replace('id="', f'id="{name}-')
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1var(--sans)", text)


def _figure(width: float, height: float, panels: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    figure.set_layout_engine("constrained", wspace=0.05)
    return figure, list(figure.subplots(1, panels, squeeze=False, **options)[0])


def _short(label: str, width: int = 22) -> str:
    return label if len(label) <= width else label[: width - 1] + "…"


class _Styled:
    """Our style for the time of one figure; a missing glyph is the browser's affair, for the text stays text."""

    def __enter__(self) -> None:
        self._caught, self._style = warnings.catch_warnings(), mpl.rc_context(STYLE)
        self._caught.__enter__()
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        self._style.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._style.__exit__(*error)
        self._caught.__exit__(*error)


def quality(bars: Sequence[tuple[str, str, float, float | None]]) -> str:
    """Bars, top to bottom: (label, kind, token accuracy, log-perplexity); kind is stage, result or reference."""
    with _Styled():
        figure, (left, right) = _figure(8.6, 0.75 + 0.27 * len(bars), 2, sharey=True)
        kinds: dict[str, dict[str, Any]] = {
            "stage": {"color": LINE, "edgecolor": MUTED},
            "result": {"color": ACCENT, "edgecolor": ACCENT},
            "reference": {"color": "none", "edgecolor": MUTED, "hatch": "////"},
        }
        for axes, values in (
            (left, [bar[2] for bar in bars]),
            (right, [bar[3] for bar in bars]),
        ):
            largest = max((value or 0.0 for value in values), default=0.0) or 1.0
            for place, (bar, value) in enumerate(zip(bars, values, strict=True)):
                if value is None:
                    continue
                axes.barh(place, value, height=0.66, linewidth=0.7, **kinds[bar[1]])
                weight = "bold" if bar[1] == "result" else "normal"
                axes.text(value + 0.015 * largest, place, f"{value:.3f}", va="center", fontsize=8, fontweight=weight)
            axes.set_xlim(0, 1.14 * largest)
            axes.tick_params(left=False)
        left.set_yticks(range(len(bars)), [_short(bar[0], 34) for bar in bars])
        for label, bar in zip(left.get_yticklabels(), bars, strict=True):
            label.set_fontweight("bold" if bar[1] == "result" else "normal")
        left.invert_yaxis()
        left.set_title(f"{METRICS['token_accuracy']} (higher is better)")
        right.set_title(f"{METRICS['token_log_perplexity']}, nats (lower is better)")
        return _svg(figure, "quality", "Quality of every stage and reference on questions that only devices can answer")


def similarity(matrix: Sequence[Sequence[float]], labels: Sequence[str], groups: Sequence[int]) -> str:
    """The cosine matrix with devices ordered by cluster, and a frame around each cluster."""
    order = sorted(range(len(labels)), key=lambda i: (groups[i], i))
    values = np.array(matrix, dtype=float)[np.ix_(order, order)]
    count = len(order)
    with _Styled():
        size = min(6.4, 1.6 + 0.26 * count)
        figure, (axes,) = _figure(size, size)
        strength = np.clip(values, 0, 1)
        if count > LARGEST_DRAWN:
            image = np.dstack([np.full_like(strength, part) for part in RASTER] + [strength])
            axes.imshow(image, interpolation="nearest", extent=(0, count, count, 0))
        else:
            _cells(axes, strength)
        start = 0
        for group in sorted(set(groups)):
            members = sum(g == group for g in groups)
            frame = Rectangle((start, start), members, members, fill=False, edgecolor=INK, linewidth=1.4, zorder=3)
            axes.add_patch(frame)
            axes.text(count * 1.015, start + members / 2, f"cluster {group}", va="center", fontsize=8, color=INK)
            start += members
        axes.set(xlim=(0, count), ylim=(count, 0), aspect="equal")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=7)
        if count <= LARGEST_DRAWN:
            names = [_short(labels[i]) for i in order]
            axes.set_yticks(np.arange(count) + 0.5, names)
            axes.set_xticks(np.arange(count) + 0.5, names, rotation=90, color=INK)
        else:
            axes.set(xticks=[], yticks=[])
        return _svg(figure, "similarity", "Cosine similarity of the devices' embeddings, ordered by cluster")


def _cells(axes: Axes, strength: np.ndarray, texts: Sequence[Sequence[str]] | None = None) -> None:
    for y, line in enumerate(strength.tolist()):
        for x, value in enumerate(line):
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=ACCENT, alpha=round(value, 2), linewidth=0))
            if texts is not None:
                ink = SURFACE if value > 0.55 else INK
                axes.text(x + 0.5, y + 0.5, texts[y][x], ha="center", va="center", fontsize=8, color=ink)


def routing(probabilities: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Heat map, domains × experts, of mean router probabilities: a panel per layer, of at most four spread evenly."""
    domains = list(probabilities)
    values = np.array([probabilities[domain] for domain in domains])  # domains, layers, experts
    layers = sorted({round(i) for i in np.linspace(0, values.shape[1] - 1, min(4, values.shape[1]))})
    experts = values.shape[2]
    with _Styled():
        width = min(9.0, 1.3 + len(layers) * max(1.1, 0.46 * experts))
        figure, panels = _figure(width, 0.95 + 0.36 * len(domains), len(layers), sharey=True)
        for axes, layer in zip(panels, layers, strict=True):
            part = values[:, layer]
            wide = experts > 16
            texts = None if wide else [[f"{value:.2f}".removeprefix("0") for value in line] for line in part]
            _cells(axes, part / values.max(), texts)
            axes.set(xlim=(0, experts), ylim=(len(domains), 0))
            axes.set_title(f"layer {layer}")
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            shown = np.arange(0, experts, 1 if not wide else 8)
            axes.set_xticks(shown + 0.5, [str(e) for e in shown])
            axes.set_xlabel("expert")
        panels[0].set_yticks(np.arange(len(domains)) + 0.5, [_short(domain) for domain in domains])
        return _svg(figure, "routing", "Mean router probability of each expert by domain, layer by layer")


def losses(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Training loss over steps, averaged in at most 120 bins a curve.

    The branches with the tuning, and the devices, have panels of their own: they are of another length.
    """
    found = {name: _binned(curve) for name, curve in curves.items() if curve}
    devices = {name: curve for name, curve in found.items() if name.startswith("device")}
    after = {name: curve for name, curve in found.items() if name.startswith("branch") or name == TUNED}
    long = {name: curve for name, curve in found.items() if name not in devices and name not in after}
    titles = ("joint student, references", "branches, tuning (bold)", "devices")
    parts = [(title, part) for title, part in zip(titles, (long, after, devices), strict=True) if part]
    with _Styled():
        ratios = {"width_ratios": [1.7 if part is long else 1 for _, part in parts]}
        figure, panels = _figure(9.6, 3.2, len(parts), gridspec_kw=ratios)
        for axes, (title, part) in zip(panels, parts, strict=True):
            for number, (name, (steps, values)) in enumerate(part.items()):
                axes.plot(steps, values, label=_short(name), **_line(name, number if part is long else 0))
            axes.set_title(title)
            axes.set_xlabel("optimiser step")
            axes.grid(axis="y", color=LINE, linewidth=0.5)
            if part is long:  # losses fall, so this corner is free
                axes.legend(loc="upper right", frameon=False, fontsize=8, handlelength=3.2)
        panels[0].set_ylabel("training loss, nats")
        return _svg(figure, "losses", "Training losses over optimiser steps")


def _line(name: str, number: int) -> dict[str, Any]:
    if name == TUNED:
        return {"color": ACCENT, "linewidth": 2.0}
    if name.startswith("device"):
        return {"color": MUTED, "linewidth": 0.7, "alpha": 0.6}
    return {"color": INK, "linewidth": 1.0, "linestyle": DASHES[number % len(DASHES)]}


def _binned(curve: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    bins = np.array_split(np.array(curve, dtype=float), min(120, len(curve)))
    steps, values = np.array([part.mean(0) for part in bins]).T
    return steps, values


def costs(up: Mapping[str, int], memory: Mapping[str, int], server: int | None) -> str:
    """Two panels of bars: bytes that each device sends, and peak memory of each device beside the server's."""
    with _Styled():
        rows = min(max(len(up), len(memory) + (server is not None)), LARGEST_DRAWN)
        figure, (left, right) = _figure(8.6, 0.75 + 0.2 * max(rows, 3), 2)
        _bars(left, sorted(up.items(), key=lambda entry: -entry[1]), "bytes sent, once")
        peaks = sorted(memory.items(), key=lambda entry: -entry[1])
        _bars(right, peaks, "peak memory", server)
        return _svg(figure, "costs", "Bytes sent and peak memory of every device")


def _bars(axes: Axes, entries: list[tuple[str, int]], title: str, server: int | None = None) -> None:
    left_out = max(0, len(entries) - LARGEST_DRAWN)
    entries = ([("server", server)] if server is not None else []) + entries[:LARGEST_DRAWN]
    largest = max((value for _, value in entries), default=1) or 1
    for place, (_, value) in enumerate(entries):
        first = server is not None and place == 0
        look: dict[str, Any] = {"color": ACCENT if first else LINE, "edgecolor": ACCENT if first else MUTED}
        axes.barh(place, value, height=0.66, linewidth=0.7, **look)
        axes.text(value + 0.015 * largest, place, size(value), va="center", fontsize=7.5)
    axes.set_yticks(range(len(entries)), [_short(name) for name, _ in entries])
    axes.set(xlim=(0, 1.25 * largest), xticks=[])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(left=False, labelsize=8)
    if entries:
        axes.invert_yaxis()
    note = f" ({left_out} smaller ones not drawn)" if left_out else ""
    axes.set_title(title + (note if entries else ": not measured"))


def trend(
    name: str,
    lines: Mapping[str, Sequence[Spread | None]],
    places: Sequence[str],
    title: str,
    result: str,
    written: Callable[[float], str] | None = None,
) -> str:
    """A line for each system over the variants of a recipe, with the interval of each mean.

    Args:
        name: keeps ids apart.
        lines: system → its mean and interval at each place; none: not measured.
        places: the variants' names.
        title: what is drawn.
        result: the system that stands out.
        written: numbers of the axis as text; none: as they are. With it the axis begins at 0.
    """
    with _Styled():
        figure, (axes,) = _figure(min(8.6, 3.4 + 1.1 * len(places)), 2.8)
        for number, (label, line) in enumerate(lines.items()):
            found = [(place, one) for place, one in enumerate(line) if one is not None]
            look: dict[str, Any] = {"color": INK, "linewidth": 1.0, "linestyle": DASHES[number % len(DASHES)]}
            if label == result:
                look = {"color": ACCENT, "linewidth": 2.0}
            axes.errorbar(
                [place for place, _ in found], [one.mean for _, one in found], [one.half or 0.0 for _, one in found],
                label=_short(label, 28), marker=MARKERS[number % len(MARKERS)], markersize=4, capsize=2, **look,
            )  # fmt: skip
        axes.set_xticks(range(len(places)), [_short(place, 24) for place in places])
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.grid(axis="y", color=LINE, linewidth=0.5)
        axes.set_title(title)
        if written is not None:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda value, _: written(value))
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8, handlelength=3.2)
        return _svg(figure, name, title)


def size(count: float) -> str:
    """Bytes for people: 1 536 → '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
