"""Figures: three forms, readable in both themes and by those who cannot see them, the same bytes each time."""

import base64
import itertools
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

from metalearn_utils import figures, frames, plots
from metalearn_utils.plots import INK, METHOD_COLOURS, bundle, curves, image_grid, intervals, label_ends, spread, summary

X = np.arange(3)
FORMS = {"text/html", "image/png", "text/plain"}


def drawn(end: float = 0.5):
    return curves(X, {"MAML": ([3.0, 1.0, end], [0.1, 0.1, 0.2]), "Reptile": [3.0, 2.0, 1.0]}, levels={"bound": 3.0057})


def dotted(mean: float = 77.1):
    return intervals({"MAML": (mean, 1.0), "pixels": (39.04, 0.8)}, levels={"guessing": 20.0})


def sheet(ink: float = 1.0):
    return image_grid(ink * torch.ones(3, 1, 28, 28), 2)


def html_of(fig) -> str:
    return bundle(fig, "It falls", "A line falls.")["text/html"]


def test_a_figure_has_three_forms():
    found = bundle(drawn(), "It falls", 'A "line" falls & stays.')
    assert set(found) == FORMS
    root = ElementTree.fromstring(re.search(r"<svg.*</svg>", found["text/html"]).group())
    assert root.get("role") == "img" and root.get("aria-label") == 'A "line" falls & stays.'
    assert found["text/html"].startswith('<figure class="fig"') and "<figcaption>It falls</figcaption>" in found["text/html"]
    assert base64.b64decode(found["image/png"]).startswith(b"\x89PNG")


def test_the_text_holds_title_alternative_and_end_values_to_three_digits():
    lines = bundle(drawn(), "It falls", "A line falls.")["text/plain"].splitlines()
    assert lines == ["It falls", "A line falls.", "MAML: 0.5 (0.3 to 0.7)", "Reptile: 1", "bound: 3.01"]
    assert summary(dotted()) == ["guessing: 20", "MAML: 77.1 (76.1 to 78.1)", "pixels: 39 (38.2 to 39.8)"]
    assert summary(sheet()) == ["picture of 60 x 60 points, mean 0.331"]  # (4 * 116 * 0.88 + 784) / 3600


@pytest.mark.parametrize(("one", "other"), [(drawn(), drawn(0.502)), (dotted(), dotted(77.2)), (sheet(), sheet(0.9))])
def test_the_text_changes_when_the_data_change(one, other):
    assert summary(one) != summary(other)


def test_a_changed_interval_or_an_unnamed_line_changes_the_text_too():
    narrow, wide = (curves(X, {"MAML": (X, half)}) for half in (0.1 + 0 * X, 0.2 + 0 * X))
    assert summary(narrow) != summary(wide)
    fig, ax = plots.figure()
    ax.plot(X, [1.0, 2.0, -0.0])
    assert summary(fig) == ["line 1: 0"]


def test_panels_are_told_apart_by_their_titles():
    fig, axes = plots.figure(2)
    for ax, end in zip(axes, (1.0, 2.0)):
        curves(X, {"MAML": [3.0, 2.0, end]}, ax=ax, title=f"K = {end:.0f}")
    assert summary(fig) == ["K = 1, MAML: 1", "K = 2, MAML: 2"]


def test_a_vertical_interval_is_read_along_y():
    fig, ax = plots.figure()
    ax.errorbar(X, [1.0, 2.0, 3.0], [0.1, 0.1, 0.5], label="MAML")
    assert summary(fig) == ["MAML: 3 (2.5 to 3.5)"]


@pytest.mark.parametrize("make", [drawn, dotted, sheet])
def test_a_figure_gives_the_same_bytes_each_time(make):
    fig = make()
    first = bundle(fig, "It falls", "A line falls.")
    assert first == bundle(fig, "It falls", "A line falls.") == bundle(make(), "It falls", "A line falls.")


@pytest.mark.parametrize("make", [drawn, dotted])
def test_ink_is_the_page_s_own_colour(make):
    html = html_of(make())
    assert 'fill="currentColor"' in html and "stroke: currentColor" in html
    used = set(re.findall(r"(?:fill|stroke): (#\w+)", html))
    assert used and used <= set(METHOD_COLOURS.values()) - {INK}


def test_black_set_by_hand_follows_the_theme_too():
    fig, ax = plots.figure()
    ax.plot(X, X, color="black")
    ax.set_xticks([0, 1], ["first", "second"])
    assert not re.search("#000000|black", html_of(fig)) and ">second</text>" in html_of(fig)


