"""Claims, settings and figures: what the notebooks use to speak."""

import re

import pytest

from metalearn_utils import claim, figures, frames, plots
from metalearn_utils import settings as settings_module
from metalearn_utils.claims import ClaimError, check_claims


@pytest.fixture
def fresh(monkeypatch):
    """Settings read anew, before and after."""
    import sys

    module = sys.modules["metalearn_utils.settings"]
    module.settings_now.cache_clear()
    for name in ("METALEARN_MODE", "METALEARN_CUT"):
        monkeypatch.delenv(name, raising=False)
    yield module
    module.settings_now.cache_clear()


def test_a_true_claim_is_printed_with_its_figures(fresh, capsys):
    claim("MAML {m:.1f} beats {p:.1f}", lambda m, p: m > p, m=77.12, p=39.0)
    assert capsys.readouterr().out == "✓ MAML 77.1 beats 39.0\n"


def test_a_false_claim_raises_in_the_verified_configuration(fresh):
    with pytest.raises(ClaimError, match="MAML 30.0 beats 39.0"):
        claim("MAML {m:.1f} beats {p:.1f}", lambda m, p: m > p, m=30.0, p=39.0)


def test_a_false_claim_warns_in_full_mode(fresh, monkeypatch):
    monkeypatch.setenv("METALEARN_MODE", "full")
    with pytest.warns(UserWarning, match="does not hold here"):
        claim("MAML {m:.1f} beats {p:.1f}", lambda m, p: m > p, m=30.0, p=39.0)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ('claim("{m}", lambda m: True, m=m)', "compares nothing"),
        ('claim("{m}", lambda m: m > 1, m=77.1)', "typed by hand"),
        ('claim("{m}", lambda m: 2 > 1, m=m)', "uses none"),
        ('claim("better", lambda m, p: m > 1, m=m, p=p)', "neither in the sentence"),
        ('claim("{m}", test, m=m)', "lambda"),
    ],
)
def test_claims_that_cannot_fail_are_found(source, fault):
    assert any(fault in found for found in check_claims(source))
    assert check_claims('claim("{m:.1f}", lambda m: m > 1, m=score.mean)') == []


def test_settings_refuse_an_unknown_mode(fresh, monkeypatch):
    monkeypatch.setenv("METALEARN_MODE", "fast")
    with pytest.raises(ValueError, match="METALEARN_MODE must be 'quick' or 'full', got 'fast'"):
        settings_module()


def test_settings_cut_every_count(fresh, monkeypatch):
    monkeypatch.setenv("METALEARN_MODE", "full")
    monkeypatch.setenv("METALEARN_CUT", "2")
    assert settings_module().count(1500, 70000) == 2


def drawn(end: float = 0.5):
    fig, ax = plots.figure()
    plots.line(ax, range(3), [3.0, 1.0, end], [0.1, 0.1, 0.1], "MAML")
    plots.level(ax, 3.0, "bound")
    plots.label_ends(ax)
    return fig


def test_a_figure_has_three_forms_and_its_text_follows_the_data():
    found = figures.bundle(drawn(), "It falls", "A line falls.")
    assert set(found) == {"text/html", "image/png", "text/plain"}
    assert found["text/plain"].splitlines() == ["It falls", "A line falls.", "MAML: 0.5 (0.4 to 0.6)", "bound: 3"]
    assert figures.bundle(drawn(0.25), "It falls", "A line falls.")["text/plain"] != found["text/plain"]


def test_a_dot_plot_reports_its_means():
    fig, ax = plots.figure()
    plots.dots(ax, {"MAML": (77.1, 1.0), "pixels": (39.0, 0.8)})
    assert figures.summary(fig) == ["MAML: 77.1 (76.1 to 78.1)", "pixels: 39 (38.2 to 39.8)"]


def test_a_figure_is_the_same_bytes_each_time_and_uses_the_page_s_ink():
    first, second = (figures.bundle(drawn(), "It falls", "A line falls.") for _ in range(2))
    assert first == second
    assert "currentColor" in first["text/html"] and plots.INK not in first["text/html"]
    assert 'role="img" aria-label="A line falls."' in first["text/html"]


def test_ids_of_two_figures_do_not_clash():
    one, two = (set(re.findall(r'id="([^"]+)"', figures.svg(drawn(), t))) for t in ("One", "Two"))
    assert one and not one & two


def test_a_figure_without_words_is_refused():
    with pytest.raises(ValueError, match="alt must say what the figure shows"):
        figures.bundle(drawn(), "title", " ")


@pytest.mark.parametrize("background", ["#ffffff", "#121212"])
def test_colours_stand_out_on_light_and_dark(background):
    def luminance(colour: str) -> float:
        r, g, b = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        r, g, b = (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in (r, g, b))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for colour in set(plots.METHOD_COLOURS.values()) - {plots.INK}:
        low, high = sorted((luminance(colour), luminance(background)))
        assert (high + 0.05) / (low + 0.05) >= 3, colour


def test_scrub_refuses_too_many_frames_and_unequal_values():
    with pytest.raises(ValueError, match="1 to 25 figures, got 26"):
        frames.scrub([drawn()] * 26, "step", range(26), "alt")
    with pytest.raises(ValueError, match="one value for each of 2 frames, got 3"):
        frames.scrub([drawn()] * 2, "step", range(3), "alt")


def test_scrub_without_stack_lets_the_kernel_switch(monkeypatch):
    monkeypatch.delattr(frames.widgets, "Stack")
    slider, shown = frames._slider(["first", "second"], "step").children
    assert shown.value == "first"
    slider.value = 1
    assert shown.value == "second"
