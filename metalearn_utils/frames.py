"""`scrub`: precomputed frames under a slider, which moves on the static page without a server."""

import gzip
from collections.abc import Sequence

import ipywidgets as widgets
from IPython.display import display
from matplotlib.figure import Figure

from .plots import summary, svg

FRAMES, KILOBYTES = 25, 60


def scrub(frames: Sequence[Figure], name: str, values: Sequence[object], alt: str) -> None:
    """Show one of several figures, chosen by a slider (drag it, or use the arrow keys).

    Args:
        frames: figures of one size, at most 25 and 60 kB together when compressed.
        name: what the slider changes, e.g. "inner step".
        values: its value for each frame; shown in the frame's title.
        alt: what a reader who cannot see the frames needs to know.

    Raises:
        ValueError: no frames, too many or too large ones, or a different number of values.
    """
    pages = _pages(frames, name, values, alt)
    slider = widgets.IntSlider(min=0, max=len(pages) - 1, description=name, readout=len(set(values)) == len(values))
    slider.style.description_width, slider.layout.width = "initial", "100%"
    slider.readout = list(values) == list(range(len(values)))
    if hasattr(widgets, "Stack"):
        children = [widgets.HTML(page) for page in pages]
        shown = widgets.Stack(children, selected_index=0)
        widgets.jslink((slider, "value"), (shown, "selected_index"))
    else:  # ipywidgets 7: the live kernel switches frames
        shown = widgets.HTML(pages[0])
        slider.observe(lambda change: setattr(shown, "value", pages[change["new"]]), "value")
    print(_text(frames, name, values, alt))
    display(widgets.VBox([slider, shown]))


def _pages(frames: Sequence[Figure], name: str, values: Sequence[object], alt: str) -> list[str]:
    if not 1 <= len(frames) <= FRAMES:
        raise ValueError(f"frames must hold 1 to {FRAMES} figures, got {len(frames)}")
    if len(values) != len(frames):
        raise ValueError(f"values must hold one value for each of {len(frames)} frames, got {len(values)}")
    if not alt.strip():
        raise ValueError(f"alt must say what the frames show, got {alt!r}")
    pages = [
        f'<div class="fig">{svg(fig, f"{name} {value} of {alt[:12]}", f"{alt} Here: {name} {value}.")}</div>'
        for fig, value in zip(frames, values)
    ]
    size = len(gzip.compress("".join(pages).encode(), mtime=0)) / 1000
    if size > KILOBYTES:
        raise ValueError(f"frames must take at most {KILOBYTES} kB compressed, got {size:.0f}: draw fewer points")
    return pages


def _text(frames: Sequence[Figure], name: str, values: Sequence[object], alt: str) -> str:
    ends = [f"{name} {value}: {'; '.join(summary(fig))}" for fig, value in zip(frames, values)]
    return "\n".join([f"Move the slider ({name}).", alt, ends[0], ends[-1]])
