"""One visual style for the whole book: what is drawn, and the colour of each method.

`curves`, `intervals` and `image_grid` draw whole figures, or one panel of a figure if given its axes; `line`, `level`
and `label_ends` are the pieces. `show` displays a figure, `scrub` several under a slider.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .figures import INK, STYLE, bundle, show, summary, svg

__all__ = ["INK", "METHOD_COLOURS", "bundle", "colour", "curves", "dots", "figure", "image_grid", "intervals",
           "label_ends", "level", "line", "pictures", "show", "spread", "summary", "svg"]  # fmt: skip

METHOD_COLOURS = {
    "MAML": "#4a8ae8",
    "FOMAML": "#246c84",
    "Reptile": "#00783c",
    "joint training": "#c08400",
    "from scratch": "#8c8c8c",
    "prototypes": "#cc4800",
    "pretrained": "#b03058",
    "fine-tuned": "#cc60c0",
    "feature reuse": "#6c54cc",
    "pixels": "#a8846c",
    "blurred pixels": "#8a7a5c",
    "head only": "#b07890",
    "ANIL": "#9a58d8",
    "Meta-SGD": "#0090a8",
    "SGD": "#6f7c8a",
    "momentum": "#96702a",
    "RMSprop": "#5c8c38",
    "Adam": "#d0503c",
    "oracle": INK,
}
Curve = Any  # means [n], or a tuple (means, half widths) or (means, low, high), each [n]


def colour(name: str) -> str:
    """The colour of a method: the same throughout the book, whatever follows its name ("MAML, K = 5")."""
    return next((c for method, c in METHOD_COLOURS.items() if name.startswith(method)), INK)


def figure(columns: int = 1, height: float = 3.3, width: float = 4.8, **options: Any) -> tuple[Figure, Any]:
    """A figure in the book's style with `columns` axes side by side; sizes in inches, legible on a phone."""
    cycle = matplotlib.cycler(color=[c for c in dict.fromkeys(METHOD_COLOURS.values()) if c != INK])
    with matplotlib.rc_context(STYLE | {"axes.prop_cycle": cycle}):
        fig = Figure(figsize=(width, height), layout="constrained")
        return fig, fig.subplots(1, columns, **options)


def curves(x: Sequence[float], rows: Mapping[str, Curve], *, levels: Mapping[str, float] | None = None,
           xlabel: str = "", ylabel: str = "", ax: Axes | None = None, **limits: Any) -> Figure:  # fmt: skip
    """Several methods' curves over x [n], each with its band, its colour and its name at its end.

    Args:
        x: positions [n].
        rows: by name, means [n], or a tuple (means, half widths) or (means, low, high).
        levels: known constants by name, drawn as thin dashed lines.
        limits: further properties of the axes, e.g. ylim=(0, 6) or yscale="log".

    Raises:
        ValueError: a curve's length is not n.
    """
    ax = ax or figure()[1]
    for name, row in rows.items():
        mean, *band = row if isinstance(row, tuple) else (row,)
        line(ax, x, mean, band[0] if len(band) == 1 else band or None, name)
    ax.set(xlabel=xlabel, ylabel=ylabel, **limits)
    for name, y in (levels or {}).items():
        level(ax, y, name)
    label_ends(ax)
    return ax.figure


def line(ax: Axes, x: Sequence[float], mean: Any, half: Any, name: str, **style: Any) -> None:
    """One method's curve; `half` is its band's half width [n], or (low, high), or None; named by `label_ends`."""
    mean = np.asarray(mean, dtype=float)
    if mean.shape != (len(x),):
        raise ValueError(f"the curve of {name!r} must have one value for each of {len(x)} x, got shape {mean.shape}")
    style = {"color": colour(name), "lw": 2} | style
    ax.plot(x, mean, label=name, **style)
    if half is not None:
        pair = isinstance(half, (tuple, list)) and len(half) == 2 and np.ndim(half[0]) == 1
        low, high = map(np.asarray, half) if pair else (mean - np.asarray(half), mean + np.asarray(half))
        ax.fill_between(x, low, high, color=style["color"], alpha=0.2, lw=0, label=f"_band {name}")


def level(ax: Axes, y: float, name: str) -> None:
    """A thin dashed line at a known constant, with its name on it."""
    ax.axhline(y, color=INK, lw=1, ls=(0, (4, 3)), alpha=0.7, label="_" + name)
    ax.annotate(name, (0.99, y), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points",
                ha="right", va="bottom", fontsize=10, color=INK)  # fmt: skip


