"""`scrub`: precomputed frames under a slider, which moves on the static page without a server."""

import gzip
from collections.abc import Sequence

import ipywidgets as widgets
from IPython.display import display
from matplotlib.figure import Figure

from .figures import bundle, framed, summary

FRAMES, KILOBYTES = 25, 60
VIEW = "application/vnd.jupyter.widget-view+json"


def scrub(frames: Sequence[Figure], name: str, values: Sequence[object], alt: str, title: str = "") -> None:
    """Show one of several figures, chosen by a slider: drag it, or focus it and use the arrow keys.

    Viewers without widgets, and the page without scripts, show the first frame. The text summary holds the end values
    of all frames.

    Args:
        frames: figures of one size and with the same axis limits; at most 25, and 60 kB together when compressed.
        name: what the slider changes, e.g. "inner step".
        values: its value for each frame, shown above it.
        alt: what a reader who cannot see the frames needs to know.
        title: what the frames show, in a sentence; it stands above each of them, before its value.

    Raises:
        ValueError: no frames, too many or too large ones, a different number of values, or a blank name or text.
    """
    captions = [f"{title} ({name} {value})" if title else f"{name} {value}" for value in values]
    pages = _pages(frames, name, values, alt, captions)
    box = _slider(pages, name)
    view = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
    first = bundle(frames[0], captions[0], _alt(alt, name, values[0]))
    text = "\n".join([*[title] * bool(title), _text(frames, name, values, alt)])
    display(first | {VIEW: view, "text/plain": text}, raw=True)
    display({"text/html": f"<noscript>{pages[0]}</noscript>", "text/plain": ""}, raw=True)


def _slider(pages: Sequence[str], name: str) -> widgets.VBox:
    slider = widgets.IntSlider(min=0, max=len(pages) - 1, description=name, readout=False)
    slider.style.description_width, slider.layout.width = "initial", "100%"
    wide = widgets.Layout(width="100%")
    if hasattr(widgets, "Stack"):
        shown = widgets.Stack([widgets.HTML(page, layout=wide) for page in pages], selected_index=0, layout=wide)
        widgets.jslink((slider, "value"), (shown, "selected_index"))
    else:  # ipywidgets 7: the live kernel switches frames
        shown = widgets.HTML(pages[0], layout=wide)
        slider.observe(lambda change: setattr(shown, "value", pages[change["new"]]), "value")
    return widgets.VBox([slider, shown], layout=wide)


def _pages(
    frames: Sequence[Figure], name: str, values: Sequence[object], alt: str, captions: Sequence[str]
) -> list[str]:
    if not 1 <= len(frames) <= FRAMES:
        raise ValueError(f"frames must hold 1 to {FRAMES} figures, got {len(frames)}")
    if len(values) != len(frames):
        raise ValueError(f"values must hold one value for each of {len(frames)} frames, got {len(values)}")
    for argument, text in (("name", name), ("alt", alt)):
        if not text.strip():
            raise ValueError(f"{argument} must say what the slider or its frames show, got {text!r}")
    pages = [framed(fig, text, _alt(alt, name, value)) for fig, text, value in zip(frames, captions, values)]
    size = len(gzip.compress("".join(pages).encode(), mtime=0)) / 1000
    if size > KILOBYTES:
        raise ValueError(f"frames must take at most {KILOBYTES} kB compressed, got {size:.0f}: draw fewer points")
    return pages


def _alt(alt: str, name: str, value: object) -> str:
    return f"{alt} Here: {name} {value}."


def _text(frames: Sequence[Figure], name: str, values: Sequence[object], alt: str) -> str:
    ends = [f"{name} {value}: {'; '.join(summary(fig))}" for fig, value in zip(frames, values)]
    return "\n".join([f"A slider ({name}).", alt, *ends])