def test_nothing_in_a_figure_reaches_the_rest_of_the_page():
    html = html_of(drawn())
    assert "<style" not in html and "<script" not in html and not re.search(r'(?<!:xlink=")https?://', html)


def test_ids_are_used_and_unique_on_a_page():
    pages = [bundle(drawn(end), "It falls", alt)["text/html"] for end, alt in ((0.5, "One."), (0.4, "One."), (0.5, "Two."))]
    ids = [re.findall(r' id="([^"]+)"', page) for page in pages]
    assert all(ids) and len(set(itertools.chain(*ids))) == sum(map(len, ids))
    for page, names in zip(pages, ids):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) == set(names)


@pytest.mark.parametrize("title, alt, name", [(" ", "alt", "title"), ("title", "", "alt")])
def test_a_figure_without_words_is_refused(title, alt, name):
    with pytest.raises(ValueError, match=f"{name} must say what the figure shows"):
        bundle(drawn(), title, alt)


def test_show_displays_the_bundle(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", lambda data, raw: shown.append((data, raw)))
    plots.show(drawn(), "It falls", "A line falls.")
    assert shown == [(bundle(drawn(), "It falls", "A line falls."), True)]


def linear(colour: str) -> np.ndarray:
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(one: str, two: str) -> float:
    """WCAG 2.1: (L1 + 0.05) / (L2 + 0.05) with relative luminances L1 >= L2."""
    low, high = sorted(linear(c) @ [0.2126, 0.7152, 0.0722] for c in (one, two))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_the_one_of_the_standard():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("background", ["#ffffff", "#121212"])
@pytest.mark.parametrize("name", [n for n, c in METHOD_COLOURS.items() if c != INK])
def test_colours_stand_out_on_light_and_dark(name, background):
    assert contrast(METHOD_COLOURS[name], background) >= 3


SIGHT = {  # Machado et al. (2009), table 1, severity 1.0
    "full": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Ottosson (2020), from linear sRGB."""
    cones = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                      [0.0883024619, 0.2817188376, 0.6299787005]]) @ rgb  # fmt: skip
    return np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                     [0.0259040371, 0.7827717662, -0.8086757660]]) @ np.cbrt(cones.clip(0))  # fmt: skip


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("together", [
    ("MAML", "FOMAML", "Reptile", "joint training", "from scratch"),
    ("MAML", "prototypes", "pretrained", "from scratch", "feature reuse"),
])  # fmt: skip
def test_curves_drawn_together_differ_for_colour_blind_readers(together, sight):
    seen = {name: oklab(np.array(SIGHT[sight]) @ linear(METHOD_COLOURS[name])) for name in together}
    for one, two in itertools.combinations(together, 2):
        assert np.linalg.norm(seen[one] - seen[two]) > 0.1, (one, two)


def test_a_method_keeps_its_colour_whatever_follows_its_name():
    assert plots.colour("MAML, K = 5") == METHOD_COLOURS["MAML"] != plots.colour("FOMAML") == METHOD_COLOURS["FOMAML"]
    assert len(set(METHOD_COLOURS.values())) == len(METHOD_COLOURS)
    assert all(METHOD_COLOURS[name] in html_of(drawn()) for name in ("MAML", "Reptile"))


@pytest.mark.parametrize("targets", [[0.5, 0.5, 0.5], [0.0, 0.01, 0.02, 1.0], [0.9, 0.1], [1.0, 0.99, 0.98, 0.2, 0.21]])
def test_labels_keep_their_order_their_distance_and_the_frame(targets):
    places = spread(targets, 0.1)
    assert np.diff(np.sort(places)).min() >= 0.1 - 1e-12 and places.min() >= 0 and places.max() <= 1 + 1e-12
    assert list(np.argsort(places)) == list(np.argsort(targets, kind="stable"))


def test_labels_that_do_not_touch_stay_and_three_at_one_place_spread_evenly():
    assert np.allclose(spread([0.1, 0.5, 0.9], 0.1), [0.1, 0.5, 0.9])
    assert np.allclose(spread([0.5, 0.5, 0.5], 0.1), [0.4, 0.5, 0.6])


def test_a_curve_that_ends_in_nan_is_named_at_its_last_finite_point():
    fig, ax = plots.figure()
    plots.line(ax, X, [1.0, 2.0, np.nan], None, "MAML")
    plots.line(ax, X, [np.nan] * 3, None, "Reptile")
    label_ends(ax)
    assert ">MAML</text>" in html_of(fig) and "Reptile" not in html_of(fig)
    assert summary(fig) == ["MAML: nan", "Reptile: nan"]


def test_bands_may_be_half_widths_or_two_limits():
    half, limits = curves(X, {"MAML": (X, 1 + 0 * X)}), curves(X, {"MAML": (X, X - 1, X + 1)})
    assert summary(half) == summary(limits) == ["MAML: 2 (1 to 3)"]
    assert summary(curves(X, {"MAML": torch.tensor([1.0, 2.0, 4.0])})) == ["MAML: 4"]


def test_a_curve_of_another_length_is_refused():
    with pytest.raises(ValueError, match="'MAML' must have one value for each of 3 x, got shape"):
        curves(X, {"MAML": [1.0, 2.0]})


@pytest.mark.parametrize("shape", [(3, 28), (3, 27, 28), (3, 3, 28, 28), (1, 3, 1, 28, 28)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"got {list(shape)}")):
        image_grid(np.zeros(shape), 2)


def test_characters_are_drawn_dark_on_light_and_in_few_bytes():
    images = np.zeros((20, 28, 28))
    images[:, 4:24, 13:15] = 1
    fig = image_grid(images, 10)
    shown = fig.axes[0].images[0].get_array()
    assert shown.shape == (60, 300) and shown[10, 14] == 0 and shown[1, 1] == 1
    assert len(html_of(fig)) < 4000


def scrubbed(monkeypatch, values=range(2), **options):
    """The widget of a slider with two frames, its display bundle, and what a page without scripts shows."""
    shown, slider = [], frames._slider
    monkeypatch.setattr(frames, "display", lambda data, raw: shown.append(data))
    monkeypatch.setattr(frames, "_slider", lambda *pages: shown.append(slider(*pages)) or shown[0])
    frames.scrub([drawn(0.5), drawn(0.4)], "step", values, "A line falls.", **options)
    monkeypatch.setattr(frames, "_slider", slider)
    return shown


def test_scrub_links_a_slider_to_frames_that_say_where_they_are(monkeypatch):
    box, data, _ = scrubbed(monkeypatch, values=["0.01", "0.1"])
    slider, stack = box.children
    assert (slider.description, slider.max, stack.selected_index) == ("step", 1, 0)
    assert ["0.01" in p.value and 'aria-label="A line falls. Here: step 0.01."' in p.value for p in stack.children] == [True, False]
    assert data[frames.VIEW]["model_id"] == box.model_id and FORMS < set(data)


def test_scrub_s_text_holds_the_end_values_of_every_frame(monkeypatch):
    _, data, _ = scrubbed(monkeypatch)
    _, again, _ = scrubbed(monkeypatch)
    assert data["text/plain"] == again["text/plain"]
    ends = [f"step {i}: MAML: {e} ({e - 0.2:.1f} to {e + 0.2:.1f}); Reptile: 1; bound: 3.01" for i, e in ((0, 0.5), (1, 0.4))]
    assert data["text/plain"].splitlines() == ["A slider (step).", "A line falls.", *ends]


def test_a_title_stands_above_every_frame_and_in_the_text(monkeypatch):
    box, data, bare = scrubbed(monkeypatch, title="It falls")
    assert ["It falls (step 0)" in p.value for p in box.children[1].children] == [True, False]
    assert data["text/plain"].splitlines()[0] == "It falls"
    assert bare["text/html"].startswith("<noscript>") and "It falls (step 0)" in bare["text/html"]


def test_without_stack_the_live_kernel_switches_frames(monkeypatch):
    monkeypatch.delattr(frames.widgets, "Stack")  # ipywidgets 7 has none
    box, *_ = scrubbed(monkeypatch)
    slider, page = box.children
    first = page.value
    slider.value = 1
    assert page.value != first and "step 0" in first and "step 1" in page.value


def noisy():
    fig, ax = plots.figure()
    ax.plot(*np.random.default_rng(0).normal(size=(2, 20000)))
    return fig


@pytest.mark.parametrize(
    ("figures_", "options", "message"),
    [
        ([], {}, "frames must hold 1 to 25 figures, got 0"),
        ([drawn()] * 26, {"values": range(26)}, "frames must hold 1 to 25 figures, got 26"),
        ([drawn()] * 2, {"values": range(3)}, "one value for each of 2 frames, got 3"),
        ([drawn()] * 2, {"alt": " "}, "alt must say"),
        ([drawn()] * 2, {"name": ""}, "name must say"),
        ([noisy()], {"values": [0]}, "at most 60 kB compressed, got"),
    ],
)
def test_scrub_refuses_what_a_page_cannot_carry(figures_, options, message):
    arguments = {"name": "step", "values": range(2), "alt": "A line falls."} | options
    with pytest.raises(ValueError, match=message):
        frames.scrub(figures_, **arguments)