def label_ends(ax: Axes) -> None:
    """Write each line's name beyond its right end, joined to it by its colour, moved apart where names would touch.

    Call it after all lines, limits and scales are set.
    """
    low, high = ax.get_ylim()
    named = [ln for ln in ax.get_lines() if not ln.get_label().startswith("_") and np.isfinite(ln.get_ydata()).any()]
    ends = [np.asarray(ln.get_xydata())[np.isfinite(ln.get_ydata())][-1] for ln in named]
    heights = ax.transAxes.inverted().transform(ax.transData.transform(np.reshape(ends, (-1, 2))))[:, 1]
    gap = 13 / (72 * ax.figure.get_figheight() * 0.78)
    for ln, end, y, place in zip(named, ends, heights.clip(0, 1), spread(heights.clip(0, 1), gap)):
        ax.annotate("", (end[0], y), xytext=(1.05, place), xycoords=("data", "axes fraction"), textcoords=ax.transAxes,
                    arrowprops={"arrowstyle": "-", "color": ln.get_color(), "lw": 1, "shrinkA": 0, "shrinkB": 0})  # fmt: skip
        ax.annotate(ln.get_label(), (1.06, place), xycoords="axes fraction", va="center", color=INK)


def spread(targets: Sequence[float], gap: float) -> np.ndarray:
    """Places in [0, 1] that are at least `gap` apart, in the targets' order, as near to them as least squares allows."""
    order = np.argsort(targets, kind="stable")
    steps, n = gap * np.arange(len(order)), len(order)
    free = np.asarray(targets, dtype=float)[order] - steps
    pooled = [max(min(free[a : b + 1].mean() for b in range(i, n)) for a in range(i + 1)) for i in range(n)]
    places = np.empty(n)
    places[order] = np.clip(pooled, 0, max(0.0, 1 - gap * (n - 1))) + steps
    return places


def intervals(rows: Mapping[str, tuple[float, float]], *, levels: Mapping[str, float] | None = None, digits: int = 1,
              xlabel: str = "accuracy (%)", ax: Axes | None = None) -> Figure:  # fmt: skip
    """One row per method: its mean as a dot, its interval as a bar, both written at the right.

    Args:
        rows: (mean, half width of the interval) by name, in the order shown.
        levels: known constants by name, drawn as thin dashed lines.
        digits: decimals of the numbers written.
    """
    ax = ax or figure(height=0.9 + 0.3 * len(rows))[1]
    dots(ax, rows, digits)
    for name, x in (levels or {}).items():
        ax.axvline(x, color=INK, lw=1, ls=(0, (4, 3)), alpha=0.7, label="_" + name)
        ax.annotate(name, (x, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=10, color=INK)
    ax.set_xlabel(xlabel)
    return ax.figure


def dots(ax: Axes, rows: Mapping[str, tuple[float, float]], digits: int = 1) -> None:
    """The rows of `intervals` in given axes."""
    for i, (name, (mean, half)) in enumerate(rows.items()):
        ax.errorbar(mean, -i, xerr=half, fmt="o", ms=7, elinewidth=2.5, color=colour(name), label=name)
        written = f"{mean:.{digits}f} ± {half:.{digits}f}".replace("-", "−")
        ax.annotate(written, (1.02, -i), xycoords=("axes fraction", "data"), va="center", color=INK)
    ax.set_yticks([-i for i in range(len(rows))], list(rows))
    ax.set_ylim(0.6 - len(rows), 0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color=INK, alpha=0.15)


def image_grid(images: Any, columns: int, *, title: str = "", ax: Axes | None = None) -> Figure:
    """Characters, white on black, drawn as dark ink on light paper in either theme.

    Args:
        images: [n, 28, 28] or [n, 1, 28, 28] in [0, 1], row by row.
        columns: how many stand in one row.
        title: written above.

    Raises:
        ValueError: the images have another shape.
    """
    shape = np.shape(images)
    if len(shape) < 3 or shape[-2:] != (28, 28) or len(shape) == 4 and shape[1] != 1 or len(shape) > 4:
        raise ValueError(f"images must be of shape [n, 28, 28] or [n, 1, 28, 28], got {list(shape)}")
    rows = -(-len(images) // columns)
    ax = ax or figure(height=0.3 + 4.8 * rows / columns)[1]
    pictures(ax, np.reshape(images, (-1, 28, 28)), columns, title)
    return ax.figure


def pictures(ax: Axes, images: Any, columns: int, title: str = "") -> None:
    """The sheet of `image_grid` in given axes."""
    x = np.asarray(images, dtype=float).reshape(-1, 28, 28)
    rows = -(-len(x) // columns)
    sheet = np.full((rows * columns, 30, 30), 0.12)
    sheet[:, 1:-1, 1:-1] = 0
    sheet[: len(x), 1:-1, 1:-1] = x
    sheet = sheet.reshape(rows, columns, 30, 30).swapaxes(1, 2).reshape(rows * 30, columns * 30)
    ax.imshow(1 - sheet, cmap="gray", vmin=0, vmax=1, interpolation="none")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_title(title, loc="left", fontsize=10)
