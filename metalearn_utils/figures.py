"""A figure is one display bundle: theme-aware inline SVG, a PNG for viewers that strip HTML, and a text summary.

The SVG's ink is the page's own text colour (`currentColor`), its letters are text in the page's own font, and the same
figure always gives the same bytes. The summary holds the end values of what is drawn, which the tests compare.
"""

import base64
import hashlib
import html
import io
import re
from collections.abc import Iterator

import matplotlib
import numpy as np
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

INK = "#010203"  # stands for the page's text colour until the SVG is written
STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "mathtext.fontset": "dejavusans",
    "svg.fonttype": "none",
    "svg.hashsalt": "metalearn_utils",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
}


def show(fig: Figure, title: str, alt: str) -> None:
    """Display a figure.

    Args:
        fig: made by `plots.figure` or one of the functions that draw a whole figure.
        title: what the figure shows, as a sentence: its finding.
        alt: what a reader who cannot see it needs to know.

    Raises:
        ValueError: the title or the alternative text is blank.
    """
    display(bundle(fig, title, alt), raw=True)


def bundle(fig: Figure, title: str, alt: str) -> dict[str, str]:
    """The three forms of a figure: text/html, image/png (72 dpi) and text/plain."""
    for name, value in (("title", title), ("alt", alt)):
        if not value.strip():
            raise ValueError(f"{name} must say what the figure shows, got {value!r}")
    return {
        "text/html": framed(fig, title, alt),
        "image/png": _png(fig),
        "text/plain": "\n".join([title, alt, *summary(fig)]),
    }


def framed(fig: Figure, caption: str, alt: str) -> str:
    """The figure as HTML: its caption and below it the inline SVG."""
    return f'<figure class="fig" style="width:100%"><figcaption>{html.escape(caption)}</figcaption>{svg(fig, alt)}</figure>'


def svg(fig: Figure, alt: str) -> str:
    """The figure as inline SVG on one line, with role and label; ids derive from the content, so they never clash."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        _settle(fig)
        fig.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = _small(buffer.getvalue()[buffer.getvalue().index("<svg") :])
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{hashlib.sha256((text + alt).encode()).hexdigest()[:8]}-", text)
    return re.sub(r"<svg[^>]*>", lambda old: _root(old.group(), alt), text, count=1)


def _settle(fig: Figure) -> None:
    """Panel titles at the left, legends without a box; the layout computed once, so that every form has the same."""
    for ax in fig.axes:
        if legend := ax.get_legend():
            legend.set_frame_on(False)
        if text := ax.get_title(loc="center"):
            ax.set_title("", loc="center")
            ax.set_title(text, loc="left")
    if fig.get_layout_engine():
        fig.draw_without_rendering()
        fig.set_layout_engine("none")


def _root(tag: str, alt: str) -> str:
    box = re.search(r'viewBox="[^"]*"', tag).group()
    look = 'style="width:100%;max-width:34rem;height:auto;overflow:visible" fill="currentColor" stroke-linejoin="round"'
    font, space = 'font-family="system-ui,sans-serif"', 'xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg role="img" aria-label="{html.escape(alt)}" {box} {look} {font} {space}>'


def _small(text: str) -> str:
    """matplotlib's SVG without what a page does not need, in the page's ink and font, coordinates to 0.01 point."""
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"(?<=data:image/png;base64,)[^\"]+", lambda m: _shrunk(base64.b64decode(re.sub(r"\s", "", m[0]))), text)
    text = re.sub(r' (d|x|y|width|height|points)="([^"]*)"', lambda m: f' {m[1]}="{_round(m[2])}"', text)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m.group() if m[1] in used else "", text)
    text = re.sub(r"font: ([^;\"]*?)([\d.]+px) [^;\"]*", lambda m: f"{_font(m[1])}font-size: {m[2]}", text)
    text = re.sub(r" ?font-family: [^;\"]*;?|(?<=\") transform=\"rotate\(-0 [^\"]*\"", "", text)
    text = re.sub(r"\s*\n\s*", " ", re.sub(f"{INK}|#000000", "currentColor", text))
    return re.sub(r"(?<=>) (?=<)|<defs>\s*</defs>", "", text).strip()


def _round(numbers: str) -> str:
    return re.sub(r"-?\d+\.\d+", lambda m: f"{float(m.group()) + 0.0:.2f}".rstrip("0").rstrip("."), numbers)


def _font(words: str) -> str:
    slant = "font-style:italic;" if "italic" in words or "oblique" in words else ""
    weight = re.search(r"\b(bold|\d00)\b", words)
    return slant + (f"font-weight:{weight.group()};" if weight else "")


def _png(fig: Figure) -> str:
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png", dpi=72, facecolor="white")
    return _shrunk(drawn.getvalue())


def _shrunk(picture: bytes) -> str:
    """A PNG in base64; in 128 colours if nothing in it is transparent, chosen so that a thin line keeps its own."""
    image, buffer = Image.open(io.BytesIO(picture)).convert("RGBA"), io.BytesIO()
    opaque = image.getextrema()[3][0] == 255
    if opaque:
        image = image.convert("RGB").quantize(128, method=Image.Quantize.FASTOCTREE)
    image.save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def summary(fig: Figure) -> list[str]:
    """One line per curve, interval and picture, its end value to 3 digits: no figure can go stale unseen."""
    found = []
    for ax in fig.axes:
        panel = next((t + ", " for loc in ("left", "center") if (t := ax.get_title(loc=loc))), "")
        found += [(panel if len(fig.axes) > 1 else "") + reading for reading in _readings(ax)]
    return found


def _readings(ax: Axes) -> Iterator[str]:
    bars = [c for c in ax.containers if hasattr(c, "has_xerr")]
    parts = {part for c in bars for part in (c.lines[0], *c.lines[1])}
    bands = {c.get_label(): c for c in ax.collections if c.get_label().startswith("_band ")}
    for i, ln in enumerate(ln for ln in ax.get_lines() if ln not in parts and len(ln.get_ydata())):
        name = ln.get_label().lstrip("_")
        band = f" ({_ends(bands[f'_band {name}'])})" if f"_band {name}" in bands else ""
        yield f"{f'line {i + 1}' if name.startswith('child') else name}: {_digits(_end(ln))}{band}"
    yield from map(_interval, bars)
    for image in ax.images:
        height, width = image.get_array().shape[:2]
        yield f"picture of {width} x {height} points, mean {_digits(np.mean(image.get_array()))}"


def _end(ln: Line2D) -> float:
    """The last y, or the x of an upright line."""
    x, y = ln.get_data()
    return x[0] if len(set(x)) == 1 < len(x) else y[-1]


def _interval(bar: matplotlib.container.ErrorbarContainer) -> str:
    axis = 0 if bar.has_xerr else 1
    low, high = bar.lines[2][0].get_segments()[-1][:, axis]
    return f"{bar.get_label()}: {_digits(bar.lines[0].get_data()[axis][-1])} ({_digits(low)} to {_digits(high)})"


def _ends(band: matplotlib.collections.PolyCollection) -> str:
    points = band.get_paths()[0].vertices
    last = points[points[:, 0] == points[:, 0].max(), 1]
    return f"{_digits(last.min())} to {_digits(last.max())}"


def _digits(value: float) -> str:
    return f"{float(value) + 0.0:.3g}"
