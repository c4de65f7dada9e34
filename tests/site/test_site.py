"""The built site, looked at by a browser: nothing missing, nothing from outside, nothing broken."""

import re

import pytest
from pages import PAGES, ROOT

KNOWN = ("Identifier 'THEBE_JS_URL' has already been declared", "Got invalid theme mode")
WRITTEN = [p for p in PAGES if p.startswith("book/") and not p.startswith("book/api/")]
NOTEBOOKS = [(ROOT / p).with_suffix(".ipynb") for p in WRITTEN]
MATHEMATICAL = [p for p, nb in zip(WRITTEN, NOTEBOOKS) if nb.exists() and "$" in nb.read_text("utf-8")]
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1440, "height": 900}


def visit(browser, address, page, theme="light", viewport=DESK):
    """Open a page; returns (tab, problems)."""
    tab = browser.new_page(viewport=viewport, color_scheme=theme)
    tab.add_init_script(f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}')")
    problems = []
    tab.on("console", lambda m: problems.append(f"{m.text} {m.location['url']}") if m.type == "error" else None)
    tab.on("pageerror", lambda e: problems.append(str(e)))
    tab.on("requestfailed", lambda r: problems.append(f"failed: {r.url}"))
    tab.on("response", lambda r: problems.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    tab.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else problems.append(f"outside: {r.url}"))
    tab.goto(f"{address}/{page}", wait_until="networkidle")
    return tab, [p for p in problems if not any(known in p for known in KNOWN)]


@pytest.mark.parametrize("page", PAGES)
def test_page_loads_without_a_failed_or_outside_request_and_a_clean_console(browser, address, page):
    tab, problems = visit(browser, address, page)
    tab.close()
    assert not problems


@pytest.mark.parametrize("page", MATHEMATICAL)
def test_mathematics_is_typeset(browser, address, page):
    tab, _ = visit(browser, address, page)
    tab.wait_for_selector("mjx-container", state="attached")
    text = tab.inner_text("article")
    tab.close()
    assert "$" not in re.sub(r"`[^`]*`", "", text) and "\\theta" not in text


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PHONE, {"width": 768, "height": 1024}, DESK], ids=["390", "768", "1440"])
@pytest.mark.parametrize("page", WRITTEN)
def test_nothing_overflows_and_figures_are_legible(browser, address, page, theme, viewport):
    tab, _ = visit(browser, address, page, theme, viewport)
    wide = tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    sizes = tab.evaluate(
        """() => [...document.querySelectorAll('.fig svg text')].filter(t => t.checkVisibility() && t.textContent.trim())
           .map(t => t.getBoundingClientRect().height).filter(h => h > 0)"""
    )
    ink = tab.evaluate(
        """() => [...document.querySelectorAll('.fig svg')].map(s => [getComputedStyle(s).color,
           getComputedStyle(document.body).backgroundColor])"""
    )
    tab.close()
    assert wide <= 1, f"the page is {wide} pixels too wide"
    assert all(size >= 8 for size in sizes), f"text of {min(sizes):.1f} pixels"
    assert all(contrast(*pair) > 4.5 for pair in ink)


def contrast(one: str, two: str) -> float:
    """WCAG contrast of two CSS colours."""
    def luminance(css: str) -> float:
        parts = [int(v) / 255 for v in re.findall(r"\d+", css)[:3]]
        r, g, b = (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", WRITTEN)
def test_every_picture_says_what_it_shows(browser, address, page):
    tab, _ = visit(browser, address, page)
    alts = tab.evaluate("[...document.querySelectorAll('article img')].map(i => i.alt)")
    labels = tab.evaluate("[...document.querySelectorAll('.fig svg')].map(s => s.getAttribute('aria-label') || '')")
    tab.close()
    assert all(alt.strip() and not re.search(r"\.(png|svg|jpg)$", alt) for alt in alts)
    assert all(len(label) > 20 for label in labels)


def test_search_finds_reptile(browser, address):
    tab, _ = visit(browser, address, "search.html?q=Reptile")
    tab.wait_for_selector("#search-results li", timeout=15000)
    found = tab.inner_text("#search-results")
    tab.close()
    assert "MAML from scratch" in found


def test_the_slider_moves_by_keyboard(browser, address):
    tab, _ = visit(browser, address, "book/05-practice/maml-from-scratch.html")
    tab.wait_for_selector(".jupyter-widgets .noUi-handle, .jupyter-widgets [role=slider]", timeout=20000)

    def frame() -> str:
        return tab.evaluate(
            """() => [...document.querySelectorAll('.jupyter-widgets .fig svg')].filter(s => s.checkVisibility())
               .map(s => s.getAttribute('aria-label')).join('|')"""
        )

    before = frame()
    tab.focus(".jupyter-widgets [role=slider]")
    tab.keyboard.press("ArrowRight")
    tab.wait_for_timeout(500)
    after = frame()
    tab.close()
    assert before.endswith("inner step 0.") and after.endswith("inner step 1.")


def test_contrast_tells_black_on_white_from_grey_on_grey():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") > 20
    assert contrast("rgb(120, 120, 120)", "rgb(128, 128, 128)") < 1.2
