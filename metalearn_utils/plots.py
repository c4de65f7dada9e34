"""One visual style for the whole book: figures that follow the reader's theme, and frames under a slider.

A figure is one display bundle: inline SVG whose ink is the page's own text colour, a PNG for viewers that strip
HTML, and a plain-text summary with the end values of its lines, which the tests compare.
"""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence

from typing import Any

import matplotlib
import numpy as np
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"
COLOURS = {
    "MAML": "#2b7bba",
    "FOMAML": "#1b9aaa",
    "Reptile": "#2e8b57",
    "feature reuse": "#9467bd",
    "prototypes": "#cf6a17",
    "pretrained": "#d1495b",
    "fine-tuned": "#c2599f",
    "joint training": "#a8860d",
    "from scratch": "#808080",
    "pixels": "#a0734d",
    "oracle": INK,
}
STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "metalearn_utils",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.prop_cycle": matplotlib.cycler(color=[c for c in COLOURS.values() if c != INK]),
    "lines.linewidth": 2,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
}


def colour(name: str) -> str:
    """The colour of a method: the same throughout the book, whatever follows its name ("MAML, K = 5")."""
    return next((c for method, c in COLOURS.items() if name.startswith(method)), INK)


def figure(columns: int = 1, height: float = 3.3, width: float = 5.4, **options: Any) -> tuple[Figure, Any]:
    """A figure in the book's style with `columns` axes side by side; sizes in inches, legible on a phone."""
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(width, height), layout="constrained")
        return fig, fig.subplots(1, columns, **options)


def line(ax: Axes, x: Sequence[float], mean: Sequence[float], half: Sequence[float] | None, name: str, **style) -> None:
    """One method's curve with its 95 % band, labelled at its end by `label_ends`."""
    mean = np.asarray(mean, dtype=float)
    style = {"color": colour(name)} | style
    ax.plot(x, mean, label=name, **style)
    if half is not None:
        ax.fill_between(x, mean - np.asarray(half), mean + np.asarray(half), color=style["color"], alpha=0.2, lw=0)


def label_ends(ax: Axes, gap: float = 0.075) -> None:
    """Write each line's label at its right end, moved apart where labels would touch (`gap`: share of the height)."""
    ends = [(ax.transAxes.inverted().transform(ax.transData.transform((ln.get_xdata()[-1], ln.get_ydata()[-1])))[1], ln)
            for ln in ax.get_lines() if not ln.get_label().startswith("_")]  # fmt: skip
    last = -1.0
    for y, ln in sorted(ends, key=lambda end: end[0]):
        last = max(y, last + gap)
        ax.annotate(ln.get_label(), (1.01, last), xycoords="axes fraction", va="center", color=ln.get_color())


def level(ax: Axes, y: float, name: str) -> None:
    """A thin dashed line at a known constant, with its name on it."""
    ax.axhline(y, color=INK, lw=1, ls=(0, (4, 3)), label="_" + name)
    ax.annotate(name, (0.99, y), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9, color=INK)


def dots(ax: Axes, rows: Mapping[str, tuple[float, float]]) -> None:
    """One row per method: the mean as a dot, its 95 % interval as a bar, the mean written beside it."""
    for i, (name, (mean, half)) in enumerate(rows.items()):
        ax.errorbar(mean, -i, xerr=half, fmt="o", color=colour(name), capsize=3, label=f"{name}")
        ax.annotate(f"{mean:.1f}", (mean, -i), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=9,
                    color=INK)  # fmt: skip
    ax.set_yticks([-i for i in range(len(rows))], list(rows))
    ax.set_ylim(-len(rows) + 0.4, 0.8)
    ax.grid(axis="x", color=INK, alpha=0.15)


def pictures(ax: Axes, images: Any, columns: int, title: str = "") -> None:
    """Characters [n, 28, 28] in [0, 1] as one sheet, dark ink on light paper in either theme."""
    x = np.asarray(images, dtype=float)
    rows = -(-len(x) // columns)
    sheet = np.zeros((rows * columns, 30, 30))
    sheet[: len(x), 1:-1, 1:-1] = x
    sheet = sheet.reshape(rows, columns, 30, 30).swapaxes(1, 2).reshape(rows * 30, columns * 30)
    ax.imshow(1 - sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_title(title)


def show(fig: Figure, title: str, alt: str) -> None:
    """Display a figure.

    Args:
        fig: made by `figure`.
        title: what the figure shows, as a sentence: its finding.
        alt: what a reader who cannot see it needs to know.
    """
    display(bundle(fig, title, alt), raw=True)


def bundle(fig: Figure, title: str, alt: str) -> dict[str, str]:
    """The three forms of a figure: text/html, image/png (72 dpi) and text/plain."""
    for name, value in (("title", title), ("alt", alt)):
        if not value.strip():
            raise ValueError(f"{name} must say what the figure shows, got {value!r}")
    caption = f'<figcaption>{html.escape(title)}</figcaption>'
    return {
        "text/html": f'<figure class="fig">{caption}{svg(fig, title, alt)}</figure>',
        "image/png": _png(fig),
        "text/plain": "\n".join([title, alt, *summary(fig)]),
    }


def svg(fig: Figure, title: str, alt: str) -> str:
    """The figure as inline SVG: ink in `currentColor`, ids made unique by the title, role and label for readers."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = text.replace(INK, "currentColor").replace("'DejaVu Sans'", "inherit")
    slug = re.sub(r"\W+", "-", title.lower())[:40]
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{slug}-", text)
    head = f'<svg role="img" aria-label="{html.escape(alt, quote=True)}" style="max-width:36rem;width:100%;height:auto"'
    return re.sub(r'<svg( width="[^"]*"| height="[^"]*")?', head, text, count=1).replace("\n", " ")


def summary(fig: Figure) -> list[str]:
    """One line per labelled curve or dot: its end value to 3 digits, so that a stale figure cannot go unseen."""
    found: dict[str, float] = {}
    for ax in fig.axes:
        for container in (c for c in ax.containers if getattr(c, "has_xerr", False)):
            found[container.get_label()] = container.lines[0].get_xdata()[-1]
        for ln in ax.get_lines():
            if not ln.get_label().startswith(("_child", "_nolegend_")):
                found.setdefault(ln.get_label().lstrip("_"), ln.get_ydata()[-1])
    return [f"{label}: {float(value):.3g}" for label, value in found.items()]


def _png(fig: Figure) -> str:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=72, facecolor="white")
    return base64.b64encode(buffer.getvalue()).decode()
