"""The rules that every page keeps; each returns a list of faults, so that tests can plant some."""

import ast
import json
import re
from pathlib import Path
from typing import NamedTuple

from metalearn_utils.claims import check_claims

ROOT = Path(__file__).resolve().parents[2]
LONGEST, MEDIAN = 30, 8


class Kind(NamedTuple):
    """What a page of one kind must have: words in its headings, numbers of code cells, words of prose."""

    headings: tuple[str, ...]
    cells: tuple[int, int]
    words: tuple[int, int]


# A notebook names its kind in its metadata, {"book": {"kind": "short"}}; a page that names none is a "page".
KINDS = {
    "page": Kind(("question", "predict", "where it fails", "summary", "references"), (10, 20), (1500, 2800)),
    "short": Kind(("question", "summary", "references"), (5, 16), (600, 1700)),
    "questions": Kind(("summary", "references"), (8, 20), (1500, 3600)),
}
SETUP = '''# Setup: on Colab this installs the book's helper library; elsewhere it does nothing.
import sys
REPOSITORY = "{url}"
if "google.colab" in sys.modules:
    if "-your-account-" in REPOSITORY:
        print("This copy of the book has no repository address yet; run `make repository URL=...` first.")
    else:
        %pip install -q --no-deps "metalearn_utils @ git+{{REPOSITORY}}"'''


def kind(nb: dict) -> Kind:
    return KINDS[nb.get("metadata", {}).get("book", {}).get("kind", "page")]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code(nb: dict) -> list[dict]:
    return [c for c in nb["cells"] if c["cell_type"] == "code"]


def prose(nb: dict) -> str:
    return "\n\n".join(source(c) for c in nb["cells"] if c["cell_type"] == "markdown")


def printed(nb: dict) -> str:
    """All text that the notebook's cells printed or showed."""
    found = []
    for cell in code(nb):
        for out in cell.get("outputs", []):
            found += out.get("text", []) if out["output_type"] == "stream" else []
            found += out.get("data", {}).get("text/plain", [])
        found.append("\n" + source(cell) + "\n")
    return "".join(found)


def plain_markdown(nb: dict) -> list[str]:
    return [m.group() for m in re.finditer(r"^(?:```|:::)\{.*|\{(?:cite|ref|numref|eq|doc|math|term)[^}]*\}`", prose(nb), re.M)]


def shape(nb: dict) -> list[str]:
    heads = [h.lower() for h in re.findall(r"^##\s+(.*)", prose(nb), re.M)]
    faults = [f"no section heading with {w!r}" for w in kind(nb).headings if not any(w in h for h in heads)]
    first = source(nb["cells"][0])
    if not re.match(r"# .+\n\n\*[^*]+\*\n", first):
        faults.append("the first cell must be a title and a promise in italics")
    return faults + [f"the card lacks {w!r}" for w in ("**Time**", "**You need first**", "**Article**") if w not in first]


