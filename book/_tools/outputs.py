"""Execute notebooks and store their outputs: `python book/_tools/outputs.py [NOTEBOOK ...]`, all by default."""

import hashlib
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

WIDGETS = "application/vnd.jupyter.widget-state+json"


def execute(path: Path) -> float:
    """Run a notebook top to bottom in a fresh kernel, in its own folder, and write it back; returns the seconds."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    start = time.perf_counter()
    client = NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": path.parent}})
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined([o for o in cell.outputs if o.get("name") != "stderr"])
            cell.metadata.pop("execution", None)
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.validate(notebook)
    store(path, same_every_time(notebook, path.stem))
    return time.perf_counter() - start


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """What was printed in one go as one output, however the kernel happened to split it."""
    found: list[nbformat.NotebookNode] = []
    for out in outputs:
        if found and out.output_type == found[-1].output_type == "stream":
            found[-1].text += out.text
        else:
            found.append(out)
    return found


def same_every_time(notebook: nbformat.NotebookNode, name: str) -> str:
    """The notebook as text, the widgets' random ids replaced by fixed ones, numbered as the widgets were made."""
    text = nbformat.writes(notebook)
    for number, model in enumerate(notebook.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})):
        text = text.replace(model, hashlib.sha256(f"{name} {number}".encode()).hexdigest()[:32])
    return nbformat.writes(nbformat.reads(text, as_version=4)) + "\n"


def store(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_suffix(".part")
    beside.write_text(text, "utf-8")
    beside.replace(path)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted(Path("book").rglob("*.ipynb"))):
        if ".ipynb_checkpoints" not in path.parts:
            print(f"{path}: {execute(path):.1f} s", flush=True)
