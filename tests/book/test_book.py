"""Every page keeps the book's rules, and every rule catches a planted fault."""

import copy
import json
import re
import statistics
from pathlib import Path

import ast
import pytest
import rules
from rules import ROOT

NOTEBOOKS = sorted(p for p in (ROOT / "book").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PAGES = sorted([*NOTEBOOKS, *(ROOT / "book").rglob("*.md")])
PAGES = [p for p in PAGES if "_vendor" not in p.parts and "api" not in p.relative_to(ROOT / "book").parts[:-1]]
URL = re.search(r"^  url: (\S+)$", (ROOT / "_config.yml").read_text("utf-8"), re.M).group(1)
RULES = ("plain_markdown", "shape", "sizes", "executed", "claims", "semicolons", "paths", "figures", "numbers")


def load(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def text(path: Path) -> str:
    return rules.prose(load(path)) if path.suffix == ".ipynb" else path.read_text("utf-8")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_keeps_the_rule(path, rule):
    assert getattr(rules, rule)(load(path)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_setup_cell_is_the_same_everywhere_with_the_address_of_the_configuration(path):
    assert rules.setup(load(path), URL) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_internal_links_lead_somewhere(path):
    assert rules.links(text(path), path) == []


@pytest.mark.parametrize("path", [ROOT / n for n in ("pyproject.toml", "CITATION.cff")], ids=lambda p: p.name)
def test_the_address_stands_in_one_place_and_all_others_agree(path):
    assert re.findall(r"https://github\.com/[\w.-]+/learning-to-optimize", path.read_text("utf-8")) == [URL]


def test_cited_works_and_bibliography_match_both_ways():
    entries = rules.bibliography((ROOT / "book/references.bib").read_text("utf-8"))
    assert all(entries.values()), "every entry has a doi or an address"
    linked = set().union(*(rules.cited_addresses(text(p)) for p in PAGES))
    keys = {k.strip() for p in PAGES for group in re.findall(r"\{cite\}`([^`]+)`", text(p)) for k in group.split(",")}
    assert linked <= set(entries.values())
    assert keys <= set(entries)
    assert {k for k, address in entries.items() if k in keys or address in linked} == set(entries)


def test_functions_of_the_library_are_short_and_modules_are_read_in_one_sitting():
    lengths = []
    for path in sorted((ROOT / "metalearn_utils").rglob("*.py")):
        source = path.read_text("utf-8")
        assert rules.functions_too_long(source) == [], path
        lengths += [rules.body_lines(n) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    assert statistics.median(lengths) <= 8


BAD = {
    "plain_markdown": ("markdown", "```{note}\nhello\n```"),
    "claims": ("code", 'claim("{m} is best", lambda m: True, m=m)'),
    "semicolons": ("code", "plot();"),
    "paths": ("code", 'open("/home/somebody/data")'),
    "numbers": ("markdown", "MAML reaches 91.7 % here."),
    "figures": ("markdown", "![](picture.png)"),
    "sizes": ("code", "\n".join(["x = 1"] * 31)),
}


@pytest.mark.parametrize("rule", BAD)
def test_a_planted_fault_is_caught(rule):
    notebook = {"cells": [{"cell_type": "markdown", "source": ["# T\n\n*p*\n"], "metadata": {}}]}
    notebook["cells"] += [{"cell_type": "code", "source": ["x = 1"], "metadata": {}, "outputs": []}] * 12
    clean = set(getattr(rules, rule)(notebook))
    kind, source = BAD[rule]
    faulty = copy.deepcopy(notebook)
    faulty["cells"].append({"cell_type": kind, "source": [source], "metadata": {}, "outputs": []})
    assert set(getattr(rules, rule)(faulty)) - clean


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_faults_planted_in_a_real_page_are_caught(path):
    notebook = load(path)
    faulty = copy.deepcopy(notebook)
    faulty["cells"] = [c for c in faulty["cells"] if "## References" not in rules.source(c)]
    rules.code(faulty)[0]["source"] = ["import sys"]
    rules.code(faulty)[3]["execution_count"] = None
    assert rules.shape(faulty) and rules.setup(faulty, URL) and rules.executed(faulty)


def test_dead_links_are_caught():
    page = ROOT / "book" / "index.md"
    assert rules.links("[a](nowhere.md) [b](notation.md#no-such-heading)", page) == ["nowhere.md", "notation.md#no-such-heading"]
