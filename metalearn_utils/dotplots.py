"""Groups of methods as one row each: mean, interval and a second mark, the numbers written beside them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plots import INK, colour, figure


class Bar(NamedTuple):
    """One row.

    Attributes:
        name: of the method.
        mean: where it stands; a mean that is not finite is written "diverges".
        half: half the width of its interval.
        tick: a second value, drawn as an upright tick; None for none.
        strong: whether the row is set off: a diamond, its name in bold.
    """

    name: str
    mean: float
    half: float
    tick: float | None = None
    strong: bool = False


def dot_groups(
    groups: Mapping[str, Sequence[Bar]], *, xlabel: str = "", ax: Axes | None = None, **limits: Any
) -> Figure:
    """The bars of each group below its heading; groups without bars are left out.

    Args:
        groups: bars by heading, in the order shown.
        limits: further properties of the axes, e.g. xscale="log".

    Raises:
        ValueError: no group has a bar.
    """
    rows = [row for heading, bars in groups.items() if bars for row in (heading, *bars)]
    if not rows:
        raise ValueError(f"groups must hold at least one bar, got {dict(groups)!r}")
    ax = ax or figure(height=0.8 + 0.25 * len(rows), width=4.8)[1]
    ax.set(xlabel=xlabel, **limits)
    for i, row in enumerate(rows):
        _heading(ax, -i, row) if isinstance(row, str) else _bar(ax, -i, row)
    _names(ax, rows)
    return ax.figure


def _heading(ax: Axes, y: float, text: str) -> None:
    ax.annotate(text, (0, y), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=INK, style="italic")


def _bar(ax: Axes, y: float, bar: Bar) -> None:
    shade, written = colour(bar.name), "diverges"
    if bar.tick is not None and math.isfinite(bar.tick):
        ax.plot([bar.tick] * 2, [y - 0.3, y + 0.3], color=shade, lw=1.5, label=f"_{bar.name}, tick")
    if math.isfinite(bar.mean):
        half, shape = bar.half if math.isfinite(bar.half) else 0.0, "D" if bar.strong else "o"
        ax.errorbar(bar.mean, y, xerr=half, fmt=shape, ms=6, elinewidth=2.5, color=shade, label=bar.name)
        written = f"{bar.mean:.4g} ± {bar.half:.3g}".replace("-", "−")
    ax.annotate(written, (1.02, y), xycoords=("axes fraction", "data"), va="center", color=INK)


def _names(ax: Axes, rows: Sequence[str | Bar]) -> None:
    """The methods' names at the left; no axis line, for the rows have no order in y."""
    named = [(-i, row) for i, row in enumerate(rows) if not isinstance(row, str)]
    ax.set_yticks([y for y, _ in named], [bar.name for _, bar in named])
    for text, (_, bar) in zip(ax.get_yticklabels(), named):
        text.set_fontweight("bold" if bar.strong else "normal")
    ax.set_ylim(0.6 - len(rows), 0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color=INK, alpha=0.15)