def sizes(nb: dict) -> list[str]:
    lengths = sorted(len(source(c).splitlines()) for c in code(nb) if "setup" not in c["metadata"].get("tags", []))
    words, faults = len(re.findall(r"\w+", prose(nb))), []
    wanted = kind(nb)
    if not wanted.cells[0] <= len(code(nb)) <= wanted.cells[1] + 2:
        faults.append(f"{len(code(nb))} code cells, wanted {wanted.cells}")
    if lengths[len(lengths) // 2] > MEDIAN or lengths[-1] > LONGEST:
        faults.append(f"cells of {lengths} lines: median at most {MEDIAN}, longest at most {LONGEST}")
    if not wanted.words[0] <= words <= wanted.words[1]:
        faults.append(f"{words} words of prose, wanted {wanted.words}")
    return faults


def setup(nb: dict, url: str) -> list[str]:
    return [] if source(code(nb)[0]) == SETUP.format(url=url) else ["the first code cell is not the setup cell"]


def executed(nb: dict) -> list[str]:
    faults = [f"cell {i} was not executed in order" for i, c in enumerate(code(nb), 1) if c.get("execution_count") != i]
    outs = [o for c in code(nb) for o in c.get("outputs", [])]
    return faults + ["an error is stored" for o in outs if o["output_type"] == "error"]


def claims(nb: dict) -> list[str]:
    return [fault for c in code(nb) for fault in check_claims(source(c))]


def semicolons(nb: dict) -> list[str]:
    return [source(c).splitlines()[-1] for c in code(nb) if source(c).rstrip().endswith(";")]


def paths(nb: dict) -> list[str]:
    return re.findall(r"(?<![\w:/.<])/(?:home|root|tmp|work|Users|mnt)/\S+", json.dumps(nb))


def figures(nb: dict) -> list[str]:
    faults = []
    for cell in code(nb):
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            html = "".join(data.get("text/html", ""))
            if "image/png" in data and 'aria-label="' not in html:
                faults.append("a figure without an alternative text")
    return faults + [m for m in re.findall(r"!\[\s*\]\(.*?\)", prose(nb))]


NUMBER = re.compile(r"(?<![\w.$\\^_{/-])-?\d+(?:,\d{3})*(?:\.\d+)?(?![\w/])")
CITED = re.compile(r"\]\(https?://")


def numbers(nb: dict) -> list[str]:
    """Figures in the prose that no output or code of the notebook holds and no citation supports."""
    shown = {float(n.replace(",", "")) for n in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", printed(nb))}
    faults = []
    for cell in nb["cells"][1:]:
        if cell["cell_type"] != "markdown" or "## References" in source(cell)[:40]:
            continue
        body = re.sub(r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`", " ", source(cell).split("## References")[0], flags=re.S)
        for sentence in re.split(r"(?<=[.?!])\s|\n", body):
            if not CITED.search(sentence):
                faults += [f"{n} in {sentence.strip()!r}" for n in unsupported(sentence, shown)]
    return faults


def unsupported(sentence: str, shown: set[float]) -> list[str]:
    found = []
    for match in NUMBER.finditer(sentence):
        value, text = abs(float(match.group().replace(",", ""))), match.group()
        counted = "." not in text and (value <= 12 or 1900 <= value <= 2100)
        digits = len(text.split(".")[1]) if "." in text else 0
        if not counted and not any(abs(round(s, digits) - value) < 1e-9 for s in shown):
            found.append(text)
    return found


def links(text: str, page: Path) -> list[str]:
    """Internal links of a page that lead nowhere."""
    faults = []
    for target in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        if not file.exists():
            faults.append(target)
        elif anchor and anchor not in anchors(file):
            faults.append(target)
    return faults


def anchors(file: Path) -> set[str]:
    text = prose(json.loads(file.read_text("utf-8"))) if file.suffix == ".ipynb" else file.read_text("utf-8")
    heads = re.findall(r"^#+\s+(.*)", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in heads}


def cited_addresses(text: str) -> set[str]:
    return set(re.findall(r"https://(?:arxiv\.org/abs/|doi\.org/)[^\s)>\]]+", text))


def bibliography(text: str) -> dict[str, str]:
    """Key -> address of every entry."""
    found = {}
    for key, body in re.findall(r"@\w+\{(\w+),(.*?)\n\}", text, re.S):
        doi, url = re.search(r"doi = \{(.*?)\}", body), re.search(r"url = \{(.*?)\}", body)
        found[key] = f"https://doi.org/{doi.group(1)}" if doi else url.group(1) if url else ""
    return found


def functions_too_long(text: str, limit: int = 30) -> list[str]:
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    return [n.name for n in nodes if body_lines(n) > limit]


def body_lines(node: ast.FunctionDef) -> int:
    """Lines of a function's body without its docstring."""
    first = node.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return node.end_lineno - (first.end_lineno if documented else first.lineno - 1)
